"""The Triton kernel of crop_resize against float64 and torchvision: on a GPU if there is one, else interpreted."""

import sys

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from sklearn.datasets import load_sample_images
from torch import Tensor

from fastofa.kernels import crop_resize
from fastofa.kernels.reference import resize_weights

pytestmark = [
    pytest.mark.kernel,
    # The interpreter computes what lies beyond the last pixel, too, which is never stored.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Beyond the error that the twin makes in the same dtype, of numbers up to 2.7; the interpreter cuts off to bf16.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3 if DEVICE == "cuda" else 2**-6}


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that a kernel does not write is NaN, or 255."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(H=29, W=34, N=3, ids=(2, 0, 1, 1)) -> dict[str, Tensor]:
    """Boxes between pixels that shrink, grow, do both, or are smaller than a pixel; every other one is flipped."""
    boxes = torch.tensor(
        [
            [0.0, 0.0, H, W],
            [0.25 * H, 0.3 * W, 0.21 * H, 0.17 * W],
            [0.05 * H, 0.5 * W, 0.9 * H, 0.2 * W],
            [0.52 * H, 0.37 * W, 0.4, 0.3],
        ]
    )
    case = {"images": torch.randint(0, 256, (N, H, W, 3), dtype=torch.uint8), "boxes": boxes[: len(ids)]}
    case |= {"flip": torch.arange(len(ids)) % 2 == 1, "ids": torch.tensor(ids)}
    return {name: value.to(DEVICE) for name, value in case.items()}


def in_float64(images: Tensor, boxes: Tensor, flip: Tensor, size: int, ids: Tensor) -> Tensor:
    """[B, 3, S, S], 0..255: the definition, with the weights of the twin, which has its own tests."""
    top, left, height, width = boxes.double().unbind(dim=1)
    rows = resize_weights(top, height, images.shape[1], size)
    columns = resize_weights(left, width, images.shape[2], size)
    out = torch.einsum("byh,bxw,bhwc->bcyx", rows, columns, images[ids].double())
    return torch.where(flip[:, None, None, None], out.flip(-1), out)


def check(case: dict[str, Tensor], size: int, dtypes=(torch.uint8, *FLOATS)) -> None:
    """|truth - kernel| <= |truth - twin in the same dtype| + tolerance."""
    truth = in_float64(**case, size=size)
    for dtype in dtypes:
        options = {"size": size, "dtype": dtype}
        if dtype == torch.uint8:
            exact, tolerance = truth, 1e-3
        else:
            exact, tolerance = tv.normalize(truth / 255, MEAN, STD), TOLERANCE[dtype]
            options |= {"mean": MEAN, "std": STD}
        twin, kernel = (crop_resize(**case, **options, impl=impl) for impl in ("torch", "triton"))
        assert kernel.dtype == dtype
        assert kernel.shape == twin.shape
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        error = (kernel.double() - exact).abs()
        assert (error <= (twin.double() - exact).abs() + tolerance).all(), (dtype, error.max().item())


@pytest.mark.parametrize(
    ("H", "W", "size"), [(29, 34, 13), (17, 8, 32), (20, 16, 2), (1, 1, 5), (5, 70, 3), (7, 9, 23)]
)
def test_equals_float64(H, W, size):
    """Down, strongly down and up; odd sizes; one or several blocks of pixels; every result dtype."""
    check(make_case(H, W), size)


@pytest.mark.parametrize("size", [32, 45])
def test_equals_torchvision_on_photographs(size):
    """In the 8-bit result: 1/255 on average and 3/255 at most."""
    photographs = [torch.from_numpy(image[:300:2, ::3].copy()) for image in load_sample_images().images]
    boxes = [[0, 0, 150, 213], [13, 27, 100, 57], [130, 180, 20, 30], [50, 0, 31, 47], [149, 212, 1, 1], [9, 9, 1, 90]]
    ids, flip = torch.tensor([0, 1, 1, 0, 1, 0]), torch.arange(6) % 2 == 0
    given = [t.to(DEVICE) for t in (torch.stack(photographs), torch.tensor(boxes), flip)]
    got = crop_resize(*given, size, ids=ids.to(DEVICE), impl="triton").cpu()
    for out, i, box, mirrored in zip(got, ids.tolist(), boxes, flip.tolist(), strict=True):
        expected = tv.resized_crop(photographs[i].permute(2, 0, 1), *box, [size, size], antialias=True)
        expected = tv.horizontal_flip(expected) if mirrored else expected
        error = (out.int() - expected.int()).abs().float()
        assert error.max() <= 3, box
        assert error.mean() <= 1, box


def test_a_box_of_the_output_size_is_copied():
    case = make_case(ids=(2, 1))
    case["boxes"] = torch.tensor([[3, 5, 20, 20], [9, 14, 20, 20]]).to(DEVICE)  # integers, as pipelines have them
    got = crop_resize(**case, size=20, impl="triton")
    assert torch.equal(got[0], case["images"][2, 3:23, 5:25].permute(2, 0, 1))
    assert torch.equal(got[1], case["images"][1, 9:29, 14:34].permute(2, 0, 1).flip(-1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_ids_and_without_normalisation(dtype):
    """Box i belongs to image i; pixels are scaled to 0..1."""
    case = make_case(N=4, ids=(0, 1, 2, 3))
    truth = in_float64(**case, size=6) / 255
    del case["ids"]
    got = crop_resize(**case, size=6, dtype=dtype, impl="triton")
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=TOLERANCE[dtype])


def test_halves_are_rounded_to_even():
    """A box between pixels gives means of two neighbours: 0.5, 1.5, 2.5, 127.5, 253.5. All weights are 1 or 0.5."""
    image = torch.tensor([0, 1, 2, 3, 252, 255], dtype=torch.uint8)[None, None, :, None].expand(1, 5, 6, 3)
    boxes = torch.tensor([[0.0, 0.5, 5.0, 5.0]])
    given = [t.to(DEVICE) for t in (image, boxes, torch.tensor([False]))]
    got = crop_resize(*given, 5, impl="triton")
    assert got[0, 0, 0].tolist() == [0, 2, 2, 128, 254]


def test_an_empty_batch_and_images_stored_channels_first():
    case = make_case()
    permuted = case["images"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    got = crop_resize(**case, size=9, impl="triton")
    assert torch.equal(got, crop_resize(**{**case, "images": permuted}, size=9, impl="triton"))
    none = {**case, "boxes": case["boxes"][:0], "flip": case["flip"][:0], "ids": case["ids"][:0]}
    assert crop_resize(**none, size=9, impl="triton").shape == (0, 3, 9, 9)


@pytest.mark.parametrize("number", [-1, 3, 2**40])
def test_an_index_out_of_range_gives_nan(number):
    """On a GPU, where indices are not checked: nothing outside the source is read, and the other images are correct."""
    case = make_case()
    options = (9, case["ids"].clone(), MEAN, STD, torch.float32)
    right = torch.ops.fastofa.crop_resize(case["images"], case["boxes"], case["flip"], *options)
    options[1][1] = number
    got = torch.ops.fastofa.crop_resize(case["images"], case["boxes"], case["flip"], *options)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], right[[0, 2, 3]])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), -500.0, 500.0, 1e30])
def test_invalid_boxes_read_nothing_outside_the_source(number):
    """They also terminate: a filter spans at most as many pixels as the image has."""
    case = make_case(6, 5, ids=(0, 1, 2, 2))
    for place in range(4):
        case["boxes"][place] = 2
        case["boxes"][place, place] = number
    got = crop_resize(**case, size=4, dtype=torch.float32, impl="triton")
    assert (got.isnan() | ((got >= 0) & (got <= 1 + 1e-6))).all()


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_is_an_operator_of_pytorch(with_ids, dtype):
    """opcheck: schema, fake tensors with their strides, compilation with dynamic shapes."""
    case = make_case(ids=(2, 0, 1))
    normalisation = (None, None) if dtype == torch.uint8 else (MEAN, STD)
    given = (case["images"], case["boxes"], case["flip"], 5, case["ids"] if with_ids else None, *normalisation, dtype)
    torch.library.opcheck(torch.ops.fastofa.crop_resize, given)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_compiles_as_one_graph(impl):
    case = make_case()

    def pixels(case):
        return 2 * crop_resize(**case, size=7, mean=MEAN, std=STD, dtype=torch.float32, impl=impl)

    compiled = torch.compile(pixels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case), pixels(case))


def test_refuses_an_image_with_more_pixels_than_32_bits_can_index():
    image = torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=DEVICE).expand(1, 27000, 27000, 3)
    boxes, flip = torch.zeros(1, 4, device=DEVICE), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"images: expected less than 2\^31 bytes each for 'triton', got 27000 x 27000"
    ):
        crop_resize(image, boxes, flip, 8, impl="triton")


def test_the_twin_handles_such_an_image_by_default(monkeypatch):
    module = sys.modules["fastofa.kernels.crop_resize"]
    monkeypatch.setattr(module, "use_triton", lambda *_: True)
    monkeypatch.setattr(module.reference, "crop_resize", lambda *_: "twin")
    image = torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=DEVICE).expand(1, 27000, 27000, 3)
    boxes, flip = torch.zeros(1, 4, device=DEVICE), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    assert crop_resize(image, boxes, flip, 8) == "twin"


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_on_a_cpu_the_operator_is_the_twin(monkeypatch):
    """As in an exported program; the kernel, if requested by name, needs a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET")
    case = make_case()
    for ids in (case["ids"], None):
        given = (case["images"], case["boxes"][:3], case["flip"][:3], 8, ids if ids is None else ids[:3])
        got = torch.ops.fastofa.crop_resize(*given, MEAN, STD, torch.float16)
        expected = crop_resize(*given, MEAN, STD, torch.float16)
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="impl: expected tensors on a GPU for 'triton', got cpu; leave impl out"):
        crop_resize(**case, size=8, impl="triton")
