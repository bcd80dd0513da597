"""The benchmarks' pictures, from their records: docs/ladder.png and docs/loaders.png.

python -m bench.plot                     from bench/results: of each the GPU's record where there is one, else the CPU's
python -m bench.plot RECORDS PICTURES    folders of your own
"""

import sys
from pathlib import Path

from bench import plot_ladder, plot_loaders
from bench.record import RESULTS, read_record

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = {"ladder.png": ("train", plot_ladder.draw), "loaders.png": ("loaders", plot_loaders.draw)}


def main(argv: list[str]) -> None:
    records, pictures = map(Path, argv or (RESULTS, DOCS))
    for name, (kind, draw) in PICTURES.items():
        places = (records / "gpu" / f"{kind}_gpu.json", records / f"{kind}_gpu.json", records / f"{kind}_cpu.json")
        source = next((path for path in places if path.exists()), None)
        if source is None:
            print(f"{name}: expected one of {', '.join(map(str, places))}, found none")
            continue
        draw(read_record(source), pictures / name)
        print(f"{pictures / name} from {source}")


if __name__ == "__main__":
    main(sys.argv[1:])
