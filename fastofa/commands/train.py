"""Train a student from a teacher cache.

    fastofa train --data photos --cache cache --student resnet18 --recipe imagenet_cnn --out run
    fastofa train --data photos --online-teacher teacher --student resnet18 --out run    runs the teacher in every step
    fastofa train --resume run      resume an interrupted run, even mid-epoch, with the same final weights
    fastofa train --resume run --epochs 200         train a run for longer
    fastofa train --config run/config.json --lr 0.05 --out other    the same run with another learning rate
    fastofa train ... --plan        estimate hours and disk space from steps timed on this machine
    torchrun --no-python --nproc-per-node 8 fastofa train ...       the same job on eight GPUs

The run's folder contains its log, its checkpoints and a report. After Ctrl-C or SIGTERM the command saves a checkpoint
and exits.
"""

from rich import filesize
from rich.console import Console
from rich.table import Table

from fastofa.runs.config import TrainConfig
from fastofa.system import torchrun
from fastofa.system.errors import escaped
from fastofa.training.loop import train
from fastofa.training.plan import Plan, plan


def main(config: TrainConfig) -> None:
    if config.plan:
        if estimate := plan(config):
            _print_plan(*estimate)
        return
    result = train(config)
    if not torchrun.is_main():
        return
    print(
        escaped(
            f"{config.out}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
            f"{result.images_per_second:,.0f} images/s, {result.seconds:,.0f} s"
        )
    )


def _print_plan(plan: Plan, config: TrainConfig) -> None:
    table = Table(
        title=f"{config.student}, recipe {config.recipe}: estimated cost on this machine", title_justify="left"
    )
    for name in ("image size", "epochs", "images/s needed", "loader images/s", "hours"):
        table.add_column(name, justify="right")
    for r in plan.rates:
        hours = r.epochs * plan.images / min(r.step, r.loader) / 3600
        table.add_row(f"{r.size} px", str(r.epochs), f"{r.step:,.0f}", f"{r.loader:,.0f}", f"{hours:,.2f}")
    table.add_row(
        "evaluation",
        "",
        f"{plan.evaluation:,.0f}",
        "",
        f"{plan.evaluated / plan.evaluation / 3600:,.2f}",
        end_section=True,
    )
    table.add_row("all", str(config.epochs), "", "", f"{plan.seconds / 3600:,.2f}")
    Console().print(table)
    slow = [r for r in plan.rates if r.loader < r.step]
    limit = (
        f"the loader is the bottleneck: it supplies {min(r.loader / r.step for r in slow):.0%} of what the step needs"
        if slow
        else "the step is the bottleneck, the loader keeps up"
    )
    cache = f", the cache {filesize.decimal(plan.cache_bytes)}" if plan.cache_bytes else ""
    limit += "; the steps include the teacher" if config.online_teacher is not None else ""
    print(f"{limit}; the run's folder takes {filesize.decimal(plan.run_bytes)}{cache}; no run was started")
