"""List image files without labels, as `fastofa predict` takes them."""

from collections.abc import Iterable
from pathlib import Path

from fastofa.data.folder_listing import is_folder, list_below
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files in `paths`, and the images in its folders, each folder sorted by path.

    Folders are searched to any depth. Hidden files, leftovers of the system or an editor and files with other suffixes
    are skipped; a notice for each folder counts them.

    Raises:
        BadInput: there are no paths; a path does not exist; a folder contains no image or is not readable; a name is
            not UTF-8.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if is_folder(path):
            images, remarks = list_below(path)
            files += images
            for remark in remarks:
                notice(remark)
            continue
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise BadInput(f"expected names in UTF-8, got {str(path)!r}; rename it") from None
        if not path.exists():
            raise BadInput(
                f"{path}: expected an image or a folder of images, got a path that does not exist; correct it"
            )
        files.append(path)
    if not files:
        raise BadInput("files: expected images or folders of images, got none; name some")
    return files
