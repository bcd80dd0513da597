"""A .beton, FFCV's format: threads decode JPEGs from the memory-mapped file, or use its pixels, and crop.

FFCV's own Loader is not used. Its decoder uses libjpeg's fast DCT and its resizing averages areas, whereas this
pipeline gives the same pixels as the torchvision pipeline, and is faster (bench/results/loaders_cpu.json). Also, the
Loader does not accept precomputed crops, every Loader compiles its code again, its batches are overwritten while they
are in use, and stopping early leaks a thread.
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
            raise BadInput(f"pipeline ffcv: expected a .beton, got {dataset.spec}; `fastofa write` writes one")
        super().__init__(request)
        self.spans = dataset.spans
        self.bytes = np.frombuffer(map_file(dataset.file), np.uint8)

    def read(self, sample_id: int) -> Tensor:
        begin, count = self.spans[sample_id].tolist()
        return self.dataset.unpack(sample_id, self.bytes[begin : begin + count])
