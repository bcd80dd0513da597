"""Damage the bytes of a file as a seed determines: flip bits; remove, zero, move or add parts."""

import random
from collections.abc import Callable


def _place(data: bytes, rng: random.Random, longest: int = 512) -> tuple[int, int]:
    """Start and end of a part that is not empty."""
    count = min(len(data), rng.choice([1, 2, 4, 16, 64, longest]))
    begin = rng.randint(0, len(data) - count)
    return begin, begin + count


def _flipped_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _random_run(data: bytes, rng: random.Random) -> bytes:
    begin, end = _place(data, rng)
    return data[:begin] + rng.randbytes(end - begin) + data[end:]


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    begin, end = _place(data, rng)
    return data[:begin] + bytes(end - begin) + data[end:]


def _swapped(data: bytes, rng: random.Random) -> bytes:
    """Swap two parts of equal length."""
    count = max(1, min(len(data) // 4, rng.choice([4, 64, 512])))
    a = rng.randint(0, len(data) // 2 - count)
    b = rng.randint(len(data) // 2, len(data) - count)
    return data[:a] + data[b : b + count] + data[a + count : b] + data[a : a + count] + data[b + count :]


def _truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: -rng.choice([1, 2, 16, rng.randint(1, len(data) - 1)])]


def _extended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([bytes, rng.randbytes])(rng.choice([1, 8, 1000]))


def _removed(data: bytes, rng: random.Random) -> bytes:
    begin, end = _place(data, rng)
    return data[:begin] + data[end:]


def _repeated(data: bytes, rng: random.Random) -> bytes:
    begin, end = _place(data, rng)
    return data[:end] + data[begin:]


def _emptied(data: bytes, rng: random.Random) -> bytes:
    return b""


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped bits": _flipped_bits,
    "random run": _random_run,
    "zeroed": _zeroed,
    "swapped": _swapped,
    "truncated": _truncated,
    "extended": _extended,
    "removed": _removed,
    "repeated": _repeated,
}


def damage_bytes(data: bytes, seed: int) -> tuple[str, bytes]:
    """The kind of damage and the damaged bytes, which differ from the original and are sometimes empty."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice([*BYTES] * 4 + ["emptied"])
        changed = {**BYTES, "emptied": _emptied}[kind](data, rng)
        if changed != data:
            return kind, changed
