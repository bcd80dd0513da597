"""Benchmarks: each a command, `python -m bench.NAME`, that measures beside a baseline and writes bench/results/."""

import os

# Before torch is imported, as in fastofa.cli: how long threads spin for each other before they sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
