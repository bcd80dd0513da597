"""Write a dataset in a format that is faster to read.

    fastofa write photos photos.pack --size 160     pixels of one size; the GPU crops
    fastofa write photos photos.beton               JPEGs (with --raw, pixels) in FFCV's format; the CPU crops
    fastofa write photos photos.pack --verify       write it unless it exists, then compare it with its checksums

Then use `--data photos.pack` instead of `--data photos`, with the same caches. Every image is decoded. If some cannot
be decoded, they are listed and nothing is written; --skip-corrupt leaves them out. The output appears under its name
only once it is complete.
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
    checked = ", checksums match" if config.verify else ""
    kind = f"{index.size} px" if index.size else "pixels" if index.raw else "JPEGs"
    content = f"{images} of {counted(len(index.classes), 'class')}, {kind}, {filesize.decimal(size)}"
    print(escaped(f"{config.out}: {content}{checked}"))
