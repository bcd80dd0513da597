"""What is refused before torch is imported, which takes seconds, and before a data set is opened, which may take hours.

Commands begin with these checks. Whatever is not certain here is left to the command itself.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from fastofa import torchrun
from fastofa.arguments import EvaluateConfig, ExportConfig, PrecomputeConfig, WriteConfig
from fastofa.config import TrainConfig
from fastofa.errors import BadInput
from fastofa.views import ViewPolicy

RUN, CHECKPOINTS = "config.json", "checkpoints/step-*.safetensors"  # of a run's folder
HEADER, TABLES = "cache.json", ("view-*.safetensors", "val.safetensors")  # of a teacher cache
SPLITS = ("train", "val")
OTHER_DATA = (".pack", ".beton", ".ffcv")  # suffixes of data sets that are no folders of images


def check(config: Any) -> None:
    """Of any command. Raises BadInput."""
    if torchrun.is_rank() or "TORCHELASTIC_RUN_ID" in os.environ:
        return  # a rank that is refused tells the others, and one that is restarted goes on with what is there
    match config:
        case TrainConfig():
            if not config.plan:
                check_vacant(config)
            check_data(config.data, SPLITS)
        case PrecomputeConfig():
            check_cache(config)
            check_data(config.data, SPLITS)
        case WriteConfig():
            check_written(config)
            check_data(config.data, ())
        case EvaluateConfig() if config.data is not None:
            check_data(config.data, ("val",))
        case ExportConfig():
            check_new(config.out)


def check_vacant(config: TrainConfig) -> None:
    """Raises BadInput if a run lies there that this one does not go on with."""
    begun = any(config.out.glob(CHECKPOINTS))
    if begun and not (config.out / RUN).exists():
        raise BadInput(f"{config.out}: holds checkpoints of a run without its {RUN}; choose another --out")
    if begun and not config.resume:
        raise BadInput(f"{config.out}: holds a run already; go on with it by --resume or choose another --out")


def check_new(out: Path) -> None:
    """Raises BadInput if there is something."""
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists already; choose another place or remove it")


def check_written(config: WriteConfig) -> None:
    """Raises BadInput if there is something that is not to be verified."""
    if os.path.lexists(config.out) and not config.verify:
        raise BadInput(f"{config.out}: exists already; choose another place, remove it, or check it by --verify")


def check_data(data: str, splits: tuple[str, ...]) -> None:
    """Raises BadInput for a folder of images that is not there, or lacks one of its splits."""
    if data.partition(":")[0] in ("digits", "cifar100") or Path(data).suffix in OTHER_DATA:
        return
    if _is_missing(Path(data)):
        raise BadInput(
            f"unknown data set {data!r}: expected digits, digits:N, cifar100:DIR, a folder with train/ and val/, or a "
            ".pack or .beton that `fastofa write` wrote; there is no such folder"
        )
    for split in splits:
        if _is_missing(Path(data, split)):
            raise no_split(Path(data), split)


def no_split(data: Path, split: str) -> BadInput:
    return BadInput(
        f"{data}: expected a folder with train/ and val/ and a folder per class in each, found no {data / split}"
    )


def _is_missing(path: Path) -> bool:
    """Surely, that is: not where it may not be looked at."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        pass
    return False


def check_cache(config: PrecomputeConfig) -> None:
    """Raises BadInput for an --out that holds something else than a cache, or one with other arguments."""
    out = config.out
    try:
        others = [] if not out.exists() else [f.name for f in out.iterdir() if not f.name.startswith(".")]
    except OSError as error:
        raise BadInput(
            f"out: expected a folder, could not read {out} ({error.strerror}); choose another --out"
        ) from None
    if others and HEADER not in others:
        raise BadInput(f"{out}: expected an empty or new folder or a cache, it holds other files; choose another --out")
    if any(any(out.glob(table)) for table in TABLES) and (different := _differences(config)):
        raise other_cache(out, different)


def other_cache(out: Path, different: list[str]) -> BadInput:
    return BadInput(
        f"{out}: holds a cache made otherwise, it differs in {'; '.join(different)}; choose another --out or remove it"
    )


def _differences(config: PrecomputeConfig) -> list[str]:
    """What the cache there was made with instead, as far as the arguments tell; nothing of one that is damaged."""
    try:
        header = json.loads((config.out / HEADER).read_bytes())
        default = {field.name: field.default for field in dataclasses.fields(ViewPolicy)}
        theirs = {"topk": header["topk"], "seed": header["seed"], **default, **header["policy"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    mine = {"topk": config.topk, "seed": config.seed, **dataclasses.asdict(config.policy())}
    return [
        f"{name.replace('_', '-')} ({_text(theirs[name])} there, {_text(value)} here)"
        for name, value in mine.items()
        if _text(theirs[name]) != _text(value)
    ]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]
