"""MATLAB's MAT files of version 5, as far as ILSVRC's meta.mat needs them: numbers, text, cells, structs.

Format: MathWorks, "MAT-File Format", version 5. A file is a header of 128 bytes and then elements, each a
tag (type, size) with its data; arrays are elements that hold elements.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from alexnet_cli.errors import DataError

HEADER = 128  # bytes
LIMIT = 1 << 28  # bytes an element may unpack to
DEPTH = 16  # arrays inside arrays
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXTS = {16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, STRUCT, CHARACTERS = 1, 2, 4
NUMERIC = range(6, 16)


def read_mat(data: bytes) -> dict[str, Any]:
    """Variables by name. Numbers come as flat arrays, text as str, structs as lists of dicts, cells as lists.

    Raises:
        DataError: it is not such a file, or damaged.
    """
    if len(data) < HEADER or data[126:128] not in (b"IM", b"MI") or data[:10] != b"MATLAB 5.0":
        raise DataError("not a MAT file of version 5", "")
    order = "<" if data[126:128] == b"IM" else ">"
    try:
        return dict(_array(content, order, 0) for _, content in _unpacked(data[HEADER:], order))
    except (struct.error, ValueError, IndexError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"a damaged MAT file ({error})", "") from error


def _unpacked(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    for kind, content in _elements(data, order):
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            content = unpacker.decompress(content, LIMIT)
            if not unpacker.eof:
                raise ValueError("a compressed element that does not end")
            kind, content = _next(_elements(content, order))
        if kind == MATRIX:
            yield kind, content


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        start = place + 8
        if kind >> 16:  # a small element: two bytes of size, two of type, four of data
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
            end = place + 8
        else:
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError(f"{start + size - len(data)} bytes are missing")
        yield kind, data[start : start + size]
        place = end


def _next(parts: Iterator[tuple[int, bytes]]) -> tuple[int, bytes]:
    if (part := next(parts, None)) is None:
        raise ValueError("an array without all its parts")
    return part


def _array(data: bytes, order: str, depth: int) -> tuple[str, Any]:
    """Name and value of an array."""
    if depth > DEPTH:
        raise ValueError("arrays inside arrays without end")
    if not data:
        return "", []
    parts = _elements(data, order)
    flags, dimensions, name = (_numbers(*_next(parts), order) for _ in range(3))
    kind, count = int(flags[0]) & 0xFF, int(np.prod(dimensions))
    title = bytes(name.astype(np.uint8)).decode("latin-1")
    if kind == CHARACTERS:
        return title, _text(*_next(parts), order) if count else ""
    if kind in NUMERIC:
        return title, _numbers(*_next(parts), order)
    if kind == CELL:
        return title, [_array(content, order, depth + 1)[1] for _, content in parts]
    if kind != STRUCT:
        raise ValueError(f"array class {kind} is not known")
    width = int(_numbers(*_next(parts), order)[0])
    _, joined = _next(parts)
    fields = [joined[i : i + width].partition(b"\0")[0].decode("latin-1") for i in range(0, len(joined), width)]
    values = [_array(content, order, depth + 1)[1] for _, content in parts]
    if not fields or len(values) != count * len(fields):
        raise ValueError(f"{len(values)} values for {count} structs of {len(fields)} fields")
    return title, [
        dict(zip(fields, values[i * len(fields) : (i + 1) * len(fields)], strict=True)) for i in range(count)
    ]


def _numbers(kind: int, content: bytes, order: str) -> Any:
    if kind not in NUMBERS:
        raise ValueError(f"number type {kind} is not known")
    return np.frombuffer(content, order + NUMBERS[kind])


def _text(kind: int, content: bytes, order: str) -> str:
    if kind in TEXTS:
        return content.decode(TEXTS[kind] if kind == 16 else TEXTS[kind] + ("-le" if order == "<" else "-be"))
    return "".join(map(chr, _numbers(kind, content, order)))
