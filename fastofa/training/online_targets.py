"""The predictions of a run's online teacher for validation images, which a cache would contain otherwise."""

import dataclasses
from contextlib import closing

import numpy as np
import torch

from fastofa.data.dataset import Dataset
from fastofa.methods.targets import TopK
from fastofa.pipelines import open_pipeline
from fastofa.runs.run import Run
from fastofa.system.device import choose_workers
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice, track
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.online import open_teacher_of
from fastofa.views.table import center_views


def online_targets(
    run: Run, dataset: Dataset, device: torch.device, pipeline: str, batch_size: int, workers: int | None
) -> TopK | None:
    """The teacher's best class for every image, from central crops at its own size, as `fastofa precompute` makes them.

    Returns:
        classes uint16 (int32 if C > 65,536) [N, 1] and log_probs [N, 1], on the CPU; or None, with a notice, if the
        teacher cannot be opened or has other weights than the run started with.
    """
    config = dataclasses.replace(
        run.config, online_teacher=run.online_teacher, teacher_checkpoint=run.teacher_checkpoint
    )
    try:
        teacher = open_teacher_of(config, dataset.classes, device)
        if run.teacher is None or teacher.sha256 != run.teacher["sha256"]:
            raise BadInput(f"{config.online_teacher} has other weights than when the run started")
    except BadInput as error:
        notice(f"agreement with the teacher not measured: {error}")
        return None
    loader = open_pipeline(pipeline, dataset, teacher.image_size, batch_size, device, choose_workers(workers))
    with closing(loader.epoch(center_views(dataset.sizes, teacher.crop), np.arange(len(dataset)))) as batches:
        tracked = track(batches, len(dataset), "teacher", lambda batch: len(batch.labels))
        parts = [topk_targets(teacher.log_probs(batch.images), 1) for batch in tracked]
    return TopK(*map(torch.cat, zip(*parts, strict=True)))
