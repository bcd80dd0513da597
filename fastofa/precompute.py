"""Ask the teacher once about every view of every picture, and keep its answers.

    fastofa precompute --data photos --teacher convnext_tiny.in12k_ft_in1k --views 300 --topk 16 --out cache
    fastofa precompute ... --recipe imagenet_vit_mlp        with the augmentation published for Transformers and MLPs

The same command goes on where it stopped. A larger --views adds views to a finished cache.
"""

import hashlib
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import filesize
from rich.progress import Progress, TaskID
from torch import Tensor

from fastofa.arguments import PrecomputeConfig
from fastofa.dataset import Dataset, open_dataset
from fastofa.device import choose_bf16, choose_device, choose_workers
from fastofa.errors import BadInput
from fastofa.interrupt import Interrupt, Stopped
from fastofa.pipelines import Pipeline, choose, open_pipeline
from fastofa.progress import notice, progress_bar
from fastofa.seen import save_seen
from fastofa.teacher import Teacher, open_teacher
from fastofa.teacher_cache import (
    HEADER,
    PARTIAL,
    VAL,
    Targets,
    TeacherCache,
    answers,
    identity,
    policy_to_json,
    read_header,
    read_table,
    view_file,
    write_header,
    write_table,
)
from fastofa.views import ViewPolicy, Views, center_views, draw_views, pair_order

SAVE_EVERY_S = 300  # seconds between two saves of an unfinished view


def precompute(config: PrecomputeConfig) -> TeacherCache:
    """Write or go on with the cache.

    Raises:
        BadInput: see the fields of the configuration; a cache with other arguments in the same place.
        Stopped: by Ctrl-C or SIGTERM, after saving.
    """
    train = open_dataset(config.data, "train", config.skip_corrupt)
    val = open_dataset(config.data, "val", config.skip_corrupt)
    if config.topk > len(train.classes):
        raise BadInput(f"topk: expected at most the {len(train.classes)} classes of {config.data}, got {config.topk}")
    policy = config.policy()
    device = choose_device(config.device)
    bf16 = choose_bf16(config.precision, device)
    teacher = open_teacher(
        config.teacher,
        len(train.classes),
        config.teacher_checkpoint,
        config.image_size,
        config.mean,
        config.std,
        device,
        bf16,
    )
    header: dict[str, Any] = {
        "dataset": {"spec": config.data, "train": train.fingerprint, "val": val.fingerprint},
        "num_samples": len(train),
        "num_val_samples": len(val),
        "num_classes": len(train.classes),
        "topk": config.topk,
        "policy": policy_to_json(policy),
        "seed": config.seed,
        "views": config.views,
        "teachers": [teacher.describe()],
        "pipeline": choose(train, device)[0] if config.pipeline == "auto" else config.pipeline,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
    }
    train_pipeline, val_pipeline = (
        open_pipeline(config.pipeline, d, teacher.image_size, config.batch_size, device, choose_workers(config.workers))
        for d in (train, val)
    )
    header = _begin(config.out, header)
    with Interrupt() as interrupt:
        job = _Job(config.out, header, teacher, config, interrupt)
        job.write_val(val, val_pipeline)
        if not (config.out / view_file(0)).exists():  # later, the pictures could be others than those of the answers
            save_seen(config.out, train_pipeline, draw_views(policy, train.sizes, config.seed, 0))
        job.write_views(train, train_pipeline, policy)
    for left in config.out.glob(f"*{PARTIAL}*"):  # by a process that was killed
        left.unlink()
    return TeacherCache.open(config.out)


def _begin(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Write the header, or find the same one there; returns the one that holds."""
    if not (out / HEADER).exists():
        if out.exists() and any(not f.name.startswith(".") for f in out.iterdir()):
            raise BadInput(f"{out}: expected an empty or new folder or a cache, it holds other files")
        write_header(out, header)
        return header
    found = read_header(out)
    mine, theirs = identity(header), identity(found)
    different = [
        f"{key} ({_short(theirs[key])} there, {_short(mine[key])} here)" for key in mine if mine[key] != theirs[key]
    ]
    if different:
        raise BadInput(
            f"{out}: holds a cache made otherwise, it differs in {'; '.join(different)}; choose another --out "
            "or remove it"
        )
    if header["views"] > found["views"]:
        found = {**found, "views": header["views"]}
        write_header(out, {k: v for k, v in found.items() if k != "schema"})
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


@dataclass(frozen=True)
class _Job:
    out: Path
    header: dict[str, Any]
    teacher: Teacher
    config: PrecomputeConfig
    interrupt: Interrupt

    def write_val(self, dataset: Dataset, pipeline: Pipeline) -> None:
        """The teacher's answers for the validation pictures, which also say how good it is."""
        if (self.out / VAL).exists():
            return
        views = center_views(dataset.sizes, self.teacher.crop)
        with progress_bar() as bar:
            task = bar.add_task("validation", total=len(dataset), note="")
            found = self._ask(dataset, pipeline, views, VAL, bar, task)
        self._commit(VAL, found._asdict(), VAL)
        correct = found.classes[:, 0].to(torch.int64) == torch.from_numpy(dataset.labels)
        notice(f"teacher {self.teacher.name}: {correct.float().mean():.2%} top-1 on {len(dataset)} validation images")

    def write_views(self, dataset: Dataset, pipeline: Pipeline, policy: ViewPolicy) -> None:
        total = self.header["views"]
        todo = [view for view in range(total) if not (self.out / view_file(view)).exists()]
        if not todo:
            return
        with progress_bar() as bar:
            done = (total - len(todo)) * len(dataset)
            task = bar.add_task("precompute", total=total * len(dataset), completed=done, note="")
            for view in todo:
                bar.update(task, note=f"view {view + 1} of {total}")
                views = draw_views(policy, dataset.sizes, self.config.seed, view)
                found = self._ask(dataset, pipeline, views, view, bar, task)
                columns = {name: torch.from_numpy(column) for name, column in views.columns().items()}
                self._commit(view_file(view), {**columns, **found._asdict()}, view)

    def _ask(
        self, dataset: Dataset, pipeline: Pipeline, views: Views, table: int | str, bar: Progress, task: TaskID
    ) -> Targets:
        """The teacher's answers for every row of a table, in sample order."""
        # As a disk reads the file, and a picture that is mixed with another is read once.
        order = pair_order(views, None if dataset.spans is None else dataset.spans[:, 0])
        partial = f"first rows of {table} in the order {hashlib.sha256(order.tobytes()).hexdigest()}"
        parts = self._read_partial(partial)
        done = sum(len(part.classes) for part in parts)
        bar.advance(task, done)
        saved_at = time.monotonic()
        for batch in pipeline.epoch(views, order, start=done):
            parts.append(answers(self.teacher.log_probs(batch.images), self.header["topk"]))
            bar.advance(task, len(batch.labels))
            if self.interrupt.signum is not None or time.monotonic() - saved_at > SAVE_EVERY_S:
                write_table(self.out / PARTIAL, _joined(parts)._asdict(), self.header, partial)
                saved_at = time.monotonic()
            if self.interrupt.signum is not None:
                raise Stopped(f"saved in {self.out}; run the same command again to go on", self.interrupt.signum)
        in_order, place = _joined(parts), np.argsort(order)
        return Targets(*(torch.from_numpy(values.numpy()[place]) for values in in_order))

    def _read_partial(self, partial: str) -> list[Targets]:
        """What an interrupted run had of this table."""
        if not (self.out / PARTIAL).exists():
            return []
        try:
            tensors = read_table(self.out / PARTIAL, self.header, partial)
        except BadInput:
            return []  # of another table, whose view was finished after all, or from a file of another order
        return [Targets(tensors["classes"], tensors["log_probs"])]

    def _commit(self, file: str, tensors: dict[str, Tensor], table: int | str) -> None:
        write_table(self.out / file, tensors, self.header, table)
        (self.out / PARTIAL).unlink(missing_ok=True)


def _joined(parts: list[Targets]) -> Targets:
    return Targets(torch.cat([p.classes for p in parts]), torch.cat([p.log_probs for p in parts]))


def main(config: PrecomputeConfig) -> None:
    cache = precompute(config)
    size = sum(file.stat().st_size for file in cache.path.iterdir())
    print(
        f"{cache.path}: {cache.views} views of {cache.num_samples:,} images, top {cache.topk} of {cache.num_classes} "
        f"classes, {filesize.decimal(size)}"
    )
