"""Augment a batch whose images have different operations, partners and boxes, in Triton or by the twins in augment.py.

images = apply_operations(images, ops, amounts, fill)
images = mix_and_erase(images, 256, mixing, erasing)

Images are uint8 [B, 3, S, S] on any device, in any memory format. All other tensors are on the CPU, where the view
tables are: the images that an operation changes are selected there, so that nothing waits for a GPU. Both
implementations give the same bits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastofa.kernels import augment
from fastofa.kernels.augment import Color
from fastofa.kernels.choice import use_triton

NAMES = ("none", *augment.OPERATIONS)
"""Operations by their number."""
CACHE_PIXELS = 100_000  # pixels whose intermediate results fit into a CPU's cache


class Mixing(NamedTuple):
    """How each image is mixed with another one."""

    partners: Tensor
    """int64 [B]: the position of the other image in the batch, in 0..M-1."""
    shares: Tensor
    """float32 [B]: the image's own weight in a blend (mixup); 1 for none."""
    boxes: Tensor
    """int64 [B, 4]: the box that the other image replaces (cutmix): top, left, bottom, right in pixels; empty for none.
    An image has a blend or a box, not both."""


class Erasing(NamedTuple):
    """The part of each image that noise replaces."""

    boxes: Tensor
    """int64 [B, 4], as in `Mixing`."""
    keys: Tensor
    """int32 [B], of which the noise is a function."""
    mean: Sequence[float]
    """Mean of the noise, RGB in 0..1."""
    std: Sequence[float]
    """Standard deviation of the noise, RGB in 0..1."""


def apply_operations(images: Tensor, ops: Tensor, amounts: Tensor, fill: Color, impl: str | None = None) -> Tensor:
    """Apply to each image its own operations, from the first column to the last.

    Args:
        images: uint8 [B, 3, S, S]; may be overwritten.
        ops: uint8 [B, n], indices into `NAMES`.
        amounts: float32 [B, n], each in its operation's unit.
        fill: the colour of pixels that come from outside an image, 0..255.
        impl: "triton", "torch" or None (choose).

    Returns:
        uint8 [B, 3, S, S] in the memory format of `images`.

    Raises:
        ValueError: invalid shapes, dtypes or values; the message states what was expected and what was given.
    """
    _check_images(images)
    batch = len(images)
    if ops.ndim != 2 or len(ops) != batch or ops.dtype != torch.uint8 or (ops >= len(NAMES)).any():
        raise ValueError(
            f"ops: expected uint8 [{batch}, n] in 0..{len(NAMES) - 1}, got {ops.dtype} {tuple(ops.shape)}"
            + (f" with {int(ops.max())}" if ops.numel() else "")
        )
    if amounts.shape != ops.shape or amounts.dtype != torch.float32:
        expected = f"float32 {tuple(ops.shape)}"
        raise ValueError(f"amounts: expected {expected}, got {amounts.dtype} {tuple(amounts.shape)}")
    if use_triton("augment", impl, images.device):
        from fastofa.kernels import triton_augment

        return triton_augment.apply_operations(images, ops, amounts, fill)
    for op, amount in zip(ops.unbind(dim=1), amounts.unbind(dim=1), strict=True):
        for number in op[op > 0].unique().tolist():
            operation = augment.OPERATIONS[NAMES[number]]
            for part in _parts(op == number, images):
                _put(images, part, operation(_get(images, part), amount[part], fill))
    return images


def mix_and_erase(
    images: Tensor, count: int, mixing: Mixing | None, erasing: Erasing | None, impl: str | None = None
) -> Tensor:
    """Mix the first `count` images with their partners, then erase their boxes.

    Args:
        images: uint8 [M, 3, S, S], M >= count; may be overwritten.
        count: B.
        mixing, erasing: for the first `count` images; None for none.
        impl: "triton", "torch" or None (choose).

    Returns:
        uint8 [B, 3, S, S] in the memory format of `images`.

    Raises:
        ValueError: invalid shapes, dtypes or values; the message states what was expected and what was given.
    """
    _check_images(images)
    if mixing is None and erasing is None:
        return images[:count]
    if mixing is not None:
        _check("shares", mixing.shares, torch.float32, (count,))
        _check("boxes", mixing.boxes, torch.int64, (count, 4))
        _check("partners", mixing.partners, torch.int64, (count,))
        wrong = mixing.partners[(mixing.partners < 0) | (mixing.partners >= len(images))]
        if len(wrong):
            raise ValueError(f"partners: expected positions in 0..{len(images) - 1}, got {wrong[0]}")
    if erasing is not None:
        _check("boxes", erasing.boxes, torch.int64, (count, 4))
        _check("keys", erasing.keys, torch.int32, (count,))
    if use_triton("augment", impl, images.device):
        from fastofa.kernels import triton_augment

        return triton_augment.mix_and_erase(images, count, mixing, erasing)
    mixed = images[:count]
    if mixing is not None:
        mixed = mixed.clone(memory_format=torch.preserve_format)
        for chosen, kernel, parameters in (
            (mixing.shares < 1, augment.mixup, mixing.shares),
            (_not_empty(mixing.boxes), augment.cutmix, mixing.boxes),
        ):
            for part in _parts(chosen, images):
                own, other = _get(images, part), _get(images, mixing.partners[part])
                _put(mixed, part, kernel(own, other, parameters[part]))
    if erasing is not None:
        for part in _parts(_not_empty(erasing.boxes), mixed):
            box, key = erasing.boxes[part], erasing.keys[part]
            _put(mixed, part, augment.erase(_get(mixed, part), box, key, erasing.mean, erasing.std))
    return mixed


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8 [B, 3, S, S], got {images.dtype} {tuple(images.shape)}")


def _check(name: str, given: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if given.dtype != dtype or given.shape != shape:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {given.dtype} {tuple(given.shape)}")


# --- The images of a batch that one operation changes -----------------------------------------------------------------


def _not_empty(boxes: Tensor) -> Tensor:
    top, left, bottom, right = boxes.unbind(dim=1)
    return (bottom > top) & (right > left)


def _parts(chosen: Tensor, images: Tensor) -> Iterator[Tensor]:
    """Positions of the chosen images; on a CPU, in small parts, so that intermediate results stay in its cache."""
    which = chosen.nonzero().flatten()
    if len(which):
        on_cpu = images.device.type == "cpu"
        yield from which.split(max(1, CACHE_PIXELS // images.shape[-1] ** 2) if on_cpu else len(which))


def _get(images: Tensor, which: Tensor) -> Tensor:
    """Select images of a channels-last batch. Copying contiguous memory is much faster than images[which]."""
    at = which.to(images.device, non_blocking=True)
    return images.permute(0, 2, 3, 1).index_select(0, at).permute(0, 3, 1, 2)


def _put(images: Tensor, which: Tensor, values: Tensor) -> None:
    if images.device.type == "cpu":
        for i, value in zip(which.tolist(), values, strict=True):
            images[i].copy_(value)
    else:
        images.index_copy_(0, which.to(images.device, non_blocking=True), values)
