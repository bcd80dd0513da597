"""kernels.crop_resize against torchvision on photographs, and against a float64 oracle for fractional boxes."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from fastofa.kernels import crop_resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """uint8 [2, 427, 640, 3]: a temple and a flower."""
    return torch.from_numpy(np.stack(load_sample_images().images))


def by_torchvision(image: Tensor, box: list[int], flip: bool, size: int) -> Tensor:
    out = tv.resized_crop(image.permute(2, 0, 1), *box, [size, size], antialias=True)
    return tv.horizontal_flip(out) if flip else out


def by_float64(image: np.ndarray, box: list[float], size: int) -> np.ndarray:
    """[S, S, 3]: antialiased bilinear filtering of the pixels that the box overlaps, one output pixel at a time."""

    def weights(start: float, length: float, source: int) -> list[dict[int, float]]:
        scale, rows = length / size, []
        for o in range(size):
            touched = [i for i in range(source) if start - 1 < i < start + length]
            w = {i: max(0.0, 1 - abs(i + 0.5 - start - (o + 0.5) * scale) / max(scale, 1)) for i in touched}
            rows.append({i: v / sum(w.values()) for i, v in w.items()})
        return rows

    top, left, height, width = box
    rows, columns = weights(top, height, image.shape[0]), weights(left, width, image.shape[1])
    out = np.zeros((size, size, 3))
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            for i, a in row.items():
                for j, b in column.items():
                    out[y, x] += a * b * image[i, j]
    return out


@pytest.mark.parametrize("size", [32, 160, 224, 333])
def test_equals_torchvision_on_photographs(photographs, size):
    """Down, up, tall, wide, at the edges, one pixel and the whole image; flipped or not. Also `ids` and layout."""
    boxes = [[0, 0, 427, 640], [13, 27, 300, 257], [327, 540, 100, 100], [200, 0, 31, 47], [0, 320, 427, 20]]
    boxes += [[5, 400, 9, 240], [400, 600, 1, 1], [0, 0, size, size] if size <= 427 else [0, 0, 1, 2]]
    ids = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0])
    flip = torch.tensor([False, True, False, True] * 2)
    got = crop_resize(photographs, torch.tensor(boxes), flip, size, ids=ids)
    assert got.dtype == torch.uint8
    assert got.shape == (8, 3, size, size)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for out, i, box, mirrored in zip(got, ids, boxes, flip, strict=True):
        error = (out.int() - by_torchvision(photographs[i], box, bool(mirrored), size).int()).abs()
        assert error.max() <= 2, box
        assert error.float().mean() <= 0.3, box


@pytest.mark.parametrize("size", [32, 224, 333])
def test_bicubic_equals_pillow_on_photographs(photographs, size):
    """Pillow's resizing of the cropped image, rows first, as torch does it and Pillow did until it chose the cheaper
    order. To 2 of 255; the bilinear filter differs by more.
    """
    boxes = [[0, 0, 427, 640], [13, 27, 300, 257], [327, 540, 100, 100], [200, 0, 31, 47], [5, 400, 9, 240]]
    flip, ids = torch.tensor([False, True, False, True, False]), torch.tensor([0, 1, 1, 0, 1])
    got = crop_resize(photographs, torch.tensor(boxes), flip, size, ids=ids, bicubic=True)
    bilinear = crop_resize(photographs, torch.tensor(boxes), flip, size, ids=ids)
    scaled = crop_resize(photographs, torch.tensor(boxes), flip, size, ids=ids, dtype=torch.float32, bicubic=True)
    torch.testing.assert_close(scaled * 255, got.float(), rtol=0, atol=0.51)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for out, other, i, (top, left, height, width), mirrored in zip(got, bilinear, ids, boxes, flip, strict=True):
        cropped = Image.fromarray(photographs[i, top : top + height, left : left + width].numpy())
        rows = cropped.resize((size, height), Image.Resampling.BICUBIC)
        expected = tv.pil_to_tensor(rows.resize((size, size), Image.Resampling.BICUBIC)).int()
        expected = expected.flip(-1) if mirrored else expected
        error = (out.int() - expected).abs()
        assert error.max() <= 2
        assert error.float().mean() <= 0.1
        assert (other.int() - expected).abs().float().mean() > 3 * error.float().mean()


def test_the_kernel_is_bilinear_only(photographs):
    with pytest.raises(ValueError, match="impl: expected 'torch' or None for the bicubic filter, got 'triton'"):
        crop_resize(photographs, torch.zeros(2, 4), torch.tensor([False, True]), 8, bicubic=True, impl="triton")


def test_a_box_of_the_output_size_is_copied(photographs):
    """Without filtering: pixel for pixel, and flipped."""
    boxes = torch.tensor([[7, 30, 96, 96], [300, 11, 96, 96]])
    got = crop_resize(photographs, boxes, torch.tensor([False, True]), 96)
    assert torch.equal(got[0], photographs[0, 7:103, 30:126].permute(2, 0, 1))
    assert torch.equal(got[1], photographs[1, 300:396, 11:107].permute(2, 0, 1).flip(-1))


def test_floating_outputs_are_scaled_and_normalised(photographs):
    """fp32 equals torchvision's float path; bf16 and fp16 equal fp32 up to their rounding; without mean 0..1."""
    boxes, flip = torch.tensor([[13, 27, 300, 257], [100, 100, 50, 61]]), torch.tensor([True, False])
    expected = []
    for image, box, mirrored in zip(photographs, boxes.tolist(), flip, strict=True):
        expected.append(by_torchvision(tv.to_dtype(image, torch.float32, scale=True), box, bool(mirrored), 64))
    expected = torch.stack(expected)
    plain = crop_resize(photographs, boxes, flip, 64, dtype=torch.float32)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = crop_resize(photographs, boxes, flip, 64, mean=MEAN, std=STD, dtype=dtype)
        assert got.dtype == dtype
        atol = 1e-4 + 3 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.float(), tv.normalize(expected, MEAN, STD), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "box",
    [
        [1.25, 2.5, 6.5, 7.75],  # downscaled in height and width
        [0.9, 3.1, 2.2, 10.4],  # up in height, down in width
        [10.6, 0.0, 1.4, 15.0],  # at the lower border
        [4.5, 6.5, 1.0, 1.0],  # one pixel large, half a pixel off: between two pixels' centres
        [5.2, 3.6, 0.3, 0.2],  # smaller than a pixel, and no centre in it
    ],
)
def test_fractional_boxes_equal_a_float64_oracle(box):
    image = torch.randint(0, 256, (12, 15, 3), dtype=torch.uint8)
    for size in (1, 5, 8):
        got = crop_resize(image[None], torch.tensor([box]), torch.tensor([False]), size, dtype=torch.float32)
        expected = by_float64(image.numpy().astype(np.float64), box, size)
        np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy() * 255, expected, rtol=0, atol=0.01)


def test_a_fractional_box_samples_its_position():
    """On a ramp of 4 grey levels a pixel, the middle of a box has the value of its position, and flipping swaps the
    ends.
    """
    ramp = (4 * torch.arange(60, dtype=torch.uint8))[None, :, None].expand(40, 60, 3)
    lefts = torch.tensor([10.0, 10.25, 10.5, 10.9])
    boxes = torch.stack([torch.tensor([3.0, left, 20.5, 24.0]) for left in lefts])
    images = ramp.expand(4, -1, -1, -1)
    got = 255 * crop_resize(images, boxes, torch.zeros(4, dtype=torch.bool), 8, dtype=torch.float32)
    for row, left in zip(got, lefts, strict=True):
        position = left + (torch.arange(8) + 0.5) * 3  # of the output pixels' centres
        expected = 4 * (position - 0.5)
        torch.testing.assert_close(row[:, :, 2:6], expected[2:6].expand(3, 8, 4), rtol=0, atol=0.01)
    mirrored = 255 * crop_resize(images, boxes, torch.ones(4, dtype=torch.bool), 8, dtype=torch.float32)
    torch.testing.assert_close(mirrored, got.flip(-1))


def test_an_empty_batch_and_images_stored_channels_first(photographs):
    """An empty batch gives an empty batch; a permuted view of [N, 3, H, W] works like [N, H, W, 3]."""
    boxes, flip = torch.tensor([[0, 0, 400, 600]] * 2), torch.tensor([False, True])
    none = crop_resize(photographs, boxes[:0], flip[:0], 32, ids=torch.tensor([], dtype=torch.int64))
    assert none.shape == (0, 3, 32, 32)
    permuted = photographs.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(crop_resize(permuted, boxes, flip, 32), crop_resize(photographs, boxes, flip, 32))


GOOD = {
    "images": torch.zeros(2, 4, 5, 3, dtype=torch.uint8),
    "boxes": torch.tensor([[0, 0, 4, 5]] * 2),
    "flip": torch.zeros(2, dtype=torch.bool),
    "size": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)}, r"images: expected uint8 \[N, H, W, 3\], got"),
        ({"images": torch.zeros(4, 5, 3, dtype=torch.uint8)}, r"got torch.uint8 \(4, 5, 3\)"),
        ({"images": torch.zeros(2, 4, 5, 3)}, "images: expected uint8 .*got torch.float32"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes: expected \[2, 4\], got \(3, 4\)"),
        ({"ids": torch.tensor([0, 1, 1])}, r"boxes: expected \[3, 4\], got \(2, 4\)"),
        ({"ids": torch.tensor([0, 1], dtype=torch.int32)}, r"ids: expected int64 \[B\], got torch.int32 \(2,\)"),
        ({"ids": torch.tensor([[0, 1]])}, r"ids: expected int64 \[B\], got torch.int64 \(1, 2\)"),
        ({"ids": torch.tensor([0, 2])}, r"ids: expected numbers in 0\.\.1, got 2"),
        ({"ids": torch.tensor([-1, 1])}, r"ids: expected numbers in 0\.\.1, got -1"),
        ({"boxes": torch.zeros(2, 4, device="meta")}, r"expected all tensors on one device, got \['cpu', 'meta'\]"),
        ({"flip": torch.zeros(2)}, r"flip: expected bool \[2\], got torch.float32"),
        ({"flip": torch.zeros(1, dtype=torch.bool)}, r"flip: expected bool \[2\], got torch.bool \(1,\)"),
        ({"size": 0}, "size: expected at least 1 pixel, got 0"),
        ({"mean": MEAN, "dtype": torch.float32}, "mean and std: expected both"),
        ({"std": STD, "dtype": torch.float32}, "mean and std: expected both"),
        ({"mean": MEAN, "std": STD}, "mean and std: expected .*a floating dtype, got .*torch.uint8"),
        ({"mean": (0.5,), "std": (0.5,), "dtype": torch.float32}, "mean and std: expected three numbers each, got"),
        ({"dtype": torch.int32}, "dtype: expected .*got torch.int32"),
        ({"impl": "pillow"}, "impl: expected .*got 'pillow'"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    """Each ValueError names the argument, the expected and the given value."""
    with pytest.raises(ValueError, match=message):
        crop_resize(**{**GOOD, **change})
