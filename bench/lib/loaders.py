"""The loaders that bench_loader measures: every pipeline, and other libraries on the same images.

Each crops at random, resizes to one size and flips, except `packed, gather only`, which leaves that to a GPU. Each
yields the number of images of every batch.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.lib.loader_step import views_and_order
from bench.lib.sources import FORMS
from fastofa.data.open import open_dataset
from fastofa.kernels import crop_resize
from fastofa.pipelines import open_pipeline
from fastofa.pipelines.packed import Gathered
from fastofa.pipelines.request import Request
from fastofa.views.order import batches

BASELINE, GATHER = "PIL + DataLoader", "packed, gather only"


@dataclass(frozen=True)
class Task:
    """The measurement that one process makes; it is pickled."""

    name: str
    sources: dict[str, str]
    """Paths of the same images, by form."""
    image_size: int
    batch_size: int
    workers: int
    calls: int
    device: str


@dataclass(frozen=True)
class Implementation:
    """One loader."""

    run: Callable[[Task], Iterator[int]]
    form: str
    """The form of the images that it reads; see `bench.lib.sources`."""
    ours: bool = False
    needs: str | None = None
    """A module that it needs and that may be missing."""
    peer: str | None = None
    """The implementation that it is compared with, at equal settings."""
    gpu_only: str | None = None
    """Why it is skipped on a CPU."""

    def skip_reason(self, device: str) -> str | None:
        """Why it is not measured here; None if it is."""
        if self.gpu_only and device == "cpu":
            return self.gpu_only
        return f"{self.needs} is not installed" if self.needs and not installed(self.needs) else None


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# --- Ours -------------------------------------------------------------------------------------------------------------


def pipeline(name: str, form: str | None = None, peer: str | None = None, needs: str | None = None) -> Implementation:
    form = form or FORMS[name]

    def run(task: Task) -> Iterator[int]:
        dataset = open_dataset(task.sources[form])
        opened = open_pipeline(name, dataset, task.image_size, task.batch_size, task.device, task.workers)
        return (len(batch.labels) for batch in opened.epoch(*views_and_order(dataset)))

    return Implementation(run, form, ours=True, peer=peer, needs=needs)


def gathered(task: Task) -> Iterator[int]:
    """The host's part of `packed` when a GPU crops: copy whole images into one buffer, pinned if there is a GPU."""
    dataset = open_dataset(task.sources["pack"])
    request = Request(dataset, task.image_size, task.batch_size, torch.device(task.device), task.workers, None)
    return (len(batch.rows) for batch in Gathered(request).host_batches(*views_and_order(dataset)))


# --- torchvision's, FFCV's, DALI's, nvImageCodec's --------------------------------------------------------------------


def data_loader(task: Task, image_of: Callable[[str], Any]) -> Iterator[int]:
    """torchvision's ImageFolder: an image at a time, collected by worker processes."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(task.image_size, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToImage()])
    folder = ImageFolder(f"{task.sources['folder']}/train", transform, loader=image_of)
    sampler = RandomSampler(folder, replacement=True, num_samples=10**6)
    loader = DataLoader(
        folder, task.batch_size, sampler=sampler, num_workers=task.workers, pin_memory=task.device != "cpu"
    )
    return (len(images.to(task.device, non_blocking=True)) for images, _ in loader)


def pillow(task: Task) -> Iterator[int]:
    from torchvision.datasets.folder import pil_loader

    return data_loader(task, pil_loader)


def torchvision_io(task: Task) -> Iterator[int]:
    return data_loader(task, _decoded)


def _decoded(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, ImageReadMode.RGB)


def stock_ffcv(form: str) -> Implementation:
    def run(task: Task) -> Iterator[int]:
        os.environ["NUMBA_NUM_THREADS"] = str(task.workers)  # otherwise FFCV refuses more threads than cores
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

        size = (task.image_size, task.image_size)
        image = [RandomResizedCropRGBImageDecoder(size), RandomHorizontalFlip(), ToTensor()]
        if task.device != "cpu":
            image.append(ToDevice(torch.device(task.device), non_blocking=True))
        loader = Loader(
            task.sources[form], task.batch_size, num_workers=task.workers, order=OrderOption.RANDOM, os_cache=True,
            pipelines={"image": [*image, ToTorchImage()], "label": [IntDecoder(), ToTensor()]},
        )  # fmt: skip
        return (len(images) for _ in itertools.count() for images, _ in loader)

    return Implementation(run, form, needs="ffcv")


def stock_dali(task: Task) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    gpu = task.device != "cpu"

    @pipeline_def(batch_size=task.batch_size, num_threads=task.workers, device_id=0 if gpu else None)
    def crops() -> tuple[Any, ...]:
        data, label = fn.readers.file(file_root=f"{task.sources['folder']}/train", random_shuffle=True)
        image = fn.decoders.image_random_crop(
            data, device="mixed" if gpu else "cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        size = [task.image_size, task.image_size]
        image = fn.resize(image, size=size, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
        return fn.flip(image, horizontal=fn.random.coin_flip()), label

    dali = crops()
    dali.build()
    return (len(batch[0]["image"]) for batch in DALIGenericIterator([dali], ["image", "label"]))


def nvimagecodec(task: Task) -> Iterator[int]:
    return map(len, decoded_crops(task))


def decoded_crops(task: Task) -> Iterator[Tensor]:
    """uint8 [B, 3, S, S] on the device: its decoder decodes the crops of a batch of files; our kernel resizes them."""
    from nvidia import nvimgcodec

    dataset, device = open_dataset(task.sources["folder"]), torch.device(task.device)
    cpu = {"device_id": nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, "backends": [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]}
    decoder = nvimgcodec.Decoder(max_num_cpu_threads=task.workers, **(cpu if device.type == "cpu" else {}))
    views, order = views_and_order(dataset)
    for rows in batches(views, order, 0, task.batch_size):
        boxes = views.take(rows).boxes(dataset.sizes[rows])
        first, extent = boxes[:, :2], boxes[:, 2:]
        regions = map(nvimgcodec.Region, first.tolist(), (first + extent).tolist())
        files = (nvimgcodec.CodeStream(dataset.path(i)) for i in rows)
        found = decoder.decode([f.get_sub_code_stream(region=r) for f, r in zip(files, regions, strict=True)])
        images = torch.empty(len(rows), *extent.max(axis=0), 3, dtype=torch.uint8, device=device)
        for image, crop, (height, width) in zip(images, found, extent.tolist(), strict=True):
            image[:height, :width] = torch.as_tensor(np.asarray(crop) if device.type == "cpu" else crop, device=device)
        corner = np.concatenate([np.zeros_like(extent), extent], axis=1)
        box, flip = (torch.from_numpy(values).to(device) for values in (corner, views.flip[rows]))
        yield crop_resize(images, box, flip, task.image_size)


IMPLEMENTATIONS = {
    BASELINE: Implementation(pillow, "folder"),
    "torchvision.io + DataLoader": Implementation(torchvision_io, "folder"),
    "stock FFCV": stock_ffcv("beton"),
    "stock FFCV, raw": stock_ffcv("raw"),
    "stock DALI": Implementation(stock_dali, "folder", needs="nvidia.dali"),
    "nvImageCodec": Implementation(
        nvimagecodec,
        "folder",
        needs="nvidia.nvimgcodec",
        gpu_only="on a CPU it uses libjpeg-turbo, like the other loaders",
    ),
    "torchvision": pipeline("torchvision"),
    "dali": pipeline("dali", peer="stock DALI", needs="nvidia.dali"),
    "ffcv": pipeline("ffcv", peer="stock FFCV"),
    "ffcv, raw": pipeline("ffcv", "raw", peer="stock FFCV, raw"),
    "packed": pipeline("packed"),
    GATHER: Implementation(gathered, "pack", ours=True),
    "resident": pipeline("resident"),
}
