"""The same images in every form that a pipeline reads."""

from pathlib import Path
from typing import Any

from bench.lib.photographs import SIDE
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig

FORMS = {"torchvision": "folder", "dali": "folder", "ffcv": "beton", "packed": "pack", "resident": "pack"}


def write_form(form: str, data: Path, out: Path, side: int = SIDE) -> str:
    """The path to open: the folder DATA itself, or a file in OUT, which is written if it does not exist.

    form: "folder", "beton" (its JPEGs), "raw" (a .beton of pixels), "pack" (images of SIDE x SIDE pixels).
    """
    if form == "folder":
        return str(data)
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "beton": ("jpeg.beton", {}), "raw": ("raw.beton", {"raw": True}), "pack": (f"{side}.pack", {"size": side}),
    }  # fmt: skip
    name, given = options[form]
    path = out / name
    if not path.exists():
        write(WriteConfig(str(data), path, **given))
    return str(path)
