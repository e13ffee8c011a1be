"""Builds a model's ONNX graph (section 3) with the onnx package, layer by layer. No torch, no tracing.

    input          float32 [batch, 3, S, S]   RGB crop of a 256 x 256 image, 0..255, nothing subtracted
    logits         float32 [batch, classes]
    probabilities  float32 [batch, classes]

The nodes of layers and their outputs have the names of `architecture.layer_names`, such as relu1; fc8 is `logits`, and
drop6 and drop7 have none.

The graph subtracts the mean image, divides and pads, so that a caller only cuts the crop. Response normalization is a
banded 1x1 convolution of the squares, two square roots and a division: on a CPU that is faster than ONNX's LRN
operator. The input's divisor and dropout's test-time factor (section 4.2) are folded into the weights of a layer. A
fully connected layer without cross-talk gets zeros for the other tower, since ONNX has no grouped matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

import alexnet_cli
from alexnet_cli.core.files import hash_file, write_chunks
from alexnet_cli.core.inference import onnx_metadata
from alexnet_cli.core.model.architecture import POOL_STRIDE, LayerSpec, NormSpec, layer_specs, norm_spec, step_name
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.errors import UsageError, storage_errors
from alexnet_cli.recipe import SIDE, Recipe

OPSET, IR_VERSION = 17, 8  # ONNX Runtime 1.12 and newer
MAX_BYTES = 2**31 - 2**20  # of weights in one protobuf message, which ends at 2 GiB
EXTERNAL_BYTES = 2**16  # smaller constants always stay in the graph
ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}

Array = npt.NDArray[np.float32]


class _GraphBuilder:
    """Appends nodes and constants to a graph. Methods that add a node return the name of its output."""

    def __init__(self, proto: onnx.GraphProto, recipe: Recipe, rows: bool, external: dict[str, Array] | None) -> None:
        self.proto, self.recipe, self.rows, self.external = proto, recipe, rows, external

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        tensor = self.proto.initializer.add(name=name, dims=value.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        if self.external is None or value.nbytes < EXTERNAL_BYTES:
            tensor.raw_data = value.tobytes()
            return name
        self.external[name] = np.ascontiguousarray(value)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="memory")
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.proto.node.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def conv(self, x: str, name: str, weight: Array, bias: Array, **attributes: Any) -> str:
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.node("Conv", inputs, name, kernel_shape=list(weight.shape[2:]), **attributes)

    def linear(self, x: str, name: str, weight: Array, bias: Array) -> str:
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.node("Gemm", inputs, name, transB=1)

    def max_pool(self, x: str, name: str, spec: LayerSpec) -> str:
        size = self.recipe.pool_size
        ceil_mode = {"ceil_mode": 1} if spec.pool_ceil and (spec.side - size) % POOL_STRIDE else {}
        return self.node("MaxPool", [x], name, kernel_shape=[size] * 2, strides=[POOL_STRIDE] * 2, **ceil_mode)

    def normalize(self, x: str, name: str, norm: NormSpec, channels: int, side: int) -> str:
        """Section 3.3: the sum runs over neighboring maps, or over a window of the same map, zero outside."""
        if norm.kind == "within-map":
            weight = np.full((channels, 1, norm.size, norm.size), norm.alpha, np.float32)
            return self._norm(x, name, norm, weight, group=channels, pads=[norm.size // 2] * 4)
        index = np.arange(channels // norm.groups)
        is_near = np.abs(index[:, None] - index[None, :]) <= norm.size // 2
        band = np.float32(norm.alpha) * is_near.astype(np.float32)
        if self.rows:
            return self._norm_of_rows(x, name, norm, band, [-1, side, side, channels])
        return self._norm(x, name, norm, np.tile(band, (norm.groups, 1))[:, :, None, None], group=norm.groups)

    def _norm(self, x: str, name: str, norm: NormSpec, weight: Array, **attributes: Any) -> str:
        """x / (k + sum)^beta; `weight` is the kernel that sums the squares, times alpha."""
        square = self.node("Mul", [x, x], f"{name}.square")
        base = self.conv(square, f"{name}.sum", weight, np.full(len(weight), norm.k, np.float32), **attributes)
        return self.node("Div", [x, self._power(base, name, norm.beta)], name)

    def _norm_of_rows(self, x: str, name: str, norm: NormSpec, band: Array, shape: Sequence[int]) -> str:
        """The same as a matrix product: a row holds a tower's channels at one pixel. `shape` has channels last."""
        last = self.node("Transpose", [x], f"{name}.last", perm=[0, 2, 3, 1])
        flat = self.constant(f"{name}.flat", np.array([-1, len(band)], np.int64))
        rows = self.node("Reshape", [last, flat], f"{name}.rows")
        square = self.node("Mul", [rows, rows], f"{name}.square")
        k = self.constant(f"{name}.k", np.full(len(band), norm.k, np.float32))
        base = self.node("Gemm", [square, self.constant(f"{name}.band", band), k], f"{name}.sum")
        quotient = self.node("Div", [rows, self._power(base, name, norm.beta)], f"{name}.quotient")
        whole = self.constant(f"{name}.whole", np.array(shape, np.int64))
        maps = self.node("Reshape", [quotient, whole], f"{name}.maps")
        return self.node("Transpose", [maps], name, perm=[0, 3, 1, 2])

    def _power(self, base: str, name: str, beta: float) -> str:
        """base^beta; for 0.75 as sqrt(z) * sqrt(sqrt(z)), which is faster than a general power."""
        if beta != 0.75:
            exponent = self.constant(f"{name}.beta", np.array(beta, np.float32))
            return self.node("Pow", [base, exponent], f"{name}.power")
        root = self.node("Sqrt", [base], f"{name}.root")
        fourth = self.node("Sqrt", [root], f"{name}.fourth")
        return self.node("Mul", [root, fourth], f"{name}.power")


def build_graph(model: Model, *, rows: bool = False, external: dict[str, Array] | None = None) -> onnx.ModelProto:
    """Build the whole network as an ONNX model. Names, preprocessing and origin are in its metadata.

    Args:
        model: what to build; if its file exists, the metadata holds its sha256.
        rows: build normalization as a matrix product, for `quantize.to_int8`, whose maps have channels last.
        external: for a session in memory: receives the large constants, not copied; the graph only names them.

    Raises:
        UsageError: the network is too large for one ONNX file.
    """
    size = sum(tensor.nbytes for tensor in model.tensors.values())
    if external is None and size > MAX_BYTES:
        raise UsageError(
            f"{model.path} has {size / 1e9:.1f} GB of weights; an ONNX file holds at most 2 GB",
            "use the .safetensors file as it is",
        )
    side, classes = model.recipe.input_size, len(model.classes)
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, side, side])
    image.type.denotation = "IMAGE"
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
        for name in ("logits", "probabilities")
    ]
    proto = helper.make_model(
        helper.make_graph([], "alexnet", [image], outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="alexnet-cli",
        producer_version=alexnet_cli.__version__,
    )
    sha256 = hash_file(model.path) if external is None and model.path.is_file() else ""
    helper.set_model_props(proto, onnx_metadata.format_metadata(model, sha256))
    graph = _GraphBuilder(proto.graph, model.recipe, rows, external)
    logits = _add_layers(graph, _subtract_mean(graph, model), model)
    graph.node("Softmax", [logits], "probabilities", axis=1)
    return proto


def _subtract_mean(graph: _GraphBuilder, model: Model) -> str:
    """Subtract the center of the mean image. The file keeps the whole image for other crops.

    The image has a batch dimension like the input: onnx2tf transposes nothing else from NCHW to NHWC correctly.
    """
    if model.recipe.mean == "rgb":
        color = model.mean.mean((1, 2), dtype=np.float64).astype(np.float32)
        return graph.node("Sub", ["input", graph.constant("mean", color[None, :, None, None])], "centered")
    low = (SIDE - model.recipe.input_size) // 2
    mean = graph.constant("mean", model.mean[None])
    starts = graph.constant("mean.starts", np.array([low, low], np.int64))
    ends = graph.constant("mean.ends", np.array([low + model.recipe.input_size] * 2, np.int64))
    axes = graph.constant("mean.axes", np.array([2, 3], np.int64))
    center = graph.node("Slice", [mean, starts, ends, axes], "mean.center")
    return graph.node("Sub", ["input", center], "centered")


def _add_layers(graph: _GraphBuilder, x: str, model: Model) -> str:
    """Add the layers and what follows each; returns the name of the logits."""
    recipe, channels, side = model.recipe, 3, 0
    for spec in layer_specs(recipe, len(model.classes)):
        weight, bias = _fold_factors(spec, model), model.tensors[f"{spec.name}.bias"]
        if spec.is_conv:
            before, after = spec.padding
            pads, strides = [before, before, after, after], [spec.stride] * 2
            x = graph.conv(x, spec.name, weight, bias, group=channels // spec.inputs, pads=pads, strides=strides)
        else:
            if spec.name == "fc6":
                x, channels = graph.node("Flatten", [x], "flat", axis=1), channels * side**2
            weight = _fill_with_zeros(weight, channels // spec.inputs)
            x = graph.linear(x, "logits" if spec.name == "fc8" else spec.name, weight, bias)
        channels, side = spec.biases, spec.side
        for step in spec.then:
            name = step_name(recipe, spec.name, step)
            if step == "activation":
                x = graph.node(ACTIVATIONS[recipe.activation], [x], name)
            elif step == "pool":
                x = graph.max_pool(x, name, spec)
                side = spec.pooled_side or side
            elif step in ("norm", "within-norm"):
                x = graph.normalize(x, name, norm_spec(recipe, step), channels, side)
    return x


def _fill_with_zeros(weight: Array, groups: int) -> Array:
    """Return the weights of a layer without cross-talk, units x inputs of a tower, as those of a layer with it."""
    if groups == 1:
        return weight
    whole = np.zeros((groups, len(weight) // groups, groups, weight.shape[1]), np.float32)
    for tower, part in enumerate(np.split(weight, groups)):
        whole[tower, :, tower] = part
    return whole.reshape(len(weight), -1)


def _fold_factors(spec: LayerSpec, model: Model) -> Array:
    """A layer's weights with the input's divisor (conv1) and dropout's test-time factor (fc7, fc8) folded in."""
    weight, recipe = model.tensors[f"{spec.name}.weight"], model.recipe
    if spec.name == "conv1":
        return weight / np.float32(recipe.input_divisor)
    factor = np.float32(recipe.dropout_factor)
    return weight * factor if spec.name in ("fc7", "fc8") and factor != 1 else weight


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph to `path` atomically. Raises StorageError."""
    with storage_errors(path):
        write_chunks(path, [proto.SerializeToString()])
