"""cache.json, the header of a teacher cache: read, check and write it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from fastofa.runs.config import MAX_EPOCHS
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import read_json, write_json
from fastofa.views.policy import ViewPolicy

SCHEMA = 4
OLDER = (3,)  # schemas that are still read
MAX_VIEWS = MAX_EPOCHS  # an epoch replays one view
AGAIN = "run `fastofa precompute` again with the same arguments"
HEADER = "cache.json"
MAX_NAMED, MAX_TEXT = 8, 40  # elements of a list and characters of a value in a message


def read_header(path: Path) -> dict[str, Any]:
    """The contents of cache.json. Raises BadInput if it is missing, damaged, or has another schema version."""
    file = path / HEADER
    try:
        exists, there = file.is_file(), path.is_dir()
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror}") from None
    if not exists:
        found = f"but it contains no {HEADER}" if there else "but there is no such folder"
        raise BadInput(f"{path}: expected a teacher cache made by `fastofa precompute`, {found}")
    header = read_json(file)
    if not isinstance(header, dict) or header.get("schema") not in (SCHEMA, *OLDER):
        schema = header.get("schema") if isinstance(header, dict) else type(header).__name__
        raise BadInput(
            f"{file}: expected schema {SCHEMA}, got {str(schema)[:80]}; remove the cache and precompute it again with "
            "this version"
        )
    if missing := sorted(FIELDS - header.keys()):
        raise BadInput(
            f"{file}: expected the fields {', '.join(missing)}, but the file was edited; remove the cache and "
            "precompute it again"
        )
    if invalid := [name for name, is_valid in _validity(header).items() if not is_valid]:
        raise BadInput(
            f"{file}: expected values that `fastofa precompute` writes for {', '.join(invalid)}, but the file was "
            "edited; remove the cache and precompute it again"
        )
    return header


FIELDS = {
    "dataset", "num_samples", "num_val_samples", "num_classes", "classes", "topk", "policy", "seed", "views",
    "teachers", "pipeline", "versions",
}  # fmt: skip


def _validity(header: dict[str, Any]) -> dict[str, bool]:
    """Whether the value of each field has the right type and range."""
    classes, policy, teachers, versions = (header[name] for name in ("classes", "policy", "teachers", "versions"))
    return {
        **{name: _whole(header[name], 1, 2**31 - 1) for name in ("num_samples", "num_val_samples", "num_classes")},
        "dataset": _texts(header["dataset"], ("spec", "train", "val")),
        "classes": isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and len(classes) == header["num_classes"],
        "topk": _whole(header["topk"], 1, header["num_classes"]),
        "policy": _is_policy(policy),
        "seed": _whole(header["seed"], 0, 2**63 - 1),
        "views": _whole(header["views"], 1, MAX_VIEWS)
        and _is_policy(policy)
        and header["views"] % policy_from_json(policy).repeats == 0,
        "teachers": _are_teachers(teachers, header.get("teacher_weights")),
        "first_view": "first_view" not in header or _whole(header["first_view"], 1, header["views"]),
        "pipeline": isinstance(header["pipeline"], str),
        "versions": isinstance(versions, dict) and len(versions) <= 100 and _texts(versions, tuple(versions)),
        "features": "features" not in header or _is_features(header["features"]),
        "keep_each": "keep_each" not in header or (header["keep_each"] is True and "teacher_weights" in header),
        "topk_chosen": header.get("topk_chosen", "auto") == "auto",
    }


def _whole(value: Any, low: int, high: Any) -> bool:
    return type(value) is int and type(high) is int and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _texts(value: Any, names: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def _is_teacher(teacher: Any) -> bool:
    return (
        _texts(teacher, ("name", "sha256", "precision"))
        and _whole(teacher.get("image_size"), 1, 1 << 16)
        and _whole(teacher.get("num_features"), 1, 1 << 20)
        and all(_is_colour(teacher.get(name)) for name in ("mean", "std"))
    )


def _are_teachers(teachers: Any, weights: Any) -> bool:
    """Whether the values describe one teacher without a weight, or several with a weight each."""
    if not (isinstance(teachers, list) and all(map(_is_teacher, teachers))):
        return False
    if len(teachers) == 1:
        return weights is None
    return isinstance(weights, list) and len(weights) == len(teachers) > 0 and all(_number(w, 0, 1) for w in weights)


def _is_features(features: Any) -> bool:
    """Whether the values describe stored vectors: their kind and their width."""
    if not isinstance(features, dict) or features.keys() != {"kind", "width"}:
        return False
    return features["kind"] in ("pooled", "pooled-int8") and _whole(features["width"], 1, 1 << 20)


def _is_colour(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(_number(v, -math.inf, math.inf) for v in values)


def _is_policy(values: Any) -> bool:
    """Whether `policy_to_json` could have returned these values."""
    if not isinstance(values, dict):
        return False
    lengths = {"scale": 2, "ratio": 2, "mean": 3, "std": 3}
    for name, value in values.items():
        numbers = value if name in lengths and isinstance(value, list) else [value]
        if len(numbers) != lengths.get(name, 1):
            return False
        if not (name == "auto_augment" or all(_number(number, 0, math.inf) for number in numbers)):
            return False
    try:
        return policy_to_json(policy_from_json(values)) == values and _whole(values.get("repeats", 1), 1, MAX_VIEWS)
    except (AttributeError, KeyError, TypeError, ValueError, BadInput):
        return False


def write_header(path: Path, header: dict[str, Any]) -> None:
    """Write cache.json in the current schema."""
    write_json(path / HEADER, {"schema": SCHEMA, **header})


def identity(header: dict[str, Any]) -> dict[str, Any]:
    """The fields of the header on which predictions depend. Caches with the same identity have the same views."""
    dataset = {split: header["dataset"][split] for split in ("train", "val")}
    names = ("classes", "topk", "policy", "seed", "teachers")
    optional = (name for name in ("teacher_weights", "keep_each", "features") if name in header)
    return {"dataset": dataset, **{name: header[name] for name in (*names, *optional)}}


def united(header: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The header of a cache that has the planned views of both; their identity is the same."""
    largest = max(header, other, key=lambda each: each["views"])
    planned: dict[str, Any] = {name: largest[name] for name in ("views", "config", "folder") if name in largest}
    first = min(each.get("first_view", 0) for each in (header, other))
    whole = {name: value for name, value in header.items() if name != "first_view"}
    return {**whole, **planned, **({"first_view": first} if first else {})}


def check_vacant(out: Path) -> None:
    """Raises BadInput if the folder contains files but no cache."""
    try:
        others = out.exists() and not (out / HEADER).exists() and any(not f.name.startswith(".") for f in out.iterdir())
    except OSError as error:
        raise BadInput(f"{out}: expected a folder, got {error.strerror}; choose another path") from None
    if others:
        raise BadInput(f"{out}: expected a new folder or a cache, got a folder with other files; choose another path")


class FieldDifference(NamedTuple):
    """A field in which two headers differ, with its value in each as text; "none" where a header lacks it."""

    field: str
    a: str
    b: str


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[FieldDifference]:
    """The fields in which two dictionaries from JSON differ, such as `identity` of two headers; nested ones are named
    policy.flip or teachers.0.sha256. Of the classes, only the first difference is included."""
    found = []
    for name in {**a, **b}:
        x, y = a.get(name), b.get(name)
        if x == y:
            continue
        if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            x, y = ({str(i): value for i, value in enumerate(values)} for values in (x, y))
        if isinstance(x, dict) and isinstance(y, dict):
            nested = differences(x, y)
            nested = nested[:1] if name == "classes" else nested
            found += [each._replace(field=f"{name}.{each.field}") for each in nested]
        else:
            found.append(FieldDifference(name, _brief(x), _brief(y)))
    return found


def _brief(value: Any) -> str:
    if isinstance(value, list) and len(value) > MAX_NAMED:
        return counted(len(value), "name" if isinstance(value[0], str) else "value")
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def check_same(a: object, header_a: dict[str, Any], b: object, header_b: dict[str, Any]) -> None:
    """Raises BadInput unless two headers have the same identity; `a` and `b` are their paths or URLs."""
    if different := differences(identity(header_a), identity(header_b)):
        fields = "; ".join(f"{name} (there: {x}, here: {y})" for name, x, y in different)
        raise BadInput(
            f"{b}: expected views of the same cache as {a}, but they differ in {fields}; only views that were made "
            "with the same arguments belong together"
        )


def policy_to_json(policy: ViewPolicy) -> dict[str, Any]:
    """Scale, ratio and flip, and any other fields that differ from their defaults."""
    values = dataclasses.asdict(policy)
    omitted = {field.name for field in dataclasses.fields(policy) if values[field.name] == field.default}
    omitted -= {"scale", "ratio", "flip"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in omitted}


def policy_from_json(values: dict[str, Any]) -> ViewPolicy:
    """The policy that `policy_to_json` described. Raises BadInput for impossible values."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return ViewPolicy(fields.pop("scale"), fields.pop("ratio"), fields.pop("flip"), **fields)
