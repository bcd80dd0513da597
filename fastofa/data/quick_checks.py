"""What is refused before torch is imported: data sets that are not there, places that are taken."""

import os
from pathlib import Path

from fastofa.data.write_config import WriteConfig
from fastofa.system.errors import BadInput

SPLITS = ("train", "val")
OTHER_DATA = (".pack", ".beton", ".ffcv")  # suffixes of data sets that are no folders of images


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
