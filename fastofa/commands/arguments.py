"""The arguments of every command.

Those of `train` are defined in runs/config.py, those of `precompute` in teacher/precompute_config.py, and those of
`write` in data/write_config.py. parse.py reads them from a command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastofa.data.write_config import WriteConfig
from fastofa.runs.config import TrainConfig, Weights
from fastofa.system.errors import BadInput, at_least
from fastofa.system.urls import is_url, refuse_url
from fastofa.teacher.precompute_config import PrecomputeConfig


@dataclass(frozen=True)
class DemoConfig:
    """Distil a Transformer into a small CNN on handwritten digits: teacher, cache, students, table, curves, export."""

    out: Path = Path("demo")
    """Folder for all output; an earlier demo in it is replaced."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Compute top-1 and top-5; for a run also agreement with the teacher, and write them to RUN/evaluation.json."""

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN|MODEL|CHECKPOINT")]]
    """Folder written by `fastofa train`, `fastofa export` or timm, local-dir:FOLDER, hf-hub:OWNER/NAME, or a
    .safetensors or .pth file of weights, which needs --student."""
    data: str | None = None
    """Dataset whose validation split is used; by default the one that the run was trained on."""
    weights: Weights = "last"
    """last: the newest weights; best: those of the run's best evaluation, which makes the result on the same images too
    optimistic. For a run with --ema, both use the weights or their average, whichever had the higher top-1 in the run;
    raw, ema, best-raw and best-ema select one of them."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    pipeline: str = "auto"
    """resident, packed, ffcv, dali, torchvision, or auto, which reports its choice and the reason."""
    workers: int | None = None
    """Decoder processes (torchvision pipeline) or threads (others); by default one per core, at most 16."""
    json: Path | None = None
    """Also write these figures, the recall of each class and the confusion matrix to this file."""
    student: str | None = None
    """Architecture of a checkpoint: timm's name, or swin_nano_patch4_window7_224 or swin_pico_patch4_window7_224."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB (0 to 1) for a checkpoint. Default: timm's for --student."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB (0 to 1) for a checkpoint. Default: timm's for --student."""
    eval_crop: float | None = None
    """Side of the central square, as a fraction of the image's shorter side, for a checkpoint. Default: timm's for
    --student."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        at_least(self, 0, "workers")


@dataclass(frozen=True)
class ExportConfig:
    """Write OUT/model.safetensors and OUT/config.json, for timm.create_model and `fastofa precompute --teacher OUT`."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN|CHECKPOINT")]]
    """Folder written by `fastofa train`, or a .safetensors or .pth file of weights, which needs --student."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """New folder for the model."""
    weights: Weights = "last"
    """last: the newest weights; best: those of the run's best evaluation. For a run with --ema, both use the weights or
    their average, whichever had the higher top-1 in the run; raw, ema, best-raw and best-ema select one of them."""
    onnx: bool = False
    """Also write OUT/model.onnx: uint8 RGB pixels [batch, 3, size, size] -> logits, with the normalisation in the
    graph, opset 18. Needs the packages onnx and onnxscript (pip install 'fastofa[onnx]')."""
    student: str | None = None
    """Architecture of a checkpoint: timm's name, or swin_nano_patch4_window7_224 or swin_pico_patch4_window7_224."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB (0 to 1) for a checkpoint. Default: timm's for --student."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB (0 to 1) for a checkpoint. Default: timm's for --student."""
    eval_crop: float | None = None
    """Side of the central square, as a fraction of the image's shorter side, for a checkpoint. Default: timm's for
    --student."""


@dataclass(frozen=True)
class PredictConfig:
    """Predict the most probable classes of images without labels, with their probabilities."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN|MODEL")]]
    """Folder written by `fastofa train`, `fastofa export` or timm, local-dir:FOLDER or hf-hub:OWNER/NAME."""
    files: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES", help_behavior_hint="(required)")]
    ]
    """Images, or folders of images, which are searched recursively."""
    csv: Path | None = None
    """File for the predictions of all images. By default the first thousand are printed."""
    topk: int = 5
    """Classes per image."""
    weights: Weights = "last"
    """Weights of a run: last, best, raw, ema, best-raw or best-ema (see `fastofa evaluate --help`)."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    workers: int | None = None
    """Decoder threads; by default one per core, at most 16."""
    skip_corrupt: bool = False
    """Exit with code 0 even if some images cannot be read. Either way, they are listed and all others are predicted."""

    def __post_init__(self) -> None:
        at_least(self, 1, "topk", "batch_size")
        at_least(self, 0, "workers")


@dataclass(frozen=True)
class CkaConfig:
    """Compare the layers of two networks by CKA, and write OUT/cka.json and OUT/cka.png."""

    a: str
    """First network (rows): a timm model, a folder written by `fastofa export` or timm, local-dir:FOLDER,
    hf-hub:OWNER/NAME, or a folder written by `fastofa train`."""
    b: str
    """Second network (columns), likewise."""
    data: str
    """Dataset whose validation images are used."""
    images: int = 10_000
    """Number of validation images, drawn at random with a fixed seed; all if there are fewer."""
    batch_size: int = 128
    """Images per batch, at least 4."""
    exits: bool = True
    """Also compare the exits of a run's student."""
    out: Path = Path("cka")
    """Folder for cka.json and cka.png, which are replaced if they exist."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the networks; CKA is computed in fp32 and fp64. auto: bf16 on a GPU, fp32 on a CPU."""
    workers: int | None = None
    """Decoder processes or threads; by default one per core, at most 16."""

    def __post_init__(self) -> None:
        at_least(self, 4, "images", "batch_size")
        at_least(self, 0, "workers")


@dataclass(frozen=True)
class CacheConfig:
    """Describe, verify, join, compare or copy teacher caches."""

    action: tyro.conf.Positional[Literal["info", "verify", "merge", "extend", "diff", "push", "pull"]]
    """info CACHE: print how it was made. verify CACHE: check every finished table. merge CACHE CACHE ... --out NEW:
    join parts of one cache. extend CACHE CACHE ...: add the views of the others to the first. diff CACHE CACHE: compare
    two caches. push CACHE URL, pull URL CACHE: copy a cache to or from an object store or a web server."""
    caches: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="CACHE|URL", help_behavior_hint="(required)")]
    ]
    """Folders written by `fastofa precompute`. push and pull also need a URL: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER,
    https://HOST/FOLDER (pull only) or any other that fsspec opens."""
    out: Path | None = None
    """merge: the joined cache, a new folder or an unfinished merge. Files are linked if the disk allows it, else
    copied."""
    json: Path | None = None
    """diff: also write the result to this file."""

    def __post_init__(self) -> None:
        names = {"merge": "at least two caches", "extend": "at least two caches", "diff": "two caches"}
        names |= {"push": "CACHE URL", "pull": "URL CACHE"}
        count, expected = len(self.caches), names.get(self.action, "one cache")
        if count < 2 if self.action in ("merge", "extend") else count != (2 if self.action in names else 1):
            raise BadInput(f"cache {self.action}: expected {expected}, got {count}")
        for flag, action in (("out", "merge"), ("json", "diff")):
            if getattr(self, flag) is not None and self.action != action:
                raise BadInput(f"{flag}: expected only with `fastofa cache {action}`; leave it out")
        if self.action == "merge" and self.out is None:
            raise BadInput("cache merge: expected --out, the folder of the joined cache; or `fastofa cache extend`")
        place = {"push": 1, "pull": 0}.get(self.action)
        for number, path in enumerate(self.caches):
            if number == place and not is_url(path):
                raise BadInput(
                    f"cache {self.action}: expected {expected}, got {path!r} where the URL belongs; a folder of this "
                    "machine has the URL file:///PATH/FROM/ROOT"
                )
            if number != place:
                push = f"pull into a folder, then run `fastofa cache push FOLDER {path}`"
                copy = push if self.action == "pull" else f"run `fastofa cache pull {path} FOLDER` and give the folder"
                refuse_url(f"cache {self.action}", path, copy)


@dataclass(frozen=True)
class DoctorConfig:
    """List the optional parts that make fastofa faster, whether they work here, and how to install missing ones."""


CONFIGS: dict[str, type] = {
    "demo": DemoConfig,
    "write": WriteConfig,
    "precompute": PrecomputeConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "predict": PredictConfig,
    "cka": CkaConfig,
    "cache": CacheConfig,
    "doctor": DoctorConfig,
}
