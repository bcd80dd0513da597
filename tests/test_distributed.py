"""Several processes train a student as one process does, lose nothing when stopped or killed, and agree.

The ranks are forked processes with torchrun's environment variables or, in the last tests, processes of torchrun.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastofa import cli
from fastofa.data.open import open_dataset
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.pipelines import open_pipeline
from fastofa.runs import recipes
from fastofa.runs.checkpoint import checkpoints
from fastofa.runs.config import TrainConfig
from fastofa.runs.run import Run, open_run
from fastofa.system.errors import BadInput, LostContact
from fastofa.system.files import load_tensors, read_json
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import view_file
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.distributed import Vote, World, check_shared, connection_errors, join, statistics
from fastofa.training.loop import train
from fastofa.training.step import Step
from fastofa.views.order import epoch_order
from ranks import PATIENCE_S, Ranks, free_port, wait_for_step
from runs import children, command_line, float64, log_of, make_cache, newest, same_run
from web_server import serving

ROOT, BIN = Path(__file__).parent.parent, Path(sys.executable).parent
STEPS = 20


def _train(_: int, config: TrainConfig) -> None:
    import fastofa.training.preflight

    fastofa.training.live_report.LiveReport.write = lambda *_: None  # type: ignore[method-assign]  # it takes half of such a run's time
    torch.set_default_dtype(torch.float64)  # see runs.float64
    cli.main(command_line("train", config))


def _train_until(rank: int, config: TrainConfig, signum: int) -> None:
    """Train; rank 1 receives a signal at the start of its eighth step."""
    call = Step.__call__

    def signalled(self: Step, *arguments: Any) -> None:
        if rank == 1 and self.steps == 7:
            os.kill(os.getpid(), signum)
        call(self, *arguments)

    Step.__call__ = signalled  # type: ignore[method-assign]
    _train(rank, config)


def _train_and_spoil(rank: int, config: TrainConfig) -> None:
    """Train; rank 1 receives a signal, and one of its running statistics is not finite at the save that follows."""
    call = Step.is_finite

    def spoiled(self: Step) -> bool:
        if rank == 1 and self.steps == 9:
            statistics(self.student).popitem()[1][0] = torch.inf
        return call(self)

    Step.is_finite = spoiled  # type: ignore[method-assign]
    _train_until(rank, config, signal.SIGTERM)


def train_on(ranks: int, config: TrainConfig) -> Path:
    """Train on this number of ranks and return the run's folder."""
    with Ranks(ranks, config.out.with_suffix(".logs"), _train, config) as started:
        assert started.wait() == [0] * ranks, started.output()
    return config.out


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return make_cache("digits:100", 10, tmp_path_factory.mktemp("cache"), topk=4)


@pytest.fixture(scope="module")
def config(cache: TeacherCache, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """config(name, ...): twenty steps of SGD on a Transformer, which has no batch norm."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, **overrides: Any) -> TrainConfig:
        values = {
            "data": "digits:100", "cache": cache.path, "student": "test_vit", "out": folder / name, "epochs": 4,
            "batch_size": 20, "optimizer": "sgd", "lr": 0.02, "warmup_epochs": 1, "pipeline": "resident",
            "log_every": 1, "eval_every": 2, "checkpoint_every": 5, "timeout_s": 2 * PATIENCE_S,
        }  # fmt: skip
        return recipes.digits(**{**values, **overrides})

    return make


@pytest.fixture(scope="module")
def alone(config) -> Path:
    """An undisturbed run of one process."""
    with float64():
        train(config("alone"))
    return config("alone").out


@pytest.fixture(scope="module")
def pair(config) -> Path:
    """An undisturbed run of two processes."""
    return train_on(2, config("pair"))


def assert_near(run: Path, expected: Path, rel: float = 1e-5, images: int = 1) -> None:
    """Each step is logged once; every figure agrees to `rel`, the accuracy to `images` of 599."""
    actual, others = log_of(run), log_of(expected)
    assert [(row["kind"], row["step"]) for row in actual] == [(row["kind"], row["step"]) for row in others]
    for row, other in zip(actual, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"kind", "step"}:
            tolerance = {"abs": (images + 0.1) / 599} if name.startswith("top") else {"rel": rel}
            assert row[name] == pytest.approx(other[name], **tolerance), (row, other)


# --- The same training ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_train_as_one(alone, pair):
    assert_near(pair, alone)
    assert load_tensors(newest(pair))[0].keys() == load_tensors(newest(alone))[0].keys()
    assert [launch["ranks"] for launch in read_json(pair / "environment.json")] == [2]


@pytest.mark.slow
def test_two_ranks_that_read_the_cache_from_a_url_train_as_from_the_folder(config, cache, tmp_path):
    """Bit for bit, with a view per epoch that each rank downloads from a server that fails now and then."""
    teacher = str(cache.path.parent / "teacher")
    long = precompute(PrecomputeConfig("digits:100", teacher, tmp_path / "cache", 4, topk=4, workers=0)).path
    folder = train_on(2, config("from-folder", cache=long))
    with serving(long, "view") as (site, url):
        site.faults = ["", "503", "truncate", "", "503"]
        run = train_on(2, config("from-url", cache=url))
        requested = [name for name, _ in site.requests]
    same_run(run, folder)
    assert site.faults == []
    assert open_run(run).view_digests == open_run(folder).view_digests
    assert all(requested.count(view_file(view)) >= 4 for view in range(4))  # its beginning and the file, for each rank


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "accumulate"), [(4, 1), (2, 5)])
def test_the_number_of_ranks_and_parts_does_not_change_the_training(config, alone, ranks, accumulate):
    assert_near(train_on(ranks, config(f"{ranks}-{accumulate}", accumulate=accumulate)), alone)


@pytest.mark.slow
def test_two_ranks_that_share_batch_statistics_train_a_cnn_as_one(config):
    """Also the checkpoints' running statistics, of the student and of its moving average."""
    overrides: dict[str, Any] = {"student": "test_resnet", "ema": 0.9, "epochs": 2, "sync_bn": True}
    with float64():
        train(config("cnn-alone", **overrides))
    alone = config("cnn-alone").out
    pair = train_on(2, config("cnn-shared", **overrides))
    assert_near(pair, alone)
    expected, got = (load_tensors(newest(run))[0] for run in (alone, pair))
    statistics = [name for name in expected if name.endswith(("_mean", "_var"))]
    assert len(statistics) > 20
    for name in statistics:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)


def _train_in_fp32(_: int, config: TrainConfig) -> None:
    """The teacher computes in fp32 or bf16, whatever the default is."""
    import fastofa.training.preflight

    fastofa.training.live_report.LiveReport.write = lambda *_: None  # type: ignore[method-assign]
    cli.main(command_line("train", config))


@pytest.mark.slow
def test_an_online_teacher_on_every_rank_trains_as_on_one(config, cache):
    """Each rank runs it on its own images, and averages only the student's gradients; in parts, and with FitNet."""
    teacher = str(cache.path.parent / "teacher")
    overrides = {"cache": None, "online_teacher": teacher, "method": "ofa+fitnet", "epochs": 2, "lr": 1e-3}
    train(config("online-alone", **overrides))
    c = config("online-pair", **overrides, accumulate=2)
    with Ranks(2, c.out.with_suffix(".logs"), _train_in_fp32, c) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    assert_near(c.out, config("online-alone").out, rel=1e-4)


@pytest.mark.slow
def test_bf16_gradient_compression_changes_little(config, alone):
    """After the first step the losses differ from those without compression, by less than 1%."""
    run = train_on(2, config("bf16", grad_compression="bf16", epochs=2))
    first, rough = ([row["loss"] for row in log_of(out) if row["kind"] == "step"] for out in (alone, run))
    assert rough[0] == pytest.approx(first[0], rel=1e-8)
    assert rough[1:5] != first[1:5]
    assert rough[:5] == pytest.approx(first[:5], rel=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_running_statistics_are_the_mean_over_the_ranks(config):
    """Of a CNN and of its moving average after one step, in which each rank saw half of the batch."""
    c = config("cnn", student="test_resnet", ema=0.9, epochs=1, batch_size=50, checkpoint_every=1, seed=3)
    train_on(2, c)
    dataset, cache = open_dataset(c.data), TeacherCache.open(c.cache)
    views = cache.targets(0)[0]
    own: list[dict[str, Tensor]] = []
    for rank in range(2):
        torch.manual_seed(c.seed)
        run = Run(c.out, c, dataset.classes, cache.teacher_dim, dataset.fingerprint)
        student = run.build_student().to(memory_format=torch.channels_last).train()
        order = epoch_order(len(dataset), c.seed, 0, rank, 2)
        student(next(open_pipeline("resident", dataset, 32, 25).epoch(views, order)).images)
        own.append({name: value for name, value in student.named_buffers() if name.endswith(("_mean", "_var"))})
    tensors, _ = load_tensors(c.out / "checkpoints" / "step-00000001.safetensors")
    assert len(own[0]) > 10
    for name in own[0]:
        mean = (own[0][name] + own[1][name]) / 2
        for part in ("student", "ema"):  # the average begins as the student after its first step
            torch.testing.assert_close(tensors[f"{part}.{name}"], mean, rtol=1e-8, atol=1e-8)
    assert max(float((own[0][name] - own[1][name]).abs().max()) for name in own[0]) > 1e-2


# --- Interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(config, alone, pair, tmp_path):
    """All exit with the signal's code. Resumed on two ranks the bytes are the same, on one or four the figures."""
    c = config("stopped")
    with Ranks(2, tmp_path, _train_until, c, signal.SIGTERM) as ranks:
        assert ranks.wait() == [128 + signal.SIGTERM] * 2, ranks.output()
    step = load_tensors(newest(c.out))[1]["step"]
    assert 7 <= step <= 9
    output, rank_1 = ranks.output()
    assert output.splitlines()[-1] == (
        f"fastofa: saved step {step} of 20 in {c.out}; run the same command with --resume to continue"
    )
    assert rank_1 == ""
    for count, same in ((1, assert_near), (4, assert_near), (2, same_run)):
        resumed = config(f"stopped-{count}", resume=True)
        shutil.copytree(c.out, resumed.out)
        train_on(count, resumed)
        same(resumed.out, pair if count == 2 else alone)
        assert [launch["ranks"] for launch in read_json(resumed.out / "environment.json")] == [2, count]


@pytest.mark.slow
def test_a_stop_between_two_checkpoints_and_logs_changes_no_bit(config, tmp_path):
    """Of a CNN, whose batch norm statistics differ between ranks. The run can also be resumed on one rank."""
    overrides: dict[str, Any] = {"student": "test_resnet", "ema": 0.9, "log_every": 4}
    undisturbed = train_on(2, config("cnn-pair", **overrides))
    c = config("cnn-stopped", **overrides)
    with Ranks(2, tmp_path, _train_until, c, signal.SIGTERM) as ranks:
        assert ranks.wait() == [128 + signal.SIGTERM] * 2, ranks.output()
    tensors, info = load_tensors(newest(c.out))
    assert info["step"] == 9  # the vote at the eighth step is known at the ninth
    assert any(name.startswith("ranks.ema.") for name in tensors)
    assert not any(name.startswith("ranks.") for name in load_tensors(newest(undisturbed))[0])
    for count in (1, 2):
        resumed = config(f"cnn-stopped-{count}", resume=True, **overrides)
        shutil.copytree(c.out, resumed.out)
        train_on(count, resumed)
        assert [(row["kind"], row["step"]) for row in log_of(resumed.out)] == [
            (row["kind"], row["step"]) for row in log_of(undisturbed)
        ]
    same_run(resumed.out, undisturbed)


@pytest.mark.slow
def test_if_one_rank_is_not_finite_all_refuse_to_save(config, tmp_path):
    c = config("spoiled", student="test_resnet", log_every=4)
    with Ranks(2, tmp_path, _train_and_spoil, c) as ranks:
        assert ranks.wait() == [2, 2], ranks.output()
    for output in ranks.output():
        assert "the weights are no longer finite between steps 8 and 9" in output.splitlines()[-1], output


@pytest.mark.slow
def test_when_a_rank_is_killed_the_other_reports_it_and_exits(config, pair, tmp_path):
    """With exit code 1 and one line, long before --timeout-s. The resumed run ends in the same bytes."""
    c = config("killed")
    with Ranks(2, tmp_path, _train_until, c, signal.SIGKILL) as ranks:
        assert ranks.wait() == [1, -signal.SIGKILL], ranks.output()
    output = ranks.output()[0]
    assert "Traceback" not in output
    assert re.match(r"fastofa: rank 0: lost the other ranks \(.+\); run the same command", output.splitlines()[-1])
    train_on(2, config("killed", resume=True))
    same_run(c.out, pair)


@pytest.mark.slow
def test_a_run_killed_at_random_is_resumed_on_another_number_of_ranks(config, alone, tmp_path):
    """All ranks are killed by SIGKILL three times; the figures are those of the undisturbed run."""
    counts, rng = (1, 2, 4, 2), random.Random(0)
    c = config("-".join(map(str, counts)), checkpoint_every=3, resume=True)
    began = []
    for kill, count in enumerate(counts[:-1]):
        with Ranks(count, tmp_path, _train, c) as ranks:
            ranks.reach(c.out, rng.randint(4 + 5 * kill, 7 + 5 * kill))
            time.sleep(rng.uniform(0, 0.02))
        began.append([launch["step"] for launch in read_json(c.out / "environment.json")][-1])
    train_on(counts[-1], c)
    assert began[0] == 0 < began[1]
    assert_near(c.out, alone)


@pytest.mark.slow
def test_a_bad_batch_size_ends_all_ranks_alike(config, tmp_path):
    """Exit code 2 and one line from each; nothing is written."""
    for overrides, message in (
        ({"batch_size": 20}, r"batch-size: expected a multiple of 3 \(3 ranks\), got 20"),
        ({"batch_size": 30, "accumulate": 4}, r"batch-size: expected a multiple of 12 \(3 ranks x 4 parts\), got 30"),
    ):
        c = config("refused", **overrides)
        with Ranks(3, tmp_path, _train, c) as ranks:
            assert ranks.wait() == [2, 2, 2], ranks.output()
        for output in ranks.output():
            assert re.fullmatch(f"fastofa: error: {message}\n", output), output
        assert not c.out.exists()


def _train_with_memory(rank: int, config: TrainConfig) -> None:
    import fastofa.data.dataset
    import fastofa.training.preflight

    fastofa.data.dataset.PAGE = 4096
    fastofa.training.preflight.memory_bytes = lambda: 10**12 if rank else 1  # type: ignore[assignment]
    _train(rank, config)


@pytest.mark.slow
def test_all_ranks_use_the_order_that_rank_0_chooses(config, tmp_path):
    """The file exceeds the memory of rank 0 alone: all ranks read by pages, as one process with --order pages does."""
    write(WriteConfig("digits:100", tmp_path / "x.beton", raw=True))
    overrides: dict[str, Any] = {
        "data": str(tmp_path / "x.beton"),
        "method": "scratch",
        "cache": None,
        "pipeline": "auto",
    }
    for name, ranks, order in (("pages", 1, "pages"), ("chosen", 2, "auto")):
        c = config(name, order=order, **overrides)
        with Ranks(ranks, tmp_path / name, _train_with_memory, c) as started:
            assert started.wait() == [0] * ranks, started.output()
    assert read_json(config("chosen").out / "config.json")["config"]["order"] == "pages"
    assert_near(config("chosen").out, config("pages").out)


def _train_here(rank: int, configs: list[TrainConfig]) -> None:
    import fastofa.data.dataset

    fastofa.data.dataset.PAGE = 4096
    _train(rank, configs[rank])


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["data", "pages"])
def test_nodes_with_different_data_are_refused(config, tmp_path, differs):
    """Other images, or the same images on other pages, with which the ranks would show some images twice."""
    overrides: dict[str, Any] = {"method": "scratch", "cache": None}
    if differs == "data":
        places = ["digits:100", "digits:50"]
        message = (
            r"digits:\d+: expected the same content on all nodes, got other content than rank 0's on 1 of 2 ranks; .*"
        )
    else:
        places = [str(tmp_path / f"{name}.beton") for name in ("pixels", "jpegs")]
        write(WriteConfig("digits:100", Path(places[0]), raw=True))
        write(WriteConfig("digits:100", Path(places[1])))
        overrides["order"] = "pages"
        message = r"the pages of .*\.beton: expected the same content on all nodes, got .* on 1 of 2 ranks; .*"
    configs = [config("other", data=place, pipeline="auto", **overrides) for place in places]
    with Ranks(2, tmp_path, _train_here, configs) as ranks:
        assert ranks.wait() == [2, 2], ranks.output()
    for output in ranks.output():
        assert re.fullmatch(f"fastofa: error: {message}\n", output), output
    assert not configs[0].out.exists()


# --- World and Vote ---------------------------------------------------------------------------------------------------


def _agree(rank: int, out: Path) -> None:
    """Call everything that World and Vote offer and write the results to a file for each rank."""
    world = join(timeout_s=PATIENCE_S)
    results: dict[str, Any] = {"world": (world.rank, world.size, world.local_rank, world.local_size, world.is_main)}
    results["broadcast"] = [world.broadcast(10 * rank + number) for number in range(3)]
    values = torch.tensor([1.0 + rank, 2.0])
    results["sum"], results["values"] = world.sum(values).tolist(), values.tolist()
    results["gathered"] = world.gather(values).tolist()
    results["ids"] = world.sum(torch.tensor([2**40 + rank])).tolist()

    set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=0.5))
    with world.no_timeout():
        time.sleep(1.5 if world.is_main else 0)
        (out / f"slow{rank}").touch()
    set_timeout(timedelta(seconds=20))
    results["all done"] = all((out / f"slow{other}").exists() for other in range(2))

    if rank == 1:
        time.sleep(0.3)
        (out / "late").touch()
    world.barrier()
    results["waited"] = (out / "late").exists()

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    for number, norm in enumerate(model):
        norm.running_mean.fill_(rank + number)
        norm.running_var.fill_(1 + 4 * rank)
        norm.num_batches_tracked.fill_(7)
    nn.init.constant_(model[0].weight, rank)
    world.average_statistics(model)
    results["state"] = {name: value.tolist() for name, value in model.state_dict().items()}

    vote = Vote(world)
    numbers = [[0, 0, 15, 0, 0], [0, 2, 0, 0, 0]][rank]
    results["votes"] = [vote(number) for number in numbers]
    results["last"] = [vote.finish(), vote.finish()]
    (out / f"{rank}.json").write_text(repr(results))
    world.leave()


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of `_agree` on two ranks."""
    out = tmp_path_factory.mktemp("agreed")
    with Ranks(2, out, _agree, out) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    return [eval((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_each_rank_knows_its_place(agreed):
    assert [result["world"] for result in agreed] == [(0, 2, 0, 2, True), (1, 2, 1, 2, False)]


def test_broadcast_gives_rank_0s_number(agreed):
    assert [result["broadcast"] for result in agreed] == [[0, 1, 2]] * 2


def test_sum_and_gather_leave_their_input_unchanged(agreed):
    """Large whole numbers are exact."""
    assert [result["sum"] for result in agreed] == [[3.0, 4.0]] * 2
    assert [result["values"] for result in agreed] == [[1.0, 2.0], [2.0, 2.0]]
    assert [result["gathered"] for result in agreed] == [[[1.0, 2.0], [2.0, 2.0]]] * 2
    assert [result["ids"] for result in agreed] == [[2**41 + 1]] * 2


def test_all_wait_for_the_slowest_rank(agreed):
    """In no_timeout also beyond the timeout."""
    assert [result["all done"] for result in agreed] == [True, True]
    assert [result["waited"] for result in agreed] == [True, True]


def test_only_running_statistics_are_averaged(agreed):
    """Of every batch norm; counters and weights stay unchanged."""
    for rank, result in enumerate(agreed):
        state = result["state"]
        assert (state["0.running_mean"], state["1.running_mean"]) == ([0.5, 0.5], [1.5, 1.5])
        assert state["0.running_var"] == state["1.running_var"] == [3.0, 3.0]
        assert state["0.num_batches_tracked"] == 7
        assert state["0.weight"] == [rank, rank]


def test_a_vote_is_known_to_all_at_the_next_step(agreed):
    """The maximum over the ranks. `finish` returns the last one, once."""
    assert [result["votes"] for result in agreed] == [[0, 0, 2, 15, 0]] * 2
    assert [result["last"] for result in agreed] == [[0, 0]] * 2


def _wait_for_rank_1(rank: int, where: str, out: Path) -> None:
    """Wait in one of three places for rank 1, which never arrives."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    world = None if where == "join" else join(timeout_s=2 * PATIENCE_S)
    (out / f"{rank}").touch()
    if rank == 1:
        time.sleep(2 * PATIENCE_S)
    elif world is None:
        join(timeout_s=2 * PATIENCE_S)
    elif where == "vote":
        Vote(world)
    else:
        with world.no_timeout():
            pass


@pytest.mark.parametrize("where", ["join", "vote", "no timeout"])
def test_ctrl_c_ends_a_wait_for_a_rank_that_never_arrives(tmp_path, where):
    with Ranks(2, tmp_path, _wait_for_rank_1, where, tmp_path) as ranks:
        while not all((tmp_path / f"{rank}").exists() for rank in range(2)):
            assert all(process.is_alive() for process in ranks.processes), ranks.output()
            time.sleep(0.01)
        time.sleep(0.5)  # rank 0 waits by now; if not, the case is easier
        first = ranks.processes[0]
        os.kill(first.pid, signal.SIGINT)
        first.join(PATIENCE_S)
        assert first.exitcode in (-signal.SIGINT, 1), ranks.output()
        assert ranks.processes[1].is_alive()


def test_one_process_makes_no_connection():
    world = World()
    assert (world.is_main, world.broadcast(3), world.sum(torch.ones(2)).tolist()) == (True, 3, [1.0, 1.0])
    world.barrier()
    with world.no_timeout():
        pass
    norm = nn.BatchNorm2d(2)
    world.average_statistics(norm)
    vote = Vote(world)
    assert [vote(0), vote(15), vote(0), vote.finish()] == [0, 15, 0, 0]
    world.leave()
    assert not torch.distributed.is_initialized()


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(5) == World()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(5) == World()


def test_only_errors_of_the_connection_become_lost_contact(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for error in (
        RuntimeError("[gloo/transport] Connection closed by peer"),
        RuntimeError("Application timeout caused pair closure"),  # gloo, too
        torch.distributed.DistBackendError("x"),
    ):
        with pytest.raises(LostContact, match=r"^rank 3: lost the other ranks \(.*\); .*--resume"), connection_errors():
            raise error
    for error in (RuntimeError("size mismatch"), BadInput("gloo"), ValueError("NCCL")):
        with pytest.raises(type(error)), connection_errors():
            raise error


def test_a_folder_that_is_not_shared_is_reported():
    check_shared(World(1, 2), True, "run/config.json")
    with pytest.raises(BadInput, match=r"rank 1: expected run/config.json as on rank 0, found none; put --out on"):
        check_shared(World(1, 2), False, "run/config.json")


# --- Vectors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return make_cache("digits:100", 10, tmp_path_factory.mktemp("vectors"), topk=4, features="pooled")


@pytest.mark.slow
def test_each_rank_restores_all_classes_of_its_own_images(config, vectors):
    """The run of two ranks has the losses of the run of one."""
    with float64():
        train(config("dkd-alone", method="dkd", cache=vectors.path))
    assert_near(train_on(2, config("dkd-pair", method="dkd", cache=vectors.path)), config("dkd-alone").out, rel=1e-4)


def _train_in_fp32(_: int, config: TrainConfig) -> None:
    cli.main(command_line("train", config))


@pytest.mark.slow
def test_the_modules_of_a_method_learn_on_two_ranks(config, vectors):
    """Each weight of the projector changes; DDP waits for no gradient that does not come."""
    c = config("rsd-pair", method="ofa+rsd", cache=vectors.path, checkpoint_every=1, keep=99)
    with Ranks(2, c.out.with_suffix(".logs"), _train_in_fp32, c) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    files = checkpoints(c.out)
    last, first = (load_tensors(file)[0] for file in (files[0], files[-1]))
    own = [name for name in first if name.startswith("student.methods.") and name.endswith("weight")]
    assert len(own) == 3
    assert not any(torch.equal(first[name], last[name]) for name in own)


# --- torchrun ---------------------------------------------------------------------------------------------------------


class Torchrun:
    """`torchrun --no-python ... fastofa train ...` with two processes, in a process group of its own."""

    def __init__(self, config: TrainConfig, restarts: int, command: Path = BIN / "fastofa") -> None:
        self.log = config.out.with_suffix(".log")
        meet = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
        torchrun = [BIN / "torchrun", "--no-python", "--nproc-per-node", "2", "--max-restarts", restarts, *meet]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*map(str, torchrun), str(command), *command_line("train", config)],
                stdout=log, stderr=log, env=environment, start_new_session=True, cwd=command.parent,
            )  # fmt: skip

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in {self.process.pid, *self.ranks()}:  # torchrun gives each rank a group of its own
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def ranks(self) -> list[int]:
        return sorted(children(self.process.pid))

    def reach(self, run: Path, step: int) -> None:
        wait_for_step(run, step, lambda: self.process.poll() is None)


@pytest.mark.slow
def test_a_run_under_torchrun_survives_a_stop_and_a_killed_rank(config):
    """SIGTERM saves, `--resume` goes on, and --max-restarts restarts a rank killed by SIGKILL."""
    overrides = {"epochs": 20, "eval_every": 10, "lr": 0.001}  # in fp32 the figures diverge with larger or more steps
    train(config("long", **overrides))
    c = config("torchrun", **overrides)
    with Torchrun(c, restarts=0) as started:
        started.reach(c.out, 3)
        started.process.send_signal(signal.SIGTERM)  # torchrun forwards it
        assert started.process.wait(PATIENCE_S) != 0
    output = started.log.read_text()
    step = load_tensors(newest(c.out))[1]["step"]
    assert 3 <= step < 100
    assert output.count(f"fastofa: saved step {step} of 100 in {c.out}; run the same command with --resume") == 1, (
        output
    )

    with Torchrun(config("torchrun", resume=True, **overrides), restarts=1) as started:
        started.reach(c.out, min(step + 20, 80))
        os.kill(started.ranks()[-1], signal.SIGKILL)
        assert started.process.wait(PATIENCE_S) == 0, started.log.read_text()
    launches = read_json(c.out / "environment.json")
    assert [launch["ranks"] for launch in launches] == [2, 2, 2]
    assert launches[1]["step"] == step < launches[2]["step"]
    assert "top-1" in started.log.read_text().splitlines()[-1]
    assert_near(c.out, config("long").out, rel=1e-3, images=3)


@pytest.mark.slow
def test_torchrun_does_not_restart_ranks_that_refuse_their_input(config, tmp_path):
    """Only rank 1 refuses its input, and a script stands between torchrun and the ranks."""
    write(WriteConfig("digits:100", tmp_path / "x.beton", raw=True))
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\n[ $RANK = 0 ] || cd elsewhere\n{BIN / "fastofa"} "$@"\nexit $?\n')
    script.chmod(0o755)
    c = config("stops", data="x.beton", method="scratch", cache=None, pipeline="auto")
    with Torchrun(c, restarts=3, command=script) as started:
        assert started.process.wait(PATIENCE_S) not in (0, None)
    output = started.log.read_text()
    assert (
        output.count(
            "fastofa: error: x.beton: expected a written dataset, found none; `fastofa write DATA x.beton` writes it\n"
        )
        == 1
    ), output
    assert output.count("fastofa: error: ") <= 2, output  # rank 0 may be killed before it can report why it stops
    assert not (c.out / "config.json").exists()


def test_a_rank_learns_that_another_refused_its_input(monkeypatch):
    """So it also exits with code 2, which stops the torchrun of its node."""
    monkeypatch.setattr("fastofa.training.distributed._store", torch.distributed.HashStore())
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(BadInput, match="no such data"), connection_errors():
        raise BadInput("no such data")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadInput, match="rank 0: stopped because rank 1 refused its input"), connection_errors():
        raise RuntimeError("gloo: Connection closed by peer")
