"""Draw the benchmarks' charts from their records: docs/ladder.png and docs/loaders.png.

    python -m bench.plot                               from bench/results to docs
    python -m bench.plot --records FOLDER --out FOLDER

Each chart is drawn from the GPU's record if there is one, otherwise from the CPU's.
"""

from pathlib import Path

from bench.lib import command_line
from bench.lib.record import RESULTS, read_record
from bench.plots import ladder, loaders

DOCS = Path(__file__).parent.parent / "docs"
CHARTS = {"ladder.png": ("train", ladder.draw), "loaders.png": ("loaders", loaders.draw)}


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__, out=None)
    parser.add_argument("--records", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the charts")
    args = parser.parse_args(argv)
    for name, (kind, draw) in CHARTS.items():
        places = [args.records / file for file in (f"gpu/{kind}_gpu.json", f"{kind}_gpu.json", f"{kind}_cpu.json")]
        source = next((path for path in places if path.exists()), None)
        if source is None:
            print(f"{name}: expected one of {', '.join(map(str, places))}, found none")
            continue
        draw(read_record(source), args.out / name)
        print(f"{args.out / name} from {source}")


if __name__ == "__main__":
    main()
