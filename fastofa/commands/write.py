"""Write a data set in a form that is read faster.

    fastofa write photos photos.pack --size 160     pixels of one size, for GPUs that crop
    fastofa write photos photos.beton               JPEGs in FFCV's format, for CPUs that crop; --raw for pixels
    fastofa write photos photos.pack --verify       compare it with its checksums, having written it if it is not there

Then `--data photos.pack` instead of `--data photos`, with the same caches. Every picture is decoded; those that cannot
be are named, and nothing is written, or they are left out by --skip-corrupt. The output has its name only when it is
whole.
"""

from rich import filesize

from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.data.written import read_index
from fastofa.system.errors import counted, escaped


def main(config: WriteConfig) -> None:
    write(config)
    index = read_index(config.out)
    *first, last = ((split, len(part.names)) for split, part in index.splits.items())
    images = ", ".join([*(f"{split} {count:,}" for split, count in first), f"{last[0]} {counted(last[1], 'image')}"])
    size = sum(file.bytes for file in index.files.values())
    checked = ", as it was written" if config.verify else ""
    kind = f"{index.size} px" if index.size else "pixels" if index.raw else "JPEGs"
    what = f"{images} of {counted(len(index.classes), 'class')}, {kind}, {filesize.decimal(size)}"
    print(escaped(f"{config.out}: {what}{checked}"))
