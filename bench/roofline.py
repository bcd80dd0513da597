"""Compute the floor under a training step: each operation at peak arithmetic or bandwidth, whichever is slower.

    python -m bench.roofline                                        at this machine's peaks, measured first
    python -m bench.roofline --tflops 790 --gb-per-second 4300      at given peaks: a table, no record
    writes bench/results/roofline_{cpu,gpu}.json

The student is trained for one step on PyTorch's `meta` device, which computes shapes only, and every operation that
accesses memory is recorded: what it reads, writes and multiplies. The figure depends on these assumptions:

- activations and weights in bf16 (or the given dtype), each read or written once by an operation that needs it;
- batch norm takes passes of its own over memory: 3 forward (read for the statistics; read, write), 5 backward;
- an element-wise operation next to a norm (ReLU, a residual sum) is part of the norm's pass and free; GELU is
  between two matrix products, into which no compiler fuses it, and takes passes of its own;
- the matrix of attention weights never leaves the chip;
- the update reads weight, gradient and momentum and writes two of them, fp32.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lib import command_line, machine
from bench.lib.record import markdown_table, write_record
from fastofa.student.model import Student
from fastofa.student.stages import ALL_STAGES

STUDENTS = ("resnet18", "resnet50", "deit_tiny_patch16_224", "resmlp_12_224", "mobilenetv2_100")
TEACHER_DIM = 192  # deit_tiny's


@dataclass(frozen=True)
class Operation:
    """One pass over memory, and what it computes."""

    kind: str
    flops: float
    bytes: float

    def ms(self, peak: machine.Machine) -> float:
        return max(self.flops / peak.tflops / 1e9, self.bytes / peak.gb_per_second / 1e6)


class _Recorder(TorchDispatchMode):
    """Records the operations that run under it, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        if name in COSTS:
            self.operations += COSTS[name](args, out if isinstance(out, tuple) else (out,))
        return out


# --- What an operation costs ------------------------------------------------------------------------------------------


def size(*tensors: Tensor | None) -> int:
    """Total size of the tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _convolution(args: Sequence[Any], out: Sequence[Tensor]) -> list[Operation]:
    x, weight = args[:2]
    return [_conv_pass(x, weight, out[0], args[8])]


def _convolution_backward(args: Sequence[Any], out: Sequence[Tensor]) -> list[Operation]:
    """One pass for the input's gradient (except in the first layer, which needs none), one for the weight's."""
    gradient, x, weight = args[:3]
    return [_conv_pass(x, weight, gradient, args[9]) for wanted in args[10][:2] if wanted]


def _conv_pass(x: Tensor, weight: Tensor, y: Tensor, groups: int) -> Operation:
    depthwise = groups > 1 and groups == x.shape[1]
    kind = "depthwise" if depthwise else "1x1 conv" if weight.shape[-1] == 1 else "conv"
    macs = y.numel() * weight[0].numel()
    return Operation(kind, 2 * macs, size(x, weight, y))


def _matmul(args: Sequence[Any], out: Sequence[Tensor]) -> list[Operation]:
    a, b = args[-2:]
    return [Operation("matmul", 2 * a.numel() * b.shape[-1], size(a, b, out[0]))]


def _attention(args: Sequence[Any], out: Sequence[Tensor]) -> list[Operation]:
    """Batched products belong to attention; square operands (tokens x tokens) stay on the chip."""
    a, b = args[:2]
    moved = [t for t in (a, b, out[0]) if t.shape[-1] != t.shape[-2]]
    return [Operation("attention", 2 * a.numel() * b.shape[-1], size(*moved))]


def _passes(kind: str, count: int, tensor: int = 0) -> Callable[[Sequence[Any], Sequence[Tensor]], list[Operation]]:
    """`count` passes over argument number `tensor`."""
    return lambda args, out: [Operation(kind, 0, count * size(args[tensor]))]


def _in_and_out(kind: str) -> Callable[[Sequence[Any], Sequence[Tensor]], list[Operation]]:
    return lambda args, out: [Operation(kind, 0, size(args[0], out[0]))]


COSTS: dict[str, Callable[[Sequence[Any], Sequence[Tensor]], list[Operation]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "mm": _matmul,
    "addmm": _matmul,
    "bmm": _attention,
    "native_batch_norm": _passes("batch norm", 3),
    "native_batch_norm_backward": _passes("batch norm", 5),
    "native_layer_norm": _passes("layer norm", 2),
    "native_layer_norm_backward": _passes("layer norm", 3),
    "gelu": _passes("gelu", 2),
    "gelu_backward": _passes("gelu", 3),
    "max_pool2d_with_indices": _in_and_out("pooling"),
    "max_pool2d_with_indices_backward": _in_and_out("pooling"),
    "mean": _in_and_out("pooling"),
}


# --- The floor --------------------------------------------------------------------------------------------------------


def operations(
    student: str, image_size: int, batch_size: int, num_classes: int, exits: bool, dtype: torch.dtype
) -> list[Operation]:
    """The operations of one training step."""
    stages = ALL_STAGES if exits else ()
    model = Student(student, num_classes, image_size, TEACHER_DIM, stages).to("meta", dtype).train()
    images = torch.empty(batch_size, 3, image_size, image_size, device="meta", dtype=dtype)
    with _Recorder() as recorder:
        model(images).sum().backward()
    weights = sum(p.numel() for p in model.parameters())
    return [*recorder.operations, Operation("update", 0, 5 * 4 * weights)]


def floor_ms(
    student: str, image_size: int, batch_size: int, num_classes: int, exits: bool, peak: machine.Machine
) -> float:
    """The shortest possible step, in milliseconds."""
    dtype = getattr(torch, peak.dtype)
    found = operations(student, image_size, batch_size, num_classes, exits, dtype)
    return sum(operation.ms(peak) for operation in found)


def by_kind(found: list[Operation], peak: machine.Machine) -> dict[str, float]:
    """Milliseconds of each kind of operation, the slowest first."""
    kinds = {operation.kind for operation in found}
    total = {kind: sum(o.ms(peak) for o in found if o.kind == kind) for kind in kinds}
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _largest(kinds: dict[str, float], digits: int) -> str:
    return ", ".join(f"{kind} {ms:.{digits}f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])[:4])


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--students", nargs="+", default=STUDENTS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--tflops", type=float, default=math.nan, help="peak arithmetic; by default measured here")
    parser.add_argument(
        "--gb-per-second", type=float, default=math.nan, help="peak bandwidth; by default measured here"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = machine.Machine(args.tflops, args.gb_per_second, "bfloat16")
    measured = math.isnan(args.tflops) or math.isnan(args.gb_per_second)
    if measured:
        peak = machine.measure(device, torch.bfloat16)
    print(
        f"{peak.tflops:,.3g} TFLOP/s, {peak.gb_per_second:,.0f} GB/s, batch {args.batch_size}, {args.image_size} px\n"
    )
    rows, found_ms = [], {}
    for student in args.students:
        plain, whole = (
            operations(student, args.image_size, args.batch_size, args.num_classes, exits, torch.bfloat16)
            for exits in (False, True)
        )
        ms, more = (sum(o.ms(peak) for o in found) for found in (plain, whole))
        kinds = by_kind(plain, peak)
        added = {kind: value - kinds.get(kind, 0) for kind, value in by_kind(whole, peak).items()}
        found_ms[student] = {"step_ms": ms, "exits_add_ms": more - ms, "kinds_ms": kinds, "exits_kinds_ms": added}
        images = f"{args.batch_size / ms:,.1f}k"
        rows.append([student, _largest(kinds, 1), _largest(added, 2), f"{ms:.1f}", images, f"{more - ms:.1f}"])
    header = ["student", "of which (ms)", "exits, of which (ms)", "step ms", "max images/s", "exits add ms"]
    print(markdown_table(header, rows, left=3))
    if measured:
        settings = {name: getattr(args, name) for name in ("image_size", "batch_size", "num_classes")}
        settings |= {"rounds": machine.ROUNDS, "baseline": "peaks of the same run", "machine": dataclasses.asdict(peak)}
        write_record(f"roofline_{device.type.replace('cuda', 'gpu')}", {**settings, "students": found_ms}, args.out)


if __name__ == "__main__":
    main()
