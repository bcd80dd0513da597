"""Time the kernels against their twins and public peers: time, GB/s, share of a copy's bandwidth.

    python -m bench.bench_kernels                     on a GPU: Triton, its twin eager and compiled, peers (5 min)
    python -m bench.bench_kernels --only loss --quick the sizes for which targets are set
    writes bench/results/kernels_{cpu,gpu}.json

Without a GPU, only the twins are timed, eager and compiled. A kernel whose results differ from its twin's is not timed,
and the exit code is 1. On a GPU, each figure is the time of a CUDA graph of several calls. Their inputs together exceed
the L2 cache (unless that takes more than 32 inputs), and the candidates' graphs are replayed in turn. "launched" is the
time of the same calls without a graph. It is the only figure for peers that wait for the device, because a graph cannot
capture them. GB/s counts the bytes that any implementation must move: each input read once, each output written once.

Shapes: H heads, B batch, C classes or channels, K classes kept of the teacher, S side.
"""

import gc
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.lib import command_line, machine
from bench.lib.record import markdown_table, write_record
from bench.lib.timing import captured, timed_ms, wait
from bench.lib.turns import patiently, wait_for_turn
from fastofa.kernels import (
    bias_gelu,
    crop_resize,
    depthwise_conv3x3,
    layer_norm,
    norm_act,
    norm_act_pool,
    ofa_loss,
    reference,
    stem_conv2d,
    stem_conv2d_with_statistics,
)
from fastofa.kernels.choice import HAS_TRITON, can_run_triton
from fastofa.kernels.reference import dense_probs, ofa_loss_dense
from fastofa.kernels.stem_conv import MAX_KERNEL

HEADS, TOPK, BASELINE = 5, 16, "twin, eager"
MAX_INPUTS_MB = 200  # total size of the rotating inputs: four times an H100's L2 cache

Call = Callable[[int], Any]


class Inputs:
    """Inputs made from seeds 0, 1, ... on first use, since those of all cases together do not fit in memory."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count = make, count
        self.made: list[Any] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        if not self.made:
            self.made = [self.make(seed) for seed in range(self.count)]
        return self.made[number % self.count]

    def free(self) -> None:
        self.made = []


@dataclass(frozen=True)
class Case:
    """One size of one kernel and its implementations, each of which is called with the number of an input."""

    kernel: str
    size: str
    bytes: float
    items: int
    """Number of images or samples, for the rate."""
    candidates: dict[str, Call]
    compare: tuple[str, ...] = ()
    """Candidates that must give the twin's results; peers that compute something else are not among them."""
    tolerance: float = 0.02
    """Largest difference from the twin, as a share of the twin's largest value."""
    waiting: tuple[str, ...] = ()
    """Candidates that wait for the device, so that a CUDA graph cannot capture them."""
    inputs: Inputs | None = None
    """The inputs to rotate over; None if the candidates hold a single one."""
    skipped: dict[str, str] = field(default_factory=dict)
    by_norm: bool = False
    """Compare norms of whole tensors, since single values may differ where rounding decides what a ReLU passes."""


def rotate(make: Callable[[int], Any], bytes_each: float, device: torch.device) -> Inputs:
    """Inputs to rotate over; on a GPU, enough of them to exceed its cache."""
    count = max(2, int(MAX_INPUTS_MB * 1e6 // bytes_each) + 1) if device.type == "cuda" else 1
    return Inputs(make, min(count, 32))


# --- The loss ---------------------------------------------------------------------------------------------------------


def loss_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and gradient of five heads against the top 16 classes."""
    gpu = device.type == "cuda"
    sizes = [(c, b) for c in (100, 1000, 21841) for b in (256, 1024, 2048)] if gpu else [(100, 256), (1000, 256)]
    if quick:
        sizes = [(1000, 1024), (21841, 1024)] if gpu else [(100, 32)]
    for num_classes, batch in sizes:
        yield loss_case(device, torch.bfloat16 if gpu else torch.float32, num_classes, batch)


def loss_case(device: torch.device, dtype: torch.dtype, num_classes: int, batch: int) -> Case:
    eps = torch.full((HEADS,), 1.5, device=device)
    moved = 2 * HEADS * batch * num_classes * dtype.itemsize + batch * (TOPK * 6 + 8)

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(HEADS, batch, num_classes, generator=generator, device=device).to(dtype)
        labels = torch.randint(0, num_classes, (batch,), generator=generator, device=device)
        teacher = (2 * torch.randn(batch, num_classes, generator=generator, device=device)).log_softmax(dim=1)
        log_probs, classes = teacher.topk(min(TOPK, num_classes))
        return logits.requires_grad_(), labels, classes.to(torch.int32), log_probs.half()

    inputs = rotate(make, moved / 2, device)

    def ours(impl: str) -> Callable[..., Tensor]:
        return lambda logits, labels, classes, log_probs: ofa_loss(logits, labels, classes, log_probs, eps, impl=impl)

    def dense(logits: Tensor, labels: Tensor, classes: Tensor, log_probs: Tensor) -> Tensor:
        return ofa_loss_dense(logits.float(), labels, dense_probs(classes, log_probs.float(), num_classes), eps)

    def call(function: Callable[..., Tensor]) -> Call:
        def forward_and_gradient(i: int) -> tuple[Tensor, Tensor]:
            logits, *rest = inputs[i]
            losses = function(logits, *rest)
            return losses, torch.autograd.grad(losses.sum(), logits)[0]

        return forward_and_gradient

    candidates = {BASELINE: call(ours("torch")), "twin, compiled": call(torch.compile(ours("torch"), dynamic=False))}
    skipped = {}
    compared = ["twin, compiled", "dense, eager"]
    candidates["dense, eager"] = call(dense)
    liger: dict[str, Call] = {}
    if device.type == "cuda" and HAS_TRITON:
        candidates["triton"] = call(ours("triton"))
        compared += ["triton"]
        try:
            liger = {name: call(function) for name, function in liger_losses(num_classes).items()}
        except ImportError as error:
            skipped["liger, KL and JSD"] = f"pip install liger-kernel ({error})"
    size = f"C={num_classes}, B={batch}, {HEADS} heads, {str(dtype).removeprefix('torch.')}"
    return Case(
        "loss", size, moved, batch, candidates | liger, tuple(compared),
        waiting=tuple(liger), inputs=inputs, skipped=skipped,
    )  # fmt: skip


def liger_losses(num_classes: int) -> dict[str, Callable[..., Tensor]]:
    """Peers: Liger-Kernel's two divergences, which take dense log-probabilities and have no target enhancement."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    def on_log_probs(loss: Callable[[Tensor, Tensor], Tensor], log_target: bool) -> Callable[..., Tensor]:
        def function(logits: Tensor, labels: Tensor, classes: Tensor, log_probs: Tensor) -> Tensor:
            target = dense_probs(classes, log_probs.float(), num_classes).repeat(HEADS, 1)
            student = logits.float().log_softmax(dim=-1).flatten(0, 1)
            return loss(student, target.clamp(min=1e-30).log() if log_target else target)

        return function

    return {
        "liger, KL": on_log_probs(LigerKLDIVLoss(reduction="batchmean"), log_target=False),
        "liger, JSD": on_log_probs(LigerJSD(), log_target=True),
    }


# --- Crop and resize --------------------------------------------------------------------------------------------------


def crop_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Random crops of stored images, some of them flipped, to normalised bf16 (fp32 on a CPU)."""
    gpu = device.type == "cuda"
    sizes = (
        [(256, 224, b) for b in (256, 1024, 2048)] + [(160, 160, 1024), (256, 128, 1024)] if gpu else [(256, 224, 16)]
    )
    if quick:
        sizes = [(256, 224, 1024)] if gpu else [(48, 32, 4)]
    for source, size, batch in sizes:
        yield crop_case(device, torch.bfloat16 if gpu else torch.float32, source, size, batch)


def crop_case(device: torch.device, dtype: torch.dtype, source: int, size: int, batch: int) -> Case:
    from torchvision.transforms.v2 import functional as v2

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

    compiled = torch.compile(ours("torch"), dynamic=False)
    candidates = {BASELINE: _on(inputs, ours("torch")), "twin, compiled": _on(inputs, compiled)}
    if device.type == "cuda" and HAS_TRITON:
        candidates["triton"] = _on(inputs, ours("triton"))
    candidates["torchvision v2, one by one"] = torchvision
    name = f"{source} to {size} px, B={batch}, {str(dtype).removeprefix('torch.')}"
    compared, waiting = tuple(list(candidates)[1:]), ("torchvision v2, one by one",)
    return Case("crop", name, moved, batch, candidates, compared, 0.03, waiting, inputs)


# --- Depthwise convolution --------------------------------------------------------------------------------------------

# Channels, side and stride: the exits of a ResNet-18 at 224 px, then layers of a MobileNetV2.
EXITS = [(64, 56, 2), (64, 28, 1), (128, 28, 2), (128, 14, 1), (256, 14, 2), (256, 7, 1)]
MOBILENET = [(96, 112, 2), (144, 56, 1), (192, 28, 1), (384, 14, 1), (960, 7, 1)]


def depthwise_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward, input gradient and weight gradient, and forward with the preceding batch norm and ReLU folded in."""
    if device.type == "cuda":
        sizes, batch = ([(64, 28, 1), (64, 56, 2), (384, 14, 1)] if quick else EXITS + MOBILENET), 1024
    else:
        sizes, batch = [(32, 14, 1)] if quick else EXITS[:2], 2 if quick else 16
    for channels, side, stride in sizes:
        for work in ("forward", "folded", "input gradient", "weight gradient"):
            yield depthwise_case(device, work, batch, channels, side, stride)
        for folded in (False, True):
            yield depthwise_gradients_case(device, folded, batch, channels, side, stride)


def depthwise_gradients_case(
    device: torch.device, folded: bool, batch: int, channels: int, side: int, stride: int
) -> Case:
    """All gradients, by separate kernels and in one pass; with a preceding batch norm and ReLU if `folded`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    out_side = -(-side // stride)
    scale, shift = torch.rand(2, channels, device=device)
    norm = (scale, shift, "relu") if folded else (None, None, None)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = (
            torch.randn(batch, n, n, channels, generator=generator, device=device, dtype=dtype).permute(0, 3, 1, 2)
            for n in (side, out_side)
        )
        return x, dy, torch.randn(channels, 1, 3, 3, generator=generator, device=device)

    moved = batch * channels * (2 * side**2 + out_side**2) * dtype.itemsize
    inputs = rotate(make, moved, device)

    def with_function(gradients: Callable[..., tuple[Tensor, ...]]) -> Call:
        return _on(inputs, lambda x, dy, weight: gradients(dy, x, weight, stride, *norm)[: 4 if folded else 2])

    def separate(implementation: Any) -> Callable[..., tuple[Tensor, ...]]:
        """Gradients of x, weight, scale and shift by the two functions of a module."""

        def gradients(*given: Any) -> tuple[Tensor, ...]:
            dx, *norms = implementation[0](*given)
            return dx, implementation[1](*given), *norms

        return gradients

    twin = separate((reference.depthwise_input_gradient, reference.depthwise_weight_gradient))
    candidates = {BASELINE: with_function(twin), "twin, compiled": with_function(torch.compile(twin, dynamic=False))}
    if can_run_triton(scale):
        from fastofa.kernels import triton_depthwise, triton_depthwise_gradients

        both = (triton_depthwise.input_gradient, triton_depthwise.weight_gradient)
        candidates["triton, separate"] = with_function(separate(both))
        candidates["triton, one pass"] = with_function(triton_depthwise_gradients.all_gradients)
    size = f"gradients{', folded' * folded}: C={channels}, {side} px, stride {stride}, B={batch}"
    return Case("depthwise", size, moved, batch, candidates, tuple(candidates)[1:], 0.03, inputs=inputs, by_norm=True)


def depthwise_case(device: torch.device, work: str, batch: int, channels: int, side: int, stride: int) -> Case:
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = f"{work}: C={channels}, {side} px, stride {stride}, B={batch}, {str(dtype).removeprefix('torch.')}"
    out_side = -(-side // stride)
    moved = batch * channels * (side**2 + out_side**2) * dtype.itemsize

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = (
            torch.randn(batch, channels, n, n, generator=generator, device=device, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )
            for n in (side, out_side)
        )
        return x, dy, torch.randn(channels, 1, 3, 3, generator=generator, device=device, dtype=dtype)

    inputs = rotate(make, moved, device)
    scale, shift = torch.rand(2, channels, device=device)

    def twin(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """On a GPU, cuDNN's convolution."""
        if work == "folded":
            return depthwise_conv3x3(x, weight, stride, scale, shift, "relu", impl="torch")
        if work == "forward":
            return depthwise_conv3x3(x, weight, stride, impl="torch")
        mask = [work == "input gradient", work == "weight gradient", False]
        settings = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], channels)
        return torch.ops.aten.convolution_backward(dy, x, weight, *settings, mask)[mask.index(True)]

    def triton(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        from fastofa.kernels import triton_depthwise

        if work == "folded":
            return triton_depthwise.depthwise_conv3x3(x, weight, stride, scale, shift, "relu")
        if work == "forward":
            return triton_depthwise.depthwise_conv3x3(x, weight, stride, None, None, None)
        if work == "input gradient":
            return triton_depthwise.input_gradient(dy, x, weight, stride, None, None, None)[0]
        return triton_depthwise.weight_gradient(dy, x, weight, stride, None, None, None)

    def narrow(*given: Tensor) -> Tensor:
        """Tiles of half the elements: four channels per lane."""
        from fastofa.kernels import triton_depthwise

        elements = triton_depthwise.ELEMENTS
        triton_depthwise.ELEMENTS = elements // 2
        try:
            return triton(*given)
        finally:
            triton_depthwise.ELEMENTS = elements

    functions = {BASELINE: twin, "twin, compiled": torch.compile(twin, dynamic=False)}
    if gpu and HAS_TRITON:
        functions |= {"triton": triton, "triton, four channels": narrow}
    candidates = {name: _on(inputs, function) for name, function in functions.items()}
    return Case("depthwise", size, moved, batch, candidates, tuple(list(candidates)[1:]), inputs=inputs)


def _on(inputs: Inputs, function: Callable[..., Any]) -> Call:
    return lambda i: function(*inputs[i])


# --- Batch norms and stems --------------------------------------------------------------------------------------------

# Channels, side, batch, residual and activation: a ResNet-18 at batch 1,024, a ResNet-50 at 256, a MobileNetV2 at 512.
NORMS = [
    (64, 56, 1024, True, "relu"), (64, 56, 1024, False, "relu"), (128, 28, 1024, True, "relu"),
    (512, 7, 1024, True, "relu"), (256, 56, 256, True, "relu"), (96, 112, 512, False, "relu6"),
    (144, 56, 512, False, "relu6"),
]  # fmt: skip


def norm_cases(device: torch.device, quick: bool, images: int | None = None) -> Iterator[Case]:
    """Forward and backward of everything between two convolutions in training; then each kernel by itself.

    `images`: the batch size, in place of each size's own.
    """
    gpu = device.type == "cuda"
    for channels, side, batch, residual, activation in NORMS[: 1 if quick and not gpu else None]:
        batch = images or (batch if gpu else 2)
        for work in ("training", "statistics", "apply", "sums", "gradient"):
            yield norm_case(device, work, batch, channels, side if gpu else side // 8, residual, activation)


def norm_case(
    device: torch.device, work: str, batch: int, channels: int, side: int, residual: bool, activation: str
) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    act = torch.nn.functional.relu if activation == "relu" else torch.nn.functional.relu6
    maps = {"training": 8 + 3 * residual, "statistics": 1, "apply": 2, "sums": 2, "gradient": 3}[work]
    maps += residual * {"apply": 1, "sums": 2}.get(work, 0)
    weight, bias, running_mean, running_var = torch.rand(4, channels, device=device) + 0.5

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (3, batch, side, side, channels)
        found = torch.randn(shape, generator=generator, device=device, dtype=dtype).permute(0, 1, 4, 2, 3)
        x, other, dy = found.unbind()
        mean, var = reference.channel_statistics(x[:2])
        return x.requires_grad_(), other.requires_grad_(residual), dy, mean, var

    inputs = rotate(make, batch * side * side * channels * dtype.itemsize * maps / 2, device)
    given = (weight.requires_grad_(), bias.requires_grad_())

    def training(x: Tensor, other: Tensor, dy: Tensor, forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = forward(x, other)
        return (y, *torch.autograd.grad(y, [x, *[other] * residual, *given], dy))

    def eager(x: Tensor, other: Tensor) -> Tensor:
        y = torch.nn.functional.batch_norm(x, running_mean, running_var, *given, True, 0.1, 1e-5)
        return act(y + other if residual else y)

    def triton(x: Tensor, other: Tensor) -> Tensor:
        running = (running_mean, running_var, True, 0.1, 1e-5)
        return norm_act(x, *given, *running, activation, other if residual else None, impl="triton")

    size = f"{work}: C={channels}, {side} px, B={batch}, {activation}{', residual' if residual else ''}"
    moved = batch * side * side * channels * dtype.itemsize * maps
    candidates: dict[str, Call] = {}
    if work == "training":
        compiled = torch.compile(eager, dynamic=False)
        candidates = {
            BASELINE: _on(inputs, lambda x, other, dy, *_: training(x, other, dy, eager)),
            "twin, compiled": _on(inputs, lambda x, other, dy, *_: training(x, other, dy, compiled)),
        }
        if can_run_triton(weight):
            candidates["triton"] = _on(inputs, lambda x, other, dy, *_: training(x, other, dy, triton))
        return Case("norm", size, moved, batch, candidates, tuple(candidates)[1:], 0.03, inputs=inputs, by_norm=True)

    def part(x: Tensor, other: Tensor, dy: Tensor, mean: Tensor, var: Tensor) -> Any:
        from fastofa.kernels import triton_norm_act as kernels

        x, other, w, b = (t.detach() for t in (x, other, *given))
        y = other if residual else None
        if work == "statistics":
            return kernels.statistics(x)
        if work == "apply":
            return kernels.norm_act(x, mean, var, w, b, y, 1e-5, activation)
        if work == "sums":
            return kernels.norm_act_sums(dy, x, y, mean, var, w, b, 1e-5, activation)[1:]
        return kernels.norm_act_gradient(dy, x, mean, var, w, b, w, b, 1e-5, None if residual else activation)

    if can_run_triton(weight):
        candidates = {"triton": _on(inputs, part)}  # there is no baseline: its share of a copy's bandwidth counts
    return Case("norm", size, moved, batch, candidates, inputs=inputs)


def stem_cases(device: torch.device, quick: bool, images: int | None = None) -> Iterator[Case]:
    """A ResNet's stem (convolution of the pixels; batch norm, ReLU and max-pool), and other models' convolutions."""
    gpu = device.type == "cuda"
    for name, kernel, stride, padding, width, batch in (
        ("ResNet", 7, 2, 3, 64, 1024), ("MobileNetV2", 3, 2, 1, 32, 512), ("DeiT-T", 16, 16, 0, 192, 1024),
    ):  # fmt: skip
        yield stem_case(device, name, kernel, stride, padding, width, images or (batch if gpu else 2))
    for work in ("training", "forward", "backward"):
        yield pool_case(device, work, images or (1024 if gpu else 2), 64, 112 if gpu else 12)


def stem_case(device: torch.device, name: str, kernel: int, stride: int, padding: int, width: int, batch: int) -> Case:
    """From uint8 to the convolution's result, and the gradient of its weights, compiled as in a training step."""
    gpu = device.type == "cuda"
    dtype, side = torch.bfloat16 if gpu else torch.float32, 224 if gpu else 32
    weight = torch.randn(width, 3, kernel, kernel, device=device).requires_grad_()
    out = (side + 2 * padding - kernel) // stride + 1

    def make(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        images = torch.randint(0, 256, (batch, side, side, 3), generator=generator, device=device, dtype=torch.uint8)
        dy = torch.randn(batch, out, out, width, generator=generator, device=device, dtype=dtype)
        return images.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)

    moved = batch * (2 * side * side * 3 + 2 * out * out * width * dtype.itemsize)
    inputs = rotate(make, moved, device)

    def forward(conv: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(images: Tensor, weight: Tensor) -> Tensor:
            pixels = ((images.float() / 255 - 0.45) / 0.22).to(dtype)
            return conv(pixels, weight.to(dtype), None, stride=stride, padding=padding)

        return run

    def call(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def run(images: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            y = function(images, weight)
            return y, *torch.autograd.grad(y, weight, dy)

        return _on(inputs, run)

    library = forward(torch.nn.functional.conv2d)
    candidates = {
        BASELINE: call(library),
        "library, compiled": call(torch.compile(library, dynamic=False)),
        "squares, compiled": call(torch.compile(forward(stem_conv2d), dynamic=False)),
        "squares of 12, compiled": call(
            torch.compile(forward(lambda *a, **k: stem_conv2d(*a, **k, multiple=4)), dynamic=False)
        ),
    }
    if kernel <= MAX_KERNEL and can_run_triton(weight):
        normalization = {
            name: torch.full((3,), value, device=device) for name, value in (("mean", 0.45), ("std", 0.22))
        }
        options = {"stride": stride, "padding": padding, "dtype": dtype, "impl": "triton", **normalization}
        candidates["triton, from uint8"] = call(partial(stem_conv2d, **options))
        with_statistics = partial(stem_conv2d_with_statistics, **options)
        candidates["triton, with statistics"] = call(lambda images, weight: with_statistics(images, weight)[0])
    size = f"{name} {kernel}x{kernel}/{stride} to {width}, {side} px, B={batch}"
    return Case("stem", size, moved, batch, candidates, tuple(candidates)[1:], inputs=inputs, by_norm=True)


def pool_case(device: torch.device, work: str, batch: int, channels: int, side: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    out = (side + 1) // 2
    weight, bias, running_mean, running_var = torch.rand(4, channels, device=device) + 0.5

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = (
            torch.randn(batch, n, n, channels, generator=generator, device=device, dtype=dtype).permute(0, 3, 1, 2)
            for n in (side, out)
        )
        mean, var = reference.channel_statistics(x[:2])
        kept = kernels.norm_act_pool(x, mean, var, *weights, 1e-5)[1:] if work == "backward" else ()
        return (x.requires_grad_(), dy, mean, var, *kept)

    whole, pooled = (batch * n * n * channels for n in (side, out))
    moved = {  # bytes that the kernels read and write; a position takes one byte
        "training": (5 * whole + 5 * pooled) * dtype.itemsize + 2 * pooled,
        "forward": (whole + 2 * pooled) * dtype.itemsize + pooled,
        "backward": (2 * whole + 3 * pooled) * dtype.itemsize + pooled,
    }[work]
    inputs = rotate(make, moved / 2, device)
    given = (weight.requires_grad_(), bias.requires_grad_())

    def eager(x: Tensor) -> Tensor:
        y = torch.nn.functional.batch_norm(x, running_mean, running_var, *given, True, 0.1, 1e-5)
        return torch.nn.functional.max_pool2d(torch.nn.functional.relu(y), 3, 2, 1)

    def call(function: Callable[[Tensor], Tensor]) -> Call:
        def run(x: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            y = function(x)
            return y, *torch.autograd.grad(y, given, dy)  # without dx, which differs where values are equal

        def whole(x: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            y = function(x)
            return y, *torch.autograd.grad(y, [*given, x], dy)[:2]

        return _on(inputs, whole if work == "training" else run)

    size = f"norm and maximum, {work}: C={channels}, {side} px, B={batch}"
    candidates: dict[str, Call] = {}
    if work == "training":
        candidates = {BASELINE: call(eager), "twin, compiled": call(torch.compile(eager, dynamic=False))}
        if can_run_triton(weight):
            running = (running_mean, running_var, True, 0.1, 1e-5)
            candidates["triton"] = call(lambda x: norm_act_pool(x, *given, *running, impl="triton"))
        return Case("stem", size, moved, batch, candidates, tuple(candidates)[1:], 0.03, inputs=inputs, by_norm=True)
    if can_run_triton(weight):
        from fastofa.kernels import triton_norm_act_pool as kernels
        from fastofa.kernels.triton_norm_act import norm_act_sums

        weights = weight.detach(), bias.detach()

        def part(x: Tensor, dy: Tensor, mean: Tensor, var: Tensor, *kept: Tensor) -> Any:
            if work == "forward":
                return kernels.norm_act_pool(x.detach(), mean, var, *weights, 1e-5)
            greatest, places = kept
            _, *sums = norm_act_sums(dy, greatest, None, mean, var, *weights, 1e-5, "relu")
            return kernels.norm_act_pool_gradient(dy, places, x.detach(), mean, var, weights[0], *sums, 1e-5), *sums

        candidates = {"triton": _on(inputs, part)}
    return Case("stem", size, moved, batch, candidates, inputs=inputs)


# --- Bias and GELU ----------------------------------------------------------------------------------------------------

# Rows, channels and images: the MLPs of a DeiT-T at batch 1,024 and of a Swin-T's first stage at 256.
GELUS = [(1024 * 197, 768, 1024), (256 * 56 * 56, 384, 256)]


def gelu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward pass of an MLP's bias and GELU, with the bias's gradient; then each pass by itself."""
    gpu = device.type == "cuda"
    for rows, channels, images in GELUS[: 1 if quick else None]:
        for work in ("training", "forward", "backward"):
            yield gelu_case(device, work, rows if gpu else rows // 256, channels, images if gpu else images // 256)


def gelu_case(device: torch.device, work: str, rows: int, channels: int, images: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bias = torch.rand(channels, device=device).requires_grad_()
    moved = rows * channels * dtype.itemsize * {"training": 5, "forward": 2, "backward": 3}[work]

    def make(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = torch.randn(2, rows, channels, generator=generator, device=device, dtype=dtype).unbind()
        return x.requires_grad_(), dy

    inputs = rotate(make, moved, device)

    def training(x: Tensor, dy: Tensor, forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = forward(x, bias)
        return (y, *torch.autograd.grad(y, [x, bias], dy))

    def part(x: Tensor, dy: Tensor) -> Any:
        from fastofa.kernels import triton_gelu

        x, b = x.detach(), bias.detach()
        return (
            triton_gelu.bias_gelu(x, b, False) if work == "forward" else triton_gelu.bias_gelu_backward(dy, x, b, False)
        )

    eager = partial(bias_gelu, impl="torch")
    size = f"bias and GELU, {work}: C={channels}, {rows:,} rows"
    candidates: dict[str, Call] = {}
    if work == "training":
        compiled = torch.compile(eager, dynamic=False)
        candidates = {
            BASELINE: _on(inputs, lambda x, dy: training(x, dy, eager)),
            "twin, compiled": _on(inputs, lambda x, dy: training(x, dy, compiled)),
        }
        if can_run_triton(bias):
            candidates["triton"] = _on(inputs, lambda x, dy: training(x, dy, partial(bias_gelu, impl="triton")))
    elif can_run_triton(bias):
        candidates = {"triton": _on(inputs, part)}  # there is no baseline: its share of a copy's bandwidth counts
    return Case("gelu", size, moved, images, candidates, tuple(candidates)[1:], inputs=inputs)


# --- Layer norm -------------------------------------------------------------------------------------------------------


def layer_norm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward of an addition and the norm after it; channels of a DeiT-T, a DeiT-S and a Mixer-B."""
    for channels in (192, 384, 768)[: 1 if quick else None]:
        yield layer_norm_case(device, 197 * (1024 if device.type == "cuda" else 4), channels)


def layer_norm_case(device: torch.device, rows: int, channels: int) -> Case:
    """An fp32 stream and, on a GPU, bf16 branches, as under autocast."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight, bias = (t.requires_grad_() for t in torch.rand(2, channels, device=device))
    moved = rows * channels * (5 * 4 + 4 * dtype.itemsize)

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dstream, branch, dy = torch.randn(4, rows, channels, generator=generator, device=device)
        return x.requires_grad_(), branch.to(dtype).requires_grad_(), dstream, dy.to(dtype)

    inputs = rotate(make, moved, device)

    def training(forward: Callable[..., Any], x: Tensor, branch: Tensor, *slopes: Tensor) -> tuple[Tensor, ...]:
        both = forward(x, weight, bias, 1e-6, branch, dtype)
        return (*both, *torch.autograd.grad(both, [x, branch, weight, bias], slopes))

    eager = partial(layer_norm, impl="torch")
    candidates = {
        BASELINE: _on(inputs, partial(training, eager)),
        "twin, compiled": _on(inputs, partial(training, torch.compile(eager, dynamic=False))),
    }
    if can_run_triton(weight):
        candidates["triton"] = _on(inputs, partial(training, partial(layer_norm, impl="triton")))
    size = f"addition and norm, training: C={channels}, {rows:,} rows"
    return Case("layer_norm", size, moved, rows // 197, candidates, tuple(candidates)[1:], inputs=inputs)


KERNELS = {
    "loss": loss_cases, "crop": crop_cases, "depthwise": depthwise_cases, "norm": norm_cases, "stem": stem_cases,
    "gelu": gelu_cases, "layer_norm": layer_norm_cases,
}  # fmt: skip


# --- Measuring --------------------------------------------------------------------------------------------------------


def gate(case: Case) -> dict[str, str]:
    """The candidates that are not timed, with the reason: they fail, or differ from the twin, which runs first."""
    expected = _flat(patiently(lambda: next(iter(case.candidates.values()))(0)))
    red = {}
    for name, call in case.candidates.items():
        try:
            got = _flat(patiently(partial(call, 0)))
        except Exception as error:
            traceback.print_exc()
            red[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        if name in case.compare:
            for ours, twins in zip(got, expected, strict=True):
                measure = "its norm" if case.by_norm else "the greatest number"
                difference = (ours - twins).norm(p=2 if case.by_norm else torch.inf)
                difference /= twins.norm(p=2 if case.by_norm else torch.inf)
                if not difference <= case.tolerance:
                    red[name] = f"differs from its twin by {difference:.1%} of {measure}"
    return red


def free(case: Case) -> None:
    if case.inputs is not None:
        case.inputs.free()
    gc.collect()
    torch.cuda.empty_cache()


def _flat(result: Any) -> list[Tensor]:
    return [t.detach().float() for t in (result if isinstance(result, tuple) else (result,))]


def measure(
    case: Case, device: torch.device, rounds: int, copy_gb_s: float, red: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """A row per candidate. All take turns, except those that `gate` rejected."""
    red = gate(case) if red is None else red
    ready = {name: call for name, call in case.candidates.items() if name not in red}
    gpu = device.type == "cuda"
    calls = max(8, len(case.inputs or ())) if gpu else 1

    def one_by_one(call: Call, count: int) -> Callable[[], None]:
        def run() -> None:
            for i in range(count):
                call(i)

        return run

    captures = {name: captured(call, calls) for name, call in ready.items() if gpu and name not in case.waiting}
    times: dict[str, list[float]] = {name: [] for name in ready}
    launched: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, call in ready.items():
            count = 1 if name in case.waiting else calls
            run = one_by_one(call, count)
            if name not in captures:
                run()
                times[name] += [timed_ms(run, device, 1) / count for _ in range(1 if gpu else 3)]
                continue
            captures[name]()
            times[name] += [timed_ms(captures[name], device, 1) / calls for _ in range(3)]
            launched[name].append(timed_ms(run, device, 1) / calls)
    rows = []
    for name in case.candidates:
        row: dict[str, Any] = {"kernel": case.kernel, "size": case.size, "candidate": name}
        if name in red:
            rows.append({**row, "red": red[name]})
            continue
        low, *_, high = statistics.quantiles(times[name], n=5)
        ms = statistics.median(times[name])
        rate = case.bytes / ms / 1e6
        row |= {
            "ms": ms, "p20_ms": low, "p80_ms": high, "gb_per_second": rate, "of_copy": rate / copy_gb_s,
            "items_per_second": case.items / ms * 1e3,
            "times_baseline": statistics.median(times[next(iter(times))]) / ms,
        }  # fmt: skip
        if launched[name]:
            row["launched_ms"] = statistics.median(launched[name])
        rows.append(row)
    return rows + [
        {"kernel": case.kernel, "size": case.size, "candidate": name, "skipped": why}
        for name, why in case.skipped.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    header = ["kernel", "size", "candidate", "ms", "p20", "p80", "launched", "GB/s", "of a copy", "x twin, eager"]
    lines = []
    for row in rows:
        names = [row["kernel"], row["size"], row["candidate"]]
        if "ms" not in row:
            lines.append([*names, row.get("red") or row["skipped"], *[""] * 6])
            continue
        lines.append(
            [
                *names,
                *(f"{row[key]:.3f}" for key in ("ms", "p20_ms", "p80_ms")),
                f"{row['launched_ms']:.3f}" if "launched_ms" in row else "",
                f"{row['gb_per_second']:,.1f}",
                f"{row['of_copy']:.0%}",
                f"{row['times_baseline']:.2f}",
            ]
        )
    return markdown_table(header, lines, left=3)


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    parser = command_line.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--quick", action="store_true", help="one size of each")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    if not gpu:
        print("no GPU here: the plain-PyTorch twins are timed, eager and compiled; no Triton kernel runs")
    cases = [case for name in args.only for case in KERNELS[name](device, args.quick) if case.candidates]
    torch._dynamo.config.recompile_limit = len(cases)  # beyond it, a function falls back to eager
    checked = []
    for case in cases:
        checked.append(gate(case))  # compiles
        free(case)
    wait(device)
    wait_for_turn()
    copy = machine.measure(device, torch.bfloat16 if gpu else torch.float32).gb_per_second
    rows = []
    for case, red in zip(cases, checked, strict=True):
        rows += measure(case, device, args.rounds, copy, red)
        free(case)
        result = {"copy_gb_per_second": copy, "rounds": args.rounds, "baseline": BASELINE, "rows": rows}
        # After each case, since a later one may crash.
        write_record(f"kernels_{'gpu' if gpu else 'cpu'}", result, args.out)
    print(table(rows))
    return int(any("red" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
