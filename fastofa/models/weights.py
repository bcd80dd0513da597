"""Weights from the files that people have: torch's or safetensors, whole checkpoints of trainers, wrapped models.

A checkpoint is a tree: dictionaries within it ({"model_ema": ...}) and the prefixes that wrappers put before every name
(`module.`, `_orig_mod.`, `backbone.`) both lead to a set of weights, which is called by the path to it.
"""

import argparse
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastofa.system.errors import BadInput
from fastofa.system.files import is_pickle
from fastofa.system.progress import notice

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "averaged_model", "teacher")
OTHERS = ("state_dict", "model_state_dict", "model", "net", "network", "student", "backbone")
UNNAMED = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile: they say nothing about the weights
PREFIXES = (*UNNAMED, *AVERAGES, *OTHERS)
DEPTH = 8  # wrappers within wrappers


@dataclass(frozen=True)
class SavedWeights:
    """What a file or a run holds."""

    source: str
    """For messages: the path."""
    contents: dict[str, Any]
    """Tensors by name, or dictionaries of such."""
    key: str | None = None
    """Which set is meant, where there are several."""
    flag: str = ""
    """The command's argument that gives `key`."""

    @property
    def numbers(self) -> int:
        """How many it holds, all sets together."""
        return sum(tensor.numel() for found in _sets(self.contents, set()).values() for tensor in found.values())

    def of_model(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The set that a model with these names of tensors is to be given, without prefixes; a notice says which.

        Where there are several: the one that has most of the names, and an average before the weights themselves.

        Raises:
            BadInput: the file holds no weights, or none called `key`.
        """
        own = set(names)
        sets = _sets(self.contents, {name.partition(".")[0] for name in own})
        if not self.contents:
            return {}
        if self.key is not None:
            chosen = {path: found for path, found in sets.items() if f"{path}.".startswith(f"{self.key}.")}
            if not chosen:
                there = ", ".join(path for path in sets if path) or "one, without a name"
                raise BadInput(f"{self.source}: expected weights called {self.key}, it holds {there}")
        else:
            chosen = sets
        if not chosen:
            raise BadInput(
                f"{self.source}: expected a state_dict of tensors, found none under {_some(map(str, self.contents))}"
            )
        ranks = {name: i for i, name in enumerate((*AVERAGES, *OTHERS))}

        def rank(path: str) -> tuple[int, int, int]:
            found = chosen[path]
            best = min(ranks.get(part, len(ranks)) for part in path.split("."))
            return -len(own & found.keys()), best, -sum(tensor.numel() for tensor in found.values())

        path = min(chosen, key=rank)
        if path and self.key is None:
            others = _some(other or "those without a name" for other in sets if other != path)
            choose = f"{self.flag} takes another" if self.flag else "save another as a file of its own"
            notice(f"{self.source}: took the weights called {path}{f', not {others}; {choose}' if others else ''}")
        return chosen[path]


def read_weights(path: Path, key: str | None = None, flag: str = "") -> SavedWeights:
    """A .safetensors file, or any other through torch's weights-only reader.

    Raises:
        BadInput: missing, no regular file, unreadable, or a pickle with code in it, which is not run.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "found none" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise BadInput(f"{path}: expected a file with weights, {reason}") from None
    if stat.S_ISDIR(mode):
        raise BadInput(f"{path}: expected a file with weights, got a folder")
    if not stat.S_ISREG(mode):
        raise BadInput(f"{path}: expected a file with weights, got a pipe, socket or device")
    contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(contents, dict):
        raise BadInput(f"{path}: expected a state_dict of tensors, got {type(contents).__name__}")
    return SavedWeights(str(path), contents, key, flag)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except PermissionError as error:
        raise BadInput(f"could not read {path}: {error.strerror}") from None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        kind = "a pickle" if is_pickle(path) else f"damaged ({str(error).strip().partition(chr(10))[0]})"
        raise BadInput(f"{path}: expected safetensors, got a file that is {kind}; nothing was loaded") from None


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their command line
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise BadInput(f"could not read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}, which is no tensor" if wanted else "it is damaged or no checkpoint of torch"
        raise BadInput(
            f"{path}: torch's weights-only reader refused it, {reason}; save a plain state_dict or safetensors"
        ) from None


def _sets(contents: dict[str, Any], own: set[str], path: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    """Every set of weights by its path. `own` are the first parts of the model's names, which are no prefixes."""
    found: dict[str, dict[str, Tensor]] = {}
    if len(path) > DEPTH:
        return found
    for name, inner in contents.items():
        if isinstance(name, str) and isinstance(inner, dict):
            found |= _sets(inner, own, (*path, name))
    tensors = {k: v for k, v in contents.items() if isinstance(k, str) and isinstance(v, Tensor)}
    wrappers = {first for first, dot, _ in (k.partition(".") for k in tensors) if dot and first in PREFIXES} - own
    for first in sorted(wrappers):
        inner = {k.removeprefix(f"{first}."): v for k, v in tensors.items() if k.startswith(f"{first}.")}
        found |= _sets(inner, own, (*path, first))
    bare = {k: v for k, v in tensors.items() if k.partition(".")[0] not in wrappers}
    # Beside wrapped weights lie counters, random states and other models' parts: those are no weights of this model.
    if bare and (not found or own & {k.partition(".")[0] for k in bare}):
        found[".".join(name for name in path if name not in UNNAMED)] = bare
    return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
