"""Configurations as JSON files: config.json of a run, cache.json of a cache, and the file of --config.

A configuration is a frozen dataclass. Its fields' types decide which values a file may contain.
"""

import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fastofa.methods.options import FitNetOptions, is_own, method_names, own_methods
from fastofa.system.errors import BadInput
from fastofa.system.read import read_json

# Fields that may contain a path, each with the value that is not one.
BUILT_IN = {"data": "digits", "init": "pretrained", "teacher": "", "online_teacher": "", "cache": ""}
# Fields that files of earlier versions lack, each with what those versions did.
LATER: dict[str, Any] = {
    "bicubic": 0.0,
    "eval_interpolation": "bilinear",
    "lr_updates": "step",
    "decay_embeddings": False,
    "online_teacher": None,
    "teacher_checkpoint": None,
    "fitnet": dataclasses.asdict(FitNetOptions()),
    "allow_mismatch": "none",
    "first_view": 0,
    "teacher_weights": None,
    "keep_each": False,
}
# The field whose objects a file contains beside the fields: {"lr": 0.1, "squares": {"weight": 2.0}}.
OWN = "own_options"
MAX_NAMED = 8  # maximum number of fields named in an error
Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration's fields for a JSON file; paths become text."""
    values: dict[str, Any] = dataclasses.asdict(config)
    own = values.pop(OWN, {})
    return {key: str(v) if isinstance(v, Path) else v for key, v in values.items()} | own


def from_json(cls: type[Config], values: Any, remedy: str) -> Config:
    """The configuration that `to_json` wrote. Raises BadInput for different fields (with `remedy`) or types."""
    if not isinstance(values, dict):
        raise BadInput(f"expected an object as config, got {_text(values)}")
    hints = get_type_hints(cls)
    values = {**{name: value for name, value in LATER.items() if name in hints}, **values}
    own: dict[str, Any] = {}
    if hints.pop(OWN, None):
        options = {name: values.pop(name) for name in own_methods(str(values.get("method"))) if name in values}
        own = {OWN: {name: _own_options(name, each) for name, each in options.items()}}
    if different := sorted(set(values) ^ set(hints)):
        named = [_text(name).strip('"') for name in different[:MAX_NAMED]] + ["..."] * (len(different) > MAX_NAMED)
        raise BadInput(
            f"expected the fields of this version of fastofa, but these differ: {', '.join(named)}; {remedy}"
        )
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            raise BadInput(
                f"expected {_words(hint)} as {name}, got {_text(values[name])}; it was edited or damaged, restore its "
                "value"
            )
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            try:
                fields[name] = from_json(cast(type, hint), fields[name], remedy)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from None
    paths = {k: Path(v) for k, v in fields.items() if v is not None and _is_path(hints[k])}
    return cls(**{**fields, **paths, **own})


def read_config(cls: type[Config], file: Path) -> Config:
    """The configuration in a JSON file: its "config" object, or the whole file if it has none.

    Relative paths are relative to the file's "folder", or to the working directory if it names none.

    Raises:
        BadInput: the file cannot be read or is not such a configuration.
    """
    values, folder = read_json(file), ""
    if isinstance(values, dict) and "config" in values:
        values, folder = values["config"], values.get("folder", "")
    try:
        if not isinstance(folder, str):
            raise BadInput(f"expected text as folder, got {_text(folder)}; correct or remove it")
        config = from_json(cls, values, "give a file that this version wrote")
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    return in_folder(config, folder)


def in_folder(config: Config, folder: str) -> Config:
    """The configuration with its relative paths joined to `folder`, unless that is the working directory or ""."""
    if Path(folder) in (Path(), Path.cwd()):
        return config
    hints, fields, cls = get_type_hints(type(config)), vars(config), type(config)
    paths = {k: Path(folder, v) for k, v in fields.items() if v is not None and _is_path(hints[k])}
    names = {k: _in_folder(folder, fields[k], built_in) for k, built_in in BUILT_IN.items() if fields.get(k)}
    if "method" in fields:
        names["method"] = "+".join(_method_from(folder, name) for name in method_names(fields["method"]))
    return cls(**{**fields, **paths, **names})


def _method_from(folder: str, name: str) -> str:
    """The method's name; the relative path of a user's file is joined to `folder`."""
    path, _, kind = name.rpartition(":")
    return f"{from_folder(folder, path, '')}:{kind}" if is_own(name) else name


def _own_options(name: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise BadInput(
            f"expected an object as {name}, got {_text(values)}; it was edited or damaged, restore its value"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def from_folder(folder: str, name: str, built_in: str) -> str:
    """The name of a dataset, model or weights file; if it is a relative path, it is joined to `folder`.

    A name that does not exist as a path there is returned unchanged.
    """
    kind = next((kind for kind in ("cifar100:", "local-dir:") if name.startswith(kind)), "")
    path = Path(folder, name.removeprefix(kind))
    return f"{kind}{path}" if name.partition(":")[0] != built_in and path.exists() else name


def _in_folder(folder: str, names: str | tuple[str, ...], built_in: str) -> str | tuple[str, ...]:
    """`from_folder` of one name or several."""
    if isinstance(names, str):
        return from_folder(folder, names, built_in)
    return tuple(from_folder(folder, name, built_in) for name in names)


def _is_path(hint: Any) -> bool:
    return hint is Path or Path in get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has this type. In JSON, paths are strings, tuples are lists, and a float may be an
    integer."""
    parts = get_args(hint)
    if dataclasses.is_dataclass(hint):
        return True  # `from_json` checks its fields
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # the configuration checks its value
    if get_origin(hint) in (UnionType, Union):
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
    """A type in words."""
    names = {
        str: "text",
        Path: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        NoneType: "null",
    }
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list" if ... in get_args(hint) else f"a list of {len(get_args(hint))} numbers"
    return "text" if get_origin(hint) is Literal else names[hint]


def _text(value: Any) -> str:
    """A value from a file for a message, shortened to its first 40 characters."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "deeply nested lists"
    return text if len(text) <= 40 else f"{text[:40]}..."
