"""The charts of the docs, drawn from records by `python -m bench.plot`."""
