"""Digests of a dataset's files, computed from a sample of their bytes.

Each time a dataset is opened, the first, middle and last 4 kB of each file are read; if there are more than
10,000 files, only 10,000 evenly spaced ones are read. This detects a file that was replaced by another of the same
size. It does not detect a change between these parts, or a change to files outside the sample (if two of a million
files are swapped, the chance of detecting it is one in fifty; if all are swapped, it is always detected).

On two busy cores, 10,000 files of 40 kB take 0.9 s from the page cache and 1.5 to 1.9 s from a local disk (0.3 and
0.7 s of it CPU time). Larger datasets take no longer, because only 10,000 files are read; reading all of 100,000 would
take 9 s and 15 to 19 s.
"""

import hashlib
import os
from collections.abc import Iterable
from itertools import islice

import numpy as np

from fastofa.system.threads import in_order

FILES = 10_000
PART = 4096  # bytes
DIGEST = 16  # bytes
THREADS = 16  # they wait for a disk or a network more than they compute
CHUNK = 64  # files per task of a thread


def sample(count: int) -> np.ndarray:
    """int64 [min(count, FILES)]: evenly spaced indices of the files that are read."""
    if count <= FILES:
        return np.arange(count)
    return np.arange(FILES) * count // FILES


def digest(path: str, size: int) -> bytes | OSError:
    """The digest of a file of `size` bytes, or the error that prevents reading it. Never blocks on a FIFO."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return digest_of(file, 0, size)
        finally:
            os.close(file)
    except OSError as error:
        return error


def digest_of(file: int, begin: int, size: int) -> bytes:
    """The digest of `size` bytes of an open file, from offset `begin`."""
    places = (0, (size - PART) // 2, size - PART) if size > 3 * PART else (0, PART, 2 * PART)
    parts = b"".join(os.pread(file, min(PART, size - place), begin + place) for place in places if place < size)
    return hashlib.blake2b(parts, digest_size=DIGEST).digest()


def digests(files: Iterable[tuple[str, int]]) -> list[bytes | OSError]:
    """The digest, or the error, for each (path, size), in order."""
    files = iter(files)
    chunks = iter(lambda: list(islice(files, CHUNK)), [])
    results = in_order(lambda chunk: [digest(path, size) for path, size in chunk], chunks, THREADS)
    return [result for chunk in results for result in chunk]
