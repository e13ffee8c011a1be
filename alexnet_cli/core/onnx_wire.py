"""What an ONNX file is made of, by its wire format alone, before anything that obeys it opens it. No onnx.

A tensor may say that its values lie in another file, anywhere on this machine, and a few operators may ask for any
amount of memory. So only what `alexnet export` writes is let in: these fields, and nodes whose results fit a network
of the size of its weights (`onnx_shapes`). It takes a millisecond or two: values are stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alexnet_cli.core import onnx_shapes
from alexnet_cli.core.onnx_shapes import Node, Stored
from alexnet_cli.core.protobuf import Field, Message, mapped
from alexnet_cli.errors import WeightsError

LARGEST = 2**31  # bytes of a protobuf message
MOST_TEXT = 2**24  # bytes of metadata; those of 20,000 classes take one or two million
OPSETS = frozenset((17,))
INTEGER, INTEGERS = 2, 7  # types of an attribute

MODEL, GRAPH, NODE, ATTRIBUTE, TENSOR = "model", "graph", "node", "attribute", "tensor"
# Field numbers (onnx.proto) that files of this toolkit have, by the kind of message.
KNOWN = {
    MODEL: frozenset((1, 2, 3, 7, 8, 14)),
    GRAPH: frozenset((1, 2, 5, 11, 12)),
    NODE: frozenset((1, 2, 3, 4, 5)),
    ATTRIBUTE: frozenset((1, 3, 8, 20)),
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


def check(path: Path) -> None:
    """Refuse an ONNX file that reaches for other files or holds what no network of this toolkit has.

    What is let in takes memory in proportion to its weights, and to the pictures of a batch; see `onnx_shapes`.

    Raises:
        WeightsError: that is so, or the file cannot be read or is no ONNX.
    """
    data = mapped(path)
    try:
        if len(data) > LARGEST:
            raise ValueError("it is larger than 2 GB")
        nodes, stored, shape = _parts(Message(data))
        try:
            onnx_shapes.check(nodes, stored, shape)
        except ValueError as error:
            raise _Odd(str(error)) from error
    except _Odd as error:
        raise WeightsError(f"{path} is refused: it has {error}", FOREIGN) from error
    except ValueError as error:
        raise WeightsError(f"{path} cannot be opened: {error}", "the file is damaged; export it anew") from error


def _parts(model: Message) -> tuple[list[Node], dict[str, Stored], list[int]]:
    """Nodes, tensors by name, and the shape of the input (0: the batch)."""
    nodes, stored, shapes, opsets, text = list[Node](), dict[str, Stored](), dict[str, list[int]](), list[Message](), 0
    for number, value in _known(MODEL, model):
        part = _message(value, model)
        if number == 8:
            opsets.append(part)
        text += len(part.data) if number == 14 else 0
        for kind, found in _known(GRAPH, part) if number == 7 else ():
            inner = _message(found, model)
            if kind == 1:
                nodes.append(_node(inner))
            elif kind == 5:
                name, tensor = _tensor(inner)
                if name in stored:
                    raise _Odd(f"two tensors called {name}")
                stored[name] = tensor
            elif kind == 11:
                tensors = _only(_only(inner, 2), 1)
                shapes[inner.text(1)] = [dimension.integer(1) for dimension in _only(tensors, 2).messages(1)]
    if [(opset.text(1), opset.integer(2) in OPSETS) for opset in opsets] != [("", True)]:
        raise _Odd("operators of another version")
    if text > MOST_TEXT:
        raise _Odd(f"{text:,} bytes of metadata")
    if list(shapes) != ["input"]:
        raise _Odd("other inputs than `input`")
    return nodes, stored, shapes["input"]


def _known(kind: str, message: Message) -> Iterator[tuple[int, Field]]:
    """The fields of a message, by number."""
    for found in message.fields():
        if found.number not in KNOWN[kind]:
            raise _Odd(REFUSED.get((kind, found.number), f"field {found.number} of an ONNX {kind}"))
        yield found.number, found


def _message(found: Field, within: Message) -> Message:
    data = found.value if isinstance(found.value, memoryview) else memoryview(b"")
    return Message(data, within.budget)


def _only(message: Message, number: int) -> Message:
    """The message in a field that is there once: readers merge several into one."""
    found = list(message.messages(number))
    if len(found) != 1:
        raise _Odd("an input that is described more than once, or not at all")
    return found[0]


def _node(message: Message) -> Node:
    attributes: dict[str, list[int]] = {}
    for number, found in _known(NODE, message):
        if number == 5:
            attribute = _message(found, message)
            list(_known(ATTRIBUTE, attribute))
            name, kind = attribute.text(1), attribute.integer(20)
            if name in attributes or kind not in {INTEGER, INTEGERS}:
                raise _Odd(f"a node with an attribute {name} that is there twice, or is no integer")
            attributes[name] = attribute.integers(8) if kind == INTEGERS else [attribute.integer(3)]
    inputs, outputs = ([str(v, "utf-8") for v in message.all(n) if isinstance(v, memoryview)] for n in (1, 2))
    return Node(message.text(3), message.text(4), inputs, outputs, attributes)


def _tensor(message: Message) -> tuple[str, Stored]:
    list(_known(TENSOR, message))
    name, kind = message.text(8), message.integer(2)
    raw = [value for value in message.all(9) if isinstance(value, memoryview)]
    data = raw[-1] if raw else memoryview(b"")
    try:
        return name, onnx_shapes.stored(kind, message.integers(1), data)
    except ValueError as error:
        raise _Odd(f"a tensor {name} {error}") from error
