"""Image files by name, without labels: what `fastofa predict` is given."""

from collections.abc import Iterable
from pathlib import Path

from fastofa.data.folder_listing import is_folder, list_below
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice


def image_files(places: Iterable[str | Path]) -> list[Path]:
    """The files among `places` as they are, and the images in the folders among them, each folder sorted by path.

    Folders are searched to any depth. Hidden files, what systems and editors leave behind and files with other suffixes
    are left out; one notice for each folder counts them.

    Raises:
        BadInput: nothing is given, there is no such file, a folder holds no image or may not be read, a name is not
            UTF-8.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if is_folder(place):
            images, remarks = list_below(place)
            found += images
            for remark in remarks:
                notice(remark)
            continue
        try:
            str(place).encode()
        except UnicodeEncodeError:
            raise BadInput(f"expected names in UTF-8, got {str(place)!r}; rename it") from None
        if not place.exists():
            raise BadInput(f"{place}: expected an image or a folder of images, found nothing there; correct the path")
        found.append(place)
    if not found:
        raise BadInput("files: expected images or folders of images, got none; name some")
    return found
