"""What an ONNX file is made of, by its wire format alone, before anything that obeys it opens it. No onnx.

A tensor may say that its values lie in another file, anywhere on this machine, and an operator may ask for any
amount of memory; no file of this toolkit has either. Walking one takes microseconds: values are stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from alexnet_cli.errors import WeightsError

LARGEST = 2**31  # bytes of a protobuf message
MOST_FIELDS = 1_000_000  # ours have some hundreds
DEEPEST = 100  # messages within messages, as protobuf's own readers have it

# Field numbers of the messages within a message, by its kind (onnx.proto).
WITHIN = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
REFUSED = {
    ("model", 20): "training information",
    ("model", 25): "functions of its own",
    ("tensor", 13): "tensors that lie in another file",
}
OPERATOR = ("node", 4)
LOCATION = ("tensor", 14)
OPERATORS = frozenset(
    b"Add AveragePool BatchNormalization Cast Clip Concat Constant Conv ConvInteger DequantizeLinear Div "
    b"DynamicQuantizeLinear Flatten Gemm Identity LRN MatMul MatMulInteger MaxPool Max Min Mul Pow QLinearConv "
    b"QLinearMatMul QuantizeLinear ReduceSum Relu Reshape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Sum Tanh "
    b"Transpose Unsqueeze".split()
)
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED = {FIXED64: 8, FIXED32: 4}
FOREIGN = "networks come from `alexnet export`; another program's file: alexnet import-weights"


def check(path: Path) -> None:
    """Refuse an ONNX file that reaches for other files or holds what no network of this toolkit has.

    Raises:
        WeightsError: that is so, or the file cannot be read or is no ONNX.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if len(data) > LARGEST:
                raise ValueError("it is larger than 2 GB")
            found = _first_refused(data)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be opened: {error}", "the file is damaged; export it anew") from error
    if found:
        raise WeightsError(f"{path} is refused: it has {found}", FOREIGN)


def _first_refused(data: mmap.mmap) -> str:
    """What in the model is not to be had, in words; nothing if all is well. ValueError for what is no ONNX."""
    waiting, count = [("model", 0, len(data), 0)], 0
    while waiting:
        kind, start, end, depth = waiting.pop()
        for number, wire, first, last in _fields(data, start, end):
            count += 1
            if count > MOST_FIELDS or depth > DEEPEST:
                raise ValueError("it has more parts than any network")
            if (kind, number) in REFUSED or ((kind, number) == LOCATION and first != 0):
                return REFUSED.get((kind, number), REFUSED["tensor", 13])
            if (kind, number) == OPERATOR and (wire != BYTES or data[first:last] not in OPERATORS):
                return f"the operator {data[first : min(last, first + 40)].decode('ascii', 'replace')}"
            if wire == BYTES and number in WITHIN[kind]:
                waiting.append((WITHIN[kind][number], first, last, depth + 1))
    return ""


def _fields(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, first and last place of each field's value; a varint's value stands for its places."""
    while place < end:
        tag, place = _varint(data, place, end)
        wire, value = tag & 7, 0
        if tag >> 3 == 0 or tag >> 3 >= 2**29:
            raise ValueError("no ONNX: a field without a number")
        if wire == VARINT:
            value, place = _varint(data, place, end)
            yield tag >> 3, wire, value, value
            continue
        if wire not in (BYTES, *FIXED):
            raise ValueError("no ONNX: a field of unknown kind")
        size = FIXED.get(wire, 0)
        if wire == BYTES:
            size, place = _varint(data, place, end)
        if size > end - place:
            raise ValueError("it is truncated, or no ONNX")
        yield tag >> 3, wire, place, place + size
        place += size


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
    raise ValueError("it is truncated, or no ONNX")
