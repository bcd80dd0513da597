"""The demo, with its machine and versions: what the README's table shows.

python -m bench.demo            writes bench/results/demo.json and docs/demo-curves.png
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

from bench.record import write_record
from fastofa.commands.demo import demo

PICTURE = Path(__file__).parent.parent / "docs" / "demo-curves.png"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = demo(Path(folder) / "demo")
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / "demo" / "curves.png", PICTURE)
    write_record("demo", {name: dataclasses.asdict(result) for name, result in results.items()})


if __name__ == "__main__":
    main()
