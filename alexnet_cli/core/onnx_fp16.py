"""The half-precision twin of a float32 graph (`onnx_graph.build`): half its size, and faster on a GPU.

Weights, mean image and what flows between layers are float16; input and outputs stay float32. Response normalisation
is float32 inside: the squares of what a picture of 0..255 gives rise to would not fit.
"""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NORMALISATION = re.compile(r"conv\d\.(norm|within)")


def halved(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in float16."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.graph.node[:], result.graph.initializer[:]
    rewriting = _Rewriting(proto.graph, result.graph)
    for node in proto.graph.node:
        rewriting.add(node)
    for tensor in proto.graph.initializer:
        result.graph.initializer.append(rewriting.constant(tensor))
    return result


class _Rewriting:
    """Copies a graph node by node, with a cast wherever float16 meets float32."""

    def __init__(self, old: onnx.GraphProto, new: onnx.GraphProto) -> None:
        self.new = new
        self.outputs = {output.name for output in old.output}
        self.kinds: dict[str, int] = {"input": TensorProto.FLOAT}  # of what was computed so far
        self.casts: dict[str, str] = {}
        self.whole = {name for node in old.node if _kind(node) == TensorProto.FLOAT for name in node.input}

    def add(self, node: onnx.NodeProto) -> None:
        """Copy a node. An output of the network that comes out in half gets its name from the cast after it."""
        kind, (output,) = _kind(node), node.output
        copy = helper.make_node(node.op_type, [], [output], node.name)
        copy.attribute.extend(node.attribute)
        copy.input.extend(self._cast(name, kind) for name in node.input)
        if output in self.outputs and kind == TensorProto.FLOAT16:
            copy.output[0] = f"{output}.half"
        self.new.node.append(copy)
        self.kinds[copy.output[0]] = kind
        if copy.output[0] != output:
            self.new.node.append(helper.make_node("Cast", [copy.output[0]], [output], f"{output}.cast", to=1))
            self.kinds[output] = TensorProto.FLOAT

    def _cast(self, name: str, kind: int) -> str:
        """The tensor in that precision; constants are made in the one that is needed."""
        if self.kinds.get(name, kind) == kind:
            return name
        if name not in self.casts:
            self.casts[name] = f"{name}.cast"
            self.new.node.append(helper.make_node("Cast", [name], [f"{name}.cast"], f"{name}.cast", to=kind))
        return self.casts[name]

    def constant(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A constant in the precision of the nodes that read it."""
        if tensor.data_type != TensorProto.FLOAT or tensor.name in self.whole:
            return tensor
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)


def _kind(node: onnx.NodeProto) -> int:
    """The precision that a node computes in."""
    whole = node.name == "probabilities" or NORMALISATION.match(node.name)
    return TensorProto.FLOAT if whole else TensorProto.FLOAT16
