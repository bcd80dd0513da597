"""Benchmarks: each file here is a command, `python -m bench.NAME`, that measures beside a baseline and writes a record.

Records are in bench/results/, what the benchmarks share in bench/lib/, their charts in bench/plots/.
"""

import os

# Before torch is imported, as in fastofa.cli: how long idle threads spin before they sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
