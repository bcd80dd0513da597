"""What an epoch shows: its table of views, this rank's samples in their order, and the teacher's answers to them."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from fastofa.data.dataset import Dataset
from fastofa.runs.config import TrainConfig
from fastofa.runs.recipes import default_policy, sized
from fastofa.system.errors import BadInput, counted
from fastofa.system.progress import notice
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.training.distributed import World
from fastofa.views.draw import draw_views
from fastofa.views.order import epoch_order, epoch_rows
from fastofa.views.table import Views, join_views


@dataclass(frozen=True)
class Epoch:
    views: Views
    order: np.ndarray
    """int64: rows of `views`, whole steps of this rank's share."""
    targets: DeviceTargets | None
    """The teacher's answers, on the device; None where nothing is learned from it."""


def check_whole(batch_size: int, whole: dict[str, int]) -> None:
    """Raises BadInput for a batch that cannot be divided into all of these."""
    if batch_size % math.prod(whole.values()):
        reasons = " x ".join(f"{count} {what}" for what, count in whole.items() if count > 1)
        raise BadInput(f"batch-size: expected a multiple of {math.prod(whole.values())} ({reasons}), got {batch_size}")


class Epochs:
    """The epochs of a run on one rank; with a cache epoch e shows view e modulo its views, else views drawn for it.

    `config` is the one given, with what it leaves open chosen by the data set's size.

    Args:
        views: of the cache, that the run began with; 0 for one that begins, with as many as are finished.

    Raises:
        BadInput: batches that ranks, mixed pairs or the data set do not allow; a cache that does not fit.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, world: World, device: torch.device, views: int = 0
    ) -> None:
        self.config, self.dataset, self.world, self.device = config, dataset, world, device
        self.cache = None if config.cache is None else TeacherCache.open(config.cache)
        if self.cache is not None:
            self.policy = config.policy(self.cache.policy)
            self.cache.check(dataset, self.policy)
        else:
            self.policy = config.policy(default_policy(config.data, config.recipe))
        rows = epoch_rows(self.policy, len(dataset))
        whole = {"ranks": world.size, "parts": config.accumulate, "in a mixed pair": 2 if self.policy.mixes else 1}
        self.config = config = sized(config, len(dataset), rows, math.prod(whole.values()))
        self.answers = () if self.cache is None else self._replayed(self.cache, views)
        """A digest of each view that the run replays."""
        self.page_ids = dataset.page_ids if config.order == "pages" else None
        if config.order == "pages" and self.page_ids is None:
            raise BadInput(
                f"order: expected random for {config.data}, got pages; "
                f"`fastofa write {config.data} NAME.beton{' --raw' * dataset.raw}` makes a file that has pages"
            )
        self._check_batches(rows, whole)
        self.share = config.batch_size // world.size  # images that a rank takes a step
        self.steps = rows // config.batch_size  # of an epoch
        self.loaded: Epoch | None = None
        self.shown: list[int] = []  # the views that are loaded

    def _replayed(self, cache: TeacherCache, begun: int) -> tuple[str, ...]:
        repeats, main = self.policy.repeats, self.world.is_main
        shown = math.ceil(self.config.epochs / repeats) * repeats  # by as many epochs, if each shows another
        if begun:
            if main and begun < min(shown, cache.views):
                views = counted(cache.views, "view")
                notice(f"cache {cache.path}: {views} by now; this run replays the {begun} it began with")
            return cache.digests(begun)
        finished = torch.zeros(self.world.size, dtype=torch.int64)
        finished[self.world.rank] = cache.views
        count = min(shown, int(self.world.sum(finished).min()))  # one may be finished while the ranks look
        if main and count < min(shown, cache.header["views"]):
            notice(f"cache {cache.path}: finished views: {cache.finished}; this run replays {count} to its end")
        return cache.digests(count)

    def _check_batches(self, rows: int, whole: dict[str, int]) -> None:
        c = self.config
        if rows < c.batch_size:
            raise BadInput(
                f"batch-size: expected at most the {counted(rows, 'training image')} of {c.data}, got {c.batch_size}; "
                "give less, or None for one that suits them"
            )
        check_whole(c.batch_size, whole)

    @property
    def pages_fingerprint(self) -> str:
        """sha256 over the page of each sample, where the order goes by pages; else empty."""
        return "" if self.page_ids is None else hashlib.sha256(self.page_ids.tobytes()).hexdigest()

    @property
    def teacher_dim(self) -> int:
        """Width of the teacher's last features; 0 without a teacher."""
        return 0 if self.cache is None else self.cache.teacher_dim

    def load(self, epoch: int) -> Epoch:
        """Raises BadInput: a view's file is missing or damaged."""
        c, repeats = self.config, self.policy.repeats
        shown = [epoch // repeats * repeats + number for number in range(repeats)]
        if self.cache is None:
            views = join_views([draw_views(self.policy, self.dataset.sizes, c.seed, view) for view in shown])
            return Epoch(views, self._order(epoch, views), None)
        shown = [view % len(self.answers) for view in shown]
        if (
            self.loaded is not None and self.shown == shown and self.world.size == 1
        ):  # answers of ranks follow the order
            self.loaded = Epoch(self.loaded.views, self._order(epoch, self.loaded.views), self.loaded.targets)
            return self.loaded
        tables, classes, log_probs = zip(*map(self.cache.targets, shown), strict=True)
        views = join_views(tables)
        order = self._order(epoch, views)
        dense = self.cache.topk == self.cache.num_classes
        mine = None if self.world.size == 1 else order  # the answers that this rank will ask for
        targets = DeviceTargets(torch.cat(classes), torch.cat(log_probs), self.device, dense, mine)
        self.shown, self.loaded = shown, Epoch(views, order, None if c.method == "scratch" else targets)
        return self.loaded

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
        return order[: self.steps * self.share]
