"""MAT files of version 5 written element by element, as the format's description has them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence


def mat_file(name: str, entries: Sequence[dict[str, str | float]], compressed: bool = False) -> bytes:
    """A file with one column of structs; texts and numbers are their fields."""
    fields = list(entries[0])
    body = element(5, struct.pack("<i", 32)) + element(1, b"".join(f.encode().ljust(32, b"\0") for f in fields))
    body += b"".join(value(entry[field]) for entry in entries for field in fields)
    content = array(2, (len(entries), 1), name, body)
    if compressed:
        packed = zlib.compress(content)
        content = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + content


def value(of: str | float) -> bytes:
    if isinstance(of, str):
        return array(4, (1, len(of)), "", element(4, of.encode("utf-16-le")))
    small = of == int(of) and 0 <= of < 256  # MATLAB stores a double that is a small whole number as a byte
    return array(6, (1, 1), "", element(2, bytes([int(of)])) if small else element(9, struct.pack("<d", of)))


def array(kind: int, shape: tuple[int, int], name: str, body: bytes) -> bytes:
    flags, dimensions = element(6, struct.pack("<II", kind, 0)), element(5, struct.pack("<ii", *shape))
    return element(14, flags + dimensions + element(1, name.encode()) + body)


def element(kind: int, data: bytes) -> bytes:
    if 0 < len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)
