"""A number with what it needs to be believed: machine, versions, commit, command."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from fastofa.environment import environment

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, result: dict[str, Any]) -> None:
    """bench/results/NAME.json, also printed."""
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    made = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        **environment(),
    }
    text = json.dumps({"result": result, "environment": made}, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    print(text, end="")
