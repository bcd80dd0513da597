"""The arguments of every command, parsed without torch, so that a typo is answered at once.

A command's help begins with its module's docstring; `train` has its arguments in config.py, as recipes fill them.
"""

import ast
import dataclasses
import inspect
import math
import re
import shutil
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastofa.config import MOST_EPOCHS, TrainConfig, Weights, changed_policy
from fastofa.errors import BadInput
from fastofa.image_headers import Limits, given_limits
from fastofa.recipes import default_policy, default_recipe, recipe
from fastofa.views import ViewPolicy

FLAGS = {".pack": ("size",), ".beton": ("max_size", "quality", "raw")}  # of `write`, by the form that takes them


@dataclass(frozen=True)
class DemoConfig:
    """Teach a small CNN handwritten digits with a Transformer: teacher, cache, students, table, curves, export."""

    out: Path = Path("demo")
    """Folder for everything; an earlier demo in it is replaced."""


@dataclass(frozen=True)
class WriteConfig:
    """Write a data set as a .pack (pixels of one size) or as a .beton (FFCV's format), both splits."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Data set: a folder with train/ and val/, or any other that --data takes."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Where to: NAME.pack, a folder, or NAME.beton, with NAME.val.beton and NAME.beton.safetensors
    beside it."""
    size: int | None = None
    """.pack: side in pixels, a multiple of 8 from 32 to 512, by default 256. The whole picture is squeezed to a square;
    its crops have their shape again."""
    max_size: int | None = None
    """.beton: the longer side in pixels at most; larger pictures are made smaller. By default all stay as they are."""
    quality: int | None = None
    """.beton: compress every picture at this JPEG quality, 1 to 100. By default JPEGs keep their bytes where nothing is
    to change; others get 95."""
    raw: bool = False
    """.beton: pixels instead of JPEGs: larger, and faster to read."""
    skip_corrupt: bool = False
    """Decode every file first, list the unreadable ones and leave them out for good."""
    allow_warnings: bool = False
    """Take images that decode with signs of damage, too, as they decode."""
    max_pixels: float = 200
    """Millions of pixels of an image at most, by its header; larger ones are unreadable."""
    verify: bool = False
    """Compare every byte with the checksums and decode every picture; where OUT is there already, write nothing."""
    workers: int | None = None
    """Threads that decode; by default one per core, at most 16."""

    def __post_init__(self) -> None:
        if self.out.suffix not in FLAGS:
            raise BadInput(f"OUT: expected a name ending in {' or '.join(FLAGS)}, got {self.out}")
        (other,) = FLAGS.keys() - {self.out.suffix}
        for name in FLAGS[other]:
            if not (getattr(self, name) is None or getattr(self, name) is False):  # 0 was given
                raise BadInput(f"--{name.replace('_', '-')}: expected OUT{other}, got {self.out}")
        if self.size is not None and (self.size % 8 or not 32 <= self.size <= 512):
            raise BadInput(f"size: expected a multiple of 8 from 32 to 512, got {self.size}")
        self.limits()
        if self.max_size is not None and self.max_size < 1:
            raise BadInput(f"max-size: expected at least 1 pixel, got {self.max_size}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise BadInput(f"quality: expected 1 to 100, got {self.quality}")
        if self.quality is not None and self.raw:
            raise BadInput(f"quality: expected none with --raw, whose pixels are not compressed, got {self.quality}")
        _at_least(self, 1, "workers")

    def limits(self) -> Limits:
        """Which images are taken."""
        return given_limits(self.max_pixels, self.allow_warnings)


@dataclass(frozen=True)
class PrecomputeConfig:
    """Write a teacher cache: V views of the training set, each with the teacher's top-K answer for every picture."""

    data: str
    """Data set: digits, digits:N, cifar100:DIR, a folder with train/ and val/, or what `fastofa write` wrote."""
    teacher: str
    """A timm model with its tag (convnext_tiny.in12k_ft_in1k), a folder that `fastofa train`, `fastofa export` or timm
    wrote, or hf-hub:OWNER/NAME. Its classes are matched with the data's by name."""
    out: Path
    """Folder of the cache."""
    views: int
    """Views of the training set. An epoch replays view (epoch modulo views): one for each is best, fewer are small.
    More can be added later; fewer than the cache holds changes nothing."""
    topk: int
    """Classes kept of each answer, at 4 bytes a class. The mass they leave is spread over the other classes."""
    teacher_checkpoint: Path | None = None
    """The teacher's weights from a .safetensors or .pth file instead of timm's. A config.json beside it, if of the same
    architecture, gives normalisation, input size and names of classes."""
    teacher_checkpoint_key: str | None = None
    """Which weights of that file, where it holds several: model, say, or model_ema. By default an average's; a line
    says which."""
    image_size: int | None = None
    """Side of the teacher's input in pixels; by default its own."""
    mean: tuple[float, float, float] | None = None
    """Normalisation of the teacher's pixels; by default its own."""
    std: tuple[float, float, float] | None = None
    """Normalisation of the teacher's pixels; by default its own."""
    scale: tuple[float, float] | None = None
    """Share of the picture's area that a crop takes, from and to. By default 0.08 1 (digits: 0.6 1)."""
    ratio: tuple[float, float] | None = None
    """Width over height of a crop, from and to. By default 3/4 to 4/3."""
    flip: float | None = None
    """Probability of mirroring. By default 0.5 (digits: 0)."""
    recipe: str = ""
    """The training recipe whose published views are drawn; the flags above and the next five change them."""
    auto_augment: str | None = None
    """RandAugment in timm's notation, as rand-m9-mstd0.5-inc1. By default the recipe's, or none."""
    mixup: float | None = None
    """Alpha of mixup. By default the recipe's, or 0: none."""
    cutmix: float | None = None
    """Alpha of cutmix. By default the recipe's, or 0: none."""
    erase: float | None = None
    """Probability of random erasing. By default the recipe's, or 0."""
    repeats: int | None = None
    """Views of a sample that one epoch shows. By default the recipe's, or 1."""
    seed: int = 0
    """Of the views."""
    skip_corrupt: bool = False
    """Decode every file first, list the unreadable ones and leave them out for good. Without it they are refused."""
    allow_warnings: bool = False
    """Take images that decode with signs of damage, too, as they decode."""
    max_pixels: float = 200
    """Millions of pixels of an image at most, by its header; larger ones are unreadable."""
    batch_size: int = 256
    """Pictures the teacher sees at once."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the teacher's arithmetic; log-softmax is always fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    pipeline: str = "auto"
    """resident, packed, ffcv, dali, torchvision, or auto, which says what it takes and why."""
    workers: int | None = None
    """Decoding processes of the torchvision pipeline, threads of others; by default one per core, at most 16."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "views", "topk", "batch_size")
        _at_least(self, 0, "workers")
        if self.views > MOST_EPOCHS:
            raise BadInput(f"views: expected at most {MOST_EPOCHS:,}, got {self.views}")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed: expected a number from 0 to 2^63 - 1, got {self.seed}")
        if self.image_size is not None and self.image_size < 1:
            raise BadInput(f"image-size: expected at least 1 pixel, got {self.image_size}")
        if self.teacher_checkpoint_key is not None and self.teacher_checkpoint is None:
            raise BadInput("teacher-checkpoint-key: expected --teacher-checkpoint with it")
        if (self.mean is None) != (self.std is None):
            raise BadInput("expected both --mean and --std or neither")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise BadInput(f"std: expected three numbers above 0, got {self.std}")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise BadInput(f"mean: expected three numbers, got {self.mean}")
        self.limits()
        if self.recipe:
            recipe(self.recipe)

    def limits(self) -> Limits:
        """Which images are taken."""
        return given_limits(self.max_pixels, self.allow_warnings)

    def policy(self) -> ViewPolicy:
        """What to draw. Raises BadInput for impossible values."""
        names = ("scale", "ratio", "flip", "auto_augment", "mixup", "cutmix", "erase", "repeats")
        given = {name: getattr(self, name) for name in names}
        policy = changed_policy(default_policy(self.data, self.recipe), **given)
        if self.views % policy.repeats:
            raise BadInput(
                f"views: expected a multiple of {policy.repeats}, as repeated augmentation shows them, got {self.views}"
            )
        return policy


@dataclass(frozen=True)
class EvaluateConfig:
    """Top-1, top-5 and agreement with the teacher, also written to RUN/evaluation.json."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder that `fastofa train` wrote."""
    data: str | None = None
    """Data set whose validation split is used. By default the one that the run was trained on."""
    weights: Weights = "last"
    """last: as they are at the end (or where the run is); best: as they were at the run's best evaluation, which
    flatters if it is the same data again. Of a run with --ema both take the weights or their average, whichever had the
    better top-1 in the run; raw, ema, best-raw and best-ema say which."""
    batch_size: int = 256
    """Images at once."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    pipeline: str = "auto"
    """resident, packed, ffcv, dali, torchvision, or auto, which says what it takes and why."""
    workers: int | None = None
    """Decoding processes of the torchvision pipeline, threads of others; by default one per core, at most 16."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size")
        _at_least(self, 0, "workers")


@dataclass(frozen=True)
class ExportConfig:
    """OUT/model.safetensors and OUT/config.json, for timm.create_model and for `fastofa precompute --teacher OUT`."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder that `fastofa train` wrote."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """New folder for the model."""
    weights: Weights = "last"
    """last: as they are at the end; best: as they were at the run's best evaluation. Of a run with --ema both take the
    weights or their average, whichever had the better top-1 in the run; raw, ema, best-raw and best-ema say which."""


@dataclass(frozen=True)
class CacheConfig:
    """info: what the cache was made from. verify: read every finished table, compare its checksum, check its values."""

    action: tyro.conf.Positional[Literal["info", "verify"]]
    """What to do."""
    cache: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CACHE")]]
    """Folder that `fastofa precompute` wrote."""


@dataclass(frozen=True)
class DoctorConfig:
    """List what makes fastofa faster, whether it works here, and how to get what is missing. All is optional."""


def _at_least(config: Any, least: int, *names: str) -> None:
    """Raises BadInput for a number below it; None, and what is left open while tyro parses, passes."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int) and value < least:
            raise BadInput(f"{name.replace('_', '-')}: expected at least {least}, got {value}")


CONFIGS: dict[str, type] = {
    "demo": DemoConfig,
    "write": WriteConfig,
    "precompute": PrecomputeConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "cache": CacheConfig,
    "doctor": DoctorConfig,
}


def parse(command: str, argv: list[str]) -> Any:
    """The command's configuration. Ends the process after --help, and with code 2 after arguments it does not have.

    Raises:
        BadInput: a value that cannot be.
    """
    config, prog = CONFIGS[command], f"fastofa {command}"
    _give_help(config)
    if {"-h", "--help"} & set(argv):
        print(_wrapped(_docstring(command), shutil.get_terminal_size().columns), end="\n\n")
    if command == "train":
        return tyro.cli(config, args=argv, description="", prog=prog, default=_recipe_defaults(argv))
    return tyro.cli(config, args=argv, description="", prog=prog)


def _docstring(command: str) -> str:
    """Of the command's module, which is not imported: that takes seconds."""
    spec = find_spec(f"fastofa.{command}")
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""


def _wrapped(text: str, width: int) -> str:
    """Paragraphs wrapped; an indented line is a command and what it does, which goes below it where it has no room."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith(" "):
            lines += textwrap.wrap(paragraph, width)
        elif max(map(len, paragraph.splitlines())) <= width:
            lines.append(paragraph)
        else:
            for line in paragraph.splitlines():
                command, *what = re.split(" {3,}", line.strip())
                lines.append(f"    {command}")
                lines += textwrap.wrap(" ".join(what), width, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines[:-1])


@cache
def _give_help(config: type) -> None:
    """Gives tyro the fields' docstrings as text that flows: it would keep their line breaks, and say twice of None what
    the docstring says it means."""
    (body,) = ast.parse(inspect.getsource(config)).body
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field, doc in pairwise(getattr(body, "body", ())):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                told = defaults[name] is None and "by default" in text.lower()
                hint = (lambda default: "" if default == "None" else f"(default: {default})") if told else None
                flowing = tyro.conf.arg(help=" ".join(text.split()), help_behavior_hint=hint)
                config.__annotations__[name] = Annotated[config.__annotations__[name], flowing]


def _recipe_defaults(argv: list[str]) -> TrainConfig:
    """Of the recipe that the arguments name, or that suits their data. Raises BadInput for an unknown recipe."""
    given = {"--recipe": "", "--data": ""}
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in given:
            given[flag] = value if equals else following
    named = any(argument.partition("=")[0] == "--recipe" for argument in argv)
    name = given["--recipe"] if named else default_recipe(given["--data"])
    return recipe(name)(data=tyro.MISSING, student=tyro.MISSING, out=tyro.MISSING)
