"""Checks of `fastofa precompute` that need no torch, so that they fail early: --out must not contain another cache."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.views.policy import ViewPolicy

HEADER, TABLES = "cache.json", ("view-*.safetensors", "val.safetensors")  # files of a teacher cache


def check_cache(config: PrecomputeConfig) -> None:
    """Raises BadInput if --out contains other files, or a cache made with other arguments."""
    out = config.out
    try:
        others = [] if not out.exists() else [f.name for f in out.iterdir() if not f.name.startswith(".")]
    except OSError as error:
        raise BadInput(
            f"out: expected a folder, could not read {out} ({error.strerror}); choose another --out"
        ) from None
    if others and HEADER not in others:
        raise BadInput(
            f"{out}: expected a new or empty folder or a cache, got a folder with other files; choose another --out"
        )
    if any(any(out.glob(table)) for table in TABLES) and (different := _differences(config)):
        raise other_cache(out, different)


def other_cache(out: Path, different: list[str]) -> BadInput:
    """The error for a folder that contains a cache made with other arguments."""
    return BadInput(
        f"{out}: contains a cache made with other arguments: {'; '.join(different)}; choose another --out or remove it"
    )


def _differences(config: PrecomputeConfig) -> list[str]:
    """The arguments that differ from those of the existing cache, as text; none if its header is damaged."""
    try:
        header = json.loads((config.out / HEADER).read_bytes())
        default = {field.name: field.default for field in dataclasses.fields(ViewPolicy)}
        features = header.get("features", {}).get("kind", "none")
        topk = header.get("topk_chosen", header["topk"]) if config.topk == "auto" else header["topk"]
        each = header.get("keep_each", False)
        cached = {"topk": topk, "features": features, "keep_each": each, "seed": header["seed"]}
        cached |= {**default, **header["policy"]}
        spec = header["dataset"]["spec"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    given = {name: getattr(config, name) for name in ("topk", "features", "keep_each", "seed")}
    requested = {**given, **dataclasses.asdict(config.policy())}
    different = [
        f"{name.replace('_', '-')} (cached: {_text(cached[name])}, given: {_text(value)})"
        for name, value in requested.items()
        if _text(cached[name]) != _text(value)
    ]
    if different and spec != config.data:  # on its own it is no difference: the same images have many names
        different.insert(0, f"data (cached: {_text(spec)}, given: {_text(config.data)})")
    return different


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]
