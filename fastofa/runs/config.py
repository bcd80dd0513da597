"""Everything that decides a training run, in one frozen value. Recipes fill it, flags change it, the run keeps it.

The fields are flat, as the flags and config.json are; the help shows them under the titles of SECTIONS.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from fastofa.data.headers import parse_limits
from fastofa.methods.options import Options
from fastofa.system.errors import BadInput
from fastofa.system.read import read_json
from fastofa.views.policy import ViewPolicy, changed_policy

MAX_EPOCHS = 1_000_000
BUILT_IN = {"data": "digits", "init": "pretrained", "teacher": ""}  # texts that may be paths; one that is none
MAX_NAMED = 8  # how many fields an error names
Config = TypeVar("Config")
Method = Literal["ofa", "kd", "scratch"]
Order = Literal["auto", "random", "pages"]
Weights = Literal["last", "best", "raw", "ema", "best-raw", "best-ema"]
Optimizer = Literal["sgd", "adamw", "lamb", "apex_sgd", "apex_adam", "apex_lamb"]

# None until the data set is opened and `recipes.with_size_defaults` chooses by its size; no later code sees a None.
if TYPE_CHECKING:
    SizedInt: TypeAlias = int
    SizedFloat: TypeAlias = float
else:
    SizedInt, SizedFloat = int | None, float | None
SIZED = ("epochs", "batch_size", "lr", "warmup_epochs")
# Titles in the help, each by the first of its fields.
SECTIONS = {
    "data": "model and data",
    "method": "method",
    "image_size": "image",
    "epochs": "schedule",
    "optimizer": "optimizer",
    "device": "hardware",
    "pipeline": "loader",
    "log_every": "logging",
}


@dataclass(frozen=True)
class TrainConfig:
    """Distil a student from a teacher cache."""

    data: str
    """Data set: digits, digits:N, cifar100:DIR, a folder with train/ and val/, or what `fastofa write` wrote."""
    student: str
    """A timm model (or swin_nano_patch4_window7_224, swin_pico_patch4_window7_224)."""
    out: Path
    """Folder of the run: config.json, metrics.jsonl, checkpoints, report.html, curves.png, TensorBoard events."""
    recipe: str
    """Where the defaults below come from: photos (your own images), digits, imagenet_fast, imagenet_cnn,
    imagenet_vit_mlp, imagenet_stronger, cifar_cnn, cifar_vit_mlp. Without this flag: digits for the digits, cifar_cnn
    for cifar100:DIR, photos for all other data. The help shows the defaults of the recipe that is named beside it."""
    cache: Path | None = None
    """Teacher cache made by `fastofa precompute`; only --method scratch can do without."""
    init: str | None = None
    """Where the student's weights start: nothing for random, "pretrained" for timm's published ones, a .safetensors or
    .pth file, or a folder that `fastofa export` or timm wrote."""
    drop_path: float | None = None
    """Stochastic depth of the student. None: the model's own, which for some is not 0."""
    resume: bool = False
    """Continue from the newest checkpoint of the run in --out, or from the start if it has none yet. --resume RUN needs
    no other flag: everything comes from RUN/config.json, and what does not change the result (--device, --workers, ...)
    may be given beside it. A process that torchrun restarted resumes by itself."""
    plan: bool = False
    """Only say what the run would cost (steps timed here, hours, disk); write nothing."""

    method: Method = "ofa"
    """ofa: every stage's exit and the final logits learn from the teacher; kd: the final logits only; scratch: labels
    only."""
    stages: tuple[int, ...] = (1, 2, 3, 4)
    """Stages of the student that get an exit (ofa)."""
    eps: tuple[float, ...] = (1.0,)
    """Target enhancement: one value, or one for each of --stages, in their order, and one for the final logits. Above 1
    boosts the target class (published: 1.5 for DeiT-T -> ResNet-18 on ImageNet, 1.0 on CIFAR)."""
    temperature: float = 1.0
    """Divides the student's and the teacher's logits."""
    variant: Literal["official", "paper"] = "official"
    """Form of the OFA loss: the published code's or the paper's text."""
    gt_weight: float = 1.0
    """Weight of the loss against the labels."""
    kd_weight: float = 1.0
    """Weight of the final logits' loss against the teacher."""
    ofa_weight: float = 1.0
    """Weight of the exits' losses (the authors' own CIFAR runs used 0.1)."""
    gt_loss: Literal["ce", "bce"] = "ce"
    """Loss against the labels: cross-entropy, or binary cross-entropy of each class."""
    smoothing: float = 0.0
    """Label smoothing."""

    image_size: int | None = None
    """Side of the student's input in pixels; by default the model's own."""
    start_size: int | None = None
    """Side of the pictures in the first epochs, for students that take any; by default --image-size throughout."""
    growth: tuple[float, float] = (0.7, 0.85)
    """Shares of the training between which the pictures grow from --start-size to --image-size, by 32 pixels."""
    eval_size: int | None = None
    """Side of the pictures that are evaluated; by default --image-size."""
    eval_crop: float = 0.875
    """Side of the central square that is evaluated, as a share of the picture's shorter side."""
    eval_flip: bool = False
    """Evaluate the mean of the logits of each picture and of its mirror image."""
    mean: tuple[float, float, float] | None = None
    """Normalisation of the pixels; by default the student's own."""
    std: tuple[float, float, float] | None = None
    """Normalisation of the pixels; by default the student's own."""
    scale: tuple[float, float] | None = None
    """Share of the picture's area that a crop takes, from and to. By default the cache's; another value is refused."""
    ratio: tuple[float, float] | None = None
    """Width over height of a crop, from and to. By default the cache's; another value is refused."""
    flip: float | None = None
    """Probability of mirroring. By default the cache's; another value is refused."""

    epochs: SizedInt = 100
    """Passes over the training set; epoch e replays view e modulo the cache's views. None: by the number of training
    images, 30 to 300 (with --init 30 to 100). A resumed run may get more epochs, never fewer: from there on cosine,
    linear and the growth of the images follow the curve of the new length (a line says by how much the learning rate
    jumps), step stays as it is."""
    batch_size: SizedInt = 512
    """Images a step, over all ranks. The learning rate belongs to it: change both together. None: by the number of
    training images, 8 to 128."""
    seed: int = 0
    """Of the initial weights, the order of samples, and the views where there is no cache."""
    order: Order = "auto"
    """random: any sample may come next; pages: first those of 64 random pages of the .beton (8 MiB each), then those of
    the next 64, so that a disk reads long stretches. auto: pages where the .beton is larger than the machine's memory;
    a run keeps the order it began with."""
    lr: SizedFloat = 0.1
    """Learning rate after warm-up. None: 1e-3, with --init 1e-4, times the root of batch size / 128."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    schedule: Literal["cosine", "step", "linear"] = "cosine"
    """How the learning rate falls."""
    decay_epochs: float = 30
    """step: epochs between two decays."""
    decay_rate: float = 0.1
    """step: factor of each decay."""
    warmup_epochs: SizedFloat = 0
    """Epochs in which the learning rate rises linearly. None: a twentieth of the epochs."""
    warmup_lr: float = 1e-6
    """Learning rate at the first step of the warm-up."""

    optimizer: Optimizer = "sgd"
    """sgd and adamw are torch's fused ones, lamb is timm's; apex_* are NVIDIA apex's, where it is built (see `fastofa
    doctor`). Biases, norms and position embeddings are exempt from weight decay."""
    weight_decay: float = 1e-4
    """Weight decay."""
    clip: float | None = None
    """Largest gradient norm; None: not clipped, but lamb clips at 1 by itself."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights; None: no average. Both the weights and their average are
    evaluated and kept; `evaluate` and `export` take the better of them, unless told otherwise by --weights."""

    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the student's arithmetic; the loss is always fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of student, exits and loss as one program. auto: on with a GPU, off on a CPU."""
    kernels: tuple[Literal["auto", "off", "loss", "exits", "stem", "norms"], ...] = ("auto",)
    """Triton kernels to use, on a GPU: loss (all of the objective), exits (their depthwise convolutions, and those of a
    MobileNet), stem (the convolution of the pixels, and a ResNet's max-pool), norms (batch norms with the activation
    and the residual after them). auto: exits, stem and norms on an H100 or H200, where they were measured to be faster,
    and none elsewhere. off: none."""
    cuda_graphs: bool = False
    """Replay the compiled program as CUDA graphs: less to launch, which helps small students and small batches."""
    accumulate: int = 1
    """Parts a rank's share of a step is computed in, one after the other, where memory is short."""
    sync_bn: bool = False
    """Batch statistics over all ranks' images (GPUs only)."""
    grad_compression: Literal["none", "bf16"] = "none"
    """Gradients travel between ranks as they are, or as bf16: half the bytes."""
    timeout_s: int = 600
    """Seconds that ranks wait for one another before they give up (and torchrun, if told so, restarts them)."""

    pipeline: str = "auto"
    """resident, packed, ffcv, dali, torchvision, or auto, which says what it takes and why."""
    workers: int | None = None
    """Decoding processes of the torchvision pipeline, threads of others; by default one per core, at most 16."""
    skip_corrupt: bool = False
    """Decode every file of both splits first, list the unreadable ones and leave them out for good."""
    allow_warnings: bool = False
    """With --skip-corrupt: take images that decode with signs of damage, too. Without it they are named and taken."""
    max_pixels: float = 200
    """Millions of pixels of an image at most, by its header; larger ones are unreadable."""

    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 1
    """Epochs between two evaluations; the last epoch always has one."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is one before each evaluation and at an interruption, too."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the weights of the best evaluation."""
    wandb: str | None = None
    """Weights & Biases project that the log is sent to as well (needs `pip install wandb` and its login)."""

    def __post_init__(self) -> None:
        def need(fits: bool, name: str, expected: str) -> None:
            if not fits:
                raise BadInput(f"{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")

        for name, hint in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                need(value in get_args(hint), name, f"one of {', '.join(get_args(hint))}")
            numbers = value if isinstance(value, tuple) else (value,)
            need(not any(isinstance(v, float) and math.isinf(v) for v in numbers), name, "finite numbers")
        parse_limits(self.max_pixels, self.allow_warnings)
        named = self.kernels in (("auto",), ("off",)) or set(self.kernels) <= {"loss", "exits", "stem", "norms"}
        need(named, "kernels", "auto, off, or some of loss exits stem norms")
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep",
            "timeout_s",
        ):
            need(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        rates, weights = ("lr", "min_lr", "warmup_lr"), ("gt_weight", "kd_weight", "ofa_weight")
        for name in (*rates, *weights, "weight_decay", "warmup_epochs"):
            need(getattr(self, name) is None or getattr(self, name) >= 0, name, "a number of at least 0")
        for name in ("smoothing", "drop_path"):
            need(getattr(self, name) is None or 0 <= getattr(self, name) < 1, name, "a number from 0 to below 1")
        for name in ("temperature", "decay_epochs", "decay_rate"):
            need(getattr(self, name) > 0, name, "a number above 0")
        need(0 < self.eval_crop <= 1, "eval_crop", "a number above 0 and at most 1")
        need(self.clip is None or self.clip > 0, "clip", "a number above 0, or None for no clipping")
        need(self.ema is None or 0 < self.ema < 1, "ema", "a number between 0 and 1, or None for no average")
        for name in ("data", "student", "init", "wandb"):
            need(getattr(self, name) != "", name, "a name")
        for name in ("image_size", "start_size", "eval_size"):
            need(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1 pixel")
        need(0 <= self.growth[0] <= self.growth[1] <= 1, "growth", "two rising numbers from 0 to 1")
        need(0 <= self.seed < 2**63, "seed", "a number from 0 to 2^63 - 1")
        need(self.epochs is None or self.epochs <= MAX_EPOCHS, "epochs", f"at most {MAX_EPOCHS:,}")
        if self.start_size is not None and self.image_size is not None:
            need(self.start_size <= self.image_size, "start_size", f"at most the full {self.image_size} pixels")
        need(not self.cuda_graphs or self.compile != "off", "compile", "on or auto with --cuda-graphs")
        need(not self.cuda_graphs or self.accumulate == 1, "accumulate", "1 with --cuda-graphs")
        need(
            set(self.stages) <= {1, 2, 3, 4} and len(set(self.stages)) == len(self.stages), "stages", "some of 1 2 3 4"
        )
        need(self.method != "ofa" or len(self.stages) > 0, "stages", "at least one stage (or --method kd)")
        heads = len(self.exits) + 1
        expected = "1 number above 0" if heads == 1 else f"1 or {heads} numbers above 0"
        need(len(self.eps) in (1, heads) and all(e > 0 for e in self.eps), "eps", expected)
        need((self.mean is None) == (self.std is None), "mean", "both --mean and --std or neither")
        need(self.mean is None or not any(map(math.isnan, self.mean)), "mean", "three numbers")
        need(self.std is None or all(value > 0 for value in self.std), "std", "three numbers above 0")
        self.policy(ViewPolicy())

    @property
    def exits(self) -> tuple[int, ...]:
        """The stages that get an exit: none unless the method uses them."""
        return tuple(sorted(self.stages)) if self.method == "ofa" else ()

    @property
    def head_eps(self) -> tuple[float, ...]:
        """Of each exit in the order of `exits`, then of the final logits; `eps` itself is in the order of `stages`."""
        if len(self.eps) == 1:
            return self.eps * (len(self.exits) + 1)
        of_stage = dict(zip(self.stages, self.eps, strict=False))
        return (*(of_stage[stage] for stage in self.exits), self.eps[-1])

    @property
    def objective(self) -> Options:
        """The part of the configuration that the objective takes."""
        return Options(
            self.head_eps,
            self.temperature,
            self.variant,
            self.gt_weight,
            self.kd_weight,
            self.ofa_weight,
            self.gt_loss,
            self.smoothing,
            "loss" in self.kernels,
        )

    def policy(self, default: ViewPolicy) -> ViewPolicy:
        """The view policy asked for, `default` where nothing was."""
        return changed_policy(default, scale=self.scale, ratio=self.ratio, flip=self.flip)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """Raises BadInput if the file was written by another version or edited."""
        return from_json(cls, values, "export the run with the version that made it, or train anew")

    def differences(self, other: "TrainConfig") -> list[str]:
        """What would make a resumed run another run than `other`, one `name: mine, other's` each; epochs may grow."""
        free = {
            "out",
            "resume",
            "plan",
            "skip_corrupt",
            "device",
            "compile",
            "kernels",
            "cuda_graphs",
            "grad_compression",
            "timeout_s",
            "accumulate",
        }
        free |= {"pipeline", "workers", "log_every", "eval_every", "checkpoint_every", "keep", "wandb", "data", "cache"}
        free |= {"allow_warnings", "max_pixels"}  # which images they take is the data's fingerprint
        mine, theirs = json.loads(json.dumps(self.to_json())), json.loads(json.dumps(other.to_json()))
        if self.epochs is not None and other.epochs is not None and self.epochs > other.epochs:
            free.add("epochs")
        return [f"{k}: {mine[k]} here, {theirs[k]} there" for k in mine if k not in free and mine[k] != theirs[k]]


def to_json(config: Any) -> dict[str, Any]:
    """A configuration's fields for a JSON file; paths become text."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(config).items()}


def from_json(cls: type[Config], values: Any, remedy: str) -> Config:
    """The configuration that `to_json` wrote. Raises BadInput for other fields (with `remedy`) and other types."""
    if not isinstance(values, dict):
        raise BadInput(f"expected an object as config, got {_text(values)}")
    hints = get_type_hints(cls)
    if odd := sorted(set(values) ^ set(hints)):
        named = [_text(name).strip('"') for name in odd[:MAX_NAMED]] + ["..."] * (len(odd) > MAX_NAMED)
        raise BadInput(f"expected the fields of this version of fastofa, these differ: {', '.join(named)}; {remedy}")
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            raise BadInput(
                f"expected {_words(hint)} as {name}, got {_text(values[name])}; it was edited or damaged, put its own "
                "value back"
            )
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    paths = {k: Path(v) for k, v in given.items() if v is not None and _is_path(hints[k])}
    return cls(**{**given, **paths})


def read_config(cls: type[Config], file: Path) -> Config:
    """The configuration in a file: its "config" object, or else all of it.

    Relative paths begin at the file's "folder", or at the working directory if it has none.

    Raises:
        BadInput: the file cannot be read, or holds something else.
    """
    values, folder = read_json(file), ""
    if isinstance(values, dict) and "config" in values:
        values, folder = values["config"], values.get("folder", "")
    try:
        if not isinstance(folder, str):
            raise BadInput(f"expected text as folder, got {_text(folder)}")
        config = from_json(cls, values, "give a file that this version wrote")
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    if Path(folder) in (Path(), Path.cwd()):
        return config
    hints, fields = get_type_hints(cls), vars(config)
    paths = {k: Path(folder, v) for k, v in fields.items() if v is not None and _is_path(hints[k])}
    places = {k: from_folder(folder, fields[k], own) for k, own in BUILT_IN.items() if fields.get(k)}
    return cls(**{**fields, **paths, **places})


def from_folder(folder: str, name: str, built_in: str) -> str:
    """A data set, model or weights file, where a relative path begins at `folder`; the name of anything else."""
    kind = next((kind for kind in ("cifar100:", "local-dir:") if name.startswith(kind)), "")
    place = Path(folder, name.removeprefix(kind))
    return f"{kind}{place}" if name.partition(":")[0] != built_in and place.exists() else name


def _is_path(hint: Any) -> bool:
    return hint is Path or Path in get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Is a value from JSON of this type? Paths are strings there, tuples lists; a float may be a whole number."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # which one is checked where the configuration is made
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            return False
        parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, str if hint is Path else hint)


def _words(hint: Any) -> str:
    """A type as one would say it."""
    names = {
        str: "text",
        Path: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        NoneType: "null",
    }
    if get_origin(hint) is UnionType:
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list" if ... in get_args(hint) else f"a list of {len(get_args(hint))} numbers"
    return "text" if get_origin(hint) is Literal else names[hint]


def _text(value: Any) -> str:
    """A value of a file in a message: its beginning."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "lists within lists"
    return text if len(text) <= 40 else f"{text[:40]}..."


OWN_CLIP = {
    "lamb": 1.0,
    "apex_lamb": 1.0,
}  # the largest gradient norm that an optimiser lets pass, whatever --clip says
