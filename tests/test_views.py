"""View tables: distributed as in torchvision and timm, exact to the pixel, and independent of how they are used."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, chisquare, ks_2samp
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop

from fastofa.system.errors import BadInput
from fastofa.views.draw import draw_views
from fastofa.views.order import WINDOW, batches, epoch_order, epoch_rows, pair_order
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views, center_views, join_views, pixel_boxes

POLICY = ViewPolicy()
CROP_ONLY = ViewPolicy(flip=0.0)
FULL = ViewPolicy(bicubic=0.5, auto_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, erase=0.25)


def same_size(count: int, height: int, width: int) -> np.ndarray:
    return np.tile([height, width], (count, 1))


def mixed_sizes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 700, (count, 2))


def by_torchvision(height: int, width: int, policy: ViewPolicy) -> list[int]:
    image = torch.empty(1, height, width, device="meta")
    return list(RandomResizedCrop.get_params(image, list(policy.scale), list(policy.ratio)))


# --- What is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "policy"),
    [
        (375, 500, POLICY),
        (32, 32, POLICY),
        (900, 250, POLICY),  # some draws find no crop that fits in ten tries
        (100, 1000, POLICY),  # most of them
        (240, 180, ViewPolicy(scale=(0.5, 0.9), ratio=(0.4, 1.5))),
    ],
)
def test_crops_are_distributed_like_torchvisions(height, width, policy):
    """Area, log aspect and position of 5,000 crops each: two-sample Kolmogorov-Smirnov; and the number of fallbacks."""
    count = 5000
    sizes = same_size(count, height, width)
    ours = draw_views(policy, sizes, seed=1, view=0).boxes(sizes)
    theirs = np.array([by_torchvision(height, width, policy) for _ in range(count)])
    for name, measure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "log aspect": lambda b: np.log(b[:, 3] / b[:, 2]),
        "top": lambda b: (b[:, 0] + 0.5) / (height - b[:, 2] + 1),
        "left": lambda b: (b[:, 1] + 0.5) / (width - b[:, 3] + 1),
    }.items():
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-4, name
    whole = np.array([(b[:, 2:] == [height, width]).any(axis=1).sum() for b in (ours, theirs)])
    spread = 4 * np.sqrt(max(whole.mean(), 1) * 2)
    assert abs(whole[0] - whole[1]) <= spread  # crops that reach from edge to edge, the fallback's among them


@pytest.mark.parametrize(
    ("height", "width", "policy"),
    [
        (10, 1000, CROP_ONLY),
        (1000, 10, CROP_ONLY),
        (331, 1009, ViewPolicy(scale=(0.9, 1.0))),
        (1009, 331, ViewPolicy(scale=(0.9, 1.0))),
        (65535, 19999, ViewPolicy(scale=(0.9, 1.0))),
        (1999, 65521, ViewPolicy(scale=(0.9, 1.0))),
        (4001, 4001, ViewPolicy(scale=(1.0, 1.0), ratio=(0.9, 1.1))),  # only the whole image fits
    ],
)
def test_the_fallback_is_torchvisions_to_the_pixel(height, width, policy):
    """If no crop can fit, both take the largest central one that the ratio allows."""
    sizes = same_size(200, height, width)
    ours = draw_views(policy, sizes, seed=0, view=3).boxes(sizes)
    theirs = {tuple(by_torchvision(height, width, policy)) for _ in range(5)}
    assert {tuple(b) for b in ours.tolist()} == theirs
    assert len(theirs) == 1


def test_flips_have_their_probability_and_ignore_the_crop():
    sizes = mixed_sizes(5000)
    for flip in (0.5, 0.2):
        views = draw_views(ViewPolicy(flip=flip), sizes, seed=4, view=1)
        assert binomtest(int(views.flip.sum()), len(views), flip).pvalue > 0.001
        area = np.prod(views.crop[:, 2:] / 65535, axis=1)
        assert ks_2samp(area[views.flip], area[~views.flip]).pvalue > 0.001
    assert not draw_views(ViewPolicy(flip=0), sizes, seed=4, view=1).flip.any()
    assert draw_views(ViewPolicy(flip=1), sizes, seed=4, view=1).flip.all()


# --- Mixing and erasing -----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 60), seed=st.integers(0, 1000), view=st.integers(0, 1000))
@example(count=1, seed=0, view=0)
def test_pairs_are_a_perfect_matching_with_one_mixture_each(count, seed, view):
    views = draw_views(FULL, same_size(count, 30, 40), seed, view)
    ids = np.arange(count)
    assert np.array_equal(views.partner[views.partner], ids)
    alone = views.partner == ids
    assert alone.sum() == count % 2
    assert (views.mix[alone] == 1).all()
    assert not views.mix_box[alone].any()
    assert np.array_equal(views.mix, views.mix[views.partner])
    assert np.array_equal(views.mix_box, views.mix_box[views.partner])
    assert ((views.mix >= 0) & (views.mix <= 1)).all()
    boxes = views.mix_box.astype(int)
    assert (boxes[:, :2] + boxes[:, 2:] <= 65535).all()
    share = 1 - boxes[:, 2].astype(float) * boxes[:, 3] / 65535**2
    assert np.array_equal(views.mix[boxes[:, 2] > 0], share.astype(np.float32)[boxes[:, 2] > 0])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.1, 1.0), (0.8, 0.0), (0.0, 1.0), (0.0, 0.3)])
def test_mixtures_are_distributed_like_timms(mixup, cutmix):
    """If both are on, half of the pairs get cutmix; Beta weights; boxes as timm's, up to its whole pixels."""
    count, size = 8000, 4096
    views = draw_views(ViewPolicy(mixup=mixup, cutmix=cutmix), same_size(count, 300, 400), seed=2, view=0)
    first = views.partner > np.arange(count)
    cut, mix = views.mix_box[first, 2] > 0, views.mix[first].astype(float)
    if mixup and cutmix:
        assert binomtest(int(cut.sum()), len(cut), 0.5).pvalue > 1e-3
        assert abs(np.corrcoef(cut, views.partner[first])[0, 1]) < 0.06
    else:
        assert cut.mean() > 0.98 if cutmix else not cut.any()
    if mixup:
        weights = beta(mixup, mixup).rvs(20_000, random_state=1).astype(np.float32)
        assert ks_2samp(mix[~cut], weights).pvalue > 1e-3
    if cutmix:
        np.random.seed(0)  # noqa: NPY002 - what timm draws from
        theirs = [cutmix_bbox_and_lam((3, size, size), lam) for lam in beta(cutmix, cutmix).rvs(4000, random_state=1)]
        boxes = np.array([(top, left, end - top, right - left) for (top, end, left, right), _ in theirs]) / size
        ours, boxes = views.mix_box[first][cut] / 65535, boxes[(boxes[:, 2:] > 0).all(axis=1)]
        assert ks_2samp(mix[cut], 1 - boxes[:, 2] * boxes[:, 3]).pvalue > 1e-3
        for column in range(4):
            assert ks_2samp(ours[:, column], boxes[:, column]).pvalue > 1e-3


def test_any_two_samples_may_be_partners():
    """Over 3,000 views of six samples, all 15 matchings are equally frequent."""
    matchings = [tuple(draw_views(FULL, same_size(6, 9, 9), 1, view).partner.tolist()) for view in range(3000)]
    numbers = np.unique(matchings, axis=0, return_counts=True)[1]
    assert len(numbers) == 15
    assert chisquare(numbers).pvalue > 1e-3


def test_erasing_is_distributed_like_timms():
    """Frequency, area, aspect and position of 5,000 boxes each, in an image so large that rounding does not matter."""
    count, size = 20_000, 1000
    views = draw_views(ViewPolicy(erase=0.25), same_size(count, 30, 40), seed=3, view=0)
    some = views.erase[:, 2] > 0
    assert binomtest(int(some.sum()), count, 0.25).pvalue > 1e-3
    ours = views.erase[some] / 65535

    class Slices:
        """Stands in for the image and records where timm writes."""

        def __setitem__(self, place, value):
            found.append([place[1].start, place[2].start, *(s.stop - s.start for s in place[1:])])

    found: list[list[int]] = []
    eraser = RandomErasing(probability=1, mode="const", device="cpu")
    for _ in range(5000):
        eraser._erase(Slices(), 3, size, size, torch.float32)
    theirs = np.array(found) / size
    for name, measure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "log aspect": lambda b: np.log(b[:, 3] / b[:, 2]),
        "top": lambda b: b[:, 0] / (1 - b[:, 2]),
        "left": lambda b: b[:, 1] / (1 - b[:, 3]),
    }.items():
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3, name
    assert len(np.unique(views.noise)) > 0.999 * count


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 500), seed=st.integers(0, 1000))
def test_boxes_in_pixels_are_inside_and_at_their_position(size, seed):
    views = draw_views(FULL, same_size(60, 9, 9), seed, view=0)
    for boxes in (views.erase, views.mix_box):
        top, left, bottom, right = pixel_boxes(boxes, size).T
        assert (top >= 0).all()
        assert (top <= bottom).all()
        assert (bottom <= size).all()
        assert (left >= 0).all()
        assert (left <= right).all()
        assert (right <= size).all()
        exact = boxes / 65535 * size
        assert np.abs(np.stack([top, left], axis=1) - exact[:, :2]).max() <= 0.5
        assert np.abs(np.stack([bottom, right], axis=1) - exact[:, :2] - exact[:, 2:]).max() <= 0.5
    assert pixel_boxes(np.array([[0, 0, 65535, 65535]], dtype=np.uint16), size).tolist() == [[0, 0, size, size]]


def test_crops_do_not_depend_on_the_other_columns():
    """A policy with more augmentation has the same crops, so old caches remain valid."""
    sizes = mixed_sizes(200)
    plain, full = draw_views(POLICY, sizes, 5, 2), draw_views(FULL, sizes, 5, 2)
    assert set(plain.columns()) == {"crop", "flip"}
    assert set(full.columns()) == {
        "crop",
        "flip",
        "bicubic",
        "ops",
        "amounts",
        "partner",
        "mix",
        "mix_box",
        "erase",
        "noise",
    }
    for name, column in plain.columns().items():
        assert np.array_equal(column, full.columns()[name])
    kinds = {name: (column.dtype.name, column.shape) for name, column in full.columns().items()}
    assert kinds == {
        "crop": ("uint16", (200, 4)), "flip": ("bool", (200,)), "bicubic": ("bool", (200,)), "ops": ("uint8", (200, 2)),
        "amounts": ("float32", (200, 2)), "partner": ("int32", (200,)), "mix": ("float32", (200,)),
        "mix_box": ("uint16", (200, 4)), "erase": ("uint16", (200, 4)), "noise": ("int32", (200,)),
    }  # fmt: skip


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 1.0])
def test_a_filter_is_drawn_for_every_image(chance):
    """Bicubic with the policy's probability, whatever the crop and the flip."""
    views = draw_views(ViewPolicy(bicubic=chance), same_size(20_000, 30, 40), seed=3, view=1)
    assert views.is_bicubic.mean() == pytest.approx(chance, abs=0.02)
    assert (views.bicubic is None) == (chance == 0)
    if 0 < chance < 1:
        for other in (views.flip, views.crop[:, 2], views.crop[:, 0]):
            assert abs(np.corrcoef(views.is_bicubic, other)[0, 1]) < 0.03


def test_the_evaluation_view_has_one_filter():
    sizes = mixed_sizes(5)
    assert center_views(sizes).bicubic is None
    assert center_views(sizes, bicubic=True).is_bicubic.tolist() == [True] * 5
    assert center_views(sizes, 0.9).crop.tolist() == center_views(sizes, 0.9, bicubic=True).crop.tolist()


def test_the_random_streams_are_unchanged():
    """If this fails, numpy's streams or their use have changed, and existing caches cannot be extended."""
    views = draw_views(FULL, same_size(8, 300, 400), seed=1, view=2)
    assert views.crop[3].tolist() == [31020, 43417, 22063, 17203]
    assert views.ops.tolist() == [[12, 14], [0, 0], [0, 0], [7, 0], [0, 0], [5, 0], [0, 0], [0, 2]]
    assert views.partner.tolist() == [2, 4, 0, 6, 1, 7, 3, 5]
    assert views.noise[:2].tolist() == [2026808164, -1287953907]
    assert views.is_bicubic.tolist() == [False, True, False, True, True, True, True, False]


# --- A pure function, row by row --------------------------------------------------------------------------------------


def test_a_table_is_a_function_of_seed_and_view():
    sizes = mixed_sizes(300)

    def table(seed: int, view: int) -> list[bytes]:
        return [column.tobytes() for column in draw_views(FULL, sizes, seed, view).columns().values()]

    tables = [table(seed, view) for seed in (0, 1, 2**40) for view in (0, 1, 300)]
    assert tables == [table(seed, view) for seed in (0, 1, 2**40) for view in (0, 1, 300)]
    assert all(len(set(column)) == len(column) for column in zip(*tables, strict=True))


def test_views_of_an_image_are_independent():
    """Crops of two views, of two seeds, and of neighbouring images do not correlate."""
    sizes = same_size(4000, 300, 400)
    area = [draw_views(POLICY, sizes, *key).crop[:, 2].astype(float) for key in ((0, 0), (0, 1), (1, 0))]
    pairs = [(area[0], area[1]), (area[0], area[2]), (area[0][1:], area[0][:-1])]
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs) < 0.07


def test_a_row_depends_on_its_own_image_only():
    """Other images' sizes (and the number of tries they take) do not change a row, whatever the integer type."""
    sizes = mixed_sizes(400)
    keep = np.arange(400) % 3 == 0
    other = np.where(keep[:, None], sizes, [[50, 2000]])  # mostly fallbacks
    a, b = draw_views(FULL, sizes, 5, 2), draw_views(FULL, other.astype(np.int32), 5, 2)
    assert np.array_equal(a.crop[keep], b.crop[keep])
    for name, column in a.columns().items():
        assert name == "crop" or np.array_equal(column, b.columns()[name])
    assert (a.crop[~keep] != b.crop[~keep]).any(axis=1).mean() > 0.9


def test_the_first_rows_of_a_longer_table_are_the_shorter_table():
    """Appended images change only partners, also beyond the block of rows that is drawn at a time."""
    sizes = mixed_sizes(70_000)
    policy = ViewPolicy(bicubic=0.5, auto_augment=FULL.auto_augment, erase=0.25)
    longer = draw_views(policy, sizes, 5, 2).columns()
    for count in (0, 1, 1000, 66_000):
        shorter = draw_views(policy, sizes[:count], 5, 2)
        assert len(shorter) == count
        for name, column in shorter.columns().items():
            assert np.array_equal(column, longer[name][:count])


# --- Pixels -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 65535), width=st.integers(1, 65535))
@example(height=65535, width=65534)
@example(height=65533, width=32768)
@example(height=1, width=2)
def test_fractions_of_1_in_65535_keep_every_pixel(height, width):
    """Every position and extent in images of up to 65,535 pixels a side survives rounding to uint16 and back."""
    count = max(height, width)
    top, left = np.arange(count) % height, np.arange(count)[::-1] % width
    boxes = np.stack([top, left, height - top, width - left], axis=1)
    extent = np.array([height, width, height, width])
    nearest = (2 * boxes * 65535 + extent) // (2 * extent)  # in whole numbers
    views = Views(nearest.astype(np.uint16), np.zeros(count, dtype=bool))
    assert np.array_equal(views.boxes(same_size(count, height, width)), boxes)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), seed=st.integers(0, 1000))
def test_boxes_stay_inside_at_any_other_resolution(height, width, seed):
    """A table drawn for one resolution gives whole boxes inside the image at the same position for another."""
    views = draw_views(POLICY, mixed_sizes(100, seed), seed, view=0)
    boxes = views.boxes(same_size(100, height, width))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()
    exact = views.crop / 65535 * [height, width, height, width]
    assert (np.abs(boxes - exact) <= 1.01).all()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 65535), width=st.integers(1, 65535), seed=st.integers(0, 1000))
@example(height=65535, width=65535, seed=0)
def test_drawn_crops_are_inside_and_have_an_allowed_area(height, width, seed):
    """Also if height times width overflows the integer type of the sizes."""
    sizes = same_size(50, height, width).astype(np.int32)
    policy = ViewPolicy(scale=(0.3, 0.6), ratio=(0.8, 1.25))
    boxes = draw_views(policy, sizes, seed, view=0).boxes(sizes)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()
    if min(height, width) >= 50 and max(height, width) < 1.3 * min(height, width):
        share = boxes[:, 2] * boxes[:, 3] / (height * width)
        assert share.min() > 0.28
        assert share.max() < 0.62


@pytest.mark.parametrize("fraction", [0.875, 0.95, 1.0])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (640, 427), (256, 256), (97, 301), (1200, 231)])
def test_center_views_cover_what_resize_and_center_crop_cover(height, width, fraction):
    """The region of torchvision's Resize(S / fraction) and CenterCrop(S), on an image of its coordinates."""
    size = 224
    rows = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width) + 0.5
    columns = torch.arange(width, dtype=torch.float32)[None, :].expand(height, width) + 0.5
    shorter = round(size / fraction)
    seen = tv.center_crop(tv.resize(torch.stack([rows, columns]), [shorter], antialias=True), [size, size])
    views = center_views(np.array([[height, width]]), fraction)
    top, left, box_height, box_width = views.boxes(np.array([[height, width]]))[0]
    assert not views.flip.any()
    assert box_height == box_width
    step = min(height, width) / shorter  # source pixels per output pixel
    for axis, (first, extent) in enumerate([(top, box_height), (left, box_width)]):
        middle = seen[axis].median().item()
        ends = (seen[axis].min().item() - step / 2, seen[axis].max().item() + step / 2)
        assert abs(first + extent / 2 - middle) <= 1 + step
        assert abs(first - ends[0]) <= 1 + step
        assert abs(first + extent - ends[1]) <= 1 + step


# --- Order and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 103])
def test_an_epoch_is_a_permutation_that_the_ranks_share(size):
    """Every sample once; another order for another epoch or seed; batches b of all ranks are batch b of the whole."""
    whole = epoch_order(size, seed=3, epoch=7)
    assert sorted(whole.tolist()) == list(range(size))
    assert np.array_equal(whole, epoch_order(size, seed=3, epoch=7))
    if size > 1:
        assert not np.array_equal(whole, epoch_order(size, seed=3, epoch=8))
        assert not np.array_equal(whole, epoch_order(size, seed=4, epoch=7))

    views = Views(np.zeros((size, 4), dtype=np.uint16), np.zeros(size, dtype=bool))
    ranks = [list(batches(views, epoch_order(size, 3, 7, rank, 4), 0, 5)) for rank in range(4)]
    together = list(batches(views, whole, 0, 20))
    for b, rows in enumerate(together):
        shares = [rank[b] for rank in ranks if b < len(rank)]
        assert sorted(np.concatenate(shares)) == sorted(rows)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sum(len(rows) for rank in ranks for rows in rank) == size


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.integers(1, 50), odd=st.booleans(), half=st.integers(1, 6), world_size=st.integers(1, 4),
    repeats=st.integers(1, 3), epoch=st.integers(0, 7),
)  # fmt: skip
def test_an_order_of_mixed_views_keeps_pairs_together(pairs, odd, half, world_size, repeats, epoch):
    """Any even batch of any rank contains whole pairs; batches b of all ranks are batch b of a single rank."""
    size = 2 * pairs + odd
    policy = ViewPolicy(mixup=1.0, repeats=repeats)
    group = epoch // repeats * repeats
    views = join_views([draw_views(policy, same_size(size, 9, 9), 1, group + k) for k in range(repeats)])

    def order(rank: int = 0, world_size: int = 1) -> np.ndarray:
        return epoch_order(size, 3, epoch, rank, world_size, views.partner, repeats)

    whole = order()
    assert len(whole) == epoch_rows(policy, size)
    assert len(set(whole.tolist())) == len(whole)
    ranks = [list(batches(views, order(rank, world_size), 0, 2 * half)) for rank in range(world_size)]
    for rank in ranks:
        for rows in rank:
            assert set(views.partner[rows].tolist()) == set(rows.tolist())
    together = list(batches(views, whole, 0, 2 * half * world_size))
    for b, rows in enumerate(together):
        assert sorted(np.concatenate([rank[b] for rank in ranks if b < len(rank)])) == sorted(rows)
    assert sum(len(rows) for rank in ranks for rows in rank) == len(whole)
    if len(whole) > 20:
        other = epoch_order(size, 3, epoch + repeats, partner=views.partner, repeats=repeats)
        assert not np.array_equal(whole, other)


def test_the_orders_of_existing_runs_are_unchanged():
    """Exactly as older versions drew them: one rank, two ranks, mixed, repeated."""
    partner = np.array([1, 0, 3, 2, 5, 4, 6], dtype=np.int32)
    assert epoch_order(7, 4, 2).tolist() == [3, 4, 1, 0, 6, 2, 5]
    assert epoch_order(7, 4, 2, 1, 2).tolist() == [4, 0, 2]
    assert epoch_order(7, 4, 2, partner=partner).tolist() == [4, 5, 0, 1, 2, 3, 6]
    assert epoch_order(6, 4, 2, repeats=3).tolist() == [4, 10, 16, 2, 8, 14]


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 300), pages=st.integers(1, 400), mixes=st.booleans(), repeats=st.integers(1, 3),
    world_size=st.integers(1, 4), epoch=st.integers(0, 5), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_an_order_by_pages_uses_few_pages_at_a_time(count, pages, mixes, repeats, world_size, epoch, seed):
    """Every row once over the epochs that share a view, over all ranks; pairs stay together, on the first's page."""
    page = np.random.default_rng(count).integers(0, pages, count)
    policy = ViewPolicy(mixup=float(mixes), repeats=repeats)
    group = epoch // repeats * repeats
    views = join_views([draw_views(policy, same_size(count, 9, 9), 1, group + k) for k in range(repeats)])

    def order(epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        return epoch_order(count, seed, epoch, rank, world_size, views.partner, repeats, page)

    unit = 2 if mixes else 1
    whole = order(epoch)
    for rank in range(world_size):  # pairs are dealt as single samples are
        dealt = np.arange(len(whole)) // unit % world_size == rank
        assert np.array_equal(order(epoch, rank, world_size), whole[dealt])
    rows = np.concatenate([order(group + k) for k in range(repeats)])
    assert len(rows) == repeats * epoch_rows(policy, count)
    assert len(set(rows.tolist())) == len(rows)

    paired = rows[: len(rows) // unit * unit].reshape(-1, unit)
    if mixes:
        assert np.array_equal(views.partner[paired[:, 0]], paired[:, 1])
        assert (paired[:, 0] < paired[:, 1]).all()
    touched = page[paired[:, 0] % count if count else []]
    stretches = np.array([np.flatnonzero(touched == p)[[0, -1]] for p in np.unique(touched)]).reshape(-1, 2)
    for first, last in stretches:  # until a page's last sample only pages of its window begin
        assert ((stretches[:, 0] >= first) & (stretches[:, 0] <= last)).sum() <= WINDOW


def test_an_order_by_pages_is_random_within_a_window_and_from_epoch_to_epoch():
    """640 pages of ten samples: the windows have other pages in each epoch, and come one after the other."""
    page = np.arange(6400) // 10
    orders = [epoch_order(6400, 0, epoch, page_ids=page) for epoch in (0, 1)]
    windows = [[frozenset(part) for part in page[order].reshape(-1, 10 * WINDOW).tolist()] for order in orders]
    for found in windows:
        assert [len(window) for window in found] == [WINDOW] * 10
        assert len(frozenset.union(*found)) == 640
    assert not set(windows[0]) & set(windows[1])
    for order in orders:
        steps = np.diff(page[order])
        assert (steps == 0).mean() < 0.03  # 1 of 64 by chance
        inside = order.reshape(-1, 10 * WINDOW)
        place = np.arange(10 * WINDOW) - (10 * WINDOW - 1) / 2
        assert all(abs(np.corrcoef(place, window)[0, 1]) < 0.15 for window in inside)
    assert np.array_equal(orders[0], epoch_order(6400, 0, 0, page_ids=page))


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_repeated_augmentation_uses_every_view_of_a_part_of_the_samples(mixup):
    """Each chosen sample comes `repeats` times per epoch, in all views, close together; over as many epochs, all rows
    once.

    As timm's RepeatAugSampler, which repeats each index in a row and keeps the length of the epoch.
    """
    size, repeats = 60, 3
    policy = ViewPolicy(mixup=mixup, repeats=repeats)
    views = join_views([draw_views(policy, same_size(size, 9, 9), 1, view) for view in (3, 4, 5)])
    assert len(views) == repeats * size
    rows = [epoch_order(size, 0, epoch, partner=views.partner, repeats=repeats) for epoch in (3, 4, 5)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(repeats * size))
    for epoch in rows:
        assert len(epoch) == size == epoch_rows(policy, size)
        numbers = np.bincount(epoch % size, minlength=size)
        assert set(numbers) == {0, repeats}
        unit = repeats * (2 if mixup else 1)
        for first in range(0, size, unit):
            samples, shown = epoch[first : first + unit] % size, epoch[first : first + unit] // size
            assert len(set(samples.tolist())) == unit // repeats
            assert sorted(shown.tolist()) == sorted([0, 1, 2] * (unit // repeats))


def test_repeats_have_the_same_partner_and_their_own_mixture():
    policy = ViewPolicy(mixup=1.0, repeats=3)
    tables = [draw_views(policy, same_size(40, 9, 9), 0, view) for view in range(6)]
    for a, b in ((0, 1), (1, 2), (3, 5)):
        assert np.array_equal(tables[a].partner, tables[b].partner)
        assert (tables[a].mix != tables[b].mix).mean() > 0.9
    assert (tables[2].partner != tables[3].partner).mean() > 0.8
    joined = join_views(tables[:3])
    assert np.array_equal(joined.partner[joined.partner], np.arange(120))
    assert np.array_equal(joined.partner // 40, np.arange(120) // 40)
    assert np.array_equal(joined.take(np.arange(40, 80)).crop, tables[1].crop)


def test_pair_order_keeps_pairs_together():
    for count in (0, 1, 7, 100):
        views = draw_views(FULL, same_size(count, 9, 9), 0, 0)
        order = pair_order(views)
        assert sorted(order.tolist()) == list(range(count))
        assert np.array_equal(views.partner[order[0 : count // 2 * 2 : 2]], order[1::2])
        places = np.random.default_rng(count).permutation(count)
        by_place = pair_order(views, places)
        assert sorted(by_place.tolist()) == list(range(count))
        firsts = by_place[0 : count // 2 * 2 : 2]
        assert np.array_equal(views.partner[firsts], by_place[1::2])
        assert (np.diff(places[firsts]) > 0).all()
    plain = draw_views(POLICY, same_size(5, 9, 9), 0, 0)
    assert pair_order(plain).tolist() == list(range(5))
    assert pair_order(plain, np.array([30, 10, 20, 50, 40])).tolist() == [1, 2, 0, 4, 3]


def test_batches_start_anywhere_and_end_with_a_smaller_one():
    views = draw_views(POLICY, mixed_sizes(30), 0, 0)
    order = np.array([4, 29, 0, 4, 7, 11, 3])
    assert [rows.tolist() for rows in batches(views, order, 0, 3)] == [[4, 29, 0], [4, 7, 11], [3]]
    assert [rows.tolist() for rows in batches(views, order, 2, 4)] == [[0, 4, 7, 11], [3]]
    assert list(batches(views, order, 7, 4)) == []
    assert list(batches(views, [], 0, 4)) == []


@pytest.mark.parametrize(
    ("order", "start", "message"),
    [
        ([0, 30], 0, r"order: expected rows 0..29, got 0..30"),
        ([0, -1], 0, r"order: expected rows 0..29, got -1..0"),
        ([0, 1], 3, r"start: expected 0..2, got 3"),
        ([0, 1], -1, r"start: expected 0..2, got -1"),
    ],
)
def test_batches_refuse_rows_outside_the_table(order, start, message):
    with pytest.raises(ValueError, match=message):
        list(batches(draw_views(POLICY, mixed_sizes(30), 0, 0), order, start, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": (0.0, 1.0)}, "expected scale with 0 < minimum <= maximum <= 1, got 0.0 1.0"),
        ({"scale": (0.5, 0.2)}, "expected scale"),
        ({"scale": (0.5, 1.1)}, "expected scale"),
        ({"scale": (float("nan"), 1.0)}, "expected scale"),
        ({"ratio": (-1.0, 1.0)}, "expected ratio with 0 < minimum <= maximum, got -1.0 1.0"),
        ({"ratio": (2.0, 1.0)}, "expected ratio"),
        ({"flip": -0.1}, "expected flip between 0 and 1, got -0.1"),
        ({"flip": 1.5}, "expected flip"),
        ({"flip": float("nan")}, "expected flip"),
        ({"erase": 1.5}, "expected erase between 0 and 1, got 1.5"),
        ({"mixup": -0.1}, "expected mixup of at least 0, got -0.1"),
        ({"cutmix": float("nan")}, "expected cutmix of at least 0, got nan"),
        ({"repeats": 0}, "expected repeats of at least 1, got 0"),
        ({"mean": (0.5, 0.5, 1.5)}, "expected mean between 0 and 1, std above 0, got"),
        ({"std": (0.5, 0.0, 0.5)}, "expected mean between 0 and 1, std above 0, got"),
        ({"auto_augment": "rand"}, "auto-augment: expected rand-mM"),
    ],
)
def test_impossible_policies_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        ViewPolicy(**change)
