"""Accuracy, and the log of a run: metrics.jsonl (one object per logged step and per epoch), TensorBoard, a picture."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastofa.dataset import Dataset
from fastofa.errors import BadInput
from fastofa.files import write_atomic
from fastofa.pipelines import Pipeline
from fastofa.progress import track
from fastofa.views import center_views

FILE = "metrics.jsonl"


@torch.inference_mode()
def predict(student: Any, pipeline: Pipeline, dataset: Dataset, crop: float, bf16: bool, title: str = "") -> np.ndarray:
    """The five best classes of the student's last head on the central crops, int64 [N, min(5, C)], best first."""
    training = student.training
    student.eval()
    best = []
    batches = pipeline.epoch(center_views(dataset.sizes, crop), np.arange(len(dataset)))
    for batch in track(batches, len(dataset), title, lambda batch: len(batch.labels)):
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
            logits = student.classify(batch.images)
        best.append(logits.topk(min(5, len(dataset.classes)), dim=-1).indices)
    student.train(training)
    return torch.cat(best).cpu().numpy()


def accuracy(best: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(top-1, top-5) as shares; `best` as `predict` gives it."""
    hits = best == labels[:, None]
    return float(hits[:, 0].mean()), float(hits.any(axis=1).mean())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in (run / FILE).read_text().splitlines() if (run / FILE).exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsLog:
    """Appends to a run's log; opened at a step, it forgets what was logged after it (a killed run's last steps)."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_atomic(run / FILE, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.run, self.hook = run, threading.excepthook
        threading.excepthook = self._in_thread
        with _told(run):
            self.file = open(run / FILE, "a")  # noqa: SIM115 (closed by close)
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row: {"kind": "step" or "epoch", "step": ..., values}."""
        with _told(self.run):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Never fails: every row is written already, or `add` has told why not."""
        for writer in (self.file, self.board):
            with suppress(OSError):
                writer.close()
        threading.excepthook = self.hook

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; where that fails the next `add` tells it, in one line."""
        if not issubclass(args.exc_type, OSError):
            self.hook(args)


@contextmanager
def _told(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"could not write to {run}: {error.strerror or error}; free space, then go on with --resume"
        ) from None
