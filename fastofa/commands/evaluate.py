"""Evaluate a run's student, an exported model, or a checkpoint such as those of the official code.

    fastofa evaluate run                    on the validation images of the run's own data
    fastofa evaluate run --data others
    fastofa evaluate run --json evaluation.json         also write the recall of each class and the confusion matrix
    fastofa evaluate student --data photos              a folder with config.json and model.safetensors
    fastofa evaluate model_best.pth.tar --student resnet18 --data cifar100:DIR

Prints the metrics. For a run, also prints the agreement with the teacher, and writes the figures to
RUN/evaluation.json.
"""

from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import EvaluateConfig
from fastofa.reports.metrics import METRICS
from fastofa.runs.run import is_run
from fastofa.system.errors import counted
from fastofa.system.files import write_json
from fastofa.system.progress import plain
from fastofa.training.evaluate import evaluate


def main(config: EvaluateConfig) -> None:
    c = config
    checkpoint = (c.student, c.mean, c.std, c.eval_crop)
    evaluation = evaluate(c.model, c.data, c.weights, c.batch_size, c.device, c.pipeline, c.workers, *checkpoint)
    if c.json is not None:
        source = {"run": str(c.model), "weights": c.weights} if is_run(c.model) else {"model": str(c.model)}
        write_json(c.json, {**source, **evaluation.details()})
    title = f"{c.model} on {counted(evaluation.images, 'image')} of {evaluation.data}"
    table = Table(title=plain(title), title_justify="left")
    for name in (*(metric.title for metric in METRICS), "teacher's top-1", "agreement"):
        table.add_column(name, justify="right")
    teacher = (evaluation.teacher_top1, evaluation.agreement)
    table.add_row(
        *(metric.text(evaluation.metrics[metric.name]) for metric in METRICS),
        *("-" if value is None else f"{value:.2%}" for value in teacher),
    )
    Console().print(table)
