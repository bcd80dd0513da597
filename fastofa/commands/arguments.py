"""The arguments of every command, parsed without torch, so that a typo is reported at once.

A command's help begins with the docstring of its module. The arguments of `train` are defined in runs/config.py, those
of `precompute` in teacher/precompute_config.py, and those of `write` in data/write_config.py.
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
from typing import Annotated, Any, Literal, cast, get_type_hints

import tyro

from fastofa.data.write_config import WriteConfig
from fastofa.methods.options import BUILT_IN, own_methods
from fastofa.runs.config import SECTIONS as train_sections
from fastofa.runs.config import USED_BY, TrainConfig, Weights, check_method
from fastofa.runs.config_file import from_json, read_config
from fastofa.runs.quick_checks import RUN
from fastofa.runs.recipes import default_recipe, recipe
from fastofa.system.errors import BadInput, at_least
from fastofa.system.urls import is_url, refuse_url
from fastofa.teacher.precompute_config import SECTIONS as precompute_sections
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


def parse(command: str, argv: list[str]) -> Any:
    """The command's configuration. Exits after --help, and with code 2 for unknown or missing arguments.

    Raises:
        BadInput: a value is invalid, or a URL where the command expects a path.
    """
    _refuse_urls(command, argv)  # before --resume and --config are read
    config = _parsed(command, argv)
    for name, value in vars(config).items():
        if isinstance(value, Path):  # from a file; as a path, its URL has lost a slash
            value = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(value), flags=re.IGNORECASE)
        if isinstance(value, str) and not _takes_url(command, name, value):
            refuse_url(name.replace("_", "-"), value)
    return config


# Flags that accept URLs; `cache push` and `cache pull` check their own.
URLS = {("train", "cache"), *((command, "data") for command in ("train", "precompute", "evaluate", "cka"))}


def _takes_url(command: str, name: str, value: str) -> bool:
    """Whether the value is a URL, and not only contains one, as cifar100:URL, and the flag accepts URLs."""
    return is_url(value) and (command, name) in URLS


def _refuse_urls(command: str, argv: list[str]) -> None:
    for previous, argument in pairwise(["", *argv]):
        flag, _, value = argument.partition("=") if argument.startswith("-") else (previous, "", argument)
        name = flag.lstrip("-") if flag.startswith("-") else ""
        if command != "cache" and not _takes_url(command, name, value):
            refuse_url(name, argument)


def _parsed(command: str, argv: list[str]) -> Any:
    config, prog = CONFIGS[command], f"fastofa {command}"
    _give_help(config)
    if {"-h", "--help"} & set(argv):
        print(_wrapped(_docstring(command), shutil.get_terminal_size().columns), end="\n\n")
        if config is CacheConfig:  # `cache push --help` would leave the actions out of the usage
            argv = ["--help"]
    if config not in DEFAULTS:
        return tyro.cli(config, args=argv, description="", prog=prog)
    argv = _joined(argv, "--teacher")
    defaults = DEFAULTS[config](argv)
    own = _own_forms(_flag_value(argv, "--method"), defaults) if config is TrainConfig else {}
    flat = (tyro.conf.OmitArgPrefixes,)
    sections = vars(tyro.cli(_form(config, defaults, own), args=argv, description="", prog=prog, config=flat)).values()
    values = {name: value for section in sections for name, value in vars(section).items() if name != FILE}
    if config is TrainConfig:
        values["own_options"] = {prefix: vars(values.pop(prefix)) for prefix in own}
    parsed = config(**values)
    if config is TrainConfig:
        _refuse_unused(argv, parsed)
    return parsed


# --- Configurations from a file ---------------------------------------------------------------------------------------

FILE = "config"


def _train_defaults(argv: list[str]) -> dict[str, Any]:
    """The values of the run to resume, of the --config file, or of the recipe: the named one, or the default for the
    data."""
    run, file, out = _flag_value(argv, "--resume"), _flag_value(argv, f"--{FILE}"), _flag_value(argv, "--out")
    if not run and not file:
        name = _flag_value(argv, "--recipe")
        of_recipe = recipe(default_recipe(_flag_value(argv, "--data") or "") if name is None else name)
        return vars(of_recipe(data=tyro.MISSING, student=tyro.MISSING, out=tyro.MISSING))
    _refuse_recipe(argv)
    if not run:
        assert file is not None
        return {**vars(read_config(TrainConfig, Path(file))), "resume": False, "plan": False}
    if file is not None:
        raise BadInput(
            f"config: expected none with --resume {run}, which takes its configuration from {run}/{RUN}; leave it out"
        )
    if out is not None and Path(out) != Path(run):
        raise BadInput(f"out: expected none with --resume {run}, which continues in {run}, got {out}; leave it out")
    if not (Path(run) / RUN).exists():
        raise BadInput(f"resume: expected a run made by `fastofa train`, found no {RUN} in {run}")
    return {**vars(read_config(TrainConfig, Path(run) / RUN)), "out": Path(run), "plan": False}


def _precompute_defaults(argv: list[str]) -> dict[str, Any]:
    """The values of the --config file except --out, which must differ; empty without a file."""
    file = _flag_value(argv, f"--{FILE}")
    if not file:
        return {}
    _refuse_recipe(argv)
    return {**vars(read_config(PrecomputeConfig, Path(file))), "out": tyro.MISSING}


def _refuse_recipe(argv: list[str]) -> None:
    """Raises BadInput for --recipe, which would change the recipe's name but not the values from the file."""
    if _flag_value(argv, "--recipe") is not None:
        raise BadInput("recipe: expected none with a configuration from a file; give only the flags that change")


def _flag_value(argv: list[str], flag: str) -> str | None:
    """The flag's last value in the arguments, empty if it has no value; None if the flag is absent."""
    last = None
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name == flag:
            last = value if equals else "" if following.startswith("-") else following
    return last


def _own_forms(method: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """For each method of a user's file in `method`, by the prefix of its options: a dataclass with the flags of its
    options, and their default values.

    Such a file is run here, which imports torch.
    """
    method = method or defaults["method"]
    own, forms = own_methods(method), dict[str, Any]()
    if not own:
        return forms
    from fastofa.methods.find_method import method_class, option_types, own_options

    check_method(method)
    for prefix, name in own.items():
        known = defaults["own_options"].get(prefix, {})
        options, types = dataclasses.asdict(own_options(name, known)), option_types(name)
        docs = _field_docs(method_class(name).Options)
        form = _dataclass(
            (field, Annotated[hint, tyro.conf.arg(name=f"{prefix}.{field}", help=docs.get(field))], dataclasses.field())
            for field, hint in types.items()
        )
        form.__doc__ = (inspect.getdoc(method_class(name)) or "").partition("\n\n")[0]
        forms[prefix] = from_json(form, options, "correct the file of the configuration")
    return forms


def _refuse_unused(argv: list[str], config: TrainConfig) -> None:
    """Raises BadInput for a flag that no chosen method uses. Values from a recipe or a file may be unused."""
    for argument in argv:
        flag = argument.partition("=")[0].removeprefix("--")
        name = flag.replace("-", "_").partition(".")[0]
        users = (name,) if name in BUILT_IN else USED_BY.get(name, ())
        if argument.startswith("--") and users and not {*users} & {*config.methods}:
            raise BadInput(
                f"{flag}: expected only with --method {' or '.join(users)}, which uses it, but got --method "
                f"{config.method}; leave it out"
            )


def _joined(argv: list[str], flag: str) -> list[str]:
    """The arguments with a repeated flag given once, with all its values: `--teacher a --teacher b` as `--teacher a b`.
    Of other flags, tyro takes the last."""
    values, others, taking = [], [], False
    for argument in argv:
        name, equals, value = argument.partition("=")
        taking = name == flag if argument.startswith("--") else taking
        if not taking:
            others.append(argument)
        elif argument != flag:
            values.append(value if equals and name == flag else argument)
    return [*others, flag, *values] if flag in (argument.partition("=")[0] for argument in argv) else argv


DEFAULTS: dict[type, Callable[[list[str]], dict[str, Any]]] = {
    TrainConfig: _train_defaults,
    PrecomputeConfig: _precompute_defaults,
}


# --- What tyro sees ---------------------------------------------------------------------------------------------------

SECTIONS = {TrainConfig: train_sections, PrecomputeConfig: precompute_sections}
_FILE_HELP = (
    'Take the defaults from {}, or from a file with only its "config" object. {}; flags override single fields. '
    'Relative paths are relative to the file\'s "folder", or to the working directory if it names none.'
)
FILE_HELP = {
    TrainConfig: _FILE_HELP.format("a run's config.json", "--data, --student and --out then become optional"),
    PrecomputeConfig: _FILE_HELP.format(
        "a cache's cache.json (without --device, --workers and other flags that do not change the predictions)",
        "Only --out is then required",
    ),
}


def _resumes(values: list[str]) -> bool:
    """Parse --resume, alone or with the run's folder, which `_train_defaults` reads."""
    if len(values) > 1:
        raise ValueError(f"expected one run, got {' '.join(values)}")
    return True


_RESUME = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[RUN]",
    instance_from_str=_resumes,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda _: [],
)


def _form(config: type, defaults: dict[str, Any], own: dict[str, Any]) -> Any:
    """The flat configuration as a dataclass with one nested dataclass per section, which tyro prints as a titled
    group.

    Args:
        own: for each method of a user's file, an instance of a dataclass with its options, in place of `own_options`.
    """
    sections: dict[str, list[Any]] = {}
    for field in dataclasses.fields(config):
        hint, default = config.__annotations__[field.name], defaults.get(field.name, field.default)
        if field.name in SECTIONS[config]:
            fields = sections[SECTIONS[config][field.name]] = []
        if field.name == "own_options":
            fields += [(prefix, type(form), dataclasses.field(default=form)) for prefix, form in own.items()]
            continue
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
    return dataclasses.make_dataclass("Section", fields, kw_only=True, frozen=True)


def _docstring(command: str) -> str:
    """The docstring of the command's module, without importing the module, which takes seconds."""
    spec = find_spec(f"fastofa.commands.{command}")
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""


def _wrapped(text: str, width: int) -> str:
    """Wrap the paragraphs. Indented lines are commands with descriptions, which move below the commands if too long."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith(" "):
            lines += textwrap.wrap(paragraph, width)
        elif max(map(len, paragraph.splitlines())) <= width:
            lines.append(paragraph)
        else:
            for line in paragraph.splitlines():
                command, *description = re.split(" {3,}", line.strip())
                lines.append(f"    {command}")
                lines += textwrap.wrap(" ".join(description), width, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines[:-1])


@cache
def _give_help(config: type, prefix: str = "") -> None:
    """Give tyro the fields' docstrings without line breaks, and hide a default of None that the docstring explains.

    The flags of options within options get their group's name as a prefix.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, nested in get_type_hints(config).items():
        if dataclasses.is_dataclass(nested):
            _give_help(cast(type, nested), f"{name}.")
    for name, text in _field_docs(config).items():
        explained = defaults[name] is None and re.search("by default|default:", text, re.IGNORECASE)
        hint = (lambda default: "" if default == "None" else f"(default: {default})") if explained else None
        given = f"{prefix}{name}" if prefix else None
        argument = tyro.conf.arg(name=given, help=text, help_behavior_hint=hint)
        config.__annotations__[name] = Annotated[config.__annotations__[name], argument]


def _field_docs(config: type) -> dict[str, str]:
    """The docstring of each field that has one, without line breaks."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    docs = {}
    for field, doc in pairwise(getattr(body, "body", ())):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs
