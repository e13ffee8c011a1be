"""How much the nodes of an ONNX graph compute, from shapes alone: no graph may ask for more than its weights explain.

    per picture   the numbers of all results together: at most 2^20 + 1536 sqrt(w), for w stored numbers (krizhevsky
                  in int8 has 2^20 + 1200 sqrt(w)); the same for the windows that a convolution unfolds
    once          the numbers of all constants that are computed from stored ones: at most 2 w

Activations grow with the width of a network, weights with its square. Every rule below leaves the batch in the first
dimension, as a factor, so that what is counted for one picture holds for each. No onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import NamedTuple

import numpy as np

SIZES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 10: 2}  # of a number in bytes, by its type in onnx.proto
INTEGERS = 7  # int64
FEW = 8  # integers of a tensor that says how to reshape or to cut
FLOATS = ([1], [10])
MOST_NODES = 1000
ROOM, FACTOR = 2**20, 1536

# Operators, and the attributes that they may have.
ALIKE = {name: frozenset[str]() for name in ("Relu", "Tanh", "Sigmoid", "Sqrt", "QuantizeLinear")}
ALIKE |= {"Softmax": frozenset({"axis"}), "DequantizeLinear": frozenset({"axis"}), "Cast": frozenset({"to"})}
ALIKE |= {"LRN": frozenset({"size", "alpha", "beta", "bias"})}  # the peer in `alexnet benchmark infer`
PAIRS = {name: frozenset[str]() for name in ("Sub", "Mul", "Div", "Pow")}
OPERATORS = {
    **ALIKE,
    **PAIRS,
    "Conv": frozenset({"kernel_shape", "group", "strides", "pads"}),
    "Gemm": frozenset({"transB"}),
    "MaxPool": frozenset({"kernel_shape", "strides", "ceil_mode"}),
    "Flatten": frozenset({"axis"}),
    "Transpose": frozenset({"perm"}),
    "Reshape": frozenset[str](),
    "Slice": frozenset[str](),
}
BLOCKED = frozenset(("Conv", "MaxPool", "Relu", "Tanh", "Sigmoid", "Mul"))
BLOCK = 16  # channels that ONNX Runtime keeps together for these on a CPU; what is missing to a multiple is filled up
ON_CONSTANTS = frozenset(("Slice", "Cast", "DequantizeLinear"))

Shape = tuple[int, ...]


class Node(NamedTuple):
    """One node; of an attribute only its integers."""

    name: str
    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Sequence[int]]

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """An attribute, as many integers as the default has, none below 0."""
        found = list(self.attributes.get(name, default))
        if len(found) != len(default) or max(found, default=0) >= 2**31:
            raise ValueError(f"{name} {found}")
        return found


class Stored(NamedTuple):
    """A constant: its shape, and its values if they are a few integers."""

    shape: Shape
    values: tuple[int, ...] = ()


def stored(kind: int, shape: Sequence[int], data: memoryview) -> Stored:
    """A tensor of the file. Raises ValueError if its bytes are not those of its shape."""
    if kind not in SIZES:
        raise ValueError(f"of type {kind}")
    if prod(shape) * SIZES[kind] != len(data) or not prod(shape):
        raise ValueError(f"of {len(data):,} bytes that do not fill its shape, {_shown(shape)}")
    few = kind == INTEGERS and prod(shape) <= FEW
    return Stored(tuple(shape), tuple(np.frombuffer(data, "<i8").tolist()) if few else ())


class _Counts:
    """Shapes by name, with 1 for the batch, and the numbers counted so far."""

    def __init__(self, constants: Mapping[str, Stored], picture: Shape) -> None:
        self.constants = dict(constants)
        self.pictures = {"input": picture}
        self.computed = prod(picture)
        self.once = self.unfolded = 0


def check(nodes: Sequence[Node], constants: Mapping[str, Stored], shape: Sequence[int]) -> int:
    """Go through the nodes in order; `shape` is that of the input, 0 standing for the batch.

    Returns the numbers of all results together, for a picture.

    Raises:
        ValueError: a node is none of ours, does not fit its inputs, or gives more than the weights explain.
    """
    if len(nodes) > MOST_NODES:
        raise ValueError(f"{len(nodes):,} nodes")
    if len(shape) != 4 or shape[0] or not all(0 < n < 2**31 for n in shape[1:]):
        raise ValueError(f"an input of shape {_shown(shape)}")
    weights = sum(prod(tensor.shape) for tensor in constants.values())
    counts = _Counts(constants, (1, *shape[1:]))
    if unused := counts.constants.keys() - {name for node in nodes for name in node.inputs}:
        raise ValueError(f"tensors that nothing uses: {min(unused)}")
    for node in nodes:
        try:
            _add(node, counts)
            if max(counts.computed, counts.unfolded) > ROOM + FACTOR * isqrt(weights):
                raise ValueError("more numbers than a network of so few weights has")
            if counts.once > 2 * weights:
                raise ValueError("more constants than are stored")
        except ValueError as error:
            place = node.name or next(iter(node.outputs), "")
            raise ValueError(f"the operator {node.operator} ({place}): {error}") from error
    return counts.computed


def _add(node: Node, counts: _Counts) -> None:
    """Note what a node gives."""
    if node.operator not in OPERATORS:
        raise ValueError("no network of this toolkit uses it")
    if odd := set(node.attributes) - OPERATORS[node.operator]:
        raise ValueError(f"with {', '.join(sorted(odd))}")
    if len(node.outputs) != 1 or {node.outputs[0]} & (counts.pictures.keys() | counts.constants.keys()):
        raise ValueError("not one result of its own")
    unknown = [name for name in node.inputs if name not in counts.pictures and name not in counts.constants]
    if unknown or not node.inputs:
        raise ValueError(f"without {', '.join(unknown) or 'an input'}")
    first, *others = node.inputs
    rest = [counts.constants[name] for name in others if name in counts.constants]
    if node.operator == "Cast" and node.attributes.get("to") not in FLOATS:
        raise ValueError("to another type than float")
    if first in counts.constants:
        if node.operator not in ON_CONSTANTS or len(rest) < len(others):
            raise ValueError("of constants")
        result = counts.constants[first].shape
        result = _slice(result, rest) if node.operator == "Slice" else result
        counts.constants[node.outputs[0]] = Stored(result)
        counts.once += prod(result)
        return
    given = counts.pictures[first]
    if len(rest) == len(others):
        result = _result(node, given, rest, counts)
    elif node.operator in PAIRS and [counts.pictures.get(name) for name in others] == [given]:
        result = given
    else:
        raise ValueError("two inputs that do not fit")
    counts.pictures[node.outputs[0]] = result
    filled = -result[1] % BLOCK if node.operator in BLOCKED and len(result) == 4 else 0
    counts.computed += prod(result) + (filled * prod(result) // result[1] if filled else 0)


def _result(node: Node, given: Shape, rest: Sequence[Stored], counts: _Counts) -> Shape:
    """The shape of what a node makes of a tensor that depends on the picture, and of constants."""
    if node.operator in PAIRS and len(rest) == 1 and _spreads(rest[0].shape, given):
        return given
    if node.operator in ALIKE:
        return given
    if node.operator == "Conv" and len(rest) in {1, 2}:
        return _conv(node, given, rest, counts)
    if node.operator == "Gemm" and len(rest) in {1, 2} and len(given) == len(rest[0].shape) == 2:
        inputs, outputs = rest[0].shape[::-1] if node.integers("transB", [0])[0] else rest[0].shape
        if given[1] == inputs and all(_spreads(bias.shape, (1, outputs)) for bias in rest[1:]):
            return given[0], outputs
    if node.operator == "MaxPool" and not rest and len(given) == 4:
        return _pool(node, given)
    if node.operator == "Flatten" and not rest and node.integers("axis", [1]) == [1]:
        return given[0], prod(given[1:])
    if node.operator == "Transpose" and not rest:
        order = node.integers("perm", given)
        if order[0] == 0 and sorted(order) == list(range(len(given))):
            return tuple(given[place] for place in order)
    if node.operator == "Reshape" and len(rest) == 1 and len(rest[0].shape) == 1 and rest[0].values:
        batch, *sides = rest[0].values
        if len(sides) == len(given) - 1:
            sides = [side or size for side, size in zip(sides, given[1:], strict=True)]
        if batch == -1 and min(sides, default=0) > 0 and prod(given) % prod(sides) == 0:
            return prod(given) // prod(sides), *sides
    raise ValueError(f"it does not fit {_shown(given)}" + "".join(f", {_shown(other.shape)}" for other in rest))


def _conv(node: Node, given: Shape, rest: Sequence[Stored], counts: _Counts) -> Shape:
    weight = rest[0].shape
    if len(weight) != 4 or len(given) != 4:
        raise ValueError(f"it does not fit {_shown(given)}, {_shown(weight)}")
    kernel, strides = node.integers("kernel_shape", weight[2:]), node.integers("strides", [1, 1])
    pads, group = node.integers("pads", [0] * 4), node.integers("group", [1])[0]
    fits = given[1] == weight[1] * group and group and weight[0] % group == 0 and kernel == list(weight[2:])
    if not fits or not all(strides) or any(bias.shape != weight[:1] for bias in rest[1:]):
        raise ValueError(f"it does not fit {_shown(given)}, {_shown(weight)}")
    sides = [
        (side + before + after - size) // stride + 1
        for side, before, after, size, stride in zip(given[2:], pads, pads[2:], kernel, strides, strict=False)
    ]
    if min(sides) < 1:
        raise ValueError(f"its kernel is larger than {_shown(given)}")
    counts.unfolded = max(counts.unfolded, given[0] * prod(weight[1:]) * prod(sides))
    return given[0], weight[0], *sides


def _pool(node: Node, given: Shape) -> Shape:
    kernel, strides = node.integers("kernel_shape", [0, 0]), node.integers("strides", [1, 1])
    up = node.integers("ceil_mode", [0])[0]
    for side, size, stride in zip(given[2:], kernel, strides, strict=True):
        # Further apart than they are wide, rounded up, the last would lie outside: ONNX Runtime leaves it out.
        if not 0 < stride <= size <= side:
            raise ValueError(f"its windows do not fit {_shown(given)}")
    steps = [
        -(-(side - size) // stride) if up else (side - size) // stride
        for side, size, stride in zip(given[2:], kernel, strides, strict=True)
    ]
    return *given[:2], *(step + 1 for step in steps)


def _slice(given: Shape, rest: Sequence[Stored]) -> Shape:
    """Starts, ends and axes are stored, and lie within the tensor."""
    sides = list(given)
    if (
        len(rest) != 3
        or len({len(part.values) for part in rest}) != 1
        or len(set(rest[2].values)) < len(rest[2].values)
    ):
        raise ValueError("without starts, ends and axes")
    for start, end, axis in zip(*(part.values for part in rest), strict=True):
        if not (0 <= axis < len(given) and 0 <= start < end <= given[axis]):
            raise ValueError(f"from {start} to {end} of {_shown(given)}")
        sides[axis] = end - start
    return tuple(sides)


def _spreads(small: Shape, large: Shape) -> bool:
    """Whether a tensor is repeated to fill another, which stays as it is."""
    return len(small) <= len(large) and all(a in {1, b} for a, b in zip(reversed(small), reversed(large), strict=False))


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
