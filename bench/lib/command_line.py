"""The command line common to all benchmarks."""

import argparse
from pathlib import Path

from bench.lib.record import RESULTS


def parser(description: str | None, out: Path | None = RESULTS) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring unchanged; `out` is the default of --out, None if there is no record."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if out is not None:
        found.add_argument("--out", type=Path, default=out, help="folder of the record")
    return found
