"""Records (a result with machine, versions, commit and command), and tables for the terminal."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from fastofa.system.environment import environment

RESULTS = Path(__file__).parent.parent / "results"


def write_record(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write FOLDER/NAME.json: the result, its machine, date, commit and command."""
    folder.mkdir(parents=True, exist_ok=True)
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    made = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        **environment(),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"result": result, "environment": made}, indent=2) + "\n")
    print(f"{os.path.relpath(path)} written")
    return path


def read_record(path: Path) -> dict[str, Any]:
    """The contents of a record from `write_record`: {"result": ..., "environment": ...}."""
    return json.loads(path.read_text())


def commit() -> str:
    """The commit of this checkout; without git, the value of FASTOFA_COMMIT."""
    try:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    return found or os.environ.get("FASTOFA_COMMIT", "unknown")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose columns also line up in a terminal; the first `left` columns are text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
