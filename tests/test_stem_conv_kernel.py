"""A stem's convolution of uint8 pixels against float64: on a GPU if there is one, else in the interpreter."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastofa.kernels import channel_statistics, stem_conv2d, stem_conv2d_with_statistics, triton_stem_conv
from fastofa.student.fused_stem import StridedConv2d, use_stem_kernels
from fastofa.student.model import Student
from test_fused_depthwise import DEVICE

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# Kernel, stride, padding: ResNets, MobileNets, ConvNeXt and Swin, then others.
STEMS = [(7, 2, 3), (3, 2, 1), (4, 4, 0), (5, 3, 4), (2, 2, 1), (7, 4, 2), (8, 8, 0)]
# Beyond the error that plain PyTorch makes in the same dtype, relative to the largest value. The interpreter truncates
# where it converts to bf16: pixels, weights and results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-6}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What a kernel forgets to write is NaN."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(kernel: int = 3, D: int = 8, H: int = 9, W: int = 11, B: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (B, H, W, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    weight = torch.randn(D, 3, kernel, kernel, generator=generator) / kernel
    case = {"x": x, "weight": weight, "bias": torch.randn(D, generator=generator), "mean": MEAN, "std": STD}
    return {name: t.to(DEVICE) for name, t in case.items()}


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, **norm: Tensor) -> Tensor:
    """PyTorch's convolution of images normalised beforehand, in the weight's dtype."""
    mean, std = (norm[name].view(3, 1, 1).double() for name in ("mean", "std"))
    return F.conv2d(((x.double() / 255 - mean) / std).to(weight.dtype), weight, bias, stride, padding)


def with_gradients(
    function: Callable[..., Any], case: dict[str, Tensor], leaves_in: torch.dtype, **options: Any
) -> list:
    """The result and the gradients of weight and bias, for a gradient of the result that is the same for all."""
    leaves = {name: case[name].to(leaves_in, copy=True).requires_grad_() for name in ("weight", "bias")}
    y = function(**{**case, **leaves}, **options)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (y * slope.to(torch.bfloat16).to(y.dtype)).sum().backward()
    return [y.detach().double(), *(leaf.grad.double() for leaf in leaves.values())]


def check(case: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    """|truth - kernel| <= |truth - plain PyTorch in the same dtype| + tolerance, for the result and gradients."""
    exact = with_gradients(truth, case, torch.float64, **options)
    plain = with_gradients(truth, case, dtype, **options)
    got = with_gradients(stem_conv2d, case, torch.float32, dtype=dtype, impl="triton", **options)
    for value, expected, other in zip(got, exact, plain, strict=True):
        assert value.shape == expected.shape
        error, allowed = ((t - expected).abs().amax().item() for t in (value, other))
        assert error <= allowed + TOLERANCE[dtype] * expected.abs().amax().item()


# --- Against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "stride", "padding"), STEMS)
def test_equals_float64(kernel, stride, padding, dtype):
    check(make_case(kernel), dtype, stride=stride, padding=padding)


@pytest.mark.kernel
@pytest.mark.parametrize("size", [(7, 7), (13, 8), (8, 31), (20, 22)])
@pytest.mark.parametrize("D", [1, 24, 72])
def test_every_size(size, D):
    """Also more channels than a program computes."""
    check(make_case(7, D, *size), torch.float32, stride=2, padding=3)


@pytest.mark.kernel
def test_many_programs_and_tiles(monkeypatch):
    """Three programs share the tiles of five images, of which each has several; the last tile is partly empty."""
    monkeypatch.setattr(triton_stem_conv, "PROGRAMS", 3)
    monkeypatch.setattr(triton_stem_conv, "BLOCK_M", 16)
    assert triton_stem_conv.tiling((5, 3, 11, 13), (8, 3, 3, 3), 2, 1).parts == 3
    check(make_case(3, 8, 11, 13, B=5), torch.float32, stride=2, padding=1)


@pytest.mark.kernel
def test_padding_is_zero_after_the_normalisation():
    """Images of the mean's colour are zero everywhere, padding included."""
    case = make_case(7)
    case["x"][:] = 51
    case["mean"] = torch.full((3,), 0.2, device=DEVICE)
    y = stem_conv2d(**case, stride=2, padding=3, impl="triton")
    expected = case["bias"].view(-1, 1, 1).expand_as(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_statistics_are_those_of_the_result(dtype, with_bias):
    case = make_case(7, 24, 20, 22)
    if not with_bias:
        case["bias"] = None
    y, mean, var = stem_conv2d_with_statistics(**case, stride=2, padding=3, dtype=dtype, impl="triton")
    assert torch.equal(y, stem_conv2d(**case, stride=2, padding=3, dtype=dtype, impl="triton"))
    expected = channel_statistics(y.double())
    # Rounding the result moves its mean and variance by less than a rounding error of one value.
    tolerance = 1e-5 if dtype == torch.float32 else TOLERANCE[dtype]
    torch.testing.assert_close((mean.double(), var.double()), expected, rtol=tolerance, atol=tolerance)
    plain = stem_conv2d_with_statistics(**case, stride=2, padding=3, dtype=torch.float64)
    torch.testing.assert_close((mean.double(), var.double()), plain[1:], rtol=tolerance, atol=tolerance)


@pytest.mark.kernel
def test_gives_the_same_numbers_every_time(monkeypatch):
    monkeypatch.setattr(triton_stem_conv, "BLOCK_M", 16)
    case = make_case(3, B=3)
    first, second = (
        [
            *with_gradients(stem_conv2d, case, torch.float32, stride=2, padding=1, impl="triton"),
            *stem_conv2d_with_statistics(**case, stride=2, padding=1, impl="triton"),
        ]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.kernel
def test_any_memory_format_comes_in_and_channels_last_goes_out():
    case = make_case()
    expected = stem_conv2d(**case, padding=1, impl="triton")
    got = stem_conv2d(**{**case, "x": case["x"].contiguous()}, padding=1, impl="triton")
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.kernel
def test_an_empty_batch():
    case = make_case(B=0)
    y, dweight, _ = with_gradients(stem_conv2d, case, torch.float32, padding=1, impl="triton")
    assert y.shape == (0, 8, 5, 6)
    assert not dweight.any()


@pytest.mark.kernel
def test_what_is_not_finite_spoils_its_channel_alone():
    case = make_case()
    case["weight"][3, 1, 1, 1] = float("nan")
    y, mean, var = stem_conv2d_with_statistics(**case, padding=1, impl="triton")
    for t in (y.transpose(0, 1).flatten(1), mean, var):
        spoilt = t.isnan().view(8, -1)
        assert spoilt[3].any()
        assert not spoilt[[0, 1, 2, 4, 5, 6, 7]].any()


# --- As operators of PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("with_statistics", [False, True])
def test_are_operators_of_pytorch(with_statistics):
    """opcheck: schema, fake tensors, autograd registration, compilation with dynamic shapes."""
    case = make_case(3, 4, 5, 5)
    weight, bias = (case[name].requires_grad_() for name in ("weight", "bias"))
    ops, norm = torch.ops.fastofa, (case["mean"], case["std"])
    torch.library.opcheck(ops.stem_conv2d, (case["x"], weight, bias, 2, 1, *norm, torch.float32, with_statistics))
    torch.library.opcheck(ops.stem_conv2d, (case["x"], weight, None, 2, 1, *norm, torch.bfloat16, with_statistics))
    dy = torch.randn(2, 4, 3, 3, device=DEVICE)
    given = (dy, case["x"], weight.detach(), 2, 1, *norm)
    torch.library.opcheck(ops.stem_conv2d_backward, given, test_utils=("test_schema", "test_faketensor"))


def test_gradcheck():
    """Of the twin, which is the operator on a CPU in float64."""
    case = {name: t.cpu() for name, t in make_case(3, 2, 4, 5).items()}

    def function(weight: Tensor, bias: Tensor) -> Tensor:
        norm = (case["mean"], case["std"])
        return torch.ops.fastofa.stem_conv2d(case["x"], weight, bias, 2, 1, *norm, torch.float64, False)[0]

    torch.autograd.gradcheck(function, [case[name].double().requires_grad_() for name in ("weight", "bias")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "expected uint8 images with mean and std, or floating ones without, got torch.uint8"),
        ({"x": torch.zeros(2, 3, 9, 9)}, "expected uint8 images with mean and std"),
        ({"std": torch.ones(4)}, r"std: expected \[3\] with 3 channels, got \(4,\) with 3 channels"),
        ({"bias": torch.ones(4)}, r"bias: expected \[8\], got \(4,\)"),
        ({"dtype": torch.float64, "impl": "triton"}, "impl: expected fp32, bf16 or fp16 and a kernel of up to 8 x 8"),
        ({"impl": "cuda"}, "impl: expected one of"),
        ({"x": torch.zeros(2, 3, 9, 9), "mean": None, "std": None, "impl": "triton"}, "impl: expected uint8 images"),
    ],
)
@pytest.mark.kernel
def test_refuses_what_does_not_fit(change, message):
    case = {**make_case(), **change}
    if DEVICE == "cuda":
        case = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in case.items()}
    with pytest.raises(ValueError, match=message):
        stem_conv2d(**case)


# --- In a student -----------------------------------------------------------------------------------------------------

# Student, and its convolution that normalises the pixels.
STUDENTS = [
    ("test_resnet", "conv1.0"),
    ("resnet18", "conv1"),
    ("test_efficientnet", "conv_stem"),
    ("mobilenetv3_small_050", "conv_stem"),
    ("regnety_002", "stem.conv"),
    ("test_convnext", "stem.0"),
]


def make_student(name: str) -> Student:
    """With running statistics unlike 0 and 1; and in eval mode, in which nothing is dropped."""
    student = Student(name, 5, image_size=64, stages=(), mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25)).eval()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return student.to(DEVICE, memory_format=torch.channels_last)


def step(student: Student, images: Tensor, dtype: torch.dtype) -> list[Tensor]:
    student = copy.deepcopy(student).to(dtype)
    logits = student(images)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in student.parameters())]


@pytest.mark.parametrize(("name", "conv"), STUDENTS)
def test_a_student_of_uint8_images_is_the_same(name, conv):
    """In float64, which is the twin's: logits, gradients and names; for floating-point images, too."""
    student = make_student(name).cpu()
    switched = copy.deepcopy(student)
    use_stem_kernels(switched, impl="triton")
    assert {"mean", "std"} <= dict(switched.backbone.get_submodule(conv).named_buffers()).keys()
    assert switched.state_dict().keys() == student.state_dict().keys()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    for given in (images, student.double().normalize(images.clone()).double()):
        expected = step(student, given, torch.float64)
        torch.testing.assert_close(step(switched, given, torch.float64), expected, rtol=1e-6, atol=1e-6)
    student.load_state_dict(copy.deepcopy(switched).state_dict())


@pytest.mark.parametrize("name", ["vgg11", "test_vit"])
def test_students_whose_stem_is_not_known_normalise_as_before(name):
    student = Student(name, 5, image_size=160 if name == "test_vit" else 64, stages=())
    use_stem_kernels(student)
    assert type(student) is Student


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["test_efficientnet", "resnet18"])
def test_with_the_kernel_a_student_learns_the_same(name):
    """The losses of two steps; a ResNet's norm takes the convolution's statistics, and keeps its running ones."""
    images = torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    images = images.to(DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(2, device=DEVICE)
    plain = make_student(name)
    fused = copy.deepcopy(plain)
    use_stem_kernels(fused, impl="triton")
    assert any(type(m) is StridedConv2d and m.before_norm for m in fused.modules()) == (name == "resnet18")
    losses, states = [], []
    for student in (plain, fused):
        student.train()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        for _ in range(2):
            torch.manual_seed(0)
            loss = F.cross_entropy(student(images)[-1], labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        states.append(student.state_dict())
    assert losses[2:] == pytest.approx(losses[:2], rel=2e-3)
    first = next(iter(name for name in states[0] if name.endswith("bn1.running_var")))
    torch.testing.assert_close(states[1][first], states[0][first], rtol=1e-3, atol=1e-4)
    assert states[0].keys() == states[1].keys()


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_compiles_without_a_graph_break():
    student = make_student("resnet18").train()
    use_stem_kernels(student, impl="triton")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8).to(DEVICE)
    compiled = copy.deepcopy(student)
    compiled.compile(fullgraph=True, backend="aot_eager")
    results = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for each in (student, compiled):
            loss = each(images).square().sum()
            loss.backward()
            results.append([loss.detach(), each.backbone.conv1.weight.grad, each.backbone.bn1.running_var])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()
