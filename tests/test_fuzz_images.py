"""Damaged images: skipped ones are reported, and the others have the pixels they had before.

Each case is a seed; a failure lists the seeds, and `damage_bytes(data, seed)` makes the same file again.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from bench.lib.damage import damage_bytes
from bench.mutations import FORMS, VISIBLE, difference, encoded
from damage import complaint, refused
from fastofa.data.decode import read_image
from fastofa.data.open import open_dataset

SEEDS = 40
# Damage that makes another valid image: JPEG and WebP have no checksums, and no decoder reports it. A seed whose level
# is near the limit is among them.
UNREPORTED = {
    "JPEG": {2, 4, 8, 18, 21, 24, 25},
    "JPEG progressive": {2, 16},
    "JPEG restarts": {2, 5, 17, 21, 25},
    "JPEG grey": {24, 30},
    "WebP lossless": {5, 10, 13, 16, 17, 18, 20, 21, 24, 31, 38},
}


@pytest.mark.parametrize("form", FORMS)
def test_damaged_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str):
    """In a folder that is opened with skip_corrupt; and read one by one."""
    photo = load_sample_images().images[0][90:250, 260:452]
    data, folder = encoded(photo, form), tmp_path / "data/train/a"
    folder.mkdir(parents=True)
    suffix = FORMS[form].suffix
    (folder / f"whole{suffix}").write_bytes(data)
    kinds = {}
    for seed in range(SEEDS):
        kinds[f"a/{seed:02d}{suffix}"], damaged = damage_bytes(data, seed)
        (folder / f"{seed:02d}{suffix}").write_bytes(damaged)
    expected = read_image(folder / f"whole{suffix}").numpy()

    dataset = open_dataset(str(tmp_path / "data"), skip_corrupt=True)
    said = capsys.readouterr().err + "\n".join(dataset.skipped)
    kept = {name: i for i, name in enumerate(dataset.names)}
    assert f"a/whole{suffix}" in kept
    wrong = []
    for name, kind in kinds.items():
        path = tmp_path / "data/train" / name

        def case(name: str = name, path: Path = path) -> str:
            named, image = refused(lambda: read_image(path), path)
            if name not in kept:
                return "" if name in said else "left out in silence"
            if named:
                return "kept, but cannot be read"
            found = dataset.read(kept[name]).numpy()
            if not np.array_equal(found, image.numpy()):
                return "read in two ways"
            level = difference(found, expected)
            unreported = int(name[2:4]) in UNREPORTED.get(form, ())
            return "" if level < VISIBLE or unreported else f"kept in silence, visibly damaged ({level:.0f} of 255)"

        if complained := complaint(case):
            wrong.append(f"seed {name[2:4]} ({kind}): {complained}")
    assert wrong == [], f"{form}: {len(wrong)} of {SEEDS}\n" + "\n".join(wrong)
    assert len(kinds) - len(kept) + 1 > SEEDS / 4  # else nothing was tried


def test_visible_differences():
    """A grey half or a block of another colour counts, another JPEG quality or a single pixel does not."""
    photo = torch.from_numpy(load_sample_images().images[0]).permute(2, 0, 1)[:, 100:180, 200:296].numpy()
    grey, block, pixel = photo.copy(), photo.copy(), photo.copy()
    grey[:, 40:] = 128
    block[:, 32:48, 32:48] = 255 - block[:, 32:48, 32:48]
    pixel[:, 5, 5] = 255 - pixel[:, 5, 5]
    assert min(difference(photo, other) for other in (grey, block, photo[:, :79])) > VISIBLE
    assert difference(photo, pixel) < 1
