"""Time the kernels against their twins and public peers: time, GB/s, share of a copy's bandwidth.

    python -m bench.bench_kernels                     on a GPU: Triton, its twin eager and compiled, peers (5 min)
    python -m bench.bench_kernels --only loss --quick the sizes for which targets are set
    writes bench/results/kernels_{cpu,gpu}.json

Without a GPU, only the twins are timed, eager and compiled. A kernel whose results differ from its twin's is not timed,
and the exit code is 1. On a GPU, each figure is the time of a CUDA graph of several calls. Their inputs together exceed
the L2 cache (unless that takes more than 32 inputs), and the candidates' graphs are replayed in turn. "launched" is the
time of the same calls without a graph. It is the only figure for peers that wait for the device, because a graph cannot
capture them. GB/s counts the bytes that any implementation must move: each input read once, each output written once.

The cases of each kernel, its sizes and implementations, are in bench/kernel_cases/.
"""

import gc
import statistics
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases.case import BASELINE, Call, Case, training_dtype
from bench.kernel_cases.crop import crop_cases
from bench.kernel_cases.depthwise import depthwise_cases
from bench.kernel_cases.gelu import gelu_cases
from bench.kernel_cases.layer_norm import layer_norm_cases
from bench.kernel_cases.loss import loss_cases
from bench.kernel_cases.norm import norm_cases
from bench.kernel_cases.stem import stem_cases
from bench.lib import command_line, machine
from bench.lib.record import markdown_table, write_record
from bench.lib.timing import captured, timed_ms, wait
from bench.lib.turns import patiently, wait_for_turn

KERNELS = {
    "loss": loss_cases, "crop": crop_cases, "depthwise": depthwise_cases, "norm": norm_cases, "stem": stem_cases,
    "gelu": gelu_cases, "layer_norm": layer_norm_cases,
}  # fmt: skip


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
    copy = machine.measure(device, training_dtype(device)).gb_per_second
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
