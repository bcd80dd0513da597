"""The arguments of every command, parsed without torch, so that a typo is answered at once.

A command's help begins with its module's docstring; `train` has its arguments in config.py, as recipes fill them.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastofa.data.write_config import WriteConfig
from fastofa.runs.config import SECTIONS as train_sections
from fastofa.runs.config import TrainConfig, Weights, read_config
from fastofa.runs.quick_checks import RUN
from fastofa.runs.recipes import default_recipe, recipe
from fastofa.system.errors import BadInput, at_least
from fastofa.teacher.precompute_config import SECTIONS as precompute_sections
from fastofa.teacher.precompute_config import PrecomputeConfig


@dataclass(frozen=True)
class DemoConfig:
    """Teach a small CNN handwritten digits with a Transformer: teacher, cache, students, table, curves, export."""

    out: Path = Path("demo")
    """Folder for everything; an earlier demo in it is replaced."""


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
    json: Path | None = None
    """File for the same figures with the recall of each class and the confusion matrix."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        at_least(self, 0, "workers")


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
    onnx: bool = False
    """Write OUT/model.onnx, too: uint8 RGB pixels [batch, 3, size, size] -> logits, normalisation inside, opset 18. It
    needs the packages onnx and onnxscript (pip install 'fastofa[onnx]')."""


@dataclass(frozen=True)
class PredictConfig:
    """The most probable classes of images without labels, with their probabilities."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN|MODEL")]]
    """Folder that `fastofa train` or `fastofa export` wrote; also a folder of timm's, local-dir:FOLDER or
    hf-hub:OWNER/NAME."""
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")]]
    """Images, and folders of images, which are searched to any depth."""
    csv: Path | None = None
    """File for the predictions of all images. By default the first thousand are printed."""
    topk: int = 5
    """Classes for each image."""
    weights: Weights = "last"
    """Of a run: last, best, raw, ema, best-raw or best-ema, as for `fastofa evaluate`."""
    batch_size: int = 256
    """Images at once."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    workers: int | None = None
    """Decoding threads; by default one per core, at most 16."""
    skip_corrupt: bool = False
    """Exit with code 0 although some images could not be read. They are named in any case, all others predicted."""

    def __post_init__(self) -> None:
        at_least(self, 1, "topk", "batch_size")
        at_least(self, 0, "workers")


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


CONFIGS: dict[str, type] = {
    "demo": DemoConfig,
    "write": WriteConfig,
    "precompute": PrecomputeConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "predict": PredictConfig,
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
    if config not in DEFAULTS:
        return tyro.cli(config, args=argv, description="", prog=prog)
    form = _form(config, DEFAULTS[config](argv))
    flat = (tyro.conf.OmitArgPrefixes,)
    sections = vars(tyro.cli(form, args=argv, description="", prog=prog, config=flat)).values()
    values = {name: value for section in sections for name, value in vars(section).items()}
    return config(**{name: value for name, value in values.items() if name != FILE})


# --- Configurations from a file ---------------------------------------------------------------------------------------

FILE = "config"


def _train_defaults(argv: list[str]) -> dict[str, Any]:
    """Of the run to resume, of the file, or of the recipe that the arguments name or that suits their data."""
    run, file, out = _given(argv, "--resume"), _given(argv, f"--{FILE}"), _given(argv, "--out")
    if not run and not file:
        name = _given(argv, "--recipe")
        made = recipe(default_recipe(_given(argv, "--data") or "") if name is None else name)
        return vars(made(data=tyro.MISSING, student=tyro.MISSING, out=tyro.MISSING))
    _refuse_recipe(argv)
    if not run:
        assert file is not None
        return {**vars(read_config(TrainConfig, Path(file))), "resume": False, "plan": False}
    if file is not None:
        raise BadInput(f"config: expected none beside --resume {run}, which takes all from its own config.json")
    if out is not None and Path(out) != Path(run):
        raise BadInput(f"out: expected none beside --resume {run}, which goes on in its own folder, got {out}")
    if not (Path(run) / RUN).exists():
        raise BadInput(f"resume: expected a run made by `fastofa train`, found no {RUN} in {run}")
    return {**vars(read_config(TrainConfig, Path(run) / RUN)), "out": Path(run), "plan": False}


def _precompute_defaults(argv: list[str]) -> dict[str, Any]:
    """Of the file, else the configuration's own. Another cache needs another --out."""
    file = _given(argv, f"--{FILE}")
    if not file:
        return {}
    _refuse_recipe(argv)
    return {**vars(read_config(PrecomputeConfig, Path(file))), "out": tyro.MISSING}


def _refuse_recipe(argv: list[str]) -> None:
    """Raises BadInput: a recipe's name would change without its values."""
    if _given(argv, "--recipe") is not None:
        raise BadInput("recipe: expected none beside the configuration of a file; give the flags that are to change")


def _given(argv: list[str], flag: str) -> str | None:
    """The flag's last value as it stands in the arguments, empty if none follows; None without the flag."""
    found = None
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else "" if following.startswith("-") else following
    return found


DEFAULTS: dict[type, Callable[[list[str]], dict[str, Any]]] = {
    TrainConfig: _train_defaults,
    PrecomputeConfig: _precompute_defaults,
}


# --- What tyro sees ---------------------------------------------------------------------------------------------------

SECTIONS = {TrainConfig: train_sections, PrecomputeConfig: precompute_sections}
_FILE_HELP = (
    'Take the defaults from {}, a file with its "config" object, or that object alone. {}, and each flag changes one '
    'field. Relative paths begin at the file\'s "folder", or at the working directory if it names none.'
)
FILE_HELP = {
    TrainConfig: _FILE_HELP.format("a run's config.json", "--data, --student and --out then become optional"),
    PrecomputeConfig: _FILE_HELP.format(
        "a cache's cache.json, which says nothing of --device, --workers and other flags that leave the predictions "
        "alone",
        "Only --out is then required",
    ),
}


def _resumes(given: list[str]) -> bool:
    """--resume alone, or with the run's folder, which _train_defaults reads."""
    if len(given) > 1:
        raise ValueError(f"expected one run, got {' '.join(given)}")
    return True


_RESUME = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[RUN]",
    instance_from_str=_resumes,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda _: [],
)


def _form(config: type, defaults: dict[str, Any]) -> Any:
    """The flat configuration as tyro takes it: a nested dataclass for each section, since that makes a titled group."""
    sections: dict[str, list[Any]] = {}
    for field in dataclasses.fields(config):
        hint, default = config.__annotations__[field.name], defaults.get(field.name, field.default)
        if field.name in SECTIONS[config]:
            fields = sections[SECTIONS[config][field.name]] = []
        if field.name == "resume":
            hint = Annotated[object, _RESUME, dataclasses.replace(hint.__metadata__[0], help_behavior_hint="")]
        needed = default is tyro.MISSING or default is dataclasses.MISSING
        fields.append((field.name, hint, dataclasses.field() if needed else dataclasses.field(default=default)))
    file = tyro.conf.arg(help=FILE_HELP[config], metavar="FILE", help_behavior_hint="")
    next(iter(sections.values())).append((FILE, Annotated[Path | None, file], dataclasses.field(default=None)))
    return _dataclass(
        (f"section_{number}", Annotated[_dataclass(fields), tyro.conf.arg(name=title, help="")])
        for number, (title, fields) in enumerate(sections.items())
    )


def _dataclass(fields: Iterable[Any]) -> Any:
    return dataclasses.make_dataclass("Section", fields, kw_only=True)


def _docstring(command: str) -> str:
    """Of the command's module, which is not imported: that takes seconds."""
    spec = find_spec(f"fastofa.commands.{command}")
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
