"""The benchmarks run, keep to their time limits and compute correct results. Their measurements are not judged here."""

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import (
    bench_kernels,
    bench_loader,
    epoch,
    gpu,
    plot,
    profile_step,
    roofline,
)
from bench.kernel_cases.case import BASELINE, Case
from bench.lib import loaders, machine, turns
from bench.lib.loader_step import stream
from bench.lib.photographs import write_folder
from bench.lib.steps import Job, StepOptions, official_step, open_step
from bench.lib.timing import interleaved_ms, median_ratio
from bench.plots import ladder as ladder_chart
from bench.plots import loaders as loaders_chart
from fastofa.data.open import open_dataset
from fastofa.pipelines import open_pipeline
from fastofa.runs import recipes

ROOT = Path(__file__).parent.parent
H200 = machine.Machine(tflops=790, gb_per_second=4300, dtype="bfloat16")
# Milliseconds a step of 1,024 images of 224 px that were computed for one H200 by other means, and what exits add.
FLOORS = {
    "resnet18": (24.2, 4.1),
    "resnet50": (85.0, 20.9),
    "deit_tiny_patch16_224": (20.4, 3.7),
    "resmlp_12_224": (33.1, None),
    "mobilenetv2_100": (44.5, None),
}


@pytest.mark.slow
def test_jobs_of_the_gpu_run_at_a_tiny_size(tmp_path):
    """One of each kind. Each record contains environment, baseline and number of rounds."""
    chosen = ["resnet18", "loaders", "kernels"]
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--only", *chosen, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    records = {path.stem.rpartition("_")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert records.keys() == set(chosen)
    for record in records.values():
        assert record["environment"].keys() >= {"date", "commit", "command", "cpu", "cores", "gpu", "torch", "timm"}
        assert record["result"]["baseline"]
        assert record["result"]["rounds"] >= 1
    (job,) = records["resnet18"]["result"]["jobs"]
    assert all(row.get("rounds_ms") or row["skipped"] for row in job["rows"])
    assert job["profile"]["kernels"][0]["ms"] > 0
    for draw, name in ((ladder_chart.draw, "resnet18"), (loaders_chart.draw, "loaders")):
        draw(records[name], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_a_job_that_ran_out_of_memory_beside_others_is_retried(message, monkeypatch):
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: None)
    failures = [RuntimeError(message)] * 2

    def call() -> str:
        if failures:
            raise failures.pop()
        return "done"

    with pytest.raises(RuntimeError, match="CUDA"):  # alone nobody gives memory back
        turns.patiently(call)
    monkeypatch.setenv(turns.VARIABLE, "turn")
    failures[:] = [RuntimeError(message)] * 2
    assert turns.patiently(call) == "done"
    failures[:] = [RuntimeError("illegal memory access")]
    with pytest.raises(RuntimeError, match="illegal"):
        turns.patiently(call)


@pytest.mark.parametrize("job", gpu.JOBS, ids=lambda job: job.name)
def test_the_arguments_of_every_gpu_job_are_accepted(job, monkeypatch):
    """Those of the full size, too, although nothing runs without a GPU."""
    if job.arguments[0] == "pytest":
        return
    module = importlib.import_module(job.arguments[0])

    def parse(parser, argv):
        raise Parsed(vars(original(parser, argv)))

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for arguments in (job.arguments, job.tiny):
        with pytest.raises(Parsed):
            module.main([*arguments[1:], "--out", "out"])


class Parsed(Exception):
    """Raised when the arguments are parsed, instead of running the benchmark."""


@pytest.mark.slow
@pytest.mark.ffcv
@pytest.mark.dali
def test_loaders_and_their_peers_are_measured(tmp_path):
    """If both libraries are installed, none is left out."""
    names = ["stock FFCV, raw", "ffcv, raw", "stock DALI", "dali", "packed, gather only"]
    tiny = ["--image-sizes", "32", "--batch-size", "4", "--count", "20", "--rounds", "1", "--calls", "2"]
    bench_loader.main(["--only", *names, *tiny, "--workers", "1", "--out", str(tmp_path)])
    (record,) = (json.loads(path.read_text())["result"] for path in tmp_path.glob("loaders_*.json"))
    assert [row["pipeline"] for row in record["rows"]] == names
    assert record["skipped"] == {}
    assert record["data"]["images"] == 20
    for row in record["rows"]:
        assert min(row[name] for name in ("images_per_second", "memory_mb", "ratio_to_baseline")) > 0
        assert (row["ratio_to_peer"] is None) == (row["pipeline"] not in ("ffcv, raw", "dali"))


def test_a_sweep_compares_at_the_same_number_of_workers(tmp_path, monkeypatch, capsys):
    speed = {"PIL + DataLoader": 100, "stock FFCV": 150, "ffcv": 300}

    def measure(task):
        return {"images_per_second": speed[task.name] * task.workers, "cpu_s_per_1000": 1.0, "memory_mb": 1.0}

    monkeypatch.setattr(bench_loader, "measure", measure)
    monkeypatch.setattr(bench_loader, "write_folder", lambda out, *_: write_folder(out, 2, [(8, 8)]))
    monkeypatch.setattr(loaders, "installed", lambda module: True)
    bench_loader.main(["--only", *speed, "--workers", "1", "2", "4", "--rounds", "2", "--out", str(tmp_path)])
    (source,) = tmp_path.glob("loaders_*.json")
    record = json.loads(source.read_text())
    rows = {(row["pipeline"], row["workers"]): row for row in record["result"]["rows"]}
    for workers in (1, 2, 4):
        assert rows["ffcv", workers]["ratio_to_baseline"] == pytest.approx(3)
        assert rows["ffcv", workers]["ratio_to_peer"] == pytest.approx(2)
    said = capsys.readouterr().out
    assert [said.count(f"workers: {workers}") for workers in (1, 2, 4)] == [1, 1, 1]
    plot.main(["--records", str(tmp_path), "--out", str(tmp_path)])
    assert (tmp_path / "loaders.png").stat().st_size > 10_000


def test_labels_at_the_ends_of_lines_do_not_overlap():
    places = loaders_chart.apart([0.1, 0.1, 0.12, 0.9], gap=0.05)
    assert min(b - a for a, b in itertools.pairwise(places)) >= 0.05 - 1e-9
    assert sum(places) == pytest.approx(1.22)
    assert loaders_chart.apart([0.1, 0.5], gap=0.05) == pytest.approx([0.1, 0.5])


@pytest.mark.dali
def test_nvimagecodec_decodes_the_same_crops_as_torchvision(tmp_path):
    """It is installed with DALI."""
    write_folder(tmp_path / "photos", 6, [(60, 80), (90, 50)])
    task = loaders.Task("nvImageCodec", {"folder": str(tmp_path / "photos")}, 32, 3, 1, 0, "cpu")
    dataset = open_dataset(task.sources["folder"])
    expected = stream(open_pipeline("torchvision", dataset, task.image_size, task.batch_size), dataset)
    for images, batch in itertools.islice(zip(loaders.decoded_crops(task), expected, strict=False), 2):
        assert images.shape == batch.images.shape
        assert (images.int() - batch.images.int()).abs().max() <= 1


def test_jobs_take_turns_and_a_failed_one_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """All prepare at once and are measured in order of priority; a job that is not ready is passed over."""
    wait = "from bench.lib.turns import wait_for_turn; wait_for_turn(); "
    programs = {
        "slow": f"import time; time.sleep(3); {wait}print('slow measured')",
        "first": f"{wait}print('first measured')",
        "fails": f"{wait}raise SystemExit(3)",
        "early": "raise SystemExit(4)",
        "last": f"{wait}import time; time.sleep(600)",
        "after": f"{wait}print('after measured')",
    }
    monkeypatch.setattr(gpu, "command", lambda job, dry_run, out: [sys.executable, "-c", *job.arguments])
    monkeypatch.setattr(gpu, "_has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "COMPILING", 0)
    monkeypatch.setattr(gpu, "ALONE_S", 3)
    monkeypatch.setattr(gpu, "JOBS", tuple(gpu.Job(name, (code,), ()) for name, code in programs.items()))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    status = {line[:16].strip(): line[17:37].strip() for line in said.splitlines()[-8:-1]}
    assert status == {
        "slow": "ok", "first": "ok", "fails": "failed (3)", "early": "failed (4)", "last": "ran out of time",
        "after": "ok", "job": "",
    }  # fmt: skip
    assert said.index("first measured") < said.index("slow measured")
    assert (tmp_path / "first.log").read_text() == "first measured\n"
    assert gpu.main(["--out", str(tmp_path), "--only", "slow", "--minutes", "0.01"]) == 1
    assert "left out: no time" in capsys.readouterr().out


@pytest.mark.parametrize("student", FLOORS)
def test_floors_equal_independent_computations(student):
    found = {
        exits: sum(o.ms(H200) for o in roofline.operations(student, 224, 1024, 1000, exits, torch.bfloat16))
        for exits in (True, False)
    }
    step, exits = FLOORS[student]
    assert found[False] == pytest.approx(step, rel=0.15)
    if exits is not None:
        assert found[True] - found[False] == pytest.approx(exits, rel=0.15)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_published_step_and_ours_have_the_same_losses(channels_last):
    """From the same weights, on the same images, with the same teacher, step after step."""
    job = Job("test_resnet", "test_vit", 32, 4, 10, torch.device("cpu"))
    official = official_step(job)
    options = StepOptions(online_teacher=True, channels_last=channels_last)
    (step, targets), batch = open_step(job, options), job.batch(channels_last)
    for _ in range(3):
        expected = official()
        step.reset_sums()
        step([batch], targets, lr=0.1)
        assert step.sums[:4].tolist() == pytest.approx(expected, rel=1e-6)


def test_ratios_are_medians_of_rounds():
    assert median_ratio({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 2.0]}, "a", "b") == 2


def test_context_managers_are_entered_for_their_rounds():
    class Loader:
        log = ""

        def __enter__(self):
            self.log += "("

        def __call__(self):
            self.log += "."

        def __exit__(self, *error):
            self.log += ")"

    loader = Loader()
    interleaved_ms({"loader": loader}, torch.device("cpu"), rounds=2, calls=3, warmup=1)
    assert loader.log == "(.)(....)(....)"


# A GPU's trace: two kernels of one convolution's backward pass, a compiled kernel, one that nobody launched.
def _operation(number, name, dims, types, concrete=()):
    shapes = {"External id": number, "Input Dims": dims, "Input type": types, "Concrete Inputs": list(concrete)}
    return {"cat": "cpu_op", "name": name, "ts": number * 100.0, "dur": 50.0, "tid": 1, "args": shapes}


def _kernel(number, name, dur):
    return {"cat": "kernel", "name": name, "ts": 0.0, "dur": dur, "args": {"External id": number}}


BF16 = "c10::BFloat16"
TRACE = [
    _operation(1, "aten::convolution_backward", [[8, 64, 7, 7], [8, 64, 7, 7], [64, 1, 3, 3]], [BF16] * 3),
    _operation(2, "triton_poi_fused_relu_0", [[8, 64, 7, 7], [8, 64, 7, 7], []], [BF16, BF16, "Scalar"]),
    _kernel(1, "dgrad2d_c1_k1_nhwc", 30.0),
    _kernel(1, "wgrad2d_c1_k1_nhwc", 10.0),
    _kernel(2, "triton_poi_fused_relu_0", 5.0),
    _kernel(9, "memset", 1.0),
]


def test_gpu_kernels_are_named_after_their_operation_and_share_its_bytes():
    rows = {r["name"]: r for r in profile_step.tabulate(profile_step.samples(TRACE), 1, H200, 0)}
    dgrad = rows["depthwise convolution_backward: dgrad2d_c1_k1_nhwc"]
    wgrad = rows["depthwise convolution_backward: wgrad2d_c1_k1_nhwc"]
    features, weight = 8 * 64 * 49 * 2, 64 * 9 * 2
    assert (dgrad["gb"] + wgrad["gb"]) * 1e9 == pytest.approx(2 * (2 * features + weight))
    assert dgrad["gb"] / wgrad["gb"] == pytest.approx(3)
    assert rows["triton_poi_fused_relu_0"]["gb"] * 1e9 == pytest.approx(2 * features)
    assert rows["memset"]["gb"] is None
    assert sum(row["share_of_step"] for row in rows.values()) == pytest.approx(1)


def test_convolutions_whose_padding_comes_first_in_the_trace():
    dims, types = [[2, 3, 64, 64], [16, 3, 7, 7], []], ["float", "float", ""]
    for name, lists in (("convolution", ("[2, 2]", "[3, 3]")), ("mkldnn_convolution", ("[3, 3]", "[2, 2]"))):
        _, flops = profile_step.cost(_operation(1, f"aten::{name}", dims, types, ["", "", "", *lists, "[1, 1]"]))
        assert flops == 2 * (2 * 16 * 32 * 32) * (3 * 7 * 7)


def test_an_epoch_is_limited_by_its_slowest_part():
    config = recipes.imagenet_fast(data="synthetic", student="resnet18", out=Path())
    rates = epoch.Rates(
        step={160: 2000.0, 192: 1000.0, 224: 500.0},
        official={160: 200.0, 192: 100.0, 224: 50.0},
        teacher=400.0,
        loader={160: 1000.0, 192: 1000.0, 224: 1000.0},
        rounds_ms={},
        source={},
    )
    found = epoch.extrapolate(config, 192, rates, "torchvision")
    assert sum(e["epochs"] for e in found["epochs"]) == 16
    assert [(e["image_size"], e["limit"]) for e in found["epochs"]] == [(160, "loader"), (192, "step")]
    assert found["training_s"] == pytest.approx(16 * epoch.IMAGES / 1000)
    assert found["precompute_s"] == pytest.approx(16 * epoch.IMAGES / 400)
    assert found["limit"] == "precompute"
    assert epoch.together(1000.0, 1000.0, "resident") == pytest.approx(500)


def test_a_kernel_with_wrong_results_is_not_timed():
    """Nor is one that fails. A peer that computes something else is timed."""
    truth = torch.arange(1.0, 5)

    def fails(i: int) -> None:
        raise RuntimeError("no such instruction")

    candidates = {
        BASELINE: lambda i: truth,
        "near": lambda i: truth * 1.01,
        "wrong": lambda i: truth.flip(0),
        "nan": lambda i: truth / 0 * 0,
        "failing": fails,
        "peer": lambda i: truth.flip(0),
    }
    case = Case("k", "4", 32e6, 4, candidates, ("near", "wrong", "nan"), tolerance=0.02)
    rows = {row["candidate"]: row for row in bench_kernels.measure(case, torch.device("cpu"), 2, copy_gb_s=10)}
    assert {name for name, row in rows.items() if "red" in row} == {"wrong", "nan", "failing"}
    assert rows["wrong"]["red"] == "differs from its twin by 75.0% of the greatest number"
    assert "no such instruction" in rows["failing"]["red"]
    timed = rows["near"]
    assert timed["p20_ms"] <= timed["ms"] <= timed["p80_ms"]
    assert timed["gb_per_second"] == pytest.approx(32 / timed["ms"])
    assert timed["of_copy"] == pytest.approx(timed["gb_per_second"] / 10)
    assert "no such instruction" in bench_kernels.table(list(rows.values()))
