"""A .beton, FFCV's format: threads decode its JPEGs, or take its pixels, where they lie in the mapped file, and crop.

FFCV's own Loader is not used: its decoder takes libjpeg's quick DCT and its resizing averages areas, where this has the
very pixels of the torchvision pipeline, and is faster (bench/results/loaders_cpu.json). Besides, its random crops
cannot be told, each Loader compiles anew, its batches are overwritten while they are used, and one that is left early
leaks a thread.
"""

import mmap
from collections.abc import Callable

import numpy as np
from torch import Tensor

from fastofa.errors import BadInput
from fastofa.files import map_file
from fastofa.pipelines.request import Request
from fastofa.pipelines.threaded import Threaded
from fastofa.views import Views


class Pipeline(Threaded):
    """See `fastofa.pipelines.open_pipeline`. Needs a .beton."""

    def __init__(self, request: Request) -> None:
        dataset = request.dataset
        if dataset.spans is None:
            raise BadInput(f"pipeline ffcv: expected a .beton, got {dataset.spec}; `fastofa write` makes one")
        super().__init__(request)
        self.dataset, self.spans = dataset, dataset.spans
        self.map = map_file(dataset.file)
        self.bytes = np.frombuffer(self.map, np.uint8)

    def picture(self, sample_id: int) -> Tensor:
        begin, count = self.spans[sample_id].tolist()
        return self.dataset.unpack(sample_id, self.bytes[begin : begin + count])

    def _filler(self, ids: np.ndarray, table: Views, out: np.ndarray) -> Callable[[np.ndarray], None]:
        crop = super()._filler(ids, table, out)

        def fetch_and_crop(part: np.ndarray) -> None:
            for begin, count in self.spans[ids[part]].tolist():  # all of them are on their way from the disk at once
                page = begin // mmap.PAGESIZE * mmap.PAGESIZE
                self.map.madvise(mmap.MADV_WILLNEED, page, begin - page + count)
            crop(part)

        return fetch_and_crop
