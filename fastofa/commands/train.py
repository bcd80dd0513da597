"""Train a student from a teacher cache.

    fastofa train --data photos --cache cache --student resnet18 --recipe imagenet_cnn --out run
    fastofa train ... --resume      go on after an interruption, mid-epoch, to the same weights
    fastofa train ... --plan        what it would cost: steps timed here, hours, disk
    torchrun --no-python --nproc-per-node 8 fastofa train ...       the same job on eight GPUs

The run's folder holds its log, its checkpoints and a report; Ctrl-C or SIGTERM saves before the command ends.
"""

# This file is the loop: epochs, logging, evaluation, checkpoints. The step is step.py, what an epoch shows epochs.py.

from fastofa.runs.config import TrainConfig
from fastofa.system import torchrun
from fastofa.system.errors import escaped
from fastofa.training.loop import train
from fastofa.training.plan import plan_run


def main(config: TrainConfig) -> None:
    if config.plan:
        plan_run(config)
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
