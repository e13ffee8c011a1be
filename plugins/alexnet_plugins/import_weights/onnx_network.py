"""An AlexNet in ONNX, such as the model zoo's bvlcalexnet: its nodes, in order, as the eight layers of this network.

The model zoo's takes 224 pixels without padding, so that maps of layer 1 have 54 pixels a side; its pooling is padded
at the right and below, which is the same as clipping windows at the edge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import CAFFE
from alexnet_plugins.import_weights import imported
from alexnet_plugins.import_weights.imported import CAFFE_MEAN, Array, ImportedNetwork, corrupt, unsupported

WORDS = {"Conv": "conv", "Gemm": "fc", "Relu": "relu", "LRN": "norm", "MaxPool": "pool"}
IDLE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Softmax", "Identity", "Constant"}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
GRIDS = {(224, 0): 54, (224, 3): 55, (227, 0): 55}  # side and padding at the end -> side of layer 1
POOLED = (27, 13, 6)


@dataclass(frozen=True)
class Node:
    """One node of the graph, with its attributes by name."""

    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: dict[str, Any]

    def integers(self, name: str, default: list[int]) -> list[int]:
        """An attribute of integers."""
        return list(self.attributes.get(name, default))

    def integer(self, name: str, default: int) -> int:
        """An attribute of one integer."""
        return int(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """An attribute of one float."""
        return imported.decimal(self.attributes.get(name, default))


def read(path: Path) -> ImportedNetwork:
    """Read an .onnx file.

    Raises:
        WeightsError: it is damaged, keeps its weights elsewhere, is ours already, or another network.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
        if any(entry.key == "alexnet.schema" for entry in model.metadata_props):
            raise unsupported(path, "it is an ONNX file of this toolkit already", f"use it as it is: -w {path}")
        if not model.HasField("graph"):
            raise WeightsError(f"{path} is no ONNX file: it holds no graph", "name a weights file")
        return _network(path, model.graph)
    except (DecodeError, ValueError, TypeError, OverflowError) as error:
        raise corrupt(path, error) from error


def _network(path: Path, graph: onnx.GraphProto) -> ImportedNetwork:
    nodes = [
        Node(n.op_type, n.input, n.output, {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute})
        for n in graph.node
    ]
    for node in nodes:
        if node.operator not in IDLE | set(WORDS):
            raise unsupported(
                path, f"it uses {node.operator}, which this network does not (quantized files are not read)"
            )
    chain = [node for node in nodes if node.operator != "Constant"]
    for before, after in itertools.pairwise(chain):
        if not after.inputs or not before.outputs or after.inputs[0] != before.outputs[0]:
            raise unsupported(path, f"a {after.operator} does not follow the {before.operator} before it")
    values = {tensor.name: tensor for tensor in graph.initializer}
    of = {word: [node for node in chain if WORDS.get(node.operator) == word] for word in WORDS.values()}
    tensors = {}
    for layer, node in imported.named(path, of["conv"], of["fc"]).items():
        missing = [name for name in node.inputs[1:3] if name not in values]
        if missing or len(node.inputs) < 3:
            raise unsupported(path, f"{layer} has no weight and bias among the file's values")
        weight, bias = (_tensor(path, values[name]) for name in node.inputs[1:3])
        if layer in imported.CONNECTED and not node.integer("transB", 0):
            weight = weight.T
        if node.number("alpha", 1.0) != 1.0 or node.number("beta", 1.0) != 1.0:
            raise unsupported(path, f"{layer} is multiplied by a factor")
        tensors[layer] = imported.shaped(path, layer, weight, bias)
    grid = _grid(path, _side(graph, chain), of["conv"], of["pool"])
    order, shown = imported.orders(path, [WORDS[node.operator] for node in chain if node.operator in WORDS])
    norms = imported.same(path, [_norm(node) for node in of["norm"]])
    recipe = imported.built(path, CAFFE, {"mean": "rgb"} | grid | norms | order)
    return ImportedNetwork(path, "ONNX", tensors, recipe, "bgr", CAFFE_MEAN, shown)


def _tensor(path: Path, tensor: TensorProto) -> Array:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise unsupported(
            path, f"the numbers of {tensor.name} lie in another file", "save the model with its weights inside"
        )
    if tensor.data_type not in FLOATS:
        raise unsupported(
            path, f"{tensor.name} has elements of type {tensor.data_type}, not floats", "take the float32 file"
        )
    return numpy_helper.to_array(tensor)


def _side(graph: onnx.GraphProto, chain: Sequence[Node]) -> int:
    """Side of the picture that the first node takes."""
    for value in graph.input:
        if chain and value.name == chain[0].inputs[0]:
            sides = [int(dimension.dim_value) for dimension in value.type.tensor_type.shape.dim]
            if len(sides) == 4 and sides[2] == sides[3]:
                return sides[2]
    return 224


def _grid(path: Path, side: int, convolutions: Sequence[Node], pools: Sequence[Node]) -> dict[str, Any]:
    """Recipe values of the input's size and padding, once every layer's geometry is as in this network."""
    end = 0
    for layer, node in zip(imported.CONVOLUTIONS, convolutions, strict=True):
        pads, strides = node.integers("pads", [0] * 4), node.integers("strides", [1, 1])
        if layer == "conv1" and pads[:2] == [0, 0] and pads[2:] in ([0, 0], [3, 3]):
            end, pads = pads[2], [0] * 4
        if len(set(pads)) != 1 or len(set(strides)) != 1 or node.integers("dilations", [1, 1]) != [1, 1]:
            raise unsupported(path, f"{layer} is padded by {pads}, moved by {strides}")
        imported.geometry(path, layer, strides[0], pads[0])
    if (side, end) not in GRIDS:
        raise unsupported(path, f"it takes pictures of {side} pixels, padded by {end}; this network 224 or 227")
    maps = GRIDS[side, end]
    for pooled, node in zip(POOLED, pools, strict=False):
        pads = node.integers("pads", [0] * 4)
        free = (maps - 3 + pads[-1]) / 2
        found = 1 + (math.ceil(free) if node.integer("ceil_mode", 0) else math.floor(free))
        kernel, strides = node.integers("kernel_shape", []), node.integers("strides", [1, 1])
        if kernel != [3, 3] or strides != [2, 2] or pads[:2] != [0, 0] or len(set(pads[2:])) != 1 or found != pooled:
            raise unsupported(
                path, f"a pooling of {kernel} at {strides}, padded by {pads}, makes {maps} pixels {found}"
            )
        maps = pooled
    return {"input_size": side, "edge_padding": GRIDS[side, end] == 55}


def _norm(node: Node) -> dict[str, Any]:
    return {
        "lrn_size": node.integer("size", 0),
        "lrn_alpha": node.number("alpha", 1e-4),
        "lrn_beta": node.number("beta", 0.75),
        "lrn_k": node.number("bias", 1.0),
    }
