"""Convolutions whose stride equals their kernel size give the numbers of F.conv2d, in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastofa.kernels import stem_conv2d

# Kernel, stride, padding: ResNets, MobileNets, ConvNeXt and Swin, ViT, then whatever else.
STEMS = [(7, 2, 3), (3, 2, 1), (4, 4, 0), (16, 16, 0), (8, 8, 0), (7, 4, 3), (7, 4, 2), (3, 2, 0), (5, 3, 4), (2, 2, 1)]


@pytest.mark.parametrize(("kernel", "stride", "padding"), STEMS)
@pytest.mark.parametrize("size", [(32, 32), (33, 38), (17, 19)])
def test_equals_conv2d(kernel, stride, padding, size):
    """Result and gradients of pixels, weights and bias; odd sides, whose last pixels no kernel may reach."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight, bias = torch.randn(5, 3, kernel, kernel, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    results = []
    for function in (F.conv2d, stem_conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves, stride=stride, padding=padding)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_padded(channels):
    x, weight = torch.randn(1, channels, 9, 9), torch.randn(4, channels, 3, 3)
    y = stem_conv2d(x, weight, stride=2, padding=1)
    torch.testing.assert_close(y, F.conv2d(x, weight, stride=2, padding=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [4, 7])
def test_the_result_is_channels_last(kernel):
    y = stem_conv2d(torch.randn(2, 3, 16, 16), torch.randn(5, 3, kernel, kernel), stride=4)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "weight", "stride", "message"),
    [
        ((1, 3, 8, 8), (4, 2, 3, 3), 2, r"expected x \[B, C, H, W\] and weight"),
        ((1, 3, 8, 8), (4, 3, 3, 3), 1, "stride: expected at least 2, got 1"),
        ((1, 3, 2, 2), (4, 3, 3, 3), 2, "x: expected at least 3 pixels per side"),
    ],
)
def test_invalid_arguments_are_refused(x, weight, stride, message):
    with pytest.raises(ValueError, match=message):
        stem_conv2d(torch.zeros(x), torch.zeros(weight), stride=stride)
