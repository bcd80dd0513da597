"""The command line that every benchmark has."""

import argparse
from pathlib import Path

from bench.lib.record import RESULTS


def parser(description: str | None, out: Path | None = RESULTS) -> argparse.ArgumentParser:
    """Shows a module's docstring as it is; `out` is the default of --out, None for a command that writes no record."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if out is not None:
        found.add_argument("--out", type=Path, default=out, help="folder of the record")
    return found
