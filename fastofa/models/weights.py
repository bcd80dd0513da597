"""Read weights from torch or safetensors files, including trainers' checkpoints and wrapped models.

A checkpoint is a tree. Its dictionaries ({"model_ema": ...}) and the prefixes that wrappers add to every name
(`module.`, `_orig_mod.`, `backbone.`) lead to sets of weights. A set is named by its path in the tree. The official
code's distiller holds `student.`, `teacher.` and `projector.`.
"""

import argparse
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastofa.system.errors import BadInput, listed
from fastofa.system.files import is_pickle
from fastofa.system.progress import notice

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "averaged_model", "teacher")
OTHERS = ("state_dict", "model_state_dict", "model", "net", "network", "student", "backbone")
UNNAMED = ("module", "_orig_mod")  # by DistributedDataParallel and torch.compile; they do not identify the weights
PROJECTOR = "projector"  # of a distiller; its teacher is another model, not an average of the student
PREFIXES = (*UNNAMED, *AVERAGES, *OTHERS, PROJECTOR)
MAX_DEPTH = 8  # of nested wrappers


@dataclass(frozen=True)
class SavedWeights:
    """The contents of a file or a run, which may include several sets of weights."""

    source: str
    """The path, for messages."""
    contents: dict[str, Any]
    """Tensors by name, or dictionaries of these."""
    key: str | None = None
    """The set to use, if there are several."""
    flag: str = ""
    """The command's argument for `key`."""

    @property
    def numbers(self) -> int:
        """The total number of elements in all sets."""
        return sum(tensor.numel() for weights in _sets(self.contents, set()).values() for tensor in weights.values())

    @property
    def names(self) -> set[str]:
        """The names of the tensors in all sets, without prefixes."""
        return {name for weights in _sets(self.contents, set()).values() for name in weights}

    @property
    def architecture(self) -> str | None:
        """The model's name as timm's trainer writes it; None if the file contains none."""
        arch = self.contents.get("arch")
        return arch if isinstance(arch, str) else None

    def of_model(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The set of weights for a model with this state_dict, without prefixes; a notice says which it is.

        Of several sets, the one with the most tensors of the same name and shape is used. Among equals, an average is
        preferred to the weights themselves, and a distiller's student to its teacher.

        Raises:
            BadInput: the file contains no weights, or none called `key`.
        """
        sets = _sets(self.contents, {name.partition(".")[0] for name in own})
        if not self.contents:
            return {}
        if self.key is not None:
            candidates = {path: weights for path, weights in sets.items() if f"{path}.".startswith(f"{self.key}.")}
            if not candidates:
                names_of_sets = ", ".join(path for path in sets if path) or "weights without a name"
                raise BadInput(f"{self.source}: expected weights called {self.key}, got {names_of_sets}")
        else:
            candidates = sets
        if not candidates:
            raise BadInput(f"{self.source}: expected a state_dict of tensors, found none in {listed(self.contents)}")
        ranks = {name: i for i, name in enumerate((*AVERAGES, *OTHERS))}
        if any(PROJECTOR in path.split(".") for path in sets):
            ranks["teacher"] = len(ranks)

        def rank(path: str) -> tuple[int, int, int, int]:
            weights = candidates[path]
            common = own.keys() & weights.keys()
            same = sum(own[name].shape == weights[name].shape for name in common)
            best = min(ranks.get(part, len(ranks)) for part in path.split("."))
            return -same, -len(common), best, -sum(tensor.numel() for tensor in weights.values())

        path = min(candidates, key=rank)
        if path and self.key is None:
            others = [other or "those without a name" for other in sets if other != path]
            choose = f"{self.flag} chooses others" if self.flag else "to use others, save them in a separate file"
            notice(
                f"{self.source}: uses the weights called {path}{f', not {listed(others)}; {choose}' if others else ''}"
            )
        return candidates[path]


def read_weights(path: Path, key: str | None = None, flag: str = "") -> SavedWeights:
    """Read a .safetensors file, or any other with torch's weights-only reader.

    Raises:
        BadInput: the file is missing, not regular or unreadable, or a pickle that contains code, which is not run.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "but it does not exist" if isinstance(error, FileNotFoundError) else f"got {error.strerror}"
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
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints contain their command line
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise BadInput(f"could not read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {refused[1]}" if refused else "it is damaged or not a torch checkpoint"
        raise BadInput(
            f"{path}: expected only tensors, but torch's weights-only reader refused the file: {reason}; save a plain "
            "state_dict or safetensors"
        ) from None


def _sets(contents: dict[str, Any], own: set[str], path: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    """Every set of weights by its path. `own`: the first parts of the model's own names, which are not prefixes."""
    sets: dict[str, dict[str, Tensor]] = {}
    if len(path) > MAX_DEPTH:
        return sets
    for name, inner in contents.items():
        if isinstance(name, str) and isinstance(inner, dict):
            sets |= _sets(inner, own, (*path, name))
    tensors = {k: v for k, v in contents.items() if isinstance(k, str) and isinstance(v, Tensor)}
    wrappers = {first for first, dot, _ in (k.partition(".") for k in tensors) if dot and first in PREFIXES} - own
    for first in sorted(wrappers):
        inner = {k.removeprefix(f"{first}."): v for k, v in tensors.items() if k.startswith(f"{first}.")}
        sets |= _sets(inner, own, (*path, first))
    bare = {k: v for k, v in tensors.items() if k.partition(".")[0] not in wrappers}
    # Next to wrapped weights, there may be counters, random states and parts of other models, which are not weights of
    # this model.
    if bare and (not sets or own & {k.partition(".")[0] for k in bare}):
        sets[".".join(name for name in path if name not in UNNAMED)] = bare
    return sets
