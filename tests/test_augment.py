"""Operations, mixing and erasing on pixels equal those of Pillow and timm on the same images."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest, norm
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm
from timm.data.mixup import FastCollateMixup
from torch import Tensor

from fastofa.kernels import augment
from fastofa.kernels.augment import OPERATIONS
from fastofa.views.rand_augment import OPS, amounts

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)
WHOLE = ("posterize", "solarize", "solarize_add")  # amounts that timm gives as int


def make_images(size: int, count: int = 24) -> Tensor:
    """uint8 [B, 3, S, S] channels-last: parts of two photographs, and a flat, a nearly flat and a two-tone image."""
    rng = np.random.default_rng(size)
    photos = load_sample_images().images
    places = rng.integers(0, 427 - size, (count, 2))
    images = [photos[i % 2][top : top + size, left : left + size] for i, (top, left) in enumerate(places)]
    flat = np.full((size, size, 3), 77, dtype=np.uint8)
    nearly, tones = flat.copy(), np.where(flat.cumsum(axis=0) > 77 * size // 2, 200, 30).astype(np.uint8)
    nearly[0, 0] = 78, 0, 255
    return torch.from_numpy(np.stack([*images, flat, nearly, tones])).permute(0, 3, 1, 2)


def by_timm(name: str, images: Tensor, given: np.ndarray) -> Tensor:
    theirs = timm._RAND_TRANSFORMS[OPS.index(name) - 1]
    out = []
    for image, amount in zip(images.permute(0, 2, 3, 1).numpy(), given.tolist(), strict=True):
        args = [] if timm.LEVEL_TO_ARG[theirs] is None else [int(amount) if name in WHOLE else amount]
        pillow = Image.fromarray(np.ascontiguousarray(image))
        options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
        out.append(np.asarray(timm.NAME_TO_OP[theirs](pillow, *args, **options)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def some(name: str, count: int, increasing: bool, seed: int = 0) -> np.ndarray:
    """float32 amounts of an operation over its whole range (except 0 bits, at which current Pillow raises an error)."""
    rng = np.random.default_rng(seed)
    low, high = (0, 9.99) if increasing else (2.5, 10)
    magnitudes, sides = rng.uniform(low, high, count), rng.choice([-1, 1], count)
    magnitudes[:2] = low, high
    return amounts(np.full(count, OPS.index(name)), magnitudes, sides, increasing).astype(np.float32)


def test_every_operation_number_is_implemented():
    assert list(OPERATIONS) == list(OPS[1:])


@pytest.mark.parametrize("size", [1, 2, 3, 32, 97])
@pytest.mark.parametrize("name", OPS[1:])
def test_operations_equal_timms(name, size):
    """Bit for bit at every strength, except that a rotation in fp32 may round down by 1 at one value in 10,000."""
    images = make_images(size)
    before = images.clone()
    for increasing in (False, True):
        given = some(name, len(images), increasing)
        got, expected = OPERATIONS[name](images, torch.from_numpy(given), FILL), by_timm(name, images, given)
        assert got.dtype == torch.uint8
        error = (got.int() - expected.int()).abs()
        assert error.max() <= (name == "rotate")
        assert (error > 0).sum() <= max(5, 1e-4 * error.numel())
    assert torch.equal(images, before)


def test_posterize_to_no_bits_gives_black():
    """At magnitude 10, increasing: Pillow gave black when the papers were published; it now raises an error."""
    assert not OPERATIONS["posterize"](make_images(8), torch.zeros(27), FILL).any()
    assert torch.equal(OPERATIONS["posterize"](make_images(8), torch.full((27,), 8.0), FILL), make_images(8))


@pytest.mark.parametrize("name", OPS[1:])
def test_an_image_does_not_depend_on_its_batch(name):
    """Alone, in another order and in the other memory format, the result is the same bit for bit."""
    images, given = make_images(33), torch.from_numpy(some(name, 27, increasing=True))
    whole = OPERATIONS[name](images, given, FILL)
    for i in (0, 5, 24, 25, 26):
        assert torch.equal(OPERATIONS[name](images[i : i + 1], given[i : i + 1], FILL)[0], whole[i])
    order = torch.arange(26, -1, -1)
    assert torch.equal(OPERATIONS[name](images[order].contiguous(), given[order], FILL), whole[order])
    assert OPERATIONS[name](images[:0], given[:0], FILL).shape == (0, 3, 33, 33)


def test_mixing_equals_timms(monkeypatch):
    """The pair mode of FastCollateMixup, which the published loader uses, with given mixtures."""
    size, count = 32, 26
    images = make_images(size)[:count]
    rng = np.random.default_rng(3)
    lam, cut = rng.beta(0.8, 0.8, count // 2).astype(np.float32), rng.random(count // 2) < 0.5
    corners = np.sort(rng.integers(0, size + 1, (count // 2, 2, 2)), axis=1)  # of each: near and far, down and across
    queue = iter(corners[cut].tolist())

    def box(*_args, **_options):
        (top, left), (bottom, right) = next(queue)
        return (top, bottom, left, right), 1 - (bottom - top) * (right - left) / size**2

    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", box)
    mixer = FastCollateMixup(mixup_alpha=1, cutmix_alpha=1, mode="pair", label_smoothing=0.1, num_classes=10)
    monkeypatch.setattr(mixer, "_params_per_elem", lambda _: (lam.copy(), cut))
    expected, _ = mixer([(image.numpy().copy(), i % 10) for i, image in enumerate(images)])

    other = images.flip(0)
    twice = np.concatenate([np.arange(count // 2), np.arange(count // 2)[::-1]])
    boxes = np.concatenate([corners[:, 0], corners[:, 1]], axis=1)
    got = torch.where(
        torch.from_numpy(cut[twice])[:, None, None, None],
        augment.cutmix(images, other, torch.from_numpy(boxes[twice])),
        augment.mixup(images, other, torch.from_numpy(lam[twice])),
    )
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(got, expected)


def test_noise_is_normal_in_each_channel_and_stays_in_its_box():
    """Mean and standard deviation are those of normalised space; the tails are clipped to 0..255."""
    size = 64
    images = make_images(size)
    boxes = torch.tensor([[3, 7, 64, 50]]).repeat(27, 1)
    keys = torch.randint(-(2**31), 2**31, (27,)).to(torch.int32)
    got = augment.erase(images, boxes, keys, MEAN, STD)
    inside = got[:, :, 3:64, 7:50]
    untouched = got.clone()
    untouched[:, :, 3:64, 7:50] = images[:, :, 3:64, 7:50]
    assert torch.equal(untouched, images)
    for c in range(3):
        values = inside[:, c].flatten().double().numpy()
        blurred = values + np.random.default_rng(c).uniform(-0.5, 0.5, len(values))  # rounded levels have steps
        middle = (values > 0) & (values < 255)
        low, high = (norm.cdf((edge / 255 - MEAN[c]) / STD[c]) for edge in (0.5, 254.5))
        uniform = (norm.cdf((blurred[middle] / 255 - MEAN[c]) / STD[c]) - low) / (high - low)
        assert kstest(uniform, "uniform").pvalue > 1e-4
        assert abs((values == 0).mean() - low) < 0.002
        assert abs((values == 255).mean() - (1 - high)) < 0.002


def test_noise_is_independent_between_pixels_channels_and_keys():
    size = 64
    keys = torch.tensor([0, 1, -1, 2**31 - 1, 12345], dtype=torch.int32)
    images = torch.zeros(5, 3, size, size, dtype=torch.uint8)
    noise = augment.erase(images, torch.tensor([[0, 0, size, size]]).repeat(5, 1), keys, MEAN, STD).double()
    noise = noise - noise.mean(dim=(2, 3), keepdim=True)
    flat = noise.flatten(2).flatten(0, 1)  # [15, 4096]
    related = torch.corrcoef(flat) - torch.eye(15)
    assert related.abs().max() < 0.07
    for shifted in (noise[..., 1:] * noise[..., :-1], noise[..., 1:, :] * noise[..., :-1, :]):
        assert (shifted.mean(dim=(2, 3)) / noise.var(dim=(2, 3))).abs().max() < 0.07


def test_noise_equals_the_hash_in_python_integers():
    """Written again with Python's integers, so that the noise of existing caches never changes."""

    def scrambled(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    keys = [7, -7, -(2**31)]
    images = torch.zeros(3, 3, 5, 5, dtype=torch.uint8)
    given = torch.tensor(keys, dtype=torch.int32)
    got = augment.erase(images, torch.tensor([[0, 0, 5, 5]]).repeat(3, 1), given, MEAN, STD)
    for key, image in zip(keys, got, strict=True):
        for place, level in enumerate(image.flatten().tolist()):
            quantile = norm.ppf(((scrambled(scrambled(place) ^ key & 0xFFFFFFFF) & 0xFFFF) + 0.5) / 65536)
            value = (MEAN[place // 25] + STD[place // 25] * quantile) * 255
            assert level == min(255, max(0, round(value)))
