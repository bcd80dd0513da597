"""The reference images of a cache: the teacher's input, and how far another pipeline's pixels are from it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastofa.data.open import open_dataset
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.pipelines import open_pipeline
from fastofa.runs.run import CONFIG, LAUNCHES
from fastofa.system.errors import BadInput
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.reference_images import SEEN, compare_teacher_images, save_teacher_images
from fastofa.training.loop import train
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy
from runs import SIZE, make_cache

MIXES = ViewPolicy(auto_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, erase=0.25)


def test_a_cache_keeps_input_images_of_its_teacher(photo_cache, photos: Path):
    """Samples 0, 3, 6, 9, 13, 16, 19 and 23 of 24 in view 0, side by side."""
    seen = np.asarray(Image.open(photo_cache.path / SEEN))
    views, _, _ = photo_cache.targets(0)
    (batch,) = open_pipeline("torchvision", open_dataset(str(photos)), SIZE, 24).epoch(views, np.arange(24))
    expected = [batch.images[i].permute(1, 2, 0).numpy() for i in (0, 3, 6, 9, 13, 16, 19, 23)]
    assert np.array_equal(seen, np.concatenate(expected, axis=1))


def test_other_pictures_are_refused(on_photos, photo_cache, tmp_path: Path):
    """Before anything is written; unless the difference is accepted."""
    cache = Path(shutil.copytree(photo_cache.path, tmp_path / "cache"))
    seen = np.asarray(Image.open(cache / SEEN))
    Image.fromarray(255 - seen).save(cache / SEEN)
    found = f"{np.abs(255.0 - 2.0 * seen).mean():.1f}"
    with pytest.raises(BadInput, match=rf"expected the pixels .* within 20 of 255, got a mean difference of {found}"):
        train(on_photos("refused", cache=str(cache)))
    assert not (tmp_path / "refused" / CONFIG).exists()
    train(on_photos("accepted", cache=str(cache), allow_mismatch="pixels", epochs=1))


def test_images_that_were_compressed_again_are_accepted_on_request(on_photos, photo_cache, folder: Path, capsys):
    for file in folder.glob("*/*/*.jpg"):
        Image.open(file).save(file, quality=60)
    with pytest.raises(BadInput, match=r"of the same names and labels; .* --allow-mismatch pixels"):
        train(on_photos("refused", data=str(folder)))
    train(on_photos("accepted", data=str(folder), allow_mismatch="pixels", epochs=1))
    error = capsys.readouterr().err
    assert f"cache {photo_cache.path}: made from other pixels" in error
    assert "mean difference" in error


@pytest.mark.parametrize("count", [3, 24])
@pytest.mark.parametrize("policy", [ViewPolicy(), MIXES])
def test_the_difference_equals_that_of_the_pixels(digits, tmp_path: Path, policy: ViewPolicy, count: int):
    """For a pipeline whose images are brighter by 2, and one of them by 10."""
    few = dataclasses.replace(
        digits, labels=digits.labels[:count], sizes=digits.sizes[:count], names=digits.names[:count],
        pixels=digits.pixels[:count] // 2,
    )  # fmt: skip
    views = draw_views(policy, few.sizes, seed=0, view=0)
    pipeline = open_pipeline("resident", few, 16, batch_size=5)
    save_teacher_images(tmp_path, pipeline, views)
    pipeline = open_pipeline("resident", few, 24, batch_size=5)  # the student's size
    same = compare_teacher_images(tmp_path, pipeline, views)
    assert same == (0, 0)
    assert str(same) == "identical to those that the teacher saw"

    shown = np.asarray(Image.open(tmp_path / SEEN)).copy()
    shown += 2
    shown[:, :16] += 8
    Image.fromarray(shown).save(tmp_path / SEEN)
    images = min(count, 8)
    assert compare_teacher_images(tmp_path, pipeline, views) == pytest.approx((2 + 8 / images, 10))


def test_a_folders_cache_and_another_form(on_photos, photo_cache, photos: Path, tmp_path: Path, capsys):
    """A run reports and records the difference of its pixels from the cache's: none, small, large."""
    for name, options in (("folder", {}), ("full", {"size": 160}), ("small", {"size": 32})):
        data = photos
        if options:
            data = tmp_path / f"{name}.pack"
            write(WriteConfig(str(photos), data, **options))
        train(on_photos(name, data=str(data)))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pixels ")]
        (launch,) = json.loads((tmp_path / name / LAUNCHES).read_text())
        found = launch["pixel_difference"]
        if name == "folder":
            assert (
                line == f"pixels of 8 images, compared with {photo_cache.path}: identical to those that the teacher saw"
            )
        else:
            assert f": mean difference {found:.2f} of 255 from those that the teacher saw" in line
        low, high = {"folder": (0, 0), "full": (0.1, 3), "small": (5, 40)}[name]
        assert low <= found <= high


def test_reference_images_are_written_once(photos: Path, tmp_path: Path):
    cache = make_cache(str(photos), 2, tmp_path, topk=2)
    before = (cache.path / SEEN).stat().st_mtime_ns
    values: dict[str, Any] = {"views": 3, "topk": 2, "workers": 0}
    precompute(PrecomputeConfig(str(photos), str(tmp_path / "teacher"), cache.path, **values))
    assert (cache.path / SEEN).stat().st_mtime_ns == before
    (cache.path / SEEN).unlink()  # as in a cache of before: what its teacher saw is no longer known
    precompute(PrecomputeConfig(str(photos), str(tmp_path / "teacher"), cache.path, **values))
    assert not (cache.path / SEEN).exists()


def test_a_cache_without_reference_images_or_with_damaged_ones(on_photos, photo_cache, photos: Path, tmp_path: Path):
    """Without them nothing is compared; with damaged ones the run does not start."""
    dataset = open_dataset(str(photos))
    views, _, _ = photo_cache.targets(0)
    pipeline = open_pipeline("torchvision", dataset, 48, 8)
    assert compare_teacher_images(tmp_path, pipeline, views) is None
    whole = (photo_cache.path / SEEN).read_bytes()
    (tmp_path / SEEN).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=SEEN):
        compare_teacher_images(tmp_path, pipeline, views)
    Image.fromarray(np.zeros((SIZE, SIZE, 3), dtype=np.uint8)).save(tmp_path / SEEN)
    with pytest.raises(BadInput, match="expected 8 square images side by side, got 32 x 32 pixels; delete"):
        compare_teacher_images(tmp_path, pipeline, views)
    assert pipeline.image_size == 48
    assert torch.equal(*(next(pipeline.epoch(views, np.arange(8))).images for _ in range(2)))
