"""`precompute --plan`: bytes and passes are those of the cache it would make, and nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastofa import cli
from fastofa.commands.precompute import print_plan
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import view_file
from fastofa.teacher.plan import Plan, plan
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from ranks import Ranks
from runs import command_line

pytestmark = pytest.mark.usefixtures("_short")


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastofa.teacher.plan.SECONDS", 0.05)


@pytest.fixture
def config(photos: Path, photo_cache: TeacherCache, tmp_path: Path) -> Callable[..., PrecomputeConfig]:
    """config(...): two views of 24 photographs; 12 are for validation."""

    def made(**options: Any) -> PrecomputeConfig:
        values = {"views": 2, "topk": 2, "batch_size": 8, "workers": 0, **options}
        return PrecomputeConfig(str(photos), str(photo_cache.path.parent / "teacher"), tmp_path / "cache", **values)

    return made


@pytest.mark.parametrize("options", [{}, {"recipe": "imagenet_vit_mlp", "features": "pooled-int8"}])
def test_the_bytes_are_those_of_a_view(config, options):
    made = config(**options)
    estimate = plan(config(**options, plan=True))
    assert estimate is not None
    assert not made.out.exists()
    cache = precompute(made)
    tensors, _ = load_tensors(cache.path / view_file(0))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert estimate.row_bytes * 24 == pytest.approx(stored, abs=8)  # eight rows share a byte of flags
    assert estimate.bytes == pytest.approx(2 * stored, abs=16)
    assert (estimate.images, estimate.val_images) == (24, cache.header["num_val_samples"])
    assert (estimate.passes, estimate.finished) == (2 * 24 + 12, 0)
    assert min(estimate.rate, estimate.teacher) > 0
    assert estimate.hours == pytest.approx(estimate.passes / estimate.rate / 3600)


def test_finished_views_are_not_counted_again(config):
    before = {file: file.stat().st_mtime_ns for file in precompute(config()).path.iterdir()}
    estimate = plan(config(views=5, plan=True))
    assert estimate is not None
    assert (estimate.finished, estimate.passes) == (2, 3 * 24 + 12)
    assert {file: file.stat().st_mtime_ns for file in config().out.iterdir()} == before


@pytest.mark.parametrize(("views", "val_images", "students"), [(100, 0, 1), (100, 0, 3), (10, 599, 1), (1, 50, 8)])
def test_the_epochs_from_which_a_cache_takes_fewer_passes(views, val_images, students):
    estimate = Plan(
        images=1000, val_images=val_images, views=views, finished=0, ranks=1, teacher=2, rate=1, topk=16, row_bytes=9
    )
    cheaper = [students * epochs * 1000 > views * 1000 + val_images for epochs in range(1000)]
    assert estimate.epochs(students) == cheaper.index(True)


@pytest.mark.parametrize(("rate", "said"), [(10, "hours 0.03 (100 s); 0.06 GPU"), (1, "hours 0.28; 0.56 GPU")])
def test_short_jobs_have_seconds_too(config, capsys, rate, said):
    """1,000 passes on two ranks."""
    images = {"images": 900, "val_images": 100}
    print_plan(Plan(**images, views=1, finished=0, ranks=2, teacher=2, rate=rate, topk=2, row_bytes=9), config())
    assert said in " ".join(capsys.readouterr().out.split())


def test_it_refuses_what_precompute_refuses(config):
    with pytest.raises(BadInput, match=r"topk: expected at most the 2 classes of .*, got 3"):
        plan(config(topk=3, plan=True))


def _plan(_: int, config: PrecomputeConfig) -> None:
    cli.main(command_line("precompute", config))


def test_ranks_are_timed_together_and_one_prints(config, tmp_path):
    with Ranks(2, tmp_path / "logs", _plan, config(plan=True)) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        output = ranks.output()
    assert "on 2 ranks" in output[0]
    assert " 60, validation included" in output[0]
    assert "images/s" not in output[1]
    assert not config().out.exists()
