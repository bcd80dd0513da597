"""Damage images, and count how many are reported and how many are visibly damaged but not reported.

    python -m bench.mutations                          2,000 images; tables by format and by kind of damage
    python -m bench.mutations --count 200 --folder out     keep them in a folder for inspection

Photographs are encoded as JPEG, PNG and WebP, damaged as a seed determines (lib/damage.py) and opened with
`--skip-corrupt`. The decoded pixels of those not skipped are compared with the undamaged image's. Damage is visible if
the mean absolute difference over a block of 16 x 16 pixels is 16 of 255 or more, or if the size differs.

The exit code is 1 if a visibly damaged image was not reported.
"""

import io
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from bench.lib import command_line
from bench.lib.damage import damage_bytes
from bench.lib.record import markdown_table
from fastofa.data.decode import read_image
from fastofa.data.open import open_dataset
from fastofa.system.errors import BadInput

BLOCK, VISIBLE = 16, 16.0  # pixels per side; levels of 255, averaged over a block
LISTED = 20
OUTCOMES = ("refused", "same pixels", "invisible", "visible, not reported")


@dataclass(frozen=True)
class Form:
    suffix: str
    options: dict[str, Any] = field(default_factory=dict)
    mode: str = "RGB"


FORMS = {
    "JPEG": Form(".jpg", {"quality": 90}),
    "JPEG 4:4:4": Form(".jpg", {"quality": 95, "subsampling": 0}),
    "JPEG progressive": Form(".jpg", {"quality": 75, "progressive": True}),
    "JPEG restarts": Form(".jpg", {"quality": 85, "restart_marker_rows": 1}),
    "JPEG grey": Form(".jpg", {"quality": 85}, "L"),
    "PNG": Form(".png"),
    "PNG palette": Form(".png", mode="P"),
    "WebP": Form(".webp", {"quality": 85}),
    "WebP lossless": Form(".webp", {"lossless": True}),
}


def encoded(pixels: np.ndarray, form: str) -> bytes:
    """uint8 [H, W, 3] as a file of one of the FORMS."""
    file, wanted = io.BytesIO(), FORMS[form]
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[wanted.suffix]
    Image.fromarray(pixels).convert(wanted.mode).save(file, kind, **wanted.options)
    return file.getvalue()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest mean absolute difference over a block of two images [3, H, W]; infinite if sizes differ."""
    if a.shape != b.shape:
        return np.inf
    error = np.abs(a.astype(int) - b.astype(int)).mean(axis=0)
    rows, columns = (range(0, side, BLOCK) for side in error.shape)
    return max(float(error[y : y + BLOCK, x : x + BLOCK].mean()) for y in rows for x in columns)


@dataclass(frozen=True)
class Case:
    name: str
    form: str
    kind: str
    """Kind of damage."""
    pixels: np.ndarray
    """uint8 [H, W, 3], before it was encoded."""


def write_cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Write FOLDER/train/a/NUMBER.SUFFIX, each a part of a photograph, encoded, then damaged."""
    photos, cases = load_sample_images().images, []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        height, width = rng.integers(64, 225, 2)
        photo = photos[number % len(photos)]
        top, left = (rng.integers(0, side - length) for side, length in zip(photo.shape, (height, width), strict=False))
        pixels = photo[top : top + height, left : left + width]
        form = [*FORMS][number % len(FORMS)]
        kind, data = damage_bytes(encoded(pixels, form), seed + number)
        case = Case(f"a/{number:05d}{FORMS[form].suffix}", form, kind, pixels)
        (folder / "train/a").mkdir(parents=True, exist_ok=True)
        (folder / "train" / case.name).write_bytes(data)
        cases.append(case)
    return cases


def outcomes(folder: Path, cases: Sequence[Case]) -> list[tuple[str, float]]:
    """For each case, one of OUTCOMES and the difference from the undamaged pixels."""
    dataset = open_dataset(str(folder), skip_corrupt=True)
    kept = {name: i for i, name in enumerate(dataset.names)}
    found = []
    with tempfile.TemporaryDirectory() as place:
        for done, case in enumerate(cases, start=1):
            if done % 200 == 0:
                print(f"compared {done:,} of {len(cases):,}", flush=True)
            whole = Path(place, f"whole{FORMS[case.form].suffix}")
            whole.write_bytes(encoded(case.pixels, case.form))
            try:
                image = dataset.read(kept[case.name]).numpy()
            except (KeyError, BadInput):  # left out, or refused when it is read
                found.append((OUTCOMES[0], 0.0))
                continue
            level = difference(image, read_image(whole).numpy())
            found.append((OUTCOMES[3] if level >= VISIBLE else OUTCOMES[2] if level else OUTCOMES[1], level))
    return found


def table(title: str, groups: Sequence[str], found: Sequence[tuple[str, float]]) -> str:
    rows = []
    for group in [*dict.fromkeys(groups), "all"]:
        counts = Counter(outcome for of, (outcome, _) in zip(groups, found, strict=True) if group in (of, "all"))
        rows.append([group, *(f"{counts[outcome]:,}" for outcome in OUTCOMES), f"{counts.total():,}"])
    return markdown_table([title, *OUTCOMES, "all"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__doc__, out=None)
    parser.add_argument("--count", type=int, default=2000, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="new folder in which to keep the images; by default they are removed"
    )
    args = parser.parse_args(argv)
    if args.folder is not None:
        args.folder.mkdir(parents=True)
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases = write_cases(folder, args.count, args.seed)
        print(f"wrote {len(cases):,} damaged images", flush=True)
        found = outcomes(folder, cases)
    print(f"\n{table('format', [case.form for case in cases], found)}")
    print(f"\n{table('damage', [case.kind for case in cases], found)}")
    silent = [(case, level) for case, (outcome, level) in zip(cases, found, strict=True) if outcome == OUTCOMES[3]]
    if silent:
        print(f"\n{len(silent)} visibly damaged images were not reported; the first ones:")
        for case, level in silent[:LISTED]:
            print(f"{case.name}  {case.form}, {case.kind}: {level:.0f} of 255")
    return int(bool(silent))


if __name__ == "__main__":
    sys.exit(main())
