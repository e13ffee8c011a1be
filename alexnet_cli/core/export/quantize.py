"""Convert a float32 graph of `onnx_graph.build_graph` to float16 or int8. No torch.

float16: half the size, and faster on a GPU. Weights, mean image and activations are float16; input and outputs stay
float32. Response normalization is computed in float32, since the squares would overflow float16.

int8: a quarter of the size, and the fastest on a CPU. The graph must be built with `rows`. It gets pairs of
QuantizeLinear and DequantizeLinear with fixed scales: weights are int8 with a scale per output channel, activations
uint8 with a scale and zero point per tensor. Weights use the codes -64 to 64 only, so that no CPU overflows. Inputs and
outputs of layers are quantized, and so is pooling, which is exact on quantized numbers. Response normalization, logits
and the biases of fully connected layers stay float32; the mean image is float16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from alexnet_cli.core.devices import count_cores

CALIBRATION_IMAGES = 256  # already from 64 on, more images change the logits by less than 1 % of their spread
BATCH = 8
LAYERS = frozenset(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "logits"))
SELECTING = frozenset(("MaxPool", "Flatten"))  # operators whose outputs are some of their inputs
MAX_CODE = 64  # x86 without VNNI adds two products of a uint8 and an int8 in 16 bits: 2 * 255 * 64 < 2**15
MAX_BIAS = 2**30  # half of int32 leaves room for the sum
NORMALIZATION = re.compile(r"(within_)?norm\d")

Range = tuple[float, float]
Array = npt.NDArray[np.float32]


def to_float16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same network in float16."""
    result = _copy_without_nodes(proto)
    converter = _Float16Converter(proto.graph, result.graph)
    for node in proto.graph.node:
        converter.add(node)
    result.graph.initializer.extend(converter.convert_constant(tensor) for tensor in proto.graph.initializer)
    return result


def _copy_without_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with inputs, outputs and metadata, but without nodes and constants."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.graph.node[:], result.graph.initializer[:]
    return result


class _Float16Converter:
    """Copies a graph node by node, with a cast wherever float16 meets float32."""

    def __init__(self, old: onnx.GraphProto, new: onnx.GraphProto) -> None:
        self.new = new
        self.outputs = {output.name for output in old.output}
        self.types: dict[str, int] = {"input": TensorProto.FLOAT}  # of each tensor so far
        self.casts: dict[str, str] = {}
        self.float32 = {name for node in old.node if _node_type(node) == TensorProto.FLOAT for name in node.input}

    def add(self, node: onnx.NodeProto) -> None:
        """Copy a node. A cast after it makes an output of the network float32."""
        kind, (output,) = _node_type(node), node.output
        copy = helper.make_node(node.op_type, [], [output], node.name)
        copy.attribute.extend(node.attribute)
        copy.input.extend(self._cast(name, kind) for name in node.input)
        if output in self.outputs and kind == TensorProto.FLOAT16:
            copy.output[0] = f"{output}.half"
        self.new.node.append(copy)
        self.types[copy.output[0]] = kind
        if copy.output[0] != output:
            self.new.node.append(helper.make_node("Cast", [copy.output[0]], [output], f"{output}.cast", to=1))
            self.types[output] = TensorProto.FLOAT

    def _cast(self, name: str, kind: int) -> str:
        """Return the name of the tensor in that precision. Constants already have it."""
        if self.types.get(name, kind) == kind:
            return name
        if name not in self.casts:
            self.casts[name] = f"{name}.cast"
            self.new.node.append(helper.make_node("Cast", [name], [f"{name}.cast"], f"{name}.cast", to=kind))
        return self.casts[name]

    def convert_constant(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """Return a constant in the precision of the nodes that read it."""
        if tensor.data_type != TensorProto.FLOAT or tensor.name in self.float32:
            return tensor
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)


def _node_type(node: onnx.NodeProto) -> int:
    """Return the precision that a node computes in."""
    is_float32 = node.name == "probabilities" or NORMALIZATION.match(node.name)
    return TensorProto.FLOAT if is_float32 else TensorProto.FLOAT16


def measure_ranges(proto: onnx.ModelProto, crops: npt.NDArray[np.uint8]) -> dict[str, Range]:
    """Return the lowest and highest value of each tensor to quantize, over crops, uint8 N x 3 x S x S, N > 0."""
    import onnxruntime

    names = list(dict.fromkeys(_quantized_tensors(proto.graph).values()))
    with_outputs = onnx.ModelProto()
    with_outputs.CopyFrom(proto)
    with_outputs.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, count_cores()
    session = onnxruntime.InferenceSession(
        with_outputs.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for start in range(0, len(crops), BATCH):
        values = session.run(names, {"input": crops[start : start + BATCH].astype(np.float32)})
        low = np.minimum(low, [value.min() for value in values])
        high = np.maximum(high, [value.max() for value in values])
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _quantized_tensors(graph: onnx.GraphProto) -> dict[str, str]:
    """Map each tensor to quantize to the tensor whose scale it shares."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    result: dict[str, str] = {}
    for node in graph.node:
        source, output = node.input[0], node.output[0]
        if node.name in LAYERS:
            result.setdefault(source, source)
            if node.name != "logits":  # a ReLU belongs to its layer, so that the scale begins at zero
                is_before_relu = [reader.op_type for reader in readers[output]] == ["Relu"]
                layer_output = readers[output][0].output[0] if is_before_relu else output
                result[layer_output] = layer_output
        elif node.op_type in SELECTING:
            result.setdefault(source, source)
            result[output] = result[source]
    return result


def to_int8(proto: onnx.ModelProto, ranges: Mapping[str, Range]) -> onnx.ModelProto:
    """Return the same network in int8, with `ranges` from `measure_ranges`."""
    result = _copy_without_nodes(proto)
    converter = _Int8Converter(proto.graph, result.graph, ranges)
    for node in proto.graph.node:
        converter.add(node)
    converter.add_constants()
    return result


class _Int8Converter:
    """Copies a graph node by node and quantizes layers and pooling."""

    def __init__(self, old: onnx.GraphProto, new: onnx.GraphProto, ranges: Mapping[str, Range]) -> None:
        self.new = new
        self.constants = {tensor.name: tensor for tensor in old.initializer}
        tensors = _quantized_tensors(old)
        self.scales = {name: activation_scale(ranges[shared]) for name, shared in tensors.items()}
        self.renamed: dict[str, str] = {}

    def add(self, node: onnx.NodeProto) -> None:
        """Copy a node. Layers get int8 weights."""
        inputs = [self._quantize(name) if name in self.scales else self.renamed.get(name, name) for name in node.input]
        if node.name in LAYERS:
            self._add_layer(node, inputs[0])
            return
        copy = self.new.node.add()
        copy.CopyFrom(node)
        copy.ClearField("input")
        copy.input.extend(inputs)
        if node.op_type == "Slice":
            self._halve(node)

    def add_constants(self) -> None:
        """Add the constants that the new graph uses."""
        used = {name for node in self.new.node for name in node.input}
        self.new.initializer.extend(tensor for name, tensor in self.constants.items() if name in used)

    def _quantize(self, name: str) -> str:
        """Quantize and dequantize a tensor: ONNX Runtime computes the layer between two such pairs in int8."""
        if name not in self.renamed:
            scale, zero = self.scales[name]
            parameters = [
                self._constant(f"{name}.scale", np.array(scale)),
                self._constant(f"{name}.zero", np.array(zero)),
            ]
            codes = self._node("QuantizeLinear", [name, *parameters], f"{name}.quantized")
            self.renamed[name] = self._node("DequantizeLinear", [codes, *parameters], f"{name}.back")
        return self.renamed[name]

    def _add_layer(self, node: onnx.NodeProto, x: str) -> None:
        """Add a convolution or a fully connected layer of the dequantized tensor `x`."""
        name, input_scale = node.name, self.scales[node.input[0]][0]
        weight, bias = (numpy_helper.to_array(self.constants[f"{name}.{part}"]) for part in ("weight", "bias"))
        scale, codes = quantize_weights(weight, bias, input_scale)
        if node.op_type == "Gemm":
            # Inputs x outputs, which ONNX Runtime multiplies without copying. The bias is float32: one of int32 codes
            # is right for the first image only in OpenCV 4.
            product = self._node("Gemm", [x, self._dequantize(f"{name}.weight", codes.T, scale, 1)], f"{name}.product")
            self._node("Add", [product, f"{name}.bias"], name)
            return
        bias_codes = np.rint(bias / (scale * input_scale)).astype(np.int32)
        weight_name = self._dequantize(f"{name}.weight", codes, scale)
        bias_name = self._dequantize(f"{name}.bias", bias_codes, scale * input_scale)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._node("Conv", [x, weight_name, bias_name], name, **attributes)

    def _dequantize(self, name: str, codes: npt.NDArray[np.signedinteger], scale: Array, axis: int = 0) -> str:
        """Add a constant with a scale per entry of an axis. Returns the name of its values."""
        values: dict[str, npt.NDArray[Any]] = {"codes": codes, "scale": scale}
        if codes.dtype == np.int8:  # int32 has none
            values["zero"] = np.zeros(len(scale), np.int8)
        names = [self._constant(f"{name}.{part}", value) for part, value in values.items()]
        return self._node("DequantizeLinear", names, f"{name}.back", axis=axis)

    def _halve(self, node: onnx.NodeProto) -> None:
        """Store the mean image in float16: finer than the scale of the input."""
        name, output = node.input[0], node.output[0]
        half = numpy_helper.to_array(self.constants[name]).astype(np.float16)
        self.constants[name] = numpy_helper.from_array(half, name)
        self.renamed[output] = self._node("Cast", [output], f"{output}.cast", to=TensorProto.FLOAT)

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.new.node.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output


def activation_scale(values: Range) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point for which 0..255 span the values and 0.0 is exact."""
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return scale, np.uint8(np.rint(-low / scale))


def quantize_weights(weight: Array, bias: Array, input_scale: np.float32) -> tuple[Array, npt.NDArray[np.int8]]:
    """Return a scale per output channel, and the weights as codes up to MAX_CODE. The bias fits int32 too."""
    rows = weight.reshape(len(weight), -1)
    by_bias = np.abs(bias) / (input_scale * np.float32(MAX_BIAS))
    scale = np.maximum(np.abs(rows).max(1) / np.float32(MAX_CODE), by_bias)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.rint(rows / scale[:, None]).clip(-MAX_CODE, MAX_CODE).astype(np.int8)
    return scale, codes.reshape(weight.shape)
