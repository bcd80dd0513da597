"""Time the update alone: torch's fused, foreach and one-by-one forms, timm's LAMB, and NVIDIA apex's if it is built.

    python -m bench.optimizers            writes bench/results/optimizers_{cpu,gpu}.json

It also reports the distance of the weights from those of the one-by-one form after ten steps on the same gradients,
even if it is zero. The weights and gradients are those of the student with its exits, channels-last.
"""

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lamb
from torch import Tensor, nn

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from bench.lib.steps import Job
from bench.lib.timing import interleaved_ms, median_ratio
from bench.lib.turns import wait_for_turn
from fastofa.student.stages import ALL_STAGES

STEPS = 10  # steps after which the weights are compared
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
ADAM: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.05}
LAMB: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.02}

# The first of each family is the baseline.
FAMILIES: dict[str, dict[str, Build]] = {
    "sgd": {
        "torch one by one": lambda p: torch.optim.SGD(p, foreach=False, **SGD),
        "torch foreach": lambda p: torch.optim.SGD(p, foreach=True, **SGD),
        "torch fused": lambda p: torch.optim.SGD(p, fused=True, **SGD),
        "apex FusedSGD": lambda p: _apex("FusedSGD")(p, **SGD),
    },
    "adamw": {
        "torch one by one": lambda p: torch.optim.AdamW(p, foreach=False, **ADAM),
        "torch foreach": lambda p: torch.optim.AdamW(p, foreach=True, **ADAM),
        "torch fused": lambda p: torch.optim.AdamW(p, fused=True, **ADAM),
        "apex FusedAdam": lambda p: _apex("FusedAdam")(p, **ADAM),
    },
    "lamb": {
        "timm one by one": lambda p: Lamb(p, foreach=False, **LAMB),
        "timm foreach": lambda p: Lamb(p, foreach=True, **LAMB),
        "apex FusedLAMB": lambda p: _apex("FusedLAMB")(p, **LAMB),
    },
}


def _apex(name: str) -> Any:
    """An optimiser of NVIDIA's apex. Raises ImportError without it."""
    importlib.import_module("amp_C")
    return getattr(importlib.import_module("apex.optimizers"), name)


class Update:
    """One optimiser on its own copy of the weights, with constant gradients."""

    def __init__(self, weights: list[Tensor], gradients: list[Tensor], build: Build) -> None:
        self.parameters = [nn.Parameter(w.clone()) for w in weights]
        self.optimizer = build(self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

    def __call__(self) -> None:
        self.optimizer.step()

    def distance(self, other: "Update") -> float:
        """The largest absolute difference of a weight."""
        pairs = zip(self.parameters, other.parameters, strict=True)
        return max((a - b).detach().abs().max().item() for a, b in pairs)


def compare(job: Job, rounds: int, calls: int) -> list[dict[str, Any]]:
    """One record for each optimiser."""
    student: Any = job.build_student(ALL_STAGES)
    student.to(job.device, memory_format=torch.channels_last)
    weights = [p.detach() for p in student.parameters()]
    gradients = [torch.randn_like(w) * 1e-2 for w in weights]
    found: list[dict[str, Any]] = []
    for family, builders in FAMILIES.items():
        updates: dict[str, Any] = {}
        for name, build in builders.items():
            try:
                updates[name] = Update(weights, gradients, build)
            except ImportError as error:
                found.append({"family": family, "optimizer": name, "skipped": f"not importable: {error}"})
        for update in updates.values():
            for _ in range(STEPS):
                update()
        baseline = next(iter(builders))
        distances = {name: update.distance(updates[baseline]) for name, update in updates.items()}
        times = interleaved_ms(updates, job.device, rounds, calls)
        found += [
            {
                "family": family,
                "optimizer": name,
                "step_ms": statistics.median(times[name]),
                "ratio_to_baseline": median_ratio(times, name, baseline),
                "weight_difference_after_10_steps": distances[name],
                "rounds_ms": times[name],
            }
            for name in updates
        ]
    return found


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = command_line.parser(__doc__)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="deit_tiny_patch16_224")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=50 if gpu else 3, help="updates a round")
    args = parser.parse_args(argv)
    wait_for_turn()
    job = Job(args.student, args.teacher, 224, 1, args.num_classes, device)
    found = compare(job, args.rounds, args.calls)
    settings = {"student": args.student, "rounds": args.rounds, "baseline": "one by one, of each family"}
    write_record(f"optimizers_{'gpu' if gpu else 'cpu'}", {**settings, "rows": found}, args.out)
    rows = [
        [r["family"], r["optimizer"], r["skipped"], "", ""]
        if "skipped" in r
        else [
            r["family"],
            r["optimizer"],
            f"{r['step_ms']:.2f}",
            f"{r['ratio_to_baseline']:.2f}",
            f"{r['weight_difference_after_10_steps']:.1e}",
        ]
        for r in found
    ]
    header = ["family", "optimizer", "ms", "x one by one", "weight difference"]
    print(markdown_table(header, rows, left=2))


if __name__ == "__main__":
    main()
