"""The random streams of a seed, one for each kind of parameter."""

import numpy as np

# Numbers of views and epochs are below 2^32.
CROP, ORDER, OPS, ERASE, PAIRS, MIX, RESIZE = range(7)


def random_stream(seed: int, stream: int, number: int) -> np.random.Generator:
    """A generator for one stream of a view or epoch (`number`), independent of all others."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 32) + number]))
