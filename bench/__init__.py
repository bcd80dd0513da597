"""Benchmarks. Each file is a command, `python -m bench.NAME`, that measures against a baseline and writes a record.

Records are in bench/results/, shared code is in bench/lib/, what bench_kernels compares is in bench/kernel_cases/, and
the code of the charts is in bench/plots/.
"""

import os

# Before torch is imported, as in fastofa.cli: how long idle threads spin before they sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
