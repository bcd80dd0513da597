"""A .beton, FFCV's format: threads decode its JPEGs, or take its pixels, where they lie in the mapped file, and crop.

FFCV's own Loader is not used: its decoder takes libjpeg's quick DCT and its resizing averages areas, where this has the
very pixels of the torchvision pipeline, and is faster (bench/results/loaders_cpu.json). Besides, its random crops
cannot be told, each Loader compiles anew, its batches are overwritten while they are used, and one that is left early
leaks a thread.
"""

import numpy as np
from torch import Tensor

from fastofa.pipelines.request import Request
from fastofa.pipelines.threaded import Threaded
from fastofa.system.errors import BadInput
from fastofa.system.files import map_file


class Pipeline(Threaded):
    """See `fastofa.pipelines.open_pipeline`. Needs a .beton."""

    def __init__(self, request: Request) -> None:
        dataset = request.dataset
        if dataset.spans is None or dataset.pixels is not None:
            raise BadInput(f"pipeline ffcv: expected a .beton, got {dataset.spec}; `fastofa write` makes one")
        super().__init__(request)
        self.spans = dataset.spans
        self.bytes = np.frombuffer(map_file(dataset.file), np.uint8)

    def picture(self, sample_id: int) -> Tensor:
        begin, count = self.spans[sample_id].tolist()
        return self.dataset.unpack(sample_id, self.bytes[begin : begin + count])
