"""Detect damage that decoders ignore.

PNG      Every chunk has a checksum. libpng refuses pixel data with a wrong one, but only warns about other chunks.
WebP     There is no checksum, and the decoder accepts any bytes as pixels. But damage changes how many bytes they take.
         An intact file cannot be decoded without its last bytes; a file that can be has unused data.
JPEG     The decoder warns (see decoder_messages).
"""

import struct
import zlib

import numpy as np
import torch
from torchvision.io import decode_webp

# Bytes at the end of a WebP's data that decoding may not need. libwebp writes up to 3 of them in lossy files. Lossless
# files can be decoded with even more bytes missing if their last pixels equal what missing bits decode to.
SPARE = {b"VP8 ": 6, b"VP8L": 32}


def damage(kind: str, data: bytearray | np.ndarray) -> str:
    """Signs of damage in a file that was decoded without an error; "" if there are none."""
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
    if name == b"VP8 ":  # two partitions; the header gives the length of the first one
        tag = int.from_bytes(frame[:3], "little")
        first = (tag >> 5) - spare
        if first > 0:
            shorter.append(
                (first << 5 | tag & 31).to_bytes(3, "little") + frame[3 : 10 + first] + frame[10 + first + spare :]
            )
    return "the image does not use all of its data" if any(_decodes(name, part) for part in shorter) else ""


def _decodes(name: bytes, frame: bytes) -> bool:
    chunk = name + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
    file = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    try:
        decode_webp(torch.frombuffer(bytearray(file), dtype=torch.uint8))
    except RuntimeError:
        return False
    return True
