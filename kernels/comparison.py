"""Compare implementations of one computation on this machine: which are correct, and which is the fastest.

An object that runs a kernel (a module, the objective, a pipeline) states its implementations in a method `comparisons`
and holds the name of the chosen one in an attribute:

    class Gelu(nn.GELU):
        impl: str = "triton"  # the default, which `comparisons` names first

        def forward(self, x):
            return gelu(x, self.impl)

        def comparisons(self, x):
            run = {impl: partial(gelu, impl=impl) for impl in ("triton", "torch")}
            return {"impl": Comparison("gelu", describe(x), random_like(x), run, leaves=(0,))}

A `Comparison` makes its own inputs, so that it can be measured before any data is loaded. It only needs the shapes and
dtypes of the tensors that `comparisons` receives, which may be fake.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

TWIN = "torch"
# Largest error of a result beyond the twin's own in the same precision, as a share of its norm, by the lowest precision
# among the inputs: a few roundings (of TF32, for fp32).
TOLERANCE = {torch.float16: 2**-8, torch.bfloat16: 2**-6, torch.float32: 2**-9}
ROUNDS = 5
ROUND_MS = 0.5  # a candidate is repeated until a round takes about as long, at most REPEATS times
REPEATS = 16

Run = Callable[..., Any]
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclass(frozen=True)
class Comparison:
    """One computation at one size, and its implementations."""

    kernel: str
    """What is computed, such as "norm_act" or "depthwise_conv3x3 weight gradient"."""
    size: str
    """Everything else on which time and result depend: shapes, dtypes and options (see `describe`)."""
    inputs: Callable[[], tuple[Any, ...]]
    """Makes the arguments of the implementations on their device."""
    candidates: Mapping[str, Run]
    """Implementations by name. The first is the default. "torch" is the plain-PyTorch twin, whose results for fp32
    inputs are the truth."""
    leaves: tuple[int, ...] = ()
    """Arguments whose gradients are computed, checked and timed, too; those that are None are skipped."""
    fused: tuple[str, ...] = ()
    """Candidates that consist of several operations, which torch.compile fuses if the step is compiled."""
    elements: int = 0
    """Elements of the largest tensor; larger computations are measured first."""

    @property
    def default(self) -> str:
        return next(iter(self.candidates))


@runtime_checkable
class Chooses(Protocol):
    """An object whose attributes name the implementations that it runs."""

    def comparisons(self, *inputs: Any) -> dict[str, Comparison]:
        """A comparison for each attribute, for inputs like these."""
        ...


@dataclass(frozen=True)
class Measured:
    """The result of `compare`."""

    correct: tuple[str, ...]
    """Names of the correct candidates."""
    ms: dict[str, float]
    """Milliseconds of each correct candidate; empty if there is at most one."""
    dropped: dict[str, str]
    """Why the other candidates were dropped."""

    @property
    def fastest(self) -> str | None:
        """The fastest correct candidate; None if none is correct."""
        return min(self.ms, key=self.ms.__getitem__) if self.ms else next(iter(self.correct), None)


def compare(comparison: Comparison, timer: Timer, compiled: bool = False) -> Measured:
    """Check every candidate against the twin in fp32 on the same inputs, then time those that are correct.

    A candidate may err as much as the twin does in the same precision, and a tolerance that depends on the precision.

    Args:
        timer: takes calls by name and returns the milliseconds of each, such as `cuda_ms`.
        compiled: compile the candidates in `comparison.fused`.

    Raises:
        Exception: whatever the twin or the timer raises, such as OutOfMemoryError.
    """
    inputs, twin = comparison.inputs(), comparison.candidates[TWIN]
    halves = [t.dtype for t in inputs if isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16)]
    tolerance = max(TOLERANCE[dtype] for dtype in [torch.float32, *halves])
    exact = [_to_fp32(t) for t in inputs]
    with torch.no_grad():
        slope = torch.randn_like(_tensors(twin(*exact))[0].float()) if comparison.leaves else None
    truth = _outputs(comparison, twin, exact, slope)
    del exact
    norms = [t.float().norm().item() for t in truth]
    allowed = _errors(_outputs(comparison, twin, inputs, slope), truth)
    allowed = [error + tolerance * norm for error, norm in zip(allowed, norms, strict=True)]
    calls: dict[str, Callable[[], object]] = {}
    dropped = {}
    for name, run in comparison.candidates.items():
        if compiled and name in comparison.fused:
            run = torch.compile(run, dynamic=False, fullgraph=True)
        call = partial(_outputs, comparison, run, inputs, slope)
        try:
            problem = _difference(call(), truth, allowed, norms)
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if problem:
            dropped[name] = problem
        else:
            calls[name] = call
    del truth
    return Measured(tuple(calls), dict(timer(calls)) if len(calls) > 1 else {}, dropped)


def _outputs(comparison: Comparison, run: Run, inputs: Sequence[Any], slope: Tensor | None) -> list[Tensor]:
    """The results, then the gradients of the leaves if `slope` is the gradient of the first result."""
    if slope is None:
        with torch.no_grad():
            return _tensors(run(*inputs))
    leaves = [i for i in comparison.leaves if inputs[i] is not None]
    given = [t.detach().requires_grad_() if i in leaves else t for i, t in enumerate(inputs)]
    with torch.enable_grad():
        results = _tensors(run(*given))
        gradients = torch.autograd.grad(results[0], [given[i] for i in leaves], slope.to(results[0].dtype))
    return [*(t.detach() for t in results), *gradients]


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _to_fp32(value: Any) -> Any:
    """A copy of a floating tensor, since some implementations update an input; anything else is returned unchanged."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.float32, copy=True) if floating else value


def _difference(
    got: Sequence[Tensor], truth: Sequence[Tensor], allowed: Sequence[float], norms: Sequence[float]
) -> str:
    """Why `got` is wrong; empty if it is correct."""
    for number, (a, b) in enumerate(zip(got, truth, strict=True)):
        if a.shape != b.shape:
            return f"result {number}: expected shape {tuple(b.shape)}, got {tuple(a.shape)}"
    for number, (error, most, norm) in enumerate(zip(_errors(got, truth), allowed, norms, strict=True)):
        if not error <= most:  # also if it is NaN
            share = max(norm, 1e-30)
            return f"result {number}: expected an error of at most {most / share:.2g}, got {error / share:.2g}"
    return ""


def _errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    return [(a.float() - b.float()).norm().item() for a, b in zip(got, truth, strict=True)]


# --- Inputs -----------------------------------------------------------------------------------------------------------


def random_like(*tensors: Tensor | None) -> Callable[[], tuple[Tensor | None, ...]]:
    """A function that makes normally distributed tensors with these shapes, dtypes and devices, None where None is
    given. Feature maps are channels-last."""
    given = [None if t is None else (tuple(t.shape), t.dtype, t.device) for t in tensors]

    def make() -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else _normal(*each) for each in given)

    return make


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if len(shape) != 4:
        return torch.randn(shape, dtype=dtype, device=device)
    batch, channels, height, width = shape
    return torch.randn(batch, height, width, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)


def describe(*tensors: Tensor | None, **options: Any) -> str:
    """Shapes and dtypes, then options: "1024x64x56x56 bfloat16, 64 float32, stride 2"."""
    texts = [
        "none" if t is None else f"{'x'.join(map(str, t.shape)) or 1} {str(t.dtype).removeprefix('torch.')}"
        for t in tensors
    ]
    return ", ".join([*texts, *(f"{name} {value}" for name, value in options.items())])


# --- Time -------------------------------------------------------------------------------------------------------------


def cuda_ms(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds per call on the current GPU: medians of rounds, each of which times every call.

    Each round replays a CUDA graph of several calls, so that only the device's time counts, without launches. The
    calls read the same inputs repeatedly, so small tensors are read from the L2 cache, faster than in a training step.
    """
    graphs = {name: _captured(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (graph, repeats) in graphs.items():
            times[name].append(_elapsed_ms(graph.replay) / repeats)
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def _captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of several calls, and their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles, and fills caches that must not be filled during the capture
        ms = _elapsed_ms(call)
    torch.cuda.current_stream().wait_stream(stream)
    repeats = max(1, min(REPEATS, round(ROUND_MS / max(ms, 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph, repeats


def _elapsed_ms(call: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)
