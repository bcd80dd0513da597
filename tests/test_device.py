"""Devices: each process of a host uses its own GPU, and a missing device is one line."""

import os

import pytest
import torch

from fastofa.system.device import choose_bf16, choose_compile, choose_device, choose_workers
from fastofa.system.errors import BadInput

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)


@pytest.mark.usefixtures("two_gpus")
def test_each_process_of_a_host_uses_the_gpu_with_its_local_rank():
    for name in ("auto", "cuda"):
        assert [choose_device(name, local_rank) for local_rank in (0, 1)] == [GPU, torch.device("cuda:1")]


@pytest.mark.usefixtures("two_gpus")
def test_a_named_device_is_used():
    assert choose_device("cuda:1", local_rank=0) == torch.device("cuda:1")
    assert choose_device("cpu", local_rank=1) == CPU


@pytest.mark.usefixtures("two_gpus")
def test_more_processes_than_gpus_are_refused():
    with pytest.raises(
        BadInput, match=r"expected at most 2 processes on this host, .* got number 3; lower --nproc-per-node"
    ):
        choose_device("auto", local_rank=2)


def test_without_a_gpu_every_process_computes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", local_rank=3) == CPU
    monkeypatch.setattr(torch, "empty", _no_gpu)
    with pytest.raises(BadInput, match="device 'cuda': expected auto, cpu, or a GPU of this machine"):
        choose_device("cuda")


def _no_gpu(*_: object, **__: object) -> None:
    raise AssertionError("Torch not compiled with CUDA enabled")


def test_auto_means_bf16_and_compile_on_a_gpu_only():
    for choose, on, off in ((choose_bf16, "bf16", "fp32"), (choose_compile, "on", "off")):
        assert [choose("auto", device) for device in (CPU, GPU)] == [False, True]
        assert [choose(on, device) for device in (CPU, GPU)] == [True, True]
        assert [choose(off, device) for device in (CPU, GPU)] == [False, False]
    assert choose_compile("max-autotune", CPU)


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(2, 1, 2), (96, 1, 16), (96, 8, 12), (2, 4, 1), (7, 2, 3)]
)
def test_the_processes_of_a_host_share_its_cores(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert choose_workers(None, processes) == expected
    assert choose_workers(5, processes) == 5
    assert choose_workers(0, processes) == 0


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    """Slim container images have none. With a GPU, Triton needs one, too."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for device, compiler in (("cpu", r"\(g\+\+\)"), ("cuda", r"\(gcc or clang\)")):
        with pytest.raises(BadInput, match=f"compile: expected a compiler {compiler}.*--compile off"):
            choose_compile("on", torch.device(device))
        assert not choose_compile("off", torch.device(device))
    assert not choose_compile("auto", torch.device("cpu"))
    (tmp_path / "c++").write_text("")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", "c++")
    assert choose_compile("on", torch.device("cpu"))
