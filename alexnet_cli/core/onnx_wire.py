"""What an ONNX file is made of, by its wire format alone, before anything that obeys it opens it. No onnx.

A tensor may say that its values lie in another file, anywhere on this machine, and an operator may ask for any
amount of memory; no file of this toolkit has either. Walking one takes microseconds: values are stepped over.
"""

from __future__ import annotations

from pathlib import Path

from alexnet_cli.core.protobuf import Message, mapped
from alexnet_cli.errors import WeightsError

LARGEST = 2**31  # bytes of a protobuf message
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
FOREIGN = "networks come from `alexnet export`; another program's file: alexnet import-weights"


def check(path: Path) -> None:
    """Refuse an ONNX file that reaches for other files or holds what no network of this toolkit has.

    Raises:
        WeightsError: that is so, or the file cannot be read or is no ONNX.
    """
    data = mapped(path)
    try:
        if len(data) > LARGEST:
            raise ValueError("it is larger than 2 GB")
        found = _first_refused(Message(data))
    except ValueError as error:
        raise WeightsError(f"{path} cannot be opened: {error}", "the file is damaged; export it anew") from error
    if found:
        raise WeightsError(f"{path} is refused: it has {found}", FOREIGN)


def _first_refused(model: Message) -> str:
    """What in the model is not to be had, in words; nothing if all is well. ValueError for what is no ONNX."""
    waiting = [("model", model, 0)]
    while waiting:
        kind, message, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"it has more parts than any network: over {DEEPEST} within one another")
        for number, value, _ in message.fields():
            place = kind, number
            if place in REFUSED or (place == LOCATION and not (isinstance(value, int) and value == 0)):
                return REFUSED.get(place, REFUSED["tensor", 13])
            text = bytes(value[:40]) if place == OPERATOR and isinstance(value, memoryview) else b""
            if place == OPERATOR and text not in OPERATORS:
                return f"the operator {text.decode('ascii', 'replace')}"
            if isinstance(value, memoryview) and number in WITHIN[kind]:
                waiting.append((WITHIN[kind][number], Message(value, message.budget), depth + 1))
    return ""
