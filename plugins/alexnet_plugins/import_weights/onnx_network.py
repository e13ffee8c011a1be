"""Reads an AlexNet in ONNX, such as the model zoo's bvlcalexnet.

The model zoo's networks take 224 pixels without padding and pad only the last pooling: maps of 54, 26, 12 and 6 pixels.
Padding a pooling on the right and below by one pixel equals clipping windows at the edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from alexnet_cli.core.model.architecture import CONV_LAYERS, POOL_STRIDE, LayerSpec, layer_specs
from alexnet_cli.errors import WeightsError
from alexnet_plugins.import_weights import imported
from alexnet_plugins.import_weights.imported import CAFFE_MEAN, Array, ImportedNetwork, corrupt, unsupported

WORDS = {"Conv": "conv", "Gemm": "fc", "Relu": "relu", "LRN": "norm", "MaxPool": "pool"}
NO_EFFECT = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Softmax", "Identity"}
FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Node:
    """One node of the graph, with its attributes by name."""

    operator: str
    inputs: Sequence[str]
    attributes: dict[str, Any]

    def integers(self, name: str, default: list[int]) -> list[int]:
        """Return an attribute of integers."""
        return list(self.attributes.get(name, default))

    def integer(self, name: str, default: int) -> int:
        """Return an attribute of one integer."""
        return int(self.attributes.get(name, default))

    @property
    def is_plain_window(self) -> bool:
        """Whether a convolution or pooling has no dilation, and all its padding in `pads`."""
        is_padded_here = self.attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        return is_padded_here and self.integers("dilations", [1, 1]) == [1, 1]

    def number(self, name: str, default: float) -> float:
        """Return an attribute of one float."""
        return imported.to_decimal(self.attributes.get(name, default))


def read_network(path: Path) -> ImportedNetwork:
    """Read an .onnx file.

    Raises:
        WeightsError: it is damaged, lacks its weights, was written by this toolkit, or is another network.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
        if any(entry.key == "alexnet.schema" for entry in model.metadata_props):
            raise unsupported(path, "it was written by alexnet export", f"use it as it is: -w {path}")
        if not model.HasField("graph"):
            raise WeightsError(f"{path} is not an ONNX file: it has no graph", "give a weights file")
        return _convert(path, model.graph)
    except (DecodeError, ValueError, TypeError, OverflowError) as error:
        raise corrupt(path, error) from error


def _convert(path: Path, graph: onnx.GraphProto) -> ImportedNetwork:
    nodes = _follow_chain(path, graph)
    by_word: dict[str, list[Node]] = {word: [] for word in WORDS.values()}
    words = [WORDS[node.operator] for node in nodes if node.operator in WORDS]
    for node in nodes:
        if node.operator in WORDS:
            by_word[WORDS[node.operator]].append(node)
    values = {tensor.name: tensor for tensor in graph.initializer}
    for constant in (node for node in graph.node if node.op_type == "Constant"):
        values |= {name: entry.t for name in constant.output for entry in constant.attribute if entry.name == "value"}
    tensors = {}
    for layer, node in imported.name_layers(path, by_word["conv"], by_word["fc"]).items():
        if len(node.inputs) < 3 or any(name not in values for name in node.inputs[1:3]):
            raise unsupported(
                path, f"the file has no weight and bias of {layer}", "give a file with the weights inside"
            )
        weight, bias = (_to_array(path, values[name]) for name in node.inputs[1:3])
        if layer in imported.FC_LAYERS and not node.integer("transB", 0):
            weight = weight.T
        if node.number("alpha", 1.0) != 1.0 or node.number("beta", 1.0) != 1.0:
            raise unsupported(path, f"{layer} is multiplied by a factor")
        tensors[layer] = imported.check_tensors(path, layer, weight, bias)
    sides = _check_geometry(path, _input_side(graph, nodes), by_word["conv"], by_word["pool"])
    orders, is_shown = imported.find_stage_orders(path, words)
    norm = imported.merge_settings(path, [_norm_settings(node) for node in by_word["norm"]])
    recipe = imported.build_recipe(path, {"mean": "rgb"} | sides | norm | orders)
    return ImportedNetwork(path, "ONNX", tensors, recipe, "bgr", CAFFE_MEAN, is_shown)


def _follow_chain(path: Path, graph: onnx.GraphProto) -> list[Node]:
    """Return the nodes from the image to the first output. Raises WeightsError for an operator that is not known."""
    makers = {name: proto for proto in graph.node for name in proto.output}
    nodes: list[Node] = []
    name = graph.output[0].name if graph.output else ""
    while proto := makers.pop(name, None):  # popped, so that a circle ends
        if proto.op_type not in NO_EFFECT and proto.op_type not in WORDS:
            raise unsupported(path, f"it uses the operator {proto.op_type}", "give a float32 AlexNet, not quantized")
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in proto.attribute}
        nodes.append(Node(proto.op_type, proto.input, attributes))
        name = proto.input[0] if proto.input else ""
    return nodes[::-1]


def _to_array(path: Path, tensor: TensorProto) -> Array:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        what = f"the values of {tensor.name} are in another file"
        raise unsupported(path, what, "save the model with its weights inside")
    if tensor.data_type not in FLOAT_TYPES:
        raise unsupported(path, f"{tensor.name} has values of type {tensor.data_type}", "give the float32 file")
    return numpy_helper.to_array(tensor)


def _input_side(graph: onnx.GraphProto, nodes: Sequence[Node]) -> int | None:
    """Return the side of the image that the first node takes; None if the file does not give it."""
    for value in graph.input:
        if nodes and value.name == nodes[0].inputs[0]:
            sides = [int(dimension.dim_value) for dimension in value.type.tensor_type.shape.dim]
            if len(sides) == 4 and sides[2] == sides[3]:
                return sides[2] or None
    return None


def _check_geometry(
    path: Path, side: int | None, convolutions: Sequence[Node], pools: Sequence[Node]
) -> dict[str, Any]:
    """Return the recipe values of input, padding and pooling. Raises WeightsError if a layer's geometry differs."""
    end_padding = 0  # of layer 1, on the right and below
    for layer, node in zip(CONV_LAYERS, convolutions, strict=True):
        pads, strides = node.integers("pads", [0] * 4), node.integers("strides", [1, 1])
        if layer == "conv1" and pads[:2] == [0, 0] and len(set(pads[2:])) == 1:
            end_padding, pads = pads[2], [0] * 4
        if len(set(pads)) != 1 or len(set(strides)) != 1 or not node.is_plain_window:
            raise unsupported(path, f"{layer} has padding {pads}, strides {strides}, auto_pad, or dilations")
        imported.check_geometry(path, layer, strides[0], pads[0])
    side = side or (224 if end_padding else 227)
    values: dict[str, Any] = {"input_size": side, "edge_padding": side != 224 or end_padding > 0}
    specs = layer_specs(imported.build_recipe(path, values), 1000)
    if end_padding != specs[0].padding[1]:
        raise unsupported(path, f"conv1 has padding {end_padding} on the right, in this network {specs[0].padding[1]}")
    try:
        _check_pooling(path, specs, pools)
    except WeightsError:
        values["pool_ceil"] = "pool5"
        _check_pooling(path, layer_specs(imported.build_recipe(path, values), 1000), pools)
    return values


def _check_pooling(path: Path, specs: Sequence[LayerSpec], pools: Sequence[Node]) -> None:
    """Raise WeightsError unless each pooling makes maps as large as those of `specs`."""
    for spec, node in zip((spec for spec in specs if spec.pooled_side), pools, strict=False):
        pads = node.integers("pads", [0] * 4)
        steps = (spec.side - 3 + pads[-1]) / POOL_STRIDE
        pooled_side = 1 + (math.ceil(steps) if node.integer("ceil_mode", 0) else math.floor(steps))
        kernel, strides = node.integers("kernel_shape", []), node.integers("strides", [1, 1])
        is_ours = kernel == [3, 3] and strides == [POOL_STRIDE] * 2 and pads[:2] == [0, 0] and len(set(pads[2:])) == 1
        if not is_ours or not node.is_plain_window or pooled_side != spec.pooled_side:
            what = f"pooling after {spec.name} has kernel {kernel}, strides {strides}, padding {pads}"
            raise unsupported(path, f"{what}; this network turns {spec.side} pixels into {spec.pooled_side}")


def _norm_settings(node: Node) -> dict[str, Any]:
    return {
        "lrn_size": node.integer("size", 0),
        "lrn_alpha": node.number("alpha", 1e-4),
        "lrn_beta": node.number("beta", 0.75),
        "lrn_k": node.number("bias", 1.0),
    }
