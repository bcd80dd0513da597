"""Choose a student's kernels as `fastofa train` does, but without a time limit, and print the table.

    python -m bench.kernel_choice --student resnet18 --batch-size 1024    on a GPU
    python -m bench.kernel_choice --dry-run                               a tiny student, in Triton's interpreter
    writes bench/results/kernel_choice.json

A training run measures for about five seconds and leaves the rest to later runs. After this command, the user's cache
folder contains all results for this student, batch size and GPU, so that the next run measures nothing.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from bench.lib.timing import timed_ms
from bench.lib.turns import wait_for_turn
from fastofa.kernels.comparison import cuda_ms
from fastofa.methods.method import Sizes
from fastofa.methods.objective import Objective
from fastofa.runs import recipes
from fastofa.student.choose_kernels import SWITCHES, record_comparisons
from fastofa.student.measure_kernels import KernelChoice, cache_path
from fastofa.student.model import Student
from fastofa.system.tuning import allow_image_sizes
from fastofa.training.step import MAX_IMAGE_SIZES


def single_ms(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of one call on a CPU, for a dry run: the interpreter's times say nothing about a GPU."""
    return {name: timed_ms(call, torch.device("cpu"), 1) for name, call in calls.items()}


def measure(student: Student, batch_size: int, choice: KernelChoice, objective: Objective) -> None:
    for switch in SWITCHES.values():
        switch(student)
    logits, found = record_comparisons(student, batch_size, bf16=True)
    choice.choose(found)
    choice.choose((objective, *each) for each in objective.comparisons(logits).items())


def table(choice: KernelChoice) -> str:
    rows = []
    for row in choice.rows:
        times = " ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
        dropped = " ".join(f"{name}: {reason}" for name, reason in row["dropped"].items())
        rows.append([row["kernel"], row["size"], str(row["uses"]), row["chosen"], times, dropped or row["source"]])
    return markdown_table(["kernel", "size", "uses", "chosen", "ms", "remark"], rows, left=2)


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__doc__)
    parser.add_argument("--student", default="resnet18", help="a timm model")
    parser.add_argument("--batch-size", type=int, default=1024, help="images that a rank processes at once")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--teacher-dim", type=int, default=768, help="width of the teacher's last features")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="as the step will be")
    parser.add_argument("--name", default="kernel_choice", help="of the record")
    parser.add_argument("--dry-run", action="store_true", help="a tiny student on a CPU; nothing is cached")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.student, args.batch_size, args.image_size, args.teacher_dim, args.classes = "test_resnet", 2, 32, 0, 10
    elif not torch.cuda.is_available():
        print("kernel_choice: expected a GPU, found none; give --dry-run to try the command on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    torch.backends.cudnn.benchmark = True
    allow_image_sizes(MAX_IMAGE_SIZES)
    student = Student(args.student, args.classes, args.image_size, args.teacher_dim).to(
        device,
        memory_format=torch.channels_last,  # type: ignore[call-overload]
    )
    config = recipes.imagenet_cnn(data="synthetic", student=args.student, out=Path())
    objective = Objective(config.objective, Sizes(args.classes)).to(device)
    with tempfile.TemporaryDirectory() as folder:
        choice = KernelChoice(
            device,
            compiled=args.compile == "on" and not args.dry_run,
            timer=single_ms if args.dry_run else cuda_ms,
            budget_s=float("inf"),
            cache=Path(folder) / "kernels.json" if args.dry_run else cache_path(),
        )
        wait_for_turn()
        measure(student, args.batch_size, choice, objective)
    print(table(choice))
    print(choice.line())
    write_record(args.name, choice.record(), args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
