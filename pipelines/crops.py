"""Crop images on the device, each with its own filter.

Shapes: N images in the source, B crops, S side of the output.
"""

import numpy as np
import torch
from torch import Tensor

from fastofa.kernels import crop_resize


def crop_on_device(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int,
    ids: Tensor | None,
    bicubic: np.ndarray | None,
    impl: str | None,
) -> Tensor:
    """`crop_resize` with a filter for every crop: uint8 [B, 3, S, S], channels last.

    The crops of each filter are computed together: the bilinear ones by `impl`, the bicubic ones by the kernel's twin.

    Args:
        images, boxes, flip, size, ids, impl: see `crop_resize`.
        bicubic: bool [B], on the CPU: resize with a bicubic filter; None: bilinear for all.
    """
    if bicubic is None:
        return crop_resize(images, boxes, flip, size, ids, impl=impl)
    out = torch.empty(len(boxes), size, size, 3, dtype=torch.uint8, device=images.device).permute(0, 3, 1, 2)
    sources = torch.arange(len(boxes), device=images.device) if ids is None else ids
    for rows, is_bicubic in ((np.flatnonzero(~bicubic), False), (np.flatnonzero(bicubic), True)):
        if len(rows):
            at = torch.from_numpy(rows).to(images.device, non_blocking=True)
            chosen = None if is_bicubic else impl
            crops = crop_resize(images, boxes[at], flip[at], size, sources[at], impl=chosen, bicubic=is_bicubic)
            out[at] = crops
    return out
