"""An ONNX file opened without reading its weights: they stay where they are and are mapped. No torch, no onnx.

ONNX Runtime by itself copies every weight before the first picture. Here each large tensor of a graph is replaced by a
note that it is found elsewhere, and handed over as a view of the mapped file.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.protobuf import BYTES, Message, Value
from alexnet_cli.core.protobuf import mapped as mapped_bytes
from alexnet_cli.errors import WeightsError

APART_BYTES = 2**16
GRAPH, INITIALIZER = 7, 5  # fields of ModelProto and GraphProto
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9  # fields of TensorProto
TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 3: np.dtype("i1"), 10: np.dtype("<f2")}
ELSEWHERE = b"j\x12\n\x08location\x12\x06memoryp\x01"  # external_data {location: "memory"}, data_location: EXTERNAL

Apart = dict[str, npt.NDArray[Any]]


def mapped(path: Path) -> tuple[bytes, Apart] | None:
    """The model without its large tensors, and these by name; None for a file that is not laid out as ours are."""
    apart: Apart = {}
    content = bytearray()
    try:
        for number, value, whole in Message(mapped_bytes(path)).fields():
            if number == GRAPH and isinstance(value, memoryview):
                content += _written(GRAPH, _graph(Message(value), apart))
            else:
                content += whole
        return bytes(content), apart
    except (WeightsError, ValueError, KeyError):
        return None  # ONNX Runtime says what is wrong with it


def constant(path: Path, name: str) -> npt.NDArray[Any] | None:
    """A constant of the graph, a view of the mapped file; None if there is none, or not as ours are."""
    try:
        for tensor in Message(mapped_bytes(path)).message(GRAPH).messages(INITIALIZER):
            if tensor.text(NAME) == name:
                return _tensor(tensor)[1]
    except (WeightsError, ValueError, KeyError):
        return None
    return None


def _graph(graph: Message, apart: Apart) -> bytes:
    content = bytearray()
    for number, value, whole in graph.fields():
        if number == INITIALIZER and isinstance(value, memoryview) and len(value) > APART_BYTES:
            name, values, rest = _tensor(Message(value, graph.budget))
            if name in apart:
                raise ValueError(name)
            apart[name] = values
            content += _written(INITIALIZER, rest + ELSEWHERE)
        else:
            content += whole
    return bytes(content)


def _tensor(tensor: Message) -> tuple[str, npt.NDArray[Any], bytes]:
    """Name, values as a view, and all of it but these. Raises ValueError or KeyError if it is not as ours are."""
    shape, rest, found = list[int](), bytearray(), dict[int, Value]()
    for number, value, whole in tensor.fields():
        found[number] = value
        if number == DIMS and isinstance(value, int):
            shape.append(value)
        if number != RAW_DATA:
            rest += whole
    name, kind, data = (found[number] for number in (NAME, DATA_TYPE, RAW_DATA))
    if not (isinstance(name, memoryview) and isinstance(kind, int) and isinstance(data, memoryview)):
        raise ValueError("parts of another kind")
    if len(data) != TYPES[kind].itemsize * prod(shape):
        raise ValueError("its data do not fill its shape")
    return str(name, "utf-8"), np.frombuffer(data, TYPES[kind]).reshape(shape), bytes(rest)


def _written(number: int, content: bytes) -> bytes:
    """A field that holds a message."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | BYTES, *length, size]) + content
