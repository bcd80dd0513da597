"""Compute a strided convolution of few channels as one of stride 1 on squares of pixels with many channels, exactly.

Tensor cores need channels in multiples of eight, but an image has three. With stride 2, every square of 2 x 2 pixels
becomes one position of 12 channels (16 with padding), and a 7 x 7 kernel becomes a 4 x 4 kernel over squares, with
zeros where it had no weights. If a kernel is as wide as its stride, the convolution is a matrix product. The weights
are rearranged in the forward pass, so that their gradients have the stored layout. Everything is plain PyTorch, which a
compiler fuses with the operations that produce the pixels.

Shapes: B batch, C channels in, D channels out, S stride, K side of the kernel, T side of the kernel over squares.
"""

import torch.nn.functional as F
from torch import Tensor


def stem_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 2, padding: int = 0, multiple: int = 8
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding) with stride > 1, for few channels.

    Args:
        x: [B, C, H, W].
        weight: [D, C, K, K].
        multiple: the channels of squares are padded with zeros to a multiple of this.

    Returns:
        [B, D, OH, OW], channels last.

    Raises:
        ValueError: invalid shapes or options; the message states what was expected and what was given.
    """
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"expected x [B, C, H, W] and weight [D, C, K, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if stride < 2:
        raise ValueError(f"stride: expected at least 2, got {stride}")
    kernel = weight.shape[2]
    heights, widths = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:])
    if heights < 1 or widths < 1:
        raise ValueError(f"x: expected at least {kernel} pixels a side with its padding, got {tuple(x.shape)}")
    before, taps = squares(kernel, stride, padding)
    height, width = heights + taps - 1, widths + taps - 1  # of squares
    pad = [before * stride, width * stride - before * stride - x.shape[3]]
    pad += [before * stride, height * stride - before * stride - x.shape[2]]
    x = F.pad(x, pad)  # negative padding crops pixels that no kernel reaches
    batch, channels = x.shape[:2]
    x = x.view(batch, channels, height, stride, width, stride).permute(0, 2, 4, 3, 5, 1)
    x = x.reshape(batch, height, width, stride * stride * channels)

    lead = before * stride - padding  # rows of zeros above the kernel, so that its squares align with the image's
    weight = F.pad(weight, [lead, taps * stride - lead - kernel] * 2)
    weight = weight.view(-1, channels, taps, stride, taps, stride).permute(0, 2, 4, 3, 5, 1)
    weight = weight.reshape(weight.shape[0], taps, taps, stride * stride * channels)
    if taps == 1:
        return F.linear(x, weight.flatten(1), bias).permute(0, 3, 1, 2)
    more = -x.shape[3] % multiple
    x, weight = (F.pad(t, [0, more]).permute(0, 3, 1, 2) for t in (x, weight))
    return F.conv2d(x, weight, bias)


def squares(kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """How many squares before its output's square a kernel begins, and the number T of squares that it spans."""
    before = -(-padding // stride)
    return before, (kernel - 1 - padding) // stride + before + 1
