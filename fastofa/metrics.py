"""Accuracy, and the log of a run: metrics.jsonl (one object per logged step and per epoch), TensorBoard, wandb."""

import hashlib
import importlib
import json
import math
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastofa.dataset import Dataset
from fastofa.distributed import World
from fastofa.errors import BadInput
from fastofa.files import save_tensors, write_atomic
from fastofa.pipelines import Pipeline
from fastofa.progress import track
from fastofa.views import center_views

FILE, PREDICTIONS = "metrics.jsonl", "val_predictions.safetensors"


@torch.inference_mode()
def predict(
    student: Any,
    pipeline: Pipeline,
    dataset: Dataset,
    crop: float,
    bf16: bool,
    title: str = "",
    flip: bool = False,
    world: World | None = None,
) -> np.ndarray:
    """The five best classes of the student's last head on the central crops, int64 [N, min(5, C)], best first.

    Args:
        crop: side of the central square, as a share of the picture's shorter side.
        flip: take the mean of the logits of each picture and of its mirror image.
        world: each rank looks at its share of the pictures; all get the answers of all.
    """
    world = world or World()
    training = student.training
    student.eval()
    best = torch.zeros(len(dataset), min(5, len(dataset.classes)), dtype=torch.int64)
    order = np.arange(len(dataset))[world.rank :: world.size]
    found = []
    with closing(pipeline.epoch(center_views(dataset.sizes, crop), order)) as batches:
        for batch in track(batches, len(order), title, lambda batch: len(batch.labels)):
            with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
                logits = student.classify(batch.images)
                if flip:
                    logits = logits + student.classify(batch.images.flip(-1))
            found.append((batch.sample_ids, logits.topk(best.shape[1], dim=-1).indices))
    for sample_ids, classes in found:  # only now: the device is waited for once
        best[sample_ids.cpu()] = classes.cpu()
    student.train(training)
    return world.sum(best).numpy()


def save_predictions(run: Path, best: np.ndarray, labels: np.ndarray, info: dict[str, Any]) -> None:
    """The answers of the last evaluation, as `predict` gives them, beside the right ones."""
    tensors = {"best": torch.from_numpy(best).to(torch.int32), "labels": torch.from_numpy(labels)}
    save_tensors(run / PREDICTIONS, tensors, info)


def accuracy(best: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(top-1, top-5) as shares; `best` as `predict` gives it."""
    hits = best == labels[:, None]
    return float(hits[:, 0].mean()), float(hits.any(axis=1).mean())


def read_metrics(run: Path, until: float = math.inf) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl up to a step; a last line cut off by a kill is left out."""
    rows = []
    for line in (run / FILE).read_text().splitlines() if (run / FILE).exists() else []:
        try:
            row = json.loads(line)
            wanted = row["step"] <= until
        except (ValueError, KeyError, TypeError):
            break
        if wanted:
            rows.append(row)
    return rows


class MetricsLog:
    """Appends to a run's log; opened at a step, it forgets what was logged after it (a killed run's last steps).

    With `wandb`, the name of a Weights & Biases project, every row goes there, too.
    """

    def __init__(self, run: Path, step: int, wandb: str | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.wandb = None if wandb is None else _open_wandb(run, wandb)
        kept = read_metrics(run, step)
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
        if self.wandb:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Never fails: every row is written already, or `add` has told why not."""
        for writer in (self.file, self.board):
            with suppress(OSError):
                writer.close()
        if self.wandb:
            self.wandb.finish()
        threading.excepthook = self.hook

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; where that fails the next `add` tells it, in one line."""
        if not issubclass(args.exc_type, OSError):
            self.hook(args)


def import_wandb() -> Any:
    """Weights & Biases, which is no part of what fastofa installs. Raises BadInput where it is missing."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise BadInput("wandb: expected Weights & Biases; pip install wandb, or leave --wandb out") from None


def _open_wandb(run: Path, project: str) -> Any:
    """A resumed run goes on in the same page. Raises BadInput if it cannot begin, without its login, say."""
    key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    try:
        return import_wandb().init(project=project, name=run.name, id=key, resume="allow", dir=str(run))
    except Exception as error:  # its many kinds
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"wandb: could not begin ({reason}); `wandb login`, or leave --wandb out") from None


@contextmanager
def _told(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"could not write to {run}: {error.strerror or error}; free space, then go on with --resume"
        ) from None
