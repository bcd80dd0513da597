"""Which kernels run in a student: what was named, what was measured to be faster, and what stands in the way."""

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
def test_what_is_named_runs(model, card, kernels, expected):
    card(9, 0)
    use_kernels(model, kernels, GPU)
    assert kinds(model) & FUSED == expected


@pytest.mark.parametrize("version", [(8, 0), (8, 9), (10, 0)])
def test_auto_is_off_where_nothing_was_measured(model, card, version):
    card(*version)
    before = kinds(model)
    use_kernels(model, ("auto",), GPU)
    use_kernels(model, ("auto",), CPU)
    assert kinds(model) == before


def test_auto_without_triton_is_one_notice(model, card, monkeypatch, capsys):
    card(9, 0)
    monkeypatch.setattr(choose_kernels, "HAS_TRITON", False)
    before = kinds(model)
    use_kernels(model, ("auto",), GPU)
    assert kinds(model) == before
    assert capsys.readouterr().err.count("kernels auto: Triton is not installed") == 1


def test_a_student_that_cannot_be_switched_stays_as_it_was(model, card, monkeypatch, capsys):
    """Half switched when it fails; named kernels fail with the error."""

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


def test_named_kernels_need_a_gpu(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match=r"kernels: expected a GPU for exits norms, .* omit these kernels"):
        use_kernels(model, ("exits", "norms"), CPU)
