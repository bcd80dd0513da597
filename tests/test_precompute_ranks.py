"""Several ranks make one cache: the bytes are those of one process, whichever rank is stopped, killed or refused."""

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

import fastofa.teacher.shares
from fastofa import cli
from fastofa.system.errors import Failed
from fastofa.system.files import filling, load_tensors
from fastofa.system.rendezvous import Place
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.compiled_teacher import TopKProgram
from fastofa.teacher.parts import PARTS, Parts, Range
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.shares import Shares, deal
from ranks import Ranks
from runs import command_line, make_teacher

VIEWS, IMAGES, VAL_IMAGES, BATCH = 3, 24, 12, 4
Prepare = Callable[[], None]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def config(photos: Path, photo_cache: TeacherCache) -> Callable[..., PrecomputeConfig]:
    """config(out, ...): three views of 24 photographs, 4 images per batch."""

    def made(out: Path, **options: Any) -> PrecomputeConfig:
        values = {"views": VIEWS, "topk": 2, "batch_size": BATCH, "workers": 0, "max_pixels": 200.0, **options}
        return PrecomputeConfig(str(photos), str(photo_cache.path.parent / "teacher"), out, **values)

    return made


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a single process."""
    return precompute(config(tmp_path_factory.mktemp("alone") / "cache")).path


# --- Dividing the work ------------------------------------------------------------------------------------------------


def makespan(work: list[Range], ranks: int) -> int:
    """Rows that the busiest of equally fast ranks computes, each taking the next range when it is free."""
    busy = [0] * ranks
    for _, start, stop in work:
        busy[busy.index(min(busy))] += stop - start
    return max(busy)


@given(
    tables=st.lists(st.integers(0, 500), min_size=1, max_size=5),
    ranks=st.integers(1, 9),
    batch_size=st.integers(1, 40),
)
def test_ranges_cover_what_is_missing_once_in_whole_batches(tables, ranks, batch_size):
    missing = [Range(table, 7, 7 + rows) for table, rows in enumerate(tables)]
    dealt = deal(missing, ranks, batch_size)
    for table, start, stop in missing:
        own = sorted(part for part in dealt if part.table == table)
        assert [row for part in own for row in range(*part[1:])] == list(range(start, stop))
        assert own  # also a table of which no row is missing, since it is to be joined
        assert all((part.start - start) % batch_size == 0 for part in own)
    if ranks == 1:
        assert sorted(dealt) == missing


@pytest.mark.parametrize(("views", "ranks"), [(1, 8), (1, 1024), (3, 64), (100, 8), (100, 3), (300, 7)])
def test_few_views_on_many_ranks_and_many_on_few_are_balanced(views, ranks):
    """Of ImageNet in batches of 256. Many views are taken whole as long as that does not matter."""
    rows, batch_size = 1_281_167, 256
    dealt = deal([Range(view, 0, rows) for view in range(views)], ranks, batch_size)
    assert makespan(dealt, ranks) <= 1.01 * (views * rows / ranks) + batch_size
    whole = sum(stop - start == rows for _, start, stop in dealt)
    assert whole >= views - 2 * ranks


# --- Without a disturbance --------------------------------------------------------------------------------------------


def _precompute(rank: int, config: PrecomputeConfig, prepare: Callable[[int], None] | None = None) -> None:
    if prepare is not None:
        prepare(rank)
    cli.main(command_line("precompute", config))


def on(
    ranks: int, config: PrecomputeConfig, prepare: Callable[[int], None] | None = None, agent: bool = True
) -> tuple[list, list[str]]:
    """Run on this number of ranks. `prepare(rank)` changes a rank's process first. Returns exit codes and outputs."""
    with Ranks(ranks, config.out.with_suffix(".logs"), _precompute, config, prepare, agent=agent) as started:
        return started.wait(), started.output()


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, {}), (3, {"views": 1, "workers": 1}), (2, {"recipe": "imagenet_vit_mlp", "features": "pooled"})],
)
def test_the_bytes_are_those_of_one_process(config, alone, tmp_path, ranks, options):
    """Also with mixed views, whose images are read in pairs, and with the ranks' own decoding processes."""
    made = config(tmp_path / "cache", **options)
    reference = precompute(dataclasses.replace(made, out=tmp_path / "reference")).path if options else alone
    codes, output = on(ranks, made)
    assert codes == [0] * ranks, output
    assert files(made.out) == files(reference)
    (line,) = [line for text in output for line in text.splitlines() if " of 24 images, top 2" in line]
    assert line.startswith(f"{made.out}: ")


def test_ranks_of_several_teachers_store_the_k_that_rank_0_chooses(config, tmp_path):
    """The bytes, with the fidelity that rank 0 measured, are those of one process."""
    made = config(tmp_path / "cache", views=1, topk="auto")
    made = dataclasses.replace(made, teacher=(made.teacher, made.teacher), teacher_weights=(0.25, 0.75))
    reference = precompute(dataclasses.replace(made, out=tmp_path / "reference")).path
    codes, output = on(2, made)
    assert codes == [0, 0], output
    assert files(made.out) == files(reference)


@pytest.mark.parametrize("topk", [1, 2])
def test_ranks_that_keep_each_teacher_store_the_bytes_of_one_process(config, tmp_path, topk):
    """Packed, and with all classes. Both ranks compute parts of the one view, and one of them joins all columns."""
    made = config(tmp_path / "cache", views=1, topk=topk)
    teachers = (*made.teachers, make_teacher(tmp_path / "other", 2, "test_resnet"))
    made = dataclasses.replace(made, teacher=teachers, teacher_weights=(0.25, 0.75), keep_each=True)
    reference = precompute(dataclasses.replace(made, out=tmp_path / "reference"))
    codes, output = on(2, made, partial(_together, tmp_path, 2))
    assert codes == [0, 0], output
    assert files(made.out) == files(reference.path)
    columns, name = load_tensors(made.out / view_file(0))[0], "predictions" if topk == 1 else "log_probs"
    assert not torch.equal(columns[f"{name}_1"], columns[f"{name}_2"])


def test_more_views_by_other_ranks(config, alone, tmp_path):
    """One view by one process, the others by two ranks."""
    precompute(config(tmp_path / "cache", views=1))
    codes, output = on(2, config(tmp_path / "cache"))
    assert codes == [0, 0], output
    for name, data in files(alone).items():
        assert name == "cache.json" or (tmp_path / "cache" / name).read_bytes() == data


# --- Ranks that end ---------------------------------------------------------------------------------------------------


def _after(batches: int, action: Callable[[], None]) -> None:
    """Act when the teacher has seen so many batches in this process."""
    call, seen = TopKProgram.__call__, []

    def counted(self: TopKProgram, images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(images))
        if len(seen) == batches:
            action()
        return call(self, images)

    TopKProgram.__call__ = counted  # type: ignore[method-assign]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _together(folder: Path, ranks: int, rank: int) -> None:
    """Let no rank finish a batch before all have begun one."""
    call = TopKProgram.__call__

    def meet(self: TopKProgram, images: torch.Tensor) -> dict[str, torch.Tensor]:
        (folder / f"begun-{rank}").touch()
        while len(list(folder.glob("begun-*"))) < ranks:
            time.sleep(0.01)
        return call(self, images)

    TopKProgram.__call__ = meet  # type: ignore[method-assign]


def _rank_1_dies(folder: Path, rank: int) -> None:
    fastofa.teacher.shares.SILENT_S = fastofa.teacher.shares.LEAVE_S = 1.0
    if rank == 1:
        _after(1, _kill)
    _together(folder, 3, rank)


def test_a_rank_that_dies_holds_up_nobody(config, alone, tmp_path):
    """Rank 0 computes what it had taken."""
    codes, output = on(3, config(tmp_path / "cache"), partial(_rank_1_dies, tmp_path))
    assert codes == [0, -signal.SIGKILL, 0], output
    assert files(tmp_path / "cache") == files(alone)


def _rank_1_dies_before_it_joins(rank: int) -> None:
    fastofa.teacher.shares.SILENT_S = fastofa.teacher.shares.LEAVE_S = 1.0
    if rank == 1:
        Parts.joined = lambda *_: _kill()  # type: ignore[method-assign,assignment,return-value]


def test_a_rank_dies_when_all_parts_are_complete(config, alone, tmp_path):
    codes, output = on(2, config(tmp_path / "cache"), _rank_1_dies_before_it_joins)
    assert codes[0] == 0, output
    assert files(tmp_path / "cache") == files(alone)


def _rank_0_dies(folder: Path, rank: int) -> None:
    if rank == 0:
        _after(2, _kill)
    _together(folder, 2, rank)


def test_without_rank_0_the_others_save_and_another_number_of_ranks_continues(config, alone, tmp_path):
    """Its process holds the store here; torchrun's own store would end with torchrun."""
    codes, output = on(2, config(tmp_path / "cache"), partial(_rank_0_dies, tmp_path), agent=False)
    assert codes == [-signal.SIGKILL, 1], output
    assert "fastofa: rank 1: lost the other ranks" in output[1]
    assert "Traceback" not in output[1]
    codes, output = on(3, config(tmp_path / "cache"))
    assert codes == [0] * 3, output
    assert files(tmp_path / "cache") == files(alone)


def _all_stop(folder: Path, rank: int) -> None:
    _after(2 + rank, lambda: signal.raise_signal(signal.SIGTERM))
    _together(folder, 2, rank)


def test_sigterm_saves_what_every_rank_has_computed(config, alone, tmp_path, monkeypatch):
    """A process that continues computes only the rest."""
    codes, output = on(2, config(tmp_path / "cache"), partial(_all_stop, tmp_path))
    assert codes == [128 + signal.SIGTERM] * 2, output
    line = f"fastofa: saved in {tmp_path / 'cache'}; run the same command again to continue"
    assert [text.splitlines()[-1] == line for text in output] == [True, False]
    call, seen = TopKProgram.__call__, []

    def counted(self: TopKProgram, images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(TopKProgram, "__call__", counted)
    precompute(config(tmp_path / "cache"))
    assert sum(seen) == VAL_IMAGES + VIEWS * IMAGES - (2 + 3) * BATCH
    assert files(tmp_path / "cache") == files(alone)


# --- Ranks that refuse ------------------------------------------------------------------------------------------------


def _rank_1_has_a_full_disk(folder: Path, rank: int) -> None:
    _together(folder, 2, rank)
    if rank == 1:

        def save(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = save  # type: ignore[assignment]


def test_a_full_disk_of_one_rank_is_one_line_and_loses_nothing(config, alone, tmp_path):
    codes, output = on(2, config(tmp_path / "cache"), partial(_rank_1_has_a_full_disk, tmp_path))
    assert codes == [2, 2], output
    assert "No space left on device; free space or choose another path" in output[1]
    assert output[0].splitlines()[-1] == "fastofa: error: rank 0: stopped because rank 1 refused its input"
    assert not any("Traceback" in text for text in output)
    assert not any((tmp_path / "cache").glob("*.tmp"))
    precompute(config(tmp_path / "cache"))
    assert files(tmp_path / "cache") == files(alone)


def test_two_runs_into_one_folder_are_refused(config, tmp_path):
    made = config(tmp_path / "cache")
    with filling(made.out):
        codes, output = on(2, made)
    assert codes == [2, 2]
    assert f"another fastofa (pid {os.getpid()} on " in output[0]
    assert "rank 1: stopped because rank 0 refused its input" in output[1]
    assert list(tmp_path.glob("cache/*")) == []


def _rank_1_has_another_folder(rank: int) -> None:
    if rank == 1:
        Path("elsewhere").mkdir()
        os.chdir("elsewhere")


def test_a_folder_that_is_not_shared_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes, output = on(2, config(Path("cache")), _rank_1_has_another_folder)
    assert codes == [2, 2], output
    assert "rank 1: expected cache/cache.json as on rank 0, found none; put --out on" in output[1]


def _rank_1_has_another_seed(rank: int) -> None:
    if rank == 1:
        made = PrecomputeConfig.__post_init__

        def changed(self: PrecomputeConfig) -> None:
            object.__setattr__(self, "seed", 5)
            made(self)

        PrecomputeConfig.__post_init__ = changed  # type: ignore[method-assign]


def test_ranks_with_another_identity_are_refused(config, tmp_path):
    codes, output = on(2, config(tmp_path / "cache"), _rank_1_has_another_seed)
    assert codes == [2, 2], output
    assert "rank 1: expected the same seed as on rank 0" in output[1]


# --- Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut off", "of another table", "overlapping"])
def test_a_part_that_cannot_be_used_is_computed_again(config, alone, tmp_path, damage):
    """Whatever it is, the cache that results is the same."""
    cache = tmp_path / "cache"
    codes, output = on(2, config(cache), partial(_all_stop, tmp_path))
    assert codes == [128 + signal.SIGTERM] * 2, output
    first, second = sorted(cache.glob(PARTS))[:2]
    if damage == "cut off":
        first.write_bytes(first.read_bytes()[:-3])
    elif damage == "of another table":
        first.rename(cache / "part-00001-0000000000.safetensors")
    else:
        second.rename(cache / f"part-{VAL.removesuffix('.safetensors')}-0000000001.safetensors")
    precompute(config(cache))
    assert files(cache) == files(alone)
    TeacherCache.open(cache).verify()


def test_a_store_that_still_holds_an_earlier_start_is_refused():
    """Its counters would skip ranges."""
    store = HashStore()
    Shares(store, Place(1, 2))
    Shares(store, Place(0, 2))
    with pytest.raises(Failed, match="earlier start of these ranks; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and run"):
        Shares(store, Place(1, 2))
