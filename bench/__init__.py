"""Benchmarks: each file here is a command, `python -m bench.NAME`, that measures beside a baseline and writes a record
to bench/results/. What they share is in bench/lib/, their charts are in bench/plots/.
"""

import os

# Before torch is imported, as in fastofa.cli: how long threads spin for each other before they sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
