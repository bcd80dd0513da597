"""Damage that decoders pass over.

PNG      every chunk has a checksum; libpng refuses wrong ones of pixels and only warns of others
WebP     has none, and its decoder takes whatever it finds for pixels. But damage changes how many bytes they take:
         of a sound file, one that lacks its last bytes cannot be decoded; where it can, what was to follow was left
JPEG     its decoder warns (see decoder_messages)
"""

import struct
import zlib

import numpy as np
import torch
from torchvision.io import decode_webp

# Bytes at the end of a WebP's data that need not be there. Of lossy ones libwebp writes up to 3; lossless ones may be
# decoded without more than that, if their last pixels are the ones that missing bits stand for.
SPARE = {b"VP8 ": 6, b"VP8L": 32}


def damage(kind: str, data: bytearray | np.ndarray) -> str:
    """Of a file that was decoded: what is wrong with it, "" if nothing is known."""
    if kind == "PNG":
        return _png(bytes(data))
    if kind == "WebP":
        return _webp(bytes(data))
    return ""


def _png(data: bytes) -> str:
    at, name = 8, b""
    while name != b"IEND" and at + 12 <= len(data):
        count, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + count
        if data[end : end + 4] != zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"):
            return f"the checksum of its {name.decode('latin1')} does not match"
        at = end + 4
    return "" if name == b"IEND" else "its end is missing"


def _webp(data: bytes) -> str:
    at, name, frame = 12, b"", b""
    while name not in (b"VP8 ", b"VP8L") and at + 8 <= len(data):
        name, count = struct.unpack_from("<4sI", data, at)
        frame = data[at + 8 : at + 8 + count]
        at += 8 + count + count % 2
    spare = SPARE.get(name, 0)
    shorter = [frame[:-spare]]
    if name == b"VP8 ":  # of two parts; the first ends where the header says
        tag = int.from_bytes(frame[:3], "little")
        first = (tag >> 5) - spare
        if first > 0:
            shorter.append(
                (first << 5 | tag & 31).to_bytes(3, "little") + frame[3 : 10 + first] + frame[10 + first + spare :]
            )
    return "not all of its data belong to the image" if any(_decodes(name, part) for part in shorter) else ""


def _decodes(name: bytes, frame: bytes) -> bool:
    chunk = name + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
    file = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    try:
        decode_webp(torch.frombuffer(bytearray(file), dtype=torch.uint8))
    except RuntimeError:
        return False
    return True
