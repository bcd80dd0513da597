"""The objects of a run, built and checked before anything is written.

The loop is in loop.py, the step in step.py, the data of an epoch in epochs.py, further checks in preflight.py.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.kernels.comparison import Chooses
from fastofa.methods.find_method import file_digests, needs_of
from fastofa.methods.method import Sizes
from fastofa.models.normalized import in_words
from fastofa.pipelines import open_pipeline
from fastofa.runs import checkpoint
from fastofa.runs.config import SIZED, TrainConfig
from fastofa.runs.log import open_wandb
from fastofa.runs.recipes import augmentation_differences
from fastofa.runs.run import CONFIG, KERNELS, Run, open_run, recorded
from fastofa.student.choose_kernels import measures_kernels
from fastofa.student.stages import channels
from fastofa.system.device import choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.progress import notice
from fastofa.system.urls import is_url
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.fidelity import FIDELITY, read_fidelity, write_fidelity
from fastofa.teacher.online import open_online_teacher
from fastofa.teacher.reference_images import IMAGES, Difference, compare_teacher_images
from fastofa.training import rank_checkpoints
from fastofa.training.distributed import World, check_same
from fastofa.training.epochs import Epochs
from fastofa.training.preflight import (
    check_early,
    check_resumable,
    choose_order,
    spread_notice,
    views_begun_with,
    with_own_evaluation,
    with_own_options,
)
from fastofa.training.schedule import cautions, image_size, lengthened, summary
from fastofa.training.step import Step
from fastofa.training.try_methods import try_methods

BatchNorm = torch.nn.modules.batchnorm._BatchNorm


def open_job(config: TrainConfig, world: World) -> "Job":
    """Build and check everything that a run needs, without writing anything."""
    device, cache = check_early(config, world)
    if config.resume and (config.out / CONFIG).exists():  # keep the values chosen by dataset size
        begun = open_run(config.out).config
        unset = [name for name in SIZED if getattr(config, name) is None]
        config = dataclasses.replace(config, **{name: getattr(begun, name) for name in unset})
    with world.no_timeout():  # opening a folder for the first time opens every image
        train_set, val_set = (
            open_dataset(config.data, split, config.skip_corrupt, limits=config.limits()) for split in ("train", "val")
        )
    config = dataclasses.replace(config, order=choose_order(config, train_set, world))
    config = with_own_options(with_own_evaluation(config))
    online = open_online_teacher(config, train_set.classes, device)
    epochs = Epochs(config, train_set, world, device, cache, views_begun_with(config, world), online)
    config = epochs.config
    data, val, pages = train_set.fingerprint, val_set.fingerprint, epochs.pages_fingerprint
    teacher = None if online is None else online.teacher.describe()
    run = Run(config.out, config, train_set.classes, epochs.teacher_dim, data, epochs.view_digests, val, pages, teacher)
    views = hashlib.sha256("".join(epochs.view_digests).encode()).hexdigest()
    methods = hashlib.sha256("".join(file_digests(config.methods).values()).encode()).hexdigest()
    for digest, name in (
        (methods, f"the files of --method {config.method}"),
        (data, config.data),
        (val, f"the validation images of {config.data}"),
        (pages, f"the pages of {config.data}"),
        (views, f"the {counted(len(epochs.view_digests), 'view')} of {config.cache}"),
        ("" if teacher is None else teacher["sha256"], f"the weights of {config.online_teacher}"),
    ):
        check_same(world, digest, name)
    if world.is_main and not config.plan:
        check_resumable(run)
    world.barrier()
    return Job(run, train_set, val_set, epochs, world, device)


class Job:
    """The objects of a run, built once."""

    def __init__(
        self, run: Run, train_set: Dataset, val_set: Dataset, epochs: Epochs, world: World, device: torch.device
    ) -> None:
        c = self.config = run.config
        self.run, self.val_set, self.epochs, self.world, self.device = run, val_set, epochs, world, device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(c.seed)
        student = run.build_student(None if c.resume and checkpoint.checkpoints(run.path) else c.init)
        needs = needs_of(c.methods)
        needs_pooled = "pooled vector" in needs
        sizes = Sizes(
            len(train_set.classes),
            student.pooled_dim() if needs_pooled else 0,
            epochs.pooled_dim,
            tuple(np.bincount(train_set.labels, minlength=len(train_set.classes)).tolist()),
            channels(student.find_stages()) if "stage features" in needs else {},
            {} if epochs.teacher is None else channels(epochs.teacher.stages),
        )
        kernels = recorded(run.path, KERNELS) if c.resume else None
        self.step = Step(student, c, self.device, world, sizes, kernels)
        self.last_step = c.epochs * epochs.steps
        full = student.image_size
        workers = choose_workers(c.workers, world.local_size)
        part = epochs.rank_batch_size // c.accumulate
        self.train_pipeline, self.val_pipeline = (
            open_pipeline(c.pipeline, data, size, batch_size, self.device, workers)
            for data, size, batch_size in (
                (train_set, full, part),
                (val_set, c.eval_size or full, self._eval_batch_size(part)),
            )
        )
        if measures_kernels(c.kernels, self.device) and isinstance(self.train_pipeline, Chooses):
            found = self.train_pipeline.comparisons()
            self.step.kernels.choose((self.train_pipeline, *each) for each in found.items())
        needs_two = any(isinstance(m, BatchNorm) for m in student.modules())
        if epochs.rank_batch_size == c.accumulate and (needs_two or needs_pooled):
            reason = f"{c.student} has batch norm" if needs_two else f"{c.method} compares images"
            raise BadInput(
                f"batch-size: expected at least two images in each part of a step, because {reason}, got one; raise "
                "--batch-size or lower --accumulate"
            )
        if c.start_size is not None and c.start_size > full:
            raise BadInput(f"start-size: expected at most the full {full} pixels, got {c.start_size}")
        student.check_sizes([image_size(c, epoch, full) for epoch in range(c.epochs)] + [c.eval_size or full])
        self.pixels: Difference | None = None
        self.spread = ""
        self.wandb_run: Any = None

    def _eval_batch_size(self, part: int) -> int:
        """On a GPU twice the images of a part of a step, since evaluation keeps no activations; at most all images."""
        share = -(-len(self.val_set) // self.world.size)
        return min(2 * part, max(share, 1)) if self.device.type == "cuda" else part

    def load(self) -> None:
        """Load the newest checkpoint, the first epoch and some images, so that corruption is reported before anything
        is written."""
        if self.config.resume and checkpoint.checkpoints(self.run.path):
            rank_checkpoints.restore(self.run.path, self.step)
        elif self.config.resume and self.world.is_main:
            notice(f"{self.run.path}: no checkpoint yet, starting from the beginning")
        if self.config.init is not None and not self.step.is_finite():
            raise BadInput(f"{self.config.init}: expected finite weights, got NaN or infinity; give another --init")
        if self.step.steps < self.last_step:
            try_methods(self.step, self.train_pipeline, self.epochs.load(self.step.steps // self.epochs.steps))
        if self.world.is_main and (cache := self.epochs.cache) is not None:
            table = cache.table(0)
            self.pixels = compare_teacher_images(cache.path, self.train_pipeline, table.views)
            if self.pixels is not None and self.config.allow_mismatch != "pixels":
                self.pixels.check(cache.path, self.config.data)
            self.spread = spread_notice(self.config.methods, cache, table)

    def begin(self) -> None:
        """Write the run's configuration, once everything has been checked. It is the first file written."""
        c, folder = self.config, self.run.path
        if c.resume and (folder / CONFIG).exists() and (before := open_run(folder).config).epochs < c.epochs:
            notice(lengthened(before, c, self.step.steps, self.epochs.steps, self.step.student.image_size))
        if c.wandb is not None:
            self.wandb_run = open_wandb(folder, c.wandb)
        self.run.save()
        if self.epochs.cache is not None and is_url(str(c.cache)):
            self._keep_fidelity(self.epochs.cache)

    def _keep_fidelity(self, cache: TeacherCache) -> None:
        """Keep the fidelity of a cache at a URL for the report, since the local copy is removed with the process."""
        fidelity = None
        try:
            fidelity = read_fidelity(cache.path, cache.header)
        except BadInput as error:
            notice(str(error).replace(str(cache.path), str(self.config.cache)))
        if fidelity is None:
            (self.run.path / FIDELITY).unlink(missing_ok=True)
        else:
            write_fidelity(self.run.path, cache.header, fidelity)

    def announce(self, given: TrainConfig) -> None:
        """Report what the run does, and what was chosen because `given`, the configuration as given, leaves it open."""
        c = self.config
        if self.world.is_main:
            notice(summary(c, self.epochs.steps))
            chosen = [name for name in SIZED if getattr(given, name) is None]
            if chosen:
                flags = " ".join(f"--{name.replace('_', '-')} {getattr(c, name):g}" for name in chosen)
                notice(f"chosen by the number of training images: {flags}")
            notice(self._normalization())
            if self.epochs.teacher is not None:
                notice(self.epochs.teacher.describe(self.step.student.image_size))
            if line := self.step.kernels.line():
                notice(line)
            for caution in cautions(c, self.epochs.steps):
                notice(caution)
        if self.pixels is not None:
            notice(f"pixels of {IMAGES} images, compared with {c.cache}: {self.pixels}")
        if self.spread:
            notice(self.spread)
        if self.world.is_main and (missing := augmentation_differences(c.recipe, self.epochs.policy)):
            notice(f"recipe {c.recipe}: its published views have {missing}; precompute --recipe draws such views")

    def _normalization(self) -> str:
        """One line with the normalisation of the student's input and, with a teacher, of the teacher's."""
        student = self.step.student
        line = f"normalisation: student {in_words(student.mean.flatten().tolist(), student.std.flatten().tolist())}"
        headers = self.epochs.teacher_headers
        names = ["teacher"] if len(headers) == 1 else [f"teacher {i} ({t['name']})" for i, t in enumerate(headers, 1)]
        return "; ".join([line, *(f"{n} {in_words(t['mean'], t['std'])}" for n, t in zip(names, headers, strict=True))])
