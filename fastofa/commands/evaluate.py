"""Evaluate a run's student.

    fastofa evaluate run                    on the validation images of the run's own data
    fastofa evaluate run --data others
    fastofa evaluate run --json evaluation.json         also write the recall of each class and the confusion matrix

Prints the metrics and the agreement with the teacher, and writes them to RUN/evaluation.json.
"""

from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import EvaluateConfig
from fastofa.reports.metrics import METRICS
from fastofa.system.errors import counted
from fastofa.system.files import write_json
from fastofa.system.progress import plain
from fastofa.training.evaluate import evaluate


def main(config: EvaluateConfig) -> None:
    c = config
    evaluation = evaluate(c.run, c.data, c.weights, c.batch_size, c.device, c.pipeline, c.workers)
    if c.json is not None:
        write_json(c.json, {"run": str(c.run), "weights": c.weights, **evaluation.details()})
    title = f"{config.run} on {counted(evaluation.images, 'image')} of {evaluation.data}"
    table = Table(title=plain(title), title_justify="left")
    for name in (*(metric.title for metric in METRICS), "teacher's top-1", "agreement"):
        table.add_column(name, justify="right")
    teacher = (evaluation.teacher_top1, evaluation.agreement)
    table.add_row(
        *(metric.text(evaluation.metrics[metric.name]) for metric in METRICS),
        *("-" if value is None else f"{value:.2%}" for value in teacher),
    )
    Console().print(table)
