"""Evaluate a run's student while it trains, and save its predictions and its best weights."""

from contextlib import nullcontext

from fastofa.data.dataset import Dataset
from fastofa.pipelines import Pipeline
from fastofa.reports.metrics import measure
from fastofa.runs import checkpoint
from fastofa.runs.predictions import save_predictions
from fastofa.runs.run import Run
from fastofa.training.background_writer import Writer
from fastofa.training.compile_notice import compiling
from fastofa.training.step import Step
from fastofa.training.validate import best_classes_each


class Evaluations:
    """The evaluations of one run. All ranks call it together; rank 0 writes the files."""

    def __init__(self, run: Run, step: Step, pipeline: Pipeline, dataset: Dataset) -> None:
        self.run, self.step, self.pipeline, self.dataset = run, step, pipeline, dataset
        self.compiled = False
        self.best: dict[str, float] = {}
        """Top-1 of the best weights so far, by file."""
        if step.world.is_main:
            files = (checkpoint.BEST, checkpoint.BEST_EMA)
            self.best = {file: checkpoint.best_top1(run.path, step.steps, file) for file in files}

    def __call__(self, epoch: int, writer: Writer) -> dict[str, float]:
        """Every metric of the student; with a moving average, those of the better of the two by top-1, and of each.

        Saves the predictions, and the weights if they are the best so far.
        """
        c, step, labels = self.run.config, self.step, self.dataset.labels
        students = {"raw": step.student} if step.ema is None else {"raw": step.student, "ema": step.ema.module}
        with nullcontext() if self.compiled else compiling(step, "evaluation"):
            predictions = best_classes_each(
                list(students.values()),
                self.pipeline,
                self.dataset,
                c.eval_crop,
                step.bf16,
                flip=c.eval_flip,
                bicubic=c.eval_interpolation == "bicubic",
                world=step.world,
                compiled=step.compiled,
            )
        self.compiled = True
        by_name = dict(zip(students, predictions, strict=True))
        scores = {name: measure(best, labels) for name, best in by_name.items()}
        better = max(reversed(scores), key=lambda name: scores[name]["top1"])  # the average on a tie
        values = dict(scores[better])
        if len(scores) > 1:
            values |= {f"{metric}_{name}": scores[name][metric] for metric in scores[better] for name in scores}
        if step.world.is_main:
            info = {"step": step.steps, "epoch": epoch}
            best, about = by_name[better], {**info, **values}
            writer(lambda: save_predictions(self.run.path, best, labels, about))
            for name, file in (("raw", checkpoint.BEST), ("ema", checkpoint.BEST_EMA)):
                if name in scores and scores[name]["top1"] > self.best[file]:
                    self.best[file] = scores[name]["top1"]
                    checkpoint.save_best(self.run.path, students[name], {**info, **scores[name]}, file, when=writer)
        return values
