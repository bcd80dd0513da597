"""Crop and resize: ours, and torchvision's, image by image."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from bench.kernel_cases.case import Case, on, rotate, short, training_dtype, twins
from fastofa.kernels import crop_resize
from fastofa.kernels.choice import HAS_TRITON


def crop_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Random crops of stored images, some of them flipped, to normalised bf16 (fp32 on a CPU)."""
    gpu = device.type == "cuda"
    sizes = (
        [(256, 224, b) for b in (256, 1024, 2048)] + [(160, 160, 1024), (256, 128, 1024)] if gpu else [(256, 224, 16)]
    )
    if quick:
        sizes = [(256, 224, 1024)] if gpu else [(48, 32, 4)]
    for source, size, batch in sizes:
        yield crop_case(device, source, size, batch)


def crop_case(device: torch.device, source: int, size: int, batch: int) -> Case:
    dtype = training_dtype(device)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (batch, source, source, 3), generator=generator, dtype=torch.uint8)
        sides = (source * (0.3 + 0.7 * torch.rand(batch, 2, generator=generator))).floor()
        corner = ((source - sides) * torch.rand(batch, 2, generator=generator)).floor()
        flip = torch.rand(batch, generator=generator) < 0.5
        return images.to(device), torch.cat([corner, sides], dim=1).to(device), flip.to(device)

    inputs = rotate(make, batch * source * source * 3, device)
    boxes_and_flips = [inputs[i][1:] for i in range(len(inputs))]
    needed = sum(box[:, 2:].prod(dim=1).sum().item() for box, _ in boxes_and_flips) / len(inputs)
    moved = 3 * needed + batch * 3 * size * size * dtype.itemsize
    lists = [(box.int().tolist(), flip.tolist()) for box, flip in boxes_and_flips]

    def ours(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda images, boxes, flip: crop_resize(
            images, boxes, flip, size, mean=mean, std=std, dtype=dtype, impl=impl
        )

    def torchvision(i: int) -> Tensor:
        images, (boxes, flips) = inputs[i][0], lists[i % len(inputs)]
        crops = []
        for image, box, flip in zip(images, boxes, flips, strict=True):
            crop = v2.resized_crop(image.permute(2, 0, 1), *box, size=[size, size], antialias=True)
            crops.append(v2.horizontal_flip(crop) if flip else crop)
        return v2.normalize(v2.to_dtype(torch.stack(crops), dtype, scale=True), list(mean), list(std))

    candidates = twins(ours("torch"), partial(on, inputs))
    if device.type == "cuda" and HAS_TRITON:
        candidates["triton"] = on(inputs, ours("triton"))
    candidates["torchvision v2, one by one"] = torchvision
    name = f"{source} to {size} px, B={batch}, {short(dtype)}"
    compared, waiting = tuple(list(candidates)[1:]), ("torchvision v2, one by one",)
    return Case("crop", name, moved, batch, candidates, compared, 0.03, waiting, inputs)
