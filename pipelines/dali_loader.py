"""NVIDIA DALI: files are read, decoded within the crop, resized and flipped by its threads, or decoded by the GPU.

What DALI cannot decode, and what may be damaged without its telling, is read by `Dataset.read`: that names a damaged
file, and knows kinds that DALI does not.

Of a crop's edge DALI's resizing repeats the outermost pixels, where torchvision's filter ends: the outermost pixels of
the output differ a little, and the mean of a picture the more, the smaller it is.
"""

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastofa.data.decode import crop_resize_one
from fastofa.pipelines.augment import augment, with_partners
from fastofa.pipelines.batch import Batch, make_batch
from fastofa.pipelines.request import Request
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice
from fastofa.views.order import batches
from fastofa.views.table import Views, samples_of

try:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor
except (ImportError, OSError) as error:
    raise BadInput(
        f"pipeline dali: needs DALI ({error}); `fastofa doctor` says how to get it, or use --pipeline torchvision"
    ) from None

JPEG_BEGIN, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class Pipeline:
    """See `fastofa.pipelines.open_pipeline`. Needs a folder of pictures."""

    hardware_share = 0.9
    """Share of the JPEGs that a GPU's JPEG unit decodes, where it has one (A100, H100); its cores take the others."""

    def __init__(self, request: Request) -> None:
        dataset = request.dataset
        if dataset.root is None:
            raise BadInput(f"pipeline dali: expected a folder of pictures, got {dataset.spec}; use --pipeline auto")
        self.dataset, self.device, self.workers = dataset, request.device, request.workers
        self.image_size, self.batch_size, self.normalize = request.image_size, request.batch_size, request.normalize
        self.sizes = dataset.stored_sizes
        self.labels = torch.from_numpy(dataset.labels).to(self.device)

    def epoch(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        size = image_size or self.image_size
        coming = deque((rows, with_partners(views, rows)) for rows in batches(views, order, start, self.batch_size))
        while coming:
            dali = self._build(views, [needed for _, needed in coming], size)
            failed = False
            while coming and not failed:
                rows, needed = coming.popleft()
                try:
                    images = self._run(dali, views, needed, size)
                except RuntimeError as error:  # after which a DALI pipeline is of no use
                    notice(f"pipeline dali: reads a batch by torchvision, since DALI says: {_first_line(error)}")
                    images, failed = self._slowly(views, needed, size), True
                images = augment(images, views, needed, len(rows))
                yield make_batch(images, self.labels, views, rows, self.normalize)

    def _build(self, views: Views, wanted: list[np.ndarray], image_size: int) -> Any:
        """A DALI pipeline whose runs give the pictures of `wanted`, one batch of the table's rows after the other.

        And of each the file's bytes, and the height and width of the whole.
        """

        def source() -> Iterator[tuple[Any, ...]]:
            for rows in wanted:
                ids, table = samples_of(rows, len(self.sizes)), views.take(rows)
                paths = [np.frombuffer(str(self.dataset.path(i)).encode(), np.uint8) for i in ids]
                boxes = table.boxes(self.sizes[ids])
                size = np.full((len(ids), 2), image_size, np.float32)
                size[table.flip, 1] *= -1  # a negative width mirrors
                yield paths, boxes[:, :2].astype(np.int32), boxes[:, 2:].astype(np.int32), size

        on_gpu = self.device.type == "cuda"
        most = max(len(rows) for rows in wanted)

        @pipeline_def(
            batch_size=most,
            num_threads=max(self.workers, 1),
            device_id=(self.device.index or 0) if on_gpu else None,
            exec_dynamic=True,
        )
        def crops() -> tuple[Any, ...]:
            path, anchor, shape, size = fn.external_source(source, num_outputs=4)
            data = fn.io.file.read(path)
            decoder = {"device": "mixed", "hw_decoder_load": self.hardware_share} if on_gpu else {}
            image = fn.decoders.image_slice(
                data, anchor, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False, **decoder
            )
            image = fn.resize(image, size=size, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
            return image, data, fn.peek_image_shape(data)

        dali = crops()
        dali.build()
        return dali

    def _run(self, dali: Any, views: Views, rows: np.ndarray, size: int) -> Tensor:
        """uint8 [M, 3, S, S] on the device. Raises RuntimeError: DALI cannot read this batch, or one after it."""
        # Bound to the stream that reads them: DALI takes their memory back when the tensor is gone, which it is while
        # kernels still wait to read it; it must not be used again before that stream has done so.
        images, files, shapes = dali.run(torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None)
        images = to_torch_tensor(images.as_tensor(), copy=False).permute(0, 3, 1, 2)
        is_cut = np.array([_is_cut(np.asarray(file)) for file in files])
        is_other = (np.asarray(shapes.as_tensor())[:, :2] != self.sizes[samples_of(rows, len(self.sizes))]).any(axis=1)
        doubtful = np.flatnonzero(is_cut | is_other)
        if len(doubtful):
            at = torch.from_numpy(doubtful).to(self.device)
            images[at] = self._slowly(views, rows[doubtful], size)
        return images

    def _slowly(self, views: Views, rows: np.ndarray, size: int) -> Tensor:
        """The same through torchvision. Raises BadInput, naming a file that is damaged."""
        table, ids = views.take(rows), samples_of(rows, len(self.sizes))
        images = torch.empty(len(ids), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for out, i, box, flip in zip(images, ids, table.boxes(self.sizes[ids]).tolist(), table.flip, strict=True):
            out.copy_(crop_resize_one(self.dataset.read(i), box, bool(flip), size))
        return images.to(self.device)


def _is_cut(file: np.ndarray) -> bool:
    """A JPEG without its end? Then DALI makes up what is missing."""
    return file[:2].tobytes() == JPEG_BEGIN and file[-2:].tobytes() != JPEG_END


def _first_line(error: RuntimeError) -> str:
    return next((line for line in str(error).splitlines() if "rror" in line), str(error).splitlines()[0])
