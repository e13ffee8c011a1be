"""What an ONNX file is made of, by its wire format alone, before anything that obeys it opens it. No onnx.

A tensor may say that its values lie in another file, anywhere on this machine, and a few operators may ask for any
amount of memory. So only what `alexnet export` writes is let in: these fields, and nodes whose results fit a network
of the size of its weights (`onnx_shapes`). It takes a millisecond or two: values are stepped over.
"""

from __future__ import annotations

from pathlib import Path

from alexnet_cli.core import onnx_shapes
from alexnet_cli.core.onnx_shapes import Node, Stored
from alexnet_cli.core.protobuf import Message, mapped
from alexnet_cli.errors import WeightsError

LARGEST = 2**31  # bytes of a protobuf message
MOST_TEXT = 2**24  # bytes of metadata; those of 20,000 classes take one or two million
OPSETS = frozenset((17,))
NUMBER, INTEGER, INTEGERS = 1, 2, 7  # types of an attribute

MODEL, GRAPH, NODE, ATTRIBUTE, TENSOR = "model", "graph", "node", "attribute", "tensor"
# Field numbers (onnx.proto) that files of this toolkit have, by the kind of message.
KNOWN = {
    MODEL: frozenset((1, 2, 3, 7, 8, 14)),
    GRAPH: frozenset((1, 2, 5, 11, 12)),
    NODE: frozenset((1, 2, 3, 4, 5)),
    ATTRIBUTE: frozenset((1, 2, 3, 8, 20)),
    TENSOR: frozenset((1, 2, 8, 9)),
}
REFUSED = {
    (MODEL, 20): "training information",
    (MODEL, 25): "functions of its own",
    (GRAPH, 15): "sparse tensors",
    (NODE, 7): "operators of another domain",
    (ATTRIBUTE, 5): "a tensor within a node",
    (ATTRIBUTE, 6): "a graph within a graph",
    (TENSOR, 13): "tensors that lie in another file",
    (TENSOR, 14): "tensors that lie in another file",
}
FOREIGN = "networks come from `alexnet export`; another program's file: alexnet import-weights"


class _Odd(ValueError):
    """Something that no file of this toolkit has."""


def check(path: Path) -> int:
    """Refuse an ONNX file that reaches for other files or holds what no network of this toolkit has.

    What is let in takes memory in proportion to its weights, and to the pictures of a batch; see `onnx_shapes`. Returns
    how many numbers it computes for a picture.

    Raises:
        WeightsError: that is so, or the file cannot be read or is no ONNX.
    """
    data = mapped(path)
    try:
        if len(data) > LARGEST:
            raise ValueError("it is larger than 2 GB")
        nodes, stored, shape = _parts(Message(data))
        try:
            return onnx_shapes.check(nodes, stored, shape)
        except ValueError as error:
            raise _Odd(str(error)) from error
    except _Odd as error:
        raise WeightsError(f"{path} is refused: it has {error}", FOREIGN) from error
    except ValueError as error:
        raise WeightsError(f"{path} cannot be opened: {error}", "the file is damaged; export it anew") from error


def _parts(model: Message) -> tuple[list[Node], dict[str, Stored], list[int]]:
    """Nodes, tensors by name, and the shape of the input (0: the batch)."""
    parts = _fields(MODEL, model)
    text = sum(len(entry.data) for entry in parts[14])
    if text > MOST_TEXT:
        raise _Odd(f"{text:,} bytes of metadata")
    nodes, stored, inputs = list[Node](), dict[str, Stored](), list[Message]()
    for graph in parts[7]:  # readers merge several into one
        inner = _fields(GRAPH, graph)
        nodes += [_node(node) for node in inner[1]]
        inputs += inner[11]
        for name, tensor in map(_tensor, inner[5]):
            if name in stored:
                raise _Odd(f"two tensors called {name}")
            stored[name] = tensor
    if [(opset.text(1), opset.integer(2) in OPSETS) for opset in parts[8]] != [("", True)]:
        raise _Odd("operators of another version")
    if [value.text(1) for value in inputs] != ["input"]:
        raise _Odd("other inputs than `input`")
    sides = _only(_only(_only(inputs[0], 2), 1), 2).messages(1)
    return nodes, stored, [side.integer(1) for side in sides]


def _fields(kind: str, message: Message) -> dict[int, list[Message]]:
    """What is in each field of a message that may hold messages or text."""
    found: dict[int, list[Message]] = {number: [] for number in KNOWN[kind]}
    for number, value, _ in message.fields():
        if number not in found:
            raise _Odd(REFUSED.get((kind, number), f"field {number} of an ONNX {kind}"))
        if isinstance(value, memoryview):
            found[number].append(Message(value, message.budget))
    return found


def _only(message: Message, number: int) -> Message:
    """The message in a field that is there once: readers merge several into one."""
    found = list(message.messages(number))
    if len(found) != 1:
        raise _Odd("an input that is described more than once, or not at all")
    return found[0]


def _text(found: list[Message]) -> str:
    return str(found[-1].data, "utf-8") if found else ""


def _node(message: Message) -> Node:
    parts = _fields(NODE, message)
    attributes: dict[str, list[int]] = {}
    for attribute in parts[5]:
        name, kind = _text(_fields(ATTRIBUTE, attribute)[1]), attribute.integer(20)
        if name in attributes or kind not in {NUMBER, INTEGER, INTEGERS}:
            raise _Odd(f"a node with an attribute {name} that is there twice, or is no number")
        attributes[name] = attribute.integers(8) if kind == INTEGERS else [attribute.integer(3)] * (kind == INTEGER)
    inputs, outputs = ([_text([name]) for name in parts[number]] for number in (1, 2))
    return Node(_text(parts[3]), _text(parts[4]), inputs, outputs, attributes)


def _tensor(message: Message) -> tuple[str, Stored]:
    parts = _fields(TENSOR, message)
    name, data = _text(parts[8]), parts[9][-1].data if parts[9] else memoryview(b"")
    try:
        return name, onnx_shapes.stored(message.integer(2), message.integers(1), data)
    except ValueError as error:
        raise _Odd(f"a tensor {name} {error}") from error
