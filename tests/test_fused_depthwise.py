"""Models whose depthwise convolutions run the kernel, batch norms folded in, against the same models as made."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from fastofa.exits import ConvExit
from fastofa.fused_depthwise import use_depthwise_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused(model: nn.Module, switched: int) -> nn.Module:
    model = copy.deepcopy(model)
    assert use_depthwise_kernel(model) == switched
    return model


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms with weights, biases and running statistics unlike 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(DEVICE, memory_format=torch.channels_last)


def step(model: nn.Module, images: Tensor, training: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after one forward and backward pass, by name."""
    model.train(training)
    images = images.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        out = model(images)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"out": out.detach(), "gradient of images": images.grad, **gradients, **buffers}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """To `tolerance` of each tensor's greatest number."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        error = (got[name] - value).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), 1e-3), (name, error)


def make_exit() -> nn.Module:
    """Two SepConvs: four depthwise convolutions, of which the first has no batch norm before it."""
    return randomize(ConvExit(2, 8, 12, 5))


@pytest.mark.kernel
@pytest.mark.parametrize("training", [True, False])
def test_an_exit_with_kernels_is_the_same(training):
    model, images = make_exit(), torch.randn(3, 8, 8, 8).to(DEVICE)
    assert_same(step(fused(model, 4), images, training), step(model, images, training), 2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_mobilenet_is_the_same(training, monkeypatch):
    """By the twin on a CPU: what is tested is the folding."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = randomize(timm.create_model("mobilenetv2_100", num_classes=5)).double()
    images = torch.randn(2, 3, 64, 64).to(DEVICE, torch.float64)
    if DEVICE == "cuda":
        model, images = model.float(), images.float()
    tolerance = 1e-9 if DEVICE == "cpu" else 1e-3
    assert_same(step(fused(model, 17), images, training), step(model, images, training), tolerance)
