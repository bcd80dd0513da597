"""Read and check config.json from a model's folder, as `fastofa export` and timm write it.

Such a folder may come from an untrusted source. Only the architecture, arguments of the architecture's own class, known
preprocessing settings and the class names are used, and every value is checked.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput
from fastofa.system.files import read_json

CHANNELS = 3  # RGB
MAX_SIDE, MAX_CLASSES = 2048, 200_000
# Limits in model_args: of a number, of a number of layers, of the length of a list.
MAX_NUMBER, MAX_LAYERS, MAX_LENGTH = 16_384, 256, 64
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random")
# Arguments of timm.create_model itself, not of an architecture; they load, download or wrap.
NOT_ARCHITECTURE = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict",
    "pretrained_filter_fn", "checkpoint_path", "cache_dir", "features_only", "feature_cfg", "scriptable", "exportable",
    "no_jit", "device", "dtype", "model_cfg", "cfg", "num_classes", "self", "kwargs",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The checked contents of a config.json."""

    path: Path
    architecture: str
    num_classes: int
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model besides the name and the number of classes."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """The values of RULES that the file contains."""
    label_names: dict[int, str] = field(default_factory=dict)
    """Class name by output index; empty if the file names none."""
    label_descriptions: dict[str, str] = field(default_factory=dict)
    """Description by class name."""


def read_model_config(path: Path) -> ModelConfig:
    """Read a config.json. Raises BadInput if it is missing, not a model configuration, or has impossible values."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected timm's model configuration, got {type(values).__name__}")
    if "pretrained_cfg" not in values and "input_size" in values:  # old versions of timm wrote everything on one level
        values = {**values, "pretrained_cfg": values, "label_names": values.get("label_names", values.get("labels"))}
    if missing := [name for name in ("architecture", "num_classes", "pretrained_cfg") if name not in values]:
        raise BadInput(f"{path}: expected timm's model configuration, but {missing[0]!r} is missing")
    settings = values["pretrained_cfg"]

    def need(valid: bool, name: str, value: Any, expected: str) -> None:
        if not valid:
            raise BadInput(f"{path}: expected {name} to be {expected}, got {_short(value)}")

    architecture, num_classes = values["architecture"], values["num_classes"]
    need(isinstance(architecture, str), "architecture", architecture, "a timm model's name")
    need(_whole(num_classes, 0, MAX_CLASSES), "num_classes", num_classes, f"0 to {MAX_CLASSES:,}")
    need(isinstance(settings, dict), "pretrained_cfg", settings, "an object")
    arguments = values.get("model_args") or {}
    need(isinstance(arguments, dict), "model_args", arguments, "an object")
    arguments = {
        key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items() if key != "num_classes"
    }  # num_classes is also a field of its own
    for key, value in arguments.items():
        largest = MAX_LAYERS if "depth" in key or "layers" in key else MAX_SIDE if "size" in key else MAX_NUMBER
        need(_simple(value, largest), f"model_args {key!r}", value, f"a word or numbers up to {largest:,}")

    preprocessing = {key: settings[key] for key in RULES if settings.get(key) is not None}
    channels: Any = arguments.get("in_chans", preprocessing.get("input_size"))
    channels = channels[0] if isinstance(channels, list) and channels else channels
    if channels != CHANNELS and _whole(channels, 1, MAX_NUMBER):
        raise BadInput(channels_message(str(path), channels))
    for key, value in preprocessing.items():
        is_valid, expected = RULES[key]
        need(is_valid(value), key, value, expected)
    preprocessing = {key: tuple(v) if isinstance(v, list) else v for key, v in preprocessing.items()}

    names = values.get("label_names") or settings.get("label_names") or {}
    named = isinstance(names, list | dict)
    need(named, "label_names", names, "a list, or an object from output to name")
    if isinstance(names, list):
        need(len(names) == num_classes, "label_names", f"{len(names):,}", f"{num_classes:,} names, one per class")
        names = dict(enumerate(names))
    wrong = [k for k in names if not (str(k).isdecimal() and len(str(k)) < 9 and int(k) < num_classes)]
    need(not wrong, "label_names", wrong[:1], f"of outputs below {num_classes:,}")
    need(all(isinstance(name, str) for name in names.values()), "label_names", names, "words")
    descriptions = values.get("label_descriptions") or settings.get("label_descriptions") or {}
    need(
        isinstance(descriptions, dict) and all(isinstance(v, str) for v in descriptions.values()),
        "label_descriptions",
        descriptions,
        "an object of words",
    )
    label_names = {int(k): name for k, name in names.items()}
    return ModelConfig(path, architecture, num_classes, arguments, preprocessing, label_names, descriptions)


def check_arguments(config: ModelConfig, model_class: type) -> None:
    """Raises BadInput unless every argument is a parameter of the architecture's class."""
    known = inspect.signature(model_class).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())  # passed on to the configuration of its layers
    for key in config.arguments:
        if key in NOT_ARCHITECTURE or not (key in known or takes_any):
            raise BadInput(
                f"{config.path}: expected model_args of the architecture {config.architecture}, got {key!r}; remove it"
            )


def channels_message(what: str, channels: int) -> str:
    return (
        f"{what}: expected a model for images of {CHANNELS} channels, because fastofa reads every image as RGB, got "
        f"one for {channels} channel{'s' * (channels != 1)}; choose or train another model"
    )


def _whole(value: Any, smallest: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _are_numbers(values: Any, smallest: float = -math.inf, largest: float = math.inf) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and smallest <= v <= largest for v in values
    )


def _simple(value: Any, largest: int) -> bool:
    """Whether it is a number within bounds, a bool, a word, or a short list of these."""
    if isinstance(value, list | tuple):
        return len(value) <= MAX_LENGTH and all(_simple(v, largest) and not isinstance(v, list) for v in value)
    if isinstance(value, str):
        return re.fullmatch(r"\w{0,64}", value, re.ASCII) is not None
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= largest)


def _is_input_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_whole(v, 1, MAX_SIDE) for v in value)


_SIDES: tuple[Callable[[Any], bool], str] = (
    lambda v: _is_input_size(v) and v[1] == v[2],
    f"[3, side, side] with a side of 1 to {MAX_SIDE:,} pixels",
)
_SHARE: tuple[Callable[[Any], bool], str] = (lambda v: _are_numbers([v], 0.05, 2), "a number from 0.05 to 2")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": _SIDES,
    "test_input_size": _SIDES,
    "mean": (lambda v: _are_numbers(v, 0, 1) and len(v) == CHANNELS, "three numbers from 0 to 1"),
    "std": (lambda v: _are_numbers(v, 1e-3, 10) and len(v) == CHANNELS, "three numbers from 0.001 to 10"),
    "crop_pct": _SHARE,
    "test_crop_pct": _SHARE,
    "interpolation": (lambda v: isinstance(v, str) and v in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
