"""Train a student from a teacher cache.

    fastofa train --data photos --cache cache --student resnet18 --recipe imagenet_cnn --out run
    fastofa train --resume run      continue an interrupted run, mid-epoch, to the same weights
    fastofa train --resume run --epochs 200         train a run for longer
    fastofa train --config run/config.json --lr 0.05 --out other    the same run with another learning rate
    fastofa train ... --plan        what it would cost: steps timed here, hours, disk
    torchrun --no-python --nproc-per-node 8 fastofa train ...       the same job on eight GPUs

The run's folder holds its log, its checkpoints and a report; Ctrl-C or SIGTERM saves before the command ends.
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
        if found := plan(config):
            _show(*found)
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


def _show(plan: Plan, config: TrainConfig) -> None:
    table = Table(title=f"{config.student}, recipe {config.recipe}: what it would cost here", title_justify="left")
    for name in ("image size", "epochs", "images/s needed", "loader's images/s", "hours"):
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
        f"the loader limits it: {min(r.loader / r.step for r in slow):.0%} of what the step takes"
        if slow
        else "the step limits it, the loader keeps up"
    )
    cache = f", and the cache of {filesize.decimal(plan.cache_bytes)} is read" if plan.cache_bytes else ""
    print(f"{limit}; the run folder takes {filesize.decimal(plan.run_bytes)}{cache}; no run was begun")
