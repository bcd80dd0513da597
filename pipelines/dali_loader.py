"""NVIDIA DALI: its threads read files, decode the crops, resize and flip; with a GPU, the GPU decodes.

Files that DALI cannot decode, or that may be damaged without an error from DALI, are read by `Dataset.read`, which
reports damaged files by name and supports more formats.

At the edges of a crop, DALI's resizing repeats the outermost pixels, whereas torchvision truncates its filter. The
outermost pixels of the output therefore differ slightly; the smaller an image, the more this changes its mean.
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
        f"pipeline dali: needs DALI ({error}); `fastofa doctor` says how to install it, or use --pipeline torchvision"
    ) from None

LINEAR, CUBIC = int(types.DALIInterpType.INTERP_LINEAR), int(types.DALIInterpType.INTERP_CUBIC)
JPEG_BEGIN, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class Pipeline:
    """See `fastofa.pipelines.open_pipeline`. Needs a folder of images."""

    hardware_share = 0.9
    """Fraction of the JPEGs decoded by a GPU's JPEG unit, if it has one (A100, H100); its cores decode the others."""

    def __init__(self, request: Request) -> None:
        dataset = request.dataset
        if dataset.root is None:
            raise BadInput(f"pipeline dali: expected a folder of images, got {dataset.spec}; use --pipeline auto")
        self.dataset, self.device, self.workers = dataset, request.device, request.workers
        self.image_size, self.batch_size, self.normalize = request.image_size, request.batch_size, request.normalize
        self.sizes = dataset.stored_sizes
        self.labels = torch.from_numpy(dataset.labels).to(self.device)

    def epoch(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        size = image_size or self.image_size
        pending = deque((rows, with_partners(views, rows)) for rows in batches(views, order, start, self.batch_size))
        while pending:
            dali = self._build(views, [all_rows for _, all_rows in pending], size)
            failed = False
            while pending and not failed:
                rows, all_rows = pending.popleft()
                try:
                    images = self._run(dali, views, all_rows, size)
                except RuntimeError as error:  # the DALI pipeline is unusable afterwards
                    notice(f"pipeline dali: reading a batch with torchvision because DALI failed: {_first_line(error)}")
                    images, failed = self._read(views, all_rows, size), True
                images = augment(images, views, all_rows, len(rows))
                yield make_batch(images, self.labels, views, rows, self.normalize)

    def _build(self, views: Views, row_batches: list[np.ndarray], image_size: int) -> Any:
        """A DALI pipeline that returns one batch per run, for the table's rows in `row_batches`.

        For each row it returns the cropped image, the bytes of the file, and the shape of the whole image.
        """

        def source() -> Iterator[tuple[Any, ...]]:
            for rows in row_batches:
                ids, table = samples_of(rows, len(self.sizes)), views.take(rows)
                paths = [np.frombuffer(str(self.dataset.path(i)).encode(), np.uint8) for i in ids]
                boxes = table.boxes(self.sizes[ids])
                size = np.full((len(ids), 2), image_size, np.float32)
                size[table.flip, 1] *= -1  # a negative width flips the image
                filters = np.where(table.is_bicubic, CUBIC, LINEAR).astype(np.int32)
                yield paths, boxes[:, :2].astype(np.int32), boxes[:, 2:].astype(np.int32), size, filters

        on_gpu = self.device.type == "cuda"
        largest = max(len(rows) for rows in row_batches)

        @pipeline_def(
            batch_size=largest,
            num_threads=max(self.workers, 1),
            device_id=(self.device.index or 0) if on_gpu else None,
            exec_dynamic=True,
        )
        def crops() -> tuple[Any, ...]:
            path, anchor, shape, size, filter_type = fn.external_source(source, num_outputs=5)
            data = fn.io.file.read(path)
            decoder = {"device": "mixed", "hw_decoder_load": self.hardware_share} if on_gpu else {}
            image = fn.decoders.image_slice(
                data, anchor, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False, **decoder
            )
            image = fn.resize(image, size=size, interp_type=filter_type, antialias=True)
            return image, data, fn.peek_image_shape(data)

        dali = crops()
        dali.build()
        return dali

    def _run(self, dali: Any, views: Views, rows: np.ndarray, size: int) -> Tensor:
        """uint8 [M, 3, S, S] on the device. Raises RuntimeError if DALI cannot read this batch or a later one."""
        # The outputs are bound to the stream that reads them. DALI reclaims their memory when the tensor is deleted,
        # while kernels may still wait to read it; DALI must not reuse it before that stream has finished.
        images, files, shapes = dali.run(torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None)
        images = to_torch_tensor(images.as_tensor(), copy=False).permute(0, 3, 1, 2)
        is_truncated = np.array([_is_truncated(np.asarray(file)) for file in files])
        expected = self.sizes[samples_of(rows, len(self.sizes))]
        is_other_size = (np.asarray(shapes.as_tensor())[:, :2] != expected).any(axis=1)
        suspect = np.flatnonzero(is_truncated | is_other_size)
        if len(suspect):
            at = torch.from_numpy(suspect).to(self.device)
            images[at] = self._read(views, rows[suspect], size)
        return images

    def _read(self, views: Views, rows: np.ndarray, size: int) -> Tensor:
        """Same as `_run`, but with torchvision, which is slower. Raises BadInput with the name of a damaged file."""
        table, ids = views.take(rows), samples_of(rows, len(self.sizes))
        images = torch.empty(len(ids), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        boxes = table.boxes(self.sizes[ids]).tolist()
        for out, i, box, flip, bicubic in zip(images, ids, boxes, table.flip, table.is_bicubic, strict=True):
            out.copy_(crop_resize_one(self.dataset.read(i), box, bool(flip), size, bool(bicubic)))
        return images.to(self.device)


def _is_truncated(file: np.ndarray) -> bool:
    """Whether `file` is a JPEG without an end marker, whose missing pixels DALI fills in silently."""
    return file[:2].tobytes() == JPEG_BEGIN and file[-2:].tobytes() != JPEG_END


def _first_line(error: RuntimeError) -> str:
    return next((line for line in str(error).splitlines() if "rror" in line), str(error).splitlines()[0])
