"""Measure where a training step's time goes, kernel by kernel, and how close each comes to the memory bandwidth.

    python -m bench.profile_step                                        on a CPU: ResNet-18's step, a row per operation
    python -m bench.profile_step --students resnet18 resnet50 mobilenetv2_100                    on a GPU: per kernel
    writes bench/results/profile_{cpu,gpu}.json and, with --docs, docs/profile.md

torch.profiler's trace gives the time of every kernel (on a CPU: the operation's own time, without its children) and the
operation that launched it, with the shapes of its operands. The bytes come from those shapes: operands read once and
results written once, by the rules of bench.roofline (batch norm 3 passes forward, 5 backward); a compiled kernel's are
its arguments. If an operation launches several kernels, its bytes are divided among them by time. A kernel that reads
or rearranges data more often shows a low share of the bandwidth that a copy reaches in the same run.
"""

import ast
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.lib import command_line, machine
from bench.lib.record import markdown_table, read_record, write_record
from bench.lib.steps import Job, StepOptions, open_step
from bench.lib.timing import timed_ms

PAGE = Path(__file__).parent.parent / "docs" / "profile.md"
TOP = 10
BYTES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4, "short": 2,
    "unsigned char": 1, "signed char": 1, "bool": 1,
}  # fmt: skip

# Why a kernel of the top ten is not optimised further: the first pattern that its name contains applies. Written by
# hand from the CPU's table; there are none for a GPU's kernels yet.
REASONS = {
    "depthwise": "the exits'; oneDNN runs it (cuDNN on a GPU), since inductor has no template for it",
    "convolution_backward": "the network's own arithmetic; oneDNN is no slower than a matrix product",
    "mkldnn_convolution": "the network's own arithmetic; oneDNN is no slower than a matrix product",
    "native_batch_norm": "3 passes over memory forward, 5 backward; `--compile on` folds ReLU into them",
    "copy_": "inside PyTorch: changes the layout of weight gradients, makes fused SGD's operands contiguous",
    "_fused_sgd_": "one pass over weight, gradient and momentum (copy_ makes them contiguous first)",
    "threshold_backward": "ReLU's backward pass; `--compile on` folds it into batch norm's",
    "linalg_vector_norm": "the gradient norm, logged at every step; reads each gradient once",
    "addmm": "five heads of 1,000 classes, forward",
    "mm": "five heads of 1,000 classes, backward",
    "add_": "residual sums and batch norm counters",
    "max_pool2d": "the stem's; PyTorch stores int64 indices",
}


@dataclass(frozen=True)
class Sample:
    """One kernel that ran (on a CPU: one operation)."""

    name: str
    ms: float
    bytes: float
    flops: float


# --- Reading the trace ------------------------------------------------------------------------------------------------


def samples(events: list[dict[str, Any]]) -> list[Sample]:
    """The samples of a Chrome trace: kernels if there are any, otherwise operations."""
    operations = [e for e in events if e.get("cat") == "cpu_op"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        own = _own_us(operations)
        return [Sample(_label("", o), us / 1e3, *cost(o)) for o, us in zip(operations, own, strict=True)]
    by_id = {o["args"]["External id"]: o for o in operations if "External id" in o["args"]}
    launched: dict[Any, float] = {}
    for kernel in kernels:
        key = kernel["args"].get("External id")
        launched[key] = launched.get(key, 0) + kernel["dur"]
    found = []
    for kernel in kernels:
        key = kernel["args"].get("External id")
        if key not in by_id:
            found.append(Sample(kernel["name"], kernel["dur"] / 1e3, math.nan, 0.0))
            continue
        share = kernel["dur"] / max(launched[key], 1e-9)
        moved, flops = cost(by_id[key])
        found.append(Sample(_label(kernel["name"], by_id[key]), kernel["dur"] / 1e3, share * moved, share * flops))
    return found


def _own_us(operations: list[dict[str, Any]]) -> list[float]:
    """Time of each operation without the operations that it called."""
    own = {id(o): float(o["dur"]) for o in operations}
    for thread in {o["tid"] for o in operations}:
        open_: list[dict[str, Any]] = []
        for o in sorted((o for o in operations if o["tid"] == thread), key=lambda o: (o["ts"], -o["dur"])):
            while open_ and open_[-1]["ts"] + open_[-1]["dur"] <= o["ts"]:
                open_.pop()
            if open_:
                own[id(open_[-1])] -= o["dur"]
            open_.append(o)
    return [max(own[id(o)], 0.0) for o in operations]


def _label(kernel: str, operation: dict[str, Any]) -> str:
    """The names of the operation and its kernel (equal for a compiled one), with "depthwise" if it is."""
    launcher = operation["name"].removeprefix("aten::")
    name = f"{launcher}: {kernel}" if kernel and kernel != launcher else launcher
    return f"depthwise {name}" if _is_depthwise(operation) else name


def _is_depthwise(operation: dict[str, Any]) -> bool:
    if "convolution" not in operation["name"]:
        return False
    weight = _dims(operation)[2 if "backward" in operation["name"] else 1]
    return len(weight) == 4 and weight[1] == 1 and weight[0] > 1


# --- What an operation costs ------------------------------------------------------------------------------------------


def _dims(operation: dict[str, Any]) -> list[list[int]]:
    return operation["args"].get("Input Dims", [])


def cost(operation: dict[str, Any]) -> tuple[float, float]:
    """Bytes that an operation must move and FLOPs that it must do, from its shapes; nan: not in the trace."""
    name, dims = operation["name"].removeprefix("aten::"), _dims(operation)
    types = operation["args"].get("Input type", [])
    inputs = [math.prod(d) * BYTES[t] for d, t in zip(dims, types, strict=False) if d and t in BYTES]
    if not inputs:  # numbers only, or a list of tensors, whose sizes are not in the trace
        return (math.nan if "TensorList" in types or "Input Dims" not in operation["args"] else 0.0), 0.0
    if name.startswith("triton"):
        return sum(inputs), 0.0  # a compiled kernel reads and writes only its arguments
    if "convolution_backward" in name:  # a pass for the input's gradient, a pass for the weight's
        macs = math.prod(dims[0]) * math.prod(dims[2][1:])
        return 2 * sum(inputs[:3]), 4 * macs
    if "convolution" in name:
        out = _conv_output(operation)
        return inputs[0] + inputs[1] + out * BYTES[types[0]], 2 * out * math.prod(dims[1][1:])
    if "batch_norm" in name:
        return (5 if "backward" in name else 3) * max(inputs), 0.0
    if name in ("mm", "addmm", "bmm"):
        a, b = dims[1:3] if name == "addmm" else dims[:2]  # a compiled program also passes the output tensor
        out = math.prod(a[:-1]) * b[-1]
        return (math.prod(a) + math.prod(b) + out) * BYTES[types[0]], 2 * out * a[-1]
    if name in ("copy_", "fill_", "zero_"):
        return sum(inputs), 0.0
    return sum(inputs) + max(inputs), 0.0  # element by element: the result is as large as the largest operand


def _conv_output(operation: dict[str, Any]) -> int:
    """The number of elements of a convolution's result."""
    x, weight = _dims(operation)[:2]
    lists = [ast.literal_eval(text) for text in operation["args"]["Concrete Inputs"] if text.startswith("[")]
    # cudnn_convolution and mkldnn_convolution take the padding first, their callers the stride.
    padding_first = "cudnn" in operation["name"] or "mkldnn" in operation["name"]
    (stride, _), (padding, _) = lists[1::-1] if padding_first else lists[:2]
    sides = [(side + 2 * padding - k) // stride + 1 for side, k in zip(x[2:], weight[2:], strict=True)]
    return x[0] * weight[0] * math.prod(sides)


# --- The table --------------------------------------------------------------------------------------------------------


def tabulate(found: Iterable[Sample], calls: int, peak: machine.Machine, update_bytes: float) -> list[dict[str, Any]]:
    """A row per name, the slowest first: figures of one step, shares of the peaks of copy and matrix product."""
    rows: dict[str, dict[str, Any]] = {}
    for sample in found:
        row = rows.setdefault(sample.name, {"name": sample.name, "calls": 0, "ms": 0.0, "gb": 0.0, "gflop": 0.0})
        row["calls"] += 1 / calls
        row["ms"] += sample.ms / calls
        row["gb"] += sample.bytes / calls / 1e9
        row["gflop"] += sample.flops / calls / 1e9
    total = sum(row["ms"] for row in rows.values())
    for row in rows.values():
        if "_fused_sgd_" in row["name"]:
            row["gb"] = update_bytes / 1e9  # lists of tensors, whose sizes are not in the trace
        row["share_of_step"] = row["ms"] / total
        known = not math.isnan(row["gb"]) and row["ms"] > 0
        row["gb"] = row["gb"] if known else None
        row["share_of_copy_bandwidth"] = row["gb"] / row["ms"] * 1e3 / peak.gb_per_second if known else None
        row["share_of_matmul"] = row["gflop"] / row["ms"] / peak.tflops if row["gflop"] else None
    return sorted(rows.values(), key=lambda row: -row["ms"])


def kernels(
    take: Callable[[], object], device: torch.device, calls: int, peak: machine.Machine, update_bytes: float = math.nan
) -> list[dict[str, Any]]:
    """The table of a warm step. `update_bytes` are those of the optimiser's update, which the trace lacks."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        timed_ms(take, device, calls)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return tabulate(samples(events), calls, peak, update_bytes)


def profile_step(job: Job, options: StepOptions, calls: int) -> dict[str, Any]:
    """Measure one student's table."""
    (step, targets), batch = open_step(job, options), job.batch()

    def take() -> None:
        step([batch], targets, lr=0.1)

    for _ in range(3):
        take()
    # Timed separately, since the profiler slows a step down.
    rounds = [timed_ms(take, job.device, calls) for _ in range(3)]
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    peak = machine.measure(job.device, dtype)
    weights = sum(p.numel() for p in step.parameters)
    rows = kernels(take, job.device, calls, peak, 5 * 4 * weights)
    return {
        "student": job.student,
        "options": dataclasses.asdict(options),
        "step_ms": sorted(rounds)[1],
        "rounds_ms": rounds,
        "machine": dataclasses.asdict(peak),
        "rows": rows,
    }


def why(name: str) -> str:
    return next((reason for pattern, reason in REASONS.items() if pattern in name), "")


def page(found: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The text of docs/profile.md."""
    parts = [
        "# Where a training step's time goes",
        "Made by `python -m bench.profile_step --docs` from "
        f"[{settings['record']}](../bench/results/{settings['record']}), which names machine, versions and commit. "
        "GB: operands read once, results written once. The last columns compare bandwidth with that of a large copy, "
        "and arithmetic with that of a large matrix product, both measured in the same run; above 100 %, caches "
        "helped.",
    ]
    for student in found:
        rows = []
        for row in student["rows"][:TOP]:
            figures = f"{row['calls']:.0f}", f"{row['ms']:.2f}", f"{row['share_of_step']:.0%}"
            gb = "" if row["gb"] is None else f"{row['gb']:.3f}"
            shares = (
                "" if row[name] is None else f"{row[name]:.0%}"
                for name in ("share_of_copy_bandwidth", "share_of_matmul")
            )
            rows.append([f"`{_short(row['name'])}`", why(row["name"]), *figures, gb, *shares])
        header = ["kernel", "why it stays", "calls", "ms", "of the step", "GB", "of a copy", "of a matmul"]
        options = student["options"]
        parts.append(
            f"## {student['student']}: {student['step_ms']:.1f} ms a step\n\n"
            f"{settings['image_size']} px, batch {settings['batch_size']}, {options['precision']}, "
            f"{'compiled' if options['compile'] == 'on' else 'eager'}, channels-last, OFA-KD from cached predictions, "
            f"{settings['hardware']}. A copy: {student['machine']['gb_per_second']:,.0f} GB/s; a matrix product: "
            f"{student['machine']['tflops']:,.2f} TFLOP/s.\n\n{markdown_table(header, rows, left=2)}"
        )
    return "\n\n".join(parts) + "\n"


def _short(name: str) -> str:
    name = name.replace("|", "/")
    return name if len(name) <= 70 else f"{name[:67]}..."


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = command_line.parser(__doc__)
    parser.add_argument("--students", nargs="+", default=["resnet18"])
    parser.add_argument("--teacher", default="deit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=224 if gpu else 64)
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 32)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--compile", choices=["on", "off"], default="on" if gpu else "off")
    parser.add_argument("--calls", type=int, default=10, help="steps that are profiled")
    parser.add_argument("--docs", action="store_true", help="write docs/profile.md, too")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True
    options = StepOptions(precision="bf16" if gpu else "fp32", compile=args.compile)
    settings = {name: getattr(args, name) for name in ("image_size", "batch_size", "num_classes", "calls")}
    settings |= {"rounds": 3, "baseline": "a large copy's bandwidth in the same run"}
    found = []
    for student in args.students:
        job = Job(student, args.teacher, args.image_size, args.batch_size, args.num_classes, device)
        found.append(profile_step(job, options, args.calls))
        # After each student, since a later one may run into a time limit.
        path = write_record(f"profile_{'gpu' if gpu else 'cpu'}", {**settings, "students": found}, args.out)
        torch.compiler.reset()
    made = read_record(path)["environment"]
    hardware = made["gpu"] or f"{made['cores']} cores of {made['cpu']}"
    text = page(found, {**settings, "record": path.name, "hardware": hardware})
    print(text)
    if args.docs:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
