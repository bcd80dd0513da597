"""View tables: drawn as torchvision draws, exact to the pixel, and the same wherever and however they are used."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ks_2samp
from torchvision.transforms import RandomResizedCrop

from fastofa.errors import BadInput
from fastofa.views import ViewPolicy, Views, batches, center_views, draw_views, epoch_order

POLICY = ViewPolicy()
CROP_ONLY = ViewPolicy(flip=0.0)


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
    """Area, log aspect and position of 5,000 crops each: two-sample Kolmogorov-Smirnov; and as many fallbacks."""
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
        (4001, 4001, ViewPolicy(scale=(1.0, 1.0), ratio=(0.9, 1.1))),  # nothing fits but the whole picture
    ],
)
def test_the_fallback_is_torchvisions_to_the_pixel(height, width, policy):
    """Where no crop can fit both take the largest central one that the ratio allows."""
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


# --- A pure function, row by row --------------------------------------------------------------------------------------


def test_a_table_is_a_function_of_seed_and_view():
    sizes = mixed_sizes(300)

    def table(seed: int, view: int) -> bytes:
        views = draw_views(POLICY, sizes, seed, view)
        return views.crop.tobytes() + views.flip.tobytes()

    tables = [table(seed, view) for seed in (0, 1, 2**40) for view in (0, 1, 300)]
    assert tables == [table(seed, view) for seed in (0, 1, 2**40) for view in (0, 1, 300)]
    assert len(set(tables)) == len(tables)


def test_views_of_an_image_are_unrelated():
    """Crops of two views, of two seeds, and of neighbouring images do not correlate."""
    sizes = same_size(4000, 300, 400)
    area = [draw_views(POLICY, sizes, *key).crop[:, 2].astype(float) for key in ((0, 0), (0, 1), (1, 0))]
    pairs = [(area[0], area[1]), (area[0], area[2]), (area[0][1:], area[0][:-1])]
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs) < 0.07


def test_a_row_depends_on_its_own_image_only():
    """Other pictures' sizes (and how many tries those take) do not change a row, whatever the integer type."""
    sizes = mixed_sizes(400)
    keep = np.arange(400) % 3 == 0
    other = np.where(keep[:, None], sizes, [[50, 2000]])  # mostly fallbacks
    a, b = draw_views(POLICY, sizes, 5, 2), draw_views(POLICY, other.astype(np.int32), 5, 2)
    assert np.array_equal(a.crop[keep], b.crop[keep])
    assert np.array_equal(a.flip, b.flip)
    assert (a.crop[~keep] != b.crop[~keep]).any(axis=1).mean() > 0.9


def test_the_first_rows_of_a_longer_table_are_the_shorter_table():
    """More images appended change nothing, also beyond the rows that are drawn at once."""
    sizes = mixed_sizes(70_000)
    longer = draw_views(POLICY, sizes, 5, 2)
    for count in (0, 1, 1000, 66_000):
        shorter = draw_views(POLICY, sizes[:count], 5, 2)
        assert len(shorter) == count
        assert np.array_equal(shorter.crop, longer.crop[:count])
        assert np.array_equal(shorter.flip, longer.flip[:count])


# --- Pixels -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 65535), width=st.integers(1, 65535))
@example(height=65535, width=65534)
@example(height=65533, width=32768)
@example(height=1, width=2)
def test_fractions_of_1_in_65535_keep_every_pixel(height, width):
    """Rounded to uint16 and back, every position and extent of a picture up to 65,535 pixels a side is what it was."""
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
    """A table drawn for one resolution gives, at another, whole boxes inside the picture at the same place."""
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
def test_drawn_crops_lie_inside_and_have_the_area_asked_for(height, width, seed):
    """Also where height times width leaves the integer type of the sizes."""
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
    """torchvision's Resize(S / fraction) and CenterCrop(S) on a picture of its coordinates shows the same region."""
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
def test_an_epoch_is_a_permutation_that_the_ranks_share_out(size):
    """Every sample once; another epoch or seed, another order; batches b of all ranks are batch b of the whole."""
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


def test_batches_start_anywhere_and_end_with_what_is_left():
    views = draw_views(POLICY, mixed_sizes(30), 0, 0)
    order = np.array([4, 29, 0, 4, 7, 11, 3])
    assert [rows.tolist() for rows in batches(views, order, 0, 3)] == [[4, 29, 0], [4, 7, 11], [3]]
    assert [rows.tolist() for rows in batches(views, order, 2, 4)] == [[0, 4, 7, 11], [3]]
    assert list(batches(views, order, 7, 4)) == []
    assert list(batches(views, [], 0, 4)) == []


@pytest.mark.parametrize(
    ("order", "start", "message"),
    [
        ([0, 30], 0, r"order: expected sample ids 0..29, got 0..30"),
        ([0, -1], 0, r"order: expected sample ids 0..29, got -1..0"),
        ([0, 1], 3, r"start: expected 0..2, got 3"),
        ([0, 1], -1, r"start: expected 0..2, got -1"),
    ],
)
def test_batches_refuse_an_order_that_leaves_the_table(order, start, message):
    with pytest.raises(ValueError, match=message):
        list(batches(draw_views(POLICY, mixed_sizes(30), 0, 0), order, start, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": (0.0, 1.0)}, "expected scale with 0 < from <= to <= 1, got 0.0 1.0"),
        ({"scale": (0.5, 0.2)}, "expected scale"),
        ({"scale": (0.5, 1.1)}, "expected scale"),
        ({"scale": (float("nan"), 1.0)}, "expected scale"),
        ({"ratio": (-1.0, 1.0)}, "expected ratio with 0 < from <= to, got -1.0 1.0"),
        ({"ratio": (2.0, 1.0)}, "expected ratio"),
        ({"flip": -0.1}, "expected flip between 0 and 1, got -0.1"),
        ({"flip": 1.5}, "expected flip"),
        ({"flip": float("nan")}, "expected flip"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(change, message):
    with pytest.raises(BadInput, match=message):
        ViewPolicy(**change)
