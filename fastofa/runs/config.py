"""The frozen configuration of a training run. Recipes set its defaults, flags override them, and the run stores it.

The fields are flat, like the flags and config.json; the help groups them under the titles in SECTIONS.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from fastofa.data.headers import Limits, parse_limits
from fastofa.methods.options import (
    BUILT_IN,
    BKDOptions,
    CCOptions,
    CRDOptions,
    DISTOptions,
    DKDOptions,
    FitNetOptions,
    KDOptions,
    LSKDOptions,
    ObjectiveOptions,
    OFAOptions,
    RKDOptions,
    RSDOptions,
    check_options,
    is_own,
    method_names,
    own_methods,
    prefix_of,
)
from fastofa.runs.config_file import from_json, to_json
from fastofa.system.errors import BadInput
from fastofa.views.policy import ViewPolicy, changed_policy

MAX_EPOCHS = 1_000_000
# The gradient norm at which an optimizer clips by itself, regardless of --clip.
OWN_CLIP = {"lamb": 1.0, "apex_lamb": 1.0}
Order = Literal["auto", "random", "pages"]
Weights = Literal["last", "best", "raw", "ema", "best-raw", "best-ema"]
Optimizer = Literal["sgd", "adamw", "lamb", "apex_sgd", "apex_adam", "apex_lamb"]

# None until a run is opened: `recipes.with_size_defaults` chooses by the size of the dataset, and
# `preflight.with_own_evaluation` by the student. Never None after that.
if TYPE_CHECKING:
    SizedInt: TypeAlias = int
    SizedFloat: TypeAlias = float
else:
    SizedInt, SizedFloat = int | None, float | None
SIZED = ("epochs", "batch_size", "lr", "warmup_epochs")
# Methods that use an option; options such as rsd.kappa are used by the method of that name, and others by all.
USED_BY = {
    "stages": ("ofa",),
    "eps": ("ofa",),
    "variant": ("ofa",),
    "ofa_weight": ("ofa",),
    "temperature": ("ofa", "kd"),
    "kd_weight": ("ofa", "kd"),
}
# Titles in the help, each keyed by its first field.
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
    """Dataset: digits, digits:N, cifar100:DIR, a folder with train/ and val/, or the output of `fastofa write`,
    here or at a URL."""
    student: str
    """A timm model (or swin_nano_patch4_window7_224, swin_pico_patch4_window7_224)."""
    out: Path
    """Folder of the run, for config.json, metrics.jsonl, checkpoints, report.html, curves.png and TensorBoard events.
    """
    recipe: str
    """Source of the defaults below: photos (your own images), digits, imagenet_fast, imagenet_cnn, imagenet_vit_mlp,
    imagenet_stronger, cifar_cnn, cifar_vit_mlp, cifar_cnn_authors, cifar_vit_mlp_authors. Without this flag: digits for
    the digits dataset, cifar_cnn for cifar100:DIR, photos for all other data. --help together with --recipe shows that
    recipe's defaults."""
    cache: str | None = None
    """Teacher cache written by `fastofa precompute`: its folder, or the URL of a pushed one (s3://BUCKET/FOLDER), whose
    views are downloaded ahead of use. Required unless --method is scratch or --online-teacher is given."""
    allow_mismatch: Literal["none", "pixels"] = "none"
    """pixels: accept a cache whose teacher saw other pixels of the same samples, such as images that were compressed or
    resized since, or that another decoder read. Names, labels, classes and views must still be the same."""
    teacher_weights: tuple[float, ...] | None = None
    """Weights of the teachers of a cache made with `fastofa precompute --keep-each`, with a sum of 1. Default: those
    given to precompute, or equal ones."""
    online_teacher: str | None = None
    """Instead of --cache: run this teacher in every step, on the student's own images, which are drawn anew for every
    epoch. A timm model with its tag, a folder written by `fastofa train`, `fastofa export` or timm, or
    hf-hub:OWNER/NAME, as for `fastofa precompute --teacher`."""
    teacher_checkpoint: Path | None = None
    """A .safetensors or .pth file with the weights of --online-teacher, instead of timm's."""
    init: str | None = None
    """Initial weights of the student: random without this flag, "pretrained" for timm's published ones, a .safetensors
    or .pth file, or a folder written by `fastofa train`, `fastofa export` or timm."""
    drop_path: float | None = 0.0
    """Stochastic depth of the student. None: timm's default for the model, which is 0.1 for Swin."""
    resume: bool = False
    """Resume the run in --out from its newest checkpoint, or from the start if it has none yet. --resume RUN needs no
    other flag: the configuration comes from RUN/config.json, and only flags that do not change the result (--device,
    --workers, ...) and a larger --epochs may be added. Processes restarted by torchrun resume automatically."""
    plan: bool = False
    """Only estimate the cost of the run (hours, from steps timed on this machine, and disk space); write nothing."""

    method: str = "ofa"
    """What the student learns from the teacher: ofa (exits and final logits), kd, bkd, dkd, dist or lskd (final
    logits), cc, rkd, crd or rsd (pooled vectors, which `fastofa precompute --features pooled` stores), fitnet (features
    of the stages, which need --online-teacher), several of them (ofa+rsd), or your own, FILE.py:Name. scratch: nothing,
    only the labels are used."""
    stages: tuple[int, ...] = (1, 2, 3, 4)
    """Stages of the student that get an exit (ofa)."""
    eps: tuple[float, ...] = (1.0,)
    """ofa: target enhancement: one value, or one for each of --stages, in that order, and one for the final logits.
    Values above 1 boost the target class (published: 1.5 for DeiT-T -> ResNet-18 on ImageNet, 1.0 on CIFAR)."""
    temperature: float = 1.0
    """ofa, kd: divisor of the student's and the teacher's logits. Only kd multiplies its loss by the square."""
    variant: Literal["official", "paper"] = "official"
    """ofa: form of the loss: that of the published code, or that of the paper's text."""
    gt_weight: float = 1.0
    """Weight of the loss against the labels."""
    kd_weight: float = 1.0
    """ofa, kd: weight of the final logits' loss against the teacher."""
    ofa_weight: float = 1.0
    """ofa: weight of the exits' losses against the teacher (the authors used 0.1 for CIFAR)."""
    gt_loss: Literal["ce", "bce"] = "ce"
    """Loss against the labels: cross-entropy, or binary cross-entropy for each class."""
    smoothing: float = 0.0
    """Label smoothing."""
    bkd: BKDOptions = field(default_factory=BKDOptions)
    dkd: DKDOptions = field(default_factory=DKDOptions)
    dist: DISTOptions = field(default_factory=DISTOptions)
    lskd: LSKDOptions = field(default_factory=LSKDOptions)
    cc: CCOptions = field(default_factory=CCOptions)
    rkd: RKDOptions = field(default_factory=RKDOptions)
    crd: CRDOptions = field(default_factory=CRDOptions)
    rsd: RSDOptions = field(default_factory=RSDOptions)
    fitnet: FitNetOptions = field(default_factory=FitNetOptions)
    own_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of the methods in your own files, by the class's name in lower case: {"squares": {"weight": 2.0}}. They
    are flags (--squares.weight 2) and, in config.json, objects beside those above."""

    image_size: int | None = None
    """Side of the student's input in pixels; by default the model's own."""
    start_size: int | None = None
    """Side of the images in the first epochs, for students that accept any size; by default --image-size throughout."""
    growth: tuple[float, float] = (0.7, 0.85)
    """Fractions of the training at which the images begin and finish growing from --start-size to --image-size, in
    steps of 32 pixels."""
    eval_size: int | None = None
    """Side of the images in evaluation; by default --image-size."""
    eval_crop: SizedFloat = 0.875
    """Side of the central square that is evaluated, as a fraction of the image's shorter side. None: that of the
    student's configuration in timm."""
    eval_interpolation: Literal["bilinear", "bicubic", "student"] = "bilinear"
    """Filter with which images are resized in evaluation. student: that of the student's configuration in timm."""
    eval_flip: bool = False
    """Average the logits of each image and of its mirror image in evaluation."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB (0 to 1) for normalising the student's input; by default the student's own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB (0 to 1) for normalising the student's input; by default the student's own."""
    scale: tuple[float, float] | None = None
    """Minimum and maximum area of a crop as a fraction of the image. By default the cache's; with a cache no other
    value is accepted."""
    ratio: tuple[float, float] | None = None
    """Minimum and maximum aspect ratio (width over height) of a crop. By default the cache's; with a cache no other
    value is accepted."""
    flip: float | None = None
    """Probability of a horizontal flip. By default the cache's; with a cache no other value is accepted."""
    bicubic: float | None = None
    """Probability that a crop is resized with a bicubic filter instead of a bilinear one. By default the cache's; with
    a cache no other value is accepted."""

    epochs: SizedInt = 100
    """Passes over the training set. Epoch e replays view e modulo the number of cached views. None: 30 to 300,
    depending on the number of training images (30 to 100 with --init). A resumed run may get more epochs, never fewer.
    From then on, cosine, linear and the growth of the images follow the curve of the new length (a notice reports how
    the learning rate changes); step does not change."""
    batch_size: SizedInt = 512
    """Images per step, over all ranks. Scale the learning rate with it. None: 8 to 128, depending on the number of
    training images."""
    seed: int = 0
    """Random seed of the initial weights, of the order of samples and, without a cache, of the views."""
    order: Order = "auto"
    """Order of the samples. random: any sample may come next. pages: the samples of 64 random pages of the .beton (8
    MiB each), then those of the next 64, so that the disk is read in long stretches. auto: pages if the .beton is
    larger than the machine's memory. A run keeps the order it started with."""
    lr: SizedFloat = 0.1
    """Learning rate after the warm-up. None: 1e-3 (1e-4 with --init) times the square root of batch size / 128."""
    min_lr: float = 0.0
    """Learning rate at the end of the run."""
    schedule: Literal["cosine", "step", "linear"] = "cosine"
    """Schedule of the learning rate."""
    lr_updates: Literal["step", "epoch"] = "step"
    """When the learning rate changes: at every step, or only between epochs, as in the published code."""
    decay_epochs: float = 30
    """step: epochs between two decays."""
    decay_rate: float = 0.1
    """step: factor of each decay."""
    warmup_epochs: SizedFloat = 0
    """Epochs during which the learning rate rises linearly. None: a twentieth of the epochs."""
    warmup_lr: float = 1e-6
    """Learning rate at the first step of the warm-up."""

    optimizer: Optimizer = "sgd"
    """sgd and adamw are torch's fused optimizers, lamb is timm's, apex_* are NVIDIA apex's if it is installed (see
    `fastofa doctor`). Biases and norms are exempt from weight decay."""
    weight_decay: float = 1e-4
    """Weight decay."""
    decay_embeddings: bool = False
    """Apply weight decay to position embeddings and class tokens too, as the published code does. By default they are
    exempt, as in timm."""
    clip: float | None = None
    """Maximum gradient norm. None: no clipping. lamb and apex_lamb also clip at 1 by themselves."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights. None: no average. Both the weights and their average are
    evaluated and saved; `evaluate`, `export` and `predict` use the better one unless --weights selects another."""

    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the student's computation; the loss is always fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    compile: Literal["auto", "on", "off", "max-autotune"] = "auto"
    """torch.compile of student, exits and loss as one program, and of the evaluation. auto: on for a GPU, off for a
    CPU. max-autotune: on, and the compiler times several implementations of every matrix product, which is slow."""
    kernels: tuple[Literal["auto", "off", "loss", "exits", "stem", "norms", "tokens", "layer_norms"], ...] = ("auto",)
    """Triton kernels to use on a GPU: loss (the whole objective), exits (depthwise convolutions of the exits and of
    MobileNets), stem (the convolution of the pixels, and a ResNet's max-pool), norms (batch norms with the activation
    and the residual after them), tokens (bias and GELU in the MLPs of token models), layer_norms (layer norms in their
    blocks, with the residual before them). auto: on a GPU, the fastest implementation of each part, measured at the
    start of a run; on a CPU, none. off: none."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay the compiled program as CUDA graphs, which launch all its kernels together. auto: on if the CPU would
    launch them more slowly than the GPU computes them, as with small students and batches; this is measured before the
    first step, and a notice reports it."""
    accumulate: int = 1
    """Number of parts in which a rank computes its share of a step, one after the other, to save memory."""
    sync_bn: bool = False
    """Compute batch statistics over the images of all ranks instead of each rank's own."""
    grad_compression: Literal["none", "bf16"] = "none"
    """Precision in which ranks exchange gradients: their own, or bf16, which halves the traffic."""
    timeout_s: int = 600
    """Seconds that ranks wait for one another before they stop (torchrun --max-restarts then restarts them)."""

    pipeline: str = "auto"
    """resident, packed, ffcv, dali, torchvision, or auto, which reports its choice and the reason."""
    workers: int | None = None
    """Decoder processes (torchvision pipeline) or threads (others); by default one per core, at most 16."""
    skip_corrupt: bool = False
    """Decode every file of both splits first, list the unreadable ones and skip them in every epoch."""
    allow_warnings: bool = False
    """With --skip-corrupt, also accept images that decode with signs of damage, and use them as decoded. Without
    --skip-corrupt they are always used, and a notice lists them."""
    max_pixels: float = 200
    """Maximum size of an image in millions of pixels, according to its header; larger ones count as unreadable."""

    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one is also saved before each evaluation and at an interruption."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the weights of the best evaluation."""
    wandb: str | None = None
    """Weights & Biases project that also receives the log (after `pip install wandb` and `wandb login`)."""

    def __post_init__(self) -> None:
        if isinstance(self.cache, Path):  # given from Python; a Path would lose a slash of a URL
            object.__setattr__(self, "cache", str(self.cache))

        def need(fits: bool, name: str, expected: str) -> None:
            if not fits:
                raise BadInput(f"{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")

        for name, hint in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                need(value in get_args(hint), name, f"one of {', '.join(get_args(hint))}")
            numbers = value if isinstance(value, tuple) else (value,)
            need(not any(isinstance(v, float) and math.isinf(v) for v in numbers), name, "finite numbers")
        self.limits()
        names = ("loss", "exits", "stem", "norms", "tokens", "layer_norms")
        named = self.kernels in (("auto",), ("off",)) or set(self.kernels) <= set(names)
        need(named, "kernels", f"auto, off, or some of {' '.join(names)}")
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
        need(self.eval_crop is None or 0 < self.eval_crop <= 1, "eval_crop", "a number above 0 and at most 1")
        need(self.clip is None or self.clip > 0, "clip", "a number above 0, or None for no clipping")
        need(self.ema is None or 0 < self.ema < 1, "ema", "a number between 0 and 1, or None for no average")
        for name in ("data", "student", "init", "wandb", "online_teacher"):
            need(getattr(self, name) != "", name, "a name")
        for name in ("image_size", "start_size", "eval_size"):
            need(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1 pixel")
        need(0 <= self.growth[0] <= self.growth[1] <= 1, "growth", "two rising numbers from 0 to 1")
        need(0 <= self.seed < 2**63, "seed", "a number from 0 to 2^63 - 1")
        need(self.epochs is None or self.epochs <= MAX_EPOCHS, "epochs", f"at most {MAX_EPOCHS:,}")
        if self.start_size is not None and self.image_size is not None:
            need(self.start_size <= self.image_size, "start_size", f"at most the full {self.image_size} pixels")
        graphs = self.cuda_graphs == "on"
        need(not graphs or self.compile != "off", "compile", "on, auto or max-autotune with --cuda-graphs on")
        need(not graphs or self.accumulate == 1, "accumulate", "1 with --cuda-graphs on")
        need(
            set(self.stages) <= {1, 2, 3, 4} and len(set(self.stages)) == len(self.stages), "stages", "some of 1 2 3 4"
        )
        self._check_methods()
        self._check_teacher()
        need("ofa" not in self.methods or len(self.stages) > 0, "stages", "at least one stage (or --method kd)")
        heads = len(self.exits) + 1
        expected = "1 number above 0" if heads == 1 else f"1 or {heads} numbers above 0"
        need(len(self.eps) in (1, heads) and all(e > 0 for e in self.eps), "eps", expected)
        need((self.mean is None) == (self.std is None), "mean", "both --mean and --std or neither")
        need(self.mean is None or not any(map(math.isnan, self.mean)), "mean", "three numbers")
        need(self.std is None or all(value > 0 for value in self.std), "std", "three numbers above 0")
        self.policy(ViewPolicy())

    def _check_methods(self) -> None:
        """Raises BadInput for unknown or repeated methods, and for options out of range."""
        check_method(self.method)
        for name in BUILT_IN:
            if hasattr(self, name):
                check_options(name, getattr(self, name))
        own = own_methods(self.method)
        for prefix, values in self.own_options.items():
            if prefix not in own:
                raise BadInput(f"{prefix}: expected options of a method in --method, got --method {self.method}")
            _check_own(prefix, values)

    def _check_teacher(self) -> None:
        """Raises BadInput unless at most one teacher is given, and a method learns from an online one."""
        if self.teacher_weights is not None and self.cache is None:
            raise BadInput("teacher-weights: expected --cache with them, got none; leave them out")
        if self.online_teacher is None:
            if self.teacher_checkpoint is not None:
                raise BadInput("teacher-checkpoint: expected --online-teacher with it, got none; give both or neither")
            return
        if self.cache is not None:
            raise BadInput(
                f"online-teacher: expected no --cache with it, which holds a teacher's predictions, got {self.cache}; "
                "give one of them"
            )
        if not self.methods:
            raise BadInput(
                f"online-teacher: expected a --method that learns from it, got scratch with {self.online_teacher}; "
                "leave it out"
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """The names in `method`; none for scratch."""
        return () if self.method == "scratch" else method_names(self.method)

    @property
    def exits(self) -> tuple[int, ...]:
        """The stages that get an exit, in ascending order; none unless ofa is among the methods."""
        return tuple(sorted(self.stages)) if "ofa" in self.methods else ()

    @property
    def head_eps(self) -> tuple[float, ...]:
        """eps of each exit, in the order of `exits`, then of the final logits. (`eps` has the order of `stages`.)"""
        if len(self.eps) == 1:
            return self.eps * (len(self.exits) + 1)
        of_stage = dict(zip(self.stages, self.eps, strict=False))
        return (*(of_stage[stage] for stage in self.exits), self.eps[-1])

    @property
    def objective(self) -> ObjectiveOptions:
        """The part of the configuration that the objective uses."""
        options = vars(self) | {
            "ofa": OFAOptions(self.head_eps, self.temperature, self.variant, self.kd_weight, self.ofa_weight),
            "kd": KDOptions(self.kd_weight, self.temperature),
            **{name: self.own_options.get(prefix) for prefix, name in own_methods(self.method).items()},
        }
        methods = tuple((name, options[name]) for name in self.methods)
        return ObjectiveOptions(methods, self.gt_weight, self.gt_loss, self.smoothing)

    def limits(self) -> Limits:
        """The limits within which images are accepted."""
        return parse_limits(self.max_pixels, self.allow_warnings)

    def policy(self, default: ViewPolicy) -> ViewPolicy:
        """The policy of the views: `default` with the values that this configuration sets."""
        return changed_policy(default, scale=self.scale, ratio=self.ratio, flip=self.flip, bicubic=self.bicubic)

    @property
    def flags(self) -> dict[str, Any]:
        """Every value by the name of its flag, without dashes: lr, rsd.kappa, squares.weight."""
        nested = {name: vars(value) for name, value in vars(self).items() if dataclasses.is_dataclass(value)}
        flat = {name: value for name, value in vars(self).items() if name not in (*nested, "own_options")}
        options = (nested | self.own_options).items()
        return flat | {f"{prefix}.{name}": value for prefix, values in options for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """Raises BadInput if the file was written by another version or edited."""
        return from_json(cls, values, "export the run with the version that wrote it, or train again")

    def differences(self, other: "TrainConfig") -> list[str]:
        """The values that a resumed run may not change, as "name: own value here, other's there"; epochs may grow.

        A user's file may have moved; only the names of the classes are compared.
        """
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
        free.add("allow_mismatch")
        free |= {"allow_warnings", "max_pixels"}  # the data's fingerprint covers the images they accept
        free |= {"online_teacher", "teacher_checkpoint"}  # the run records the teacher and the digest of its weights
        own, others = self._as_compared(), other._as_compared()
        if self.epochs is not None and other.epochs is not None and self.epochs > other.epochs:
            free.add("epochs")
        pairs: dict[str, tuple[Any, Any]] = {
            name: (own.get(name, "nothing"), others.get(name, "nothing")) for name in own | others
        }
        return [f"{name}: {a} here, {b} there" for name, (a, b) in pairs.items() if name not in free and a != b]

    def _as_compared(self) -> dict[str, Any]:
        """The flags as JSON gives them back, and the methods without the folders of their files."""
        names = "+".join(map(prefix_of, method_names(self.method)))
        return dict(json.loads(json.dumps({**self.flags, "method": names}, default=str)))


def check_method(method: str) -> None:
    """Raises BadInput for unknown or repeated names in a value of --method."""
    names = () if method == "scratch" else method_names(method)
    prefixes = [prefix_of(name) for name in names]
    for name, prefix in zip(names, prefixes, strict=True):
        if name not in BUILT_IN and not is_own(name):
            raise BadInput(
                f"method: expected some of {' '.join(BUILT_IN)}, joined by +, FILE.py:Name, or scratch alone, got "
                f"{method!r}"
            )
        if prefixes.count(prefix) > 1:
            remedy = f"; rename a class, since --{prefix}.weight sets an option of one" if is_own(name) else ""
            raise BadInput(f"method: expected each name once, got {method!r}{remedy}")
        if is_own(name) and prefix in {"config", *(field.name for field in dataclasses.fields(TrainConfig))}:
            raise BadInput(f"method {name}: expected another class name, --{prefix} is a flag of its own; rename it")


def _check_own(prefix: str, values: Any) -> None:
    """Raises BadInput unless the options of a method in a user's file can be stored as JSON and its weight is valid."""
    for name, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        if not all(v is None or isinstance(v, str) or (isinstance(v, int | float) and math.isfinite(v)) for v in parts):
            raise BadInput(f"{prefix}.{name}: expected finite numbers, text, true, false or None, got {value!r}")
        if name == "weight" and not (isinstance(value, int | float) and value >= 0):
            raise BadInput(f"{prefix}.weight: expected a number of at least 0, got {value!r}")
