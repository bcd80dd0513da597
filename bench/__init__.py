"""Benchmarks: each a command, `python -m bench.NAME`, that measures beside a baseline and writes bench/results/."""

import os

# Before torch is imported, as in fastofa.cli: threads that spin for each other are slow where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
