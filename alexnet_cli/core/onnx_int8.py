"""The int8 twin of a float32 graph (`onnx_graph.build` with rows): static, as QuantizeLinear and DequantizeLinear.

Weights are int8 with a scale for each output channel, activations uint8 with one scale and zero point for each tensor,
biases int32 in units of the product. What enters and what leaves a layer is quantised, and what is pooled: the maximum
of quantised numbers is exact. Response normalisation stays float32, the logits too. The mean image is kept in half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

LAYERS = frozenset(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "logits"))
SAME_NUMBERS = frozenset(("MaxPool", "Flatten"))  # what comes out of them was in what went in
MOST = 2**30  # of a bias: half of what int32 holds leaves room for the sum

Range = tuple[float, float]
Array = npt.NDArray[np.float32]


def points(proto: onnx.ModelProto) -> list[str]:
    """The tensors that are quantised, in order: their ranges have to be known."""
    return list(dict.fromkeys(_points(proto.graph).values()))


def _points(graph: onnx.GraphProto) -> dict[str, str]:
    """Each quantised tensor -> the one whose scale it shares."""
    after: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            after.setdefault(name, []).append(node)
    found: dict[str, str] = {}
    for node in graph.node:
        source, output = node.input[0], node.output[0]
        if node.name in LAYERS:
            found.setdefault(source, source)
            if node.name != "logits":  # a Relu is part of its layer: the scale's lowest value is zero
                end = after[output][0].output[0] if [n.op_type for n in after[output]] == ["Relu"] else output
                found[end] = end
        elif node.op_type in SAME_NUMBERS:
            found.setdefault(source, source)
            found[output] = found[source]
    return found


def quantised(proto: onnx.ModelProto, ranges: Mapping[str, Range]) -> onnx.ModelProto:
    """The same network in int8; `ranges` says for each of `points` which values its scale spans."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.graph.node[:], result.graph.initializer[:]
    rewriting = _Rewriting(proto.graph, result.graph, ranges)
    for node in proto.graph.node:
        rewriting.add(node)
    rewriting.keep_constants()
    return result


class _Rewriting:
    """Copies a graph node by node, quantised where it is to be."""

    def __init__(self, old: onnx.GraphProto, new: onnx.GraphProto, ranges: Mapping[str, Range]) -> None:
        self.new = new
        self.constants = {tensor.name: tensor for tensor in old.initializer}
        self.points = _points(old)
        self.scales = {name: activation_scale(ranges[root]) for name, root in self.points.items()}
        self.renamed: dict[str, str] = {}
        self.units: dict[str, np.float32] = {}  # tensors computed in units of a scale instead of 1

    def add(self, node: onnx.NodeProto) -> None:
        """Copy a node; its weights and what it yields are quantised if they are to be."""
        if node.name.endswith(".norm.last") and self._fits_codes(node):
            inputs = [self._counted(node)]
        else:
            inputs = [self._quantised(name) if name in self.points else name for name in node.input]
        if node.name in LAYERS:
            inputs[1:] = self._weights(node.name, self.scales[node.input[0]][0])
        copy = self.new.node.add()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(self.renamed.get(name, name) for name in inputs)
        if node.name in LAYERS and node.op_type == "Gemm":
            del copy.attribute[:]  # its weights are the other way round now
        if node.op_type == "Slice":
            self._halve(node)

    def keep_constants(self) -> None:
        """Copy the constants that are still in use."""
        used = {name for node in self.new.node for name in node.input}
        self.new.initializer.extend(tensor for name, tensor in self.constants.items() if name in used)

    def _quantised(self, name: str) -> str:
        """There and back: what ONNX Runtime takes for the sign that the layer between two of these is of int8."""
        if name not in self.renamed:
            codes, result = self._codes(name), f"{name}.back"
            self._node("DequantizeLinear", [codes, f"{name}.scale", f"{name}.zero"], result)
            self.renamed[name] = result
        return self.renamed[name]

    def _codes(self, name: str) -> str:
        scale, zero = self.scales[name]
        self._constant(f"{name}.zero", np.array(zero))
        step = self._constant(f"{name}.scale", np.array(scale))
        if name in self.units:
            step = self._constant(f"{name}.step", np.array(scale / self.units[name]))
        return self._node("QuantizeLinear", [name, step, f"{name}.zero"], f"{name}.quantised")

    def _fits_codes(self, node: onnx.NodeProto) -> bool:
        """Whether normalisation may start from codes: they count from zero, and what leaves is quantised at once."""
        return node.input[0] in self.points and not self.scales[node.input[0]][1] and _norm_of(node) in self.points

    def _counted(self, node: onnx.NodeProto) -> str:
        """What enters normalisation, as codes: ONNX Runtime would dequantise it once for each of its three uses."""
        source, norm = node.input[0], _norm_of(node)
        codes = self._codes(source)
        scale = self.units[norm] = self.scales[source][0]
        band = numpy_helper.to_array(self.constants[f"{norm}.band"])
        self.constants[f"{norm}.band"] = numpy_helper.from_array(band * scale**2, f"{norm}.band")
        return self._node("Cast", [codes], f"{source}.codes", to=onnx.TensorProto.FLOAT)

    def _weights(self, layer: str, input_scale: np.float32) -> list[str]:
        """The names of a layer's weight and bias, dequantised."""
        weight, bias = (numpy_helper.to_array(self.constants[f"{layer}.{part}"]) for part in ("weight", "bias"))
        scale, codes = weight_codes(weight, bias, input_scale)
        units = scale * input_scale
        linear = weight.ndim == 2  # inputs x outputs: what ONNX Runtime multiplies without copying it first
        values: dict[str, npt.NDArray[Any]] = {
            "codes": codes.T if linear else codes,
            "scale": scale,
            "zero": np.zeros(len(scale), np.int8),
        }
        names = [self._constant(f"{layer}.weight.{part}", value) for part, value in values.items()]
        self._node("DequantizeLinear", names, f"{layer}.weight.back", axis=1 if linear else 0)
        parts = {"codes": np.rint(bias / units).astype(np.int32), "scale": units}
        names = [self._constant(f"{layer}.bias.{part}", value) for part, value in parts.items()]
        self._node("DequantizeLinear", names, f"{layer}.bias.back", axis=0)
        return [f"{layer}.weight.back", f"{layer}.bias.back"]

    def _halve(self, node: onnx.NodeProto) -> None:
        """Keep the mean image in half: nothing that the scale of the input would show."""
        name = node.input[0]
        half = numpy_helper.to_array(self.constants[name]).astype(np.float16)
        self.constants[name] = numpy_helper.from_array(half, name)
        self.renamed[node.output[0]] = f"{node.output[0]}.whole"
        self._node("Cast", [node.output[0]], f"{node.output[0]}.whole", to=onnx.TensorProto.FLOAT)

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.new.node.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output


def _norm_of(node: onnx.NodeProto) -> str:
    return node.name.removesuffix(".last")


def activation_scale(values: Range) -> tuple[np.float32, np.uint8]:
    """Scale and zero point for which 0..255 span the values; zero is among them, and exact."""
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return scale, np.uint8(np.rint(-low / scale))


def weight_codes(weight: Array, bias: Array, input_scale: np.float32) -> tuple[Array, npt.NDArray[np.int8]]:
    """For each output channel a scale, and the weights in its units, -127..127; the bias fits int32 in them too."""
    rows = weight.reshape(len(weight), -1)
    scale = np.maximum(np.abs(rows).max(1) / np.float32(127), np.abs(bias) / (input_scale * np.float32(MOST)))
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.rint(rows / scale[:, None]).clip(-127, 127).astype(np.int8)
    return scale, codes.reshape(weight.shape)
