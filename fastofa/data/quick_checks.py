"""Checks that need no torch, so that they fail early: the dataset must exist and the output must not."""

import os
from pathlib import Path

from fastofa.data.write_config import WriteConfig
from fastofa.system.errors import BadInput
from fastofa.system.urls import is_url

SPLITS = ("train", "val")
AT_URLS = (".pack", ".beton")
OTHER_DATA = (".pack", ".beton", ".ffcv")  # suffixes of datasets that are not image folders


def check_written(config: WriteConfig) -> None:
    """Raises BadInput if OUT exists, unless --verify is given to check it."""
    if os.path.lexists(config.out) and not config.verify:
        raise BadInput(f"{config.out}: already exists; choose another path, remove it, or check it with --verify")


def check_data(data: str, splits: tuple[str, ...]) -> None:
    """Raises BadInput for an image folder that does not exist, lacks one of the splits or lies at a URL."""
    if is_url(data):
        check_url(data)
    if data == "digits" or ":" in data or Path(data).suffix in OTHER_DATA:  # not folders: `open_dataset` decides
        return
    if _is_missing(Path(data)):
        raise BadInput(
            f"unknown dataset {data!r}: expected digits, digits:N, cifar100:DIR, a folder with train/ and val/, or a "
            ".pack or .beton that `fastofa write` wrote; there is no such folder"
        )
    for split in splits:
        if _is_missing(Path(data, split)):
            raise no_split(Path(data), split)


def check_url(url: str) -> None:
    """Raises BadInput unless it is the URL of a .pack or .beton in a folder."""
    if Path(url).suffix not in AT_URLS or not is_url(url.rstrip("/").rpartition("/")[0]):
        raise BadInput(
            f"data: expected a folder, or SCHEME://PLACE/NAME.pack or .beton, got {url}; run `fastofa write` where the "
            "images are, copy what it wrote to a URL and give that"
        )


def no_split(data: Path, split: str) -> BadInput:
    """The error for an image folder without one of its splits."""
    return BadInput(
        f"{data}: expected a folder with train/ and val/ and a folder per class in each, found no {data / split}"
    )


def _is_missing(path: Path) -> bool:
    """Whether the path certainly does not exist; False if permissions leave that unknown."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        pass
    return False
