"""Run the demo and record its results with machine and versions: the first table of the README.

python -m bench.demo            writes bench/results/demo.json and docs/demo-curves.png
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

from bench.lib import command_line
from bench.lib.record import write_record
from fastofa.commands.demo import demo

CHART = Path(__file__).parent.parent / "docs" / "demo-curves.png"


def main() -> None:
    args = command_line.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = demo(Path(folder) / "demo")
        CHART.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / "demo" / "curves.png", CHART)
    write_record("demo", {name: dataclasses.asdict(result) for name, result in results.items()}, args.out)


if __name__ == "__main__":
    main()
