"""The data of each epoch: its table of views, the order of this rank's samples, and the teacher's targets for them."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastofa.data.dataset import Dataset
from fastofa.methods.find_method import needs_of
from fastofa.runs.config import TrainConfig
from fastofa.runs.recipes import default_policy, with_size_defaults
from fastofa.system.errors import BadInput, counted
from fastofa.system.progress import notice
from fastofa.teacher.cache import Table, TeacherCache
from fastofa.teacher.device_targets import DeviceTargets, MixedTargets
from fastofa.teacher.online import OnlineTeacher, TargetSource
from fastofa.teacher.packed_rows import joined
from fastofa.teacher.vectors import joined as joined_vectors
from fastofa.training.distributed import World
from fastofa.views.draw import draw_views
from fastofa.views.order import epoch_order, epoch_rows
from fastofa.views.table import Views, join_views


@dataclass(frozen=True)
class Epoch:
    views: Views
    order: np.ndarray
    """int64 [steps * images per step of this rank]: rows of `views`."""
    targets: TargetSource | None
    """The source of the teacher's targets, on the device; None if the method does not use them."""


def check_divisible(batch_size: int, factors: dict[str, int]) -> None:
    """Raises BadInput if the batch size is not a multiple of the product of the factors, which are given by name."""
    product = math.prod(factors.values())
    if batch_size % product:
        reasons = " x ".join(f"{count} {name}" for name, count in factors.items() if count > 1)
        raise BadInput(f"batch-size: expected a multiple of {product} ({reasons}), got {batch_size}")


class Epochs:
    """The epochs of a run on one rank.

    With a cache of V views, epoch e replays view e modulo V; without one, new views are drawn for each epoch, and an
    online teacher computes the targets.
    `self.config` is the given configuration with its unset values (None) chosen by dataset size.

    Args:
        cache: the opened teacher cache; None without one.
        views: number of cached views that a resumed run started with; 0 for a new run, which uses all finished ones.
        teacher: the online teacher; None without one.

    Raises:
        BadInput: the batch size does not suit the ranks, mixed pairs or dataset, or the cache does not fit the dataset.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        world: World,
        device: torch.device,
        cache: TeacherCache | None,
        views: int = 0,
        teacher: OnlineTeacher | None = None,
    ) -> None:
        self.config, self.dataset, self.world, self.device, self.teacher = config, dataset, world, device, teacher
        self.cache = cache
        if cache is not None:
            self.policy = config.policy(cache.policy)
            config = dataclasses.replace(config, teacher_weights=cache.weights(config.teacher_weights))
            cache.check(dataset, self.policy, config.allow_mismatch == "pixels")
            if world.is_main and cache.header["dataset"]["train"] != dataset.fingerprint:
                made_from = cache.header["dataset"]["spec"]
                notice(f"cache {cache.path}: made from other pixels ({made_from}), accepted by --allow-mismatch")
        else:
            self.policy = config.policy(default_policy(config.data, config.recipe))
        rows = epoch_rows(self.policy, len(dataset))
        factors = {"ranks": world.size, "parts": config.accumulate, "in a mixed pair": 2 if self.policy.mixes else 1}
        self.config = config = with_size_defaults(config, len(dataset), rows, math.prod(factors.values()))
        self.view_digests = () if cache is None else self._replayed_digests(cache, views)
        """The digest of each view that the run replays."""
        self.page_ids = dataset.page_ids if config.order == "pages" else None
        if config.order == "pages" and self.page_ids is None:
            raise BadInput(
                f"order: expected random for {config.data}, which has no pages, got pages; "
                f"`fastofa write {config.data} NAME.beton{' --raw' * dataset.raw}` writes a file that has pages"
            )
        self._check_batches(rows, factors)
        self.rank_batch_size = config.batch_size // world.size
        self.steps = rows // config.batch_size  # per epoch
        self.needs = needs_of(config.methods)
        self.loaded: Epoch | None = None
        self.loaded_views: list[int] = []

    def _replayed_digests(self, cache: TeacherCache, begun: int) -> tuple[str, ...]:
        repeats, main = self.policy.repeats, self.world.is_main
        usable = math.ceil(self.config.epochs / repeats) * repeats  # views that the epochs can replay, each once
        if begun:
            if main and begun < min(usable, cache.views):
                views = counted(cache.views, "view")
                notice(f"cache {cache.path}: has {views} now; this run continues with the {begun} it started with")
            return cache.digests(begun)
        finished = torch.zeros(self.world.size, dtype=torch.int64)
        finished[self.world.rank] = cache.views
        count = min(usable, int(self.world.sum(finished).min()))  # a view may be finished while the ranks count
        if main and count < min(usable, cache.header["views"]):
            notice(f"cache {cache.path}: finished views: {cache.finished}; this run replays {count} until it ends")
        return cache.digests(count)

    def _check_batches(self, rows: int, factors: dict[str, int]) -> None:
        c = self.config
        if rows < c.batch_size:
            raise BadInput(
                f"batch-size: expected at most the {counted(rows, 'training image')} of {c.data}, got {c.batch_size}; "
                "pass a smaller one, or None to choose it by dataset size"
            )
        check_divisible(c.batch_size, factors)

    @property
    def pages_fingerprint(self) -> str:
        """sha256 over the page of each sample if the order is by pages; else empty."""
        return "" if self.page_ids is None else hashlib.sha256(self.page_ids.tobytes()).hexdigest()

    @property
    def teacher_dim(self) -> int:
        """Width of the teacher's last features, 0 without a teacher."""
        if self.teacher is not None:
            return int(self.teacher.teacher.model.num_features)
        return 0 if self.cache is None else self.cache.teacher_dim

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vectors in the targets, 0 without them."""
        if self.teacher is not None:
            return self.teacher.pooled_dim
        return 0 if self.cache is None else self.cache.pooled_dim

    @property
    def teacher_headers(self) -> list[dict[str, Any]]:
        """The teachers as `Teacher.describe` describes them; none without a teacher."""
        if self.teacher is not None:
            return [self.teacher.teacher.describe()]
        return [] if self.cache is None else list(self.cache.header["teachers"])

    def load(self, epoch: int) -> Epoch:
        """Return the data of an epoch. Raises BadInput if the file of a view is missing or damaged."""
        c, repeats = self.config, self.policy.repeats
        numbers = [epoch // repeats * repeats + i for i in range(repeats)]
        if self.cache is None:
            views = join_views([draw_views(self.policy, self.dataset.sizes, c.seed, view) for view in numbers])
            return Epoch(views, self._order(epoch, views), self.teacher)
        numbers = [view % len(self.view_digests) for view in numbers]
        # With several ranks, the targets depend on this epoch's order, so they are loaded again.
        if self.loaded is not None and self.loaded_views == numbers and self.world.size == 1:
            self.loaded = Epoch(self.loaded.views, self._order(epoch, self.loaded.views), self.loaded.targets)
            return self.loaded
        tables = [self.cache.table(number) for number in numbers]
        views = join_views([table.views for table in tables])
        order = self._order(epoch, views)
        targets = self._device_targets(self.cache, tables, order) if c.methods else None
        self.loaded_views, self.loaded = numbers, Epoch(views, order, targets)
        return self.loaded

    def _device_targets(self, cache: TeacherCache, tables: list[Table], order: np.ndarray) -> TargetSource:
        """The targets that this epoch's methods need, on the device."""
        rows = None if self.world.size == 1 else order  # the rows that this rank looks up
        if self.config.teacher_weights is not None:
            tables_of_each = zip(*(table.of_each() for table in tables), strict=True)
            each = [DeviceTargets(joined(own), self.device, rows=rows) for own in tables_of_each]
            return MixedTargets(each, self.config.teacher_weights, cache.num_classes, "all classes" in self.needs)
        dense = cache.topk == cache.num_classes
        rebuilt = "all classes" in self.needs and not dense
        vectors = [t.vectors for t in tables if t.vectors is not None and (rebuilt or "pooled vector" in self.needs)]
        return DeviceTargets(
            joined([own for table in tables for own in table.of_each()]),
            self.device,
            dense,
            rows,
            joined_vectors(vectors) if vectors else None,
            cache.classifier() if rebuilt else None,
        )

    def _order(self, epoch: int, views: Views) -> np.ndarray:
        order = epoch_order(
            len(self.dataset),
            self.config.seed,
            epoch,
            self.world.rank,
            self.world.size,
            partner=views.partner,
            repeats=self.policy.repeats,
            page_ids=self.page_ids,
        )
        return order[: self.steps * self.rank_batch_size]
