"""The random streams of a seed."""

import numpy as np

# Random streams of a seed; views (and epochs) are numbered below 2^32.
CROP, ORDER, OPS, ERASE, PAIRS, MIX = range(6)


def random_stream(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 32) + number]))
