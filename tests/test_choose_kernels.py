"""Which kernels run in a student: those named, those measured to be faster, and what prevents their use."""

import pytest
import timm
import torch
from torch import nn

from fastofa.student import choose_kernels
from fastofa.student.choose_kernels import use_kernels
from fastofa.student.exits import ConvExit
from fastofa.student.fused_depthwise import DepthwiseConv2d
from fastofa.student.fused_norms import NormAct2d
from fastofa.student.fused_stem import NormActPool2d, StridedConv2d
from fastofa.system.errors import BadInput

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleList([timm.create_model("resnet18", num_classes=5), ConvExit(1, 64, 512, 5)])


@pytest.fixture
def card(monkeypatch):
    """The GPU is one of this compute capability."""
    return lambda *version: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


FUSED = {NormAct2d, NormActPool2d, StridedConv2d, DepthwiseConv2d}


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ((), set()),
        (("off",), set()),
        (("loss",), set()),
        (("norms",), {NormAct2d}),
        (("stem", "norms"), {NormAct2d, NormActPool2d, StridedConv2d}),
        (("auto",), FUSED),
    ],
)
def test_named_kernels_run(model, card, kernels, expected):
    card(9, 0)
    use_kernels(model, kernels, GPU)
    assert kinds(model) & FUSED == expected


@pytest.mark.parametrize("version", [(8, 0), (8, 9), (10, 0)])
def test_auto_uses_no_kernels_on_a_gpu_that_was_not_measured(model, card, version):
    card(*version)
    before = kinds(model)
    use_kernels(model, ("auto",), GPU)
    use_kernels(model, ("auto",), CPU)
    assert kinds(model) == before


def test_auto_without_triton_is_reported_once(model, card, monkeypatch, capsys):
    card(9, 0)
    monkeypatch.setattr(choose_kernels, "HAS_TRITON", False)
    before = kinds(model)
    use_kernels(model, ("auto",), GPU)
    assert kinds(model) == before
    assert capsys.readouterr().err.count("kernels auto: Triton is not installed") == 1


def test_a_student_that_cannot_be_switched_is_unchanged(model, card, monkeypatch, capsys):
    """It fails half-way. With named kernels, the error is raised."""

    def fails(module: nn.Module) -> int:
        raise AttributeError("no drop_block")

    card(9, 0)
    monkeypatch.setitem(choose_kernels.SWITCHES, "norms", fails)
    before = [type(module) for module in model.modules()]
    use_kernels(model, ("auto",), GPU)
    assert [type(module) for module in model.modules()] == before
    assert "kernels auto: AttributeError in this student (no drop_block)" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(AttributeError, match="no drop_block"):
        use_kernels(model, ("norms",), GPU)


@pytest.mark.parametrize("synchronised", [False, True])
def test_synchronised_batch_norms_are_not_replaced(model, card, synchronised):
    card(9, 0)
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    use_kernels(model, ("auto",), GPU)
    found = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert found == (20 + 6 if synchronised else 0)


def test_named_kernels_need_a_gpu(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match=r"kernels: expected a GPU for exits norms, .* omit these kernels"):
        use_kernels(model, ("exits", "norms"), CPU)
