"""An ONNX file opened without reading its weights: they stay where they are and are mapped. No torch, no onnx.

ONNX Runtime by itself copies every weight before the first picture. Here the few messages of the format that matter are
walked by hand (protobuf: a field is a number, a kind and a value): each large tensor of a graph is replaced by a note
that it is found elsewhere, and handed over as a view of the mapped file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

APART_BYTES = 2**16
GRAPH, INITIALIZER = 7, 5  # fields of ModelProto and GraphProto
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9  # fields of TensorProto
TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 3: np.dtype("i1"), 10: np.dtype("<f2")}
VARINT, LENGTH = 0, 2  # kinds of values; the fixed ones are not used here
FIXED = {1: 8, 5: 4}  # kind -> bytes
ELSEWHERE = b"j\x12\n\x08location\x12\x06memoryp\x01"  # external_data {location: "memory"}, data_location: EXTERNAL

Apart = dict[str, npt.NDArray[Any]]


def mapped(path: Path) -> tuple[bytes, Apart] | None:
    """The model without its large tensors, and these by name; None for a file that is not laid out as ours are."""
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _without_tensors(view)
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError):
        return None  # ONNX Runtime says what is wrong with it


def _without_tensors(view: memoryview) -> tuple[bytes, Apart]:
    apart: Apart = {}
    model = bytearray()
    for number, start, value, end in _fields(view, 0, len(view)):
        if number != GRAPH:
            model += view[start:end]
            continue
        graph = bytearray()
        for inner, first, content, last in _fields(view, value, end):
            if inner == INITIALIZER and last - content > APART_BYTES:
                graph += _message(INITIALIZER, _noted(view, content, last, apart))
            else:
                graph += view[first:last]
        model += _message(GRAPH, bytes(graph))
    return bytes(model), apart


def _noted(view: memoryview, start: int, end: int, apart: Apart) -> bytes:
    """A tensor without its data, which is put into `apart`."""
    kept, dims, kind, name = bytearray(), list[int](), 0, ""
    data: memoryview | None = None
    for number, first, value, last in _fields(view, start, end):
        if number == RAW_DATA:
            data = view[value:last]
            continue
        kept += view[first:last]
        if number == DIMS:
            dims.append(_varint(view, value)[0])
        elif number == DATA_TYPE:
            kind = _varint(view, value)[0]
        elif number == NAME:
            name = str(view[value:last], "utf-8")
    if data is None or name in apart:
        raise ValueError(name)
    apart[name] = np.frombuffer(data, TYPES[kind], prod(dims)).reshape(dims)
    if apart[name].nbytes != len(data):
        raise ValueError(name)
    return bytes(kept) + ELSEWHERE


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its number, where it begins, where its value begins, and where it ends."""
    place = start
    while place < end:
        first = place
        tag, place = _varint(view, place)
        value, kind = place, tag & 7
        if kind == VARINT:
            _, place = _varint(view, place)
        elif kind == LENGTH:
            size, value = _varint(view, place)
            place = value + size
        else:
            place += FIXED[kind]
        if place > end:
            raise ValueError("a field is longer than what holds it")
        yield tag >> 3, first, value, place


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        byte = view[place + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + shift // 7 + 1
    raise ValueError("a number of more than ten bytes")


def _message(number: int, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | LENGTH, *length, size]) + content
