"""A model file as one ONNX graph (section 3), built with the onnx package alone. No torch, no tracing.

    input          float32 [batch, 3, S, S]   RGB crop of a 256 x 256 picture, 0..255, nothing subtracted
    logits         float32 [batch, classes]
    probabilities  float32 [batch, classes]

Subtracting the mean image, dividing and padding are in the graph: a caller can only get the crop wrong.
Response normalization is a banded 1x1 convolution of the squares, two square roots and a division, which ONNX
Runtime runs faster on a CPU than its own LRN operator; with `rows` it is a product of matrices over rows of channels,
which suits int8 kernels, whose maps have channels last. The test-time factor of dropout (section 4.2) and the input's
divisor are folded into the weights of the layer that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

import alexnet_cli
from alexnet_cli.core.files import hash_file
from alexnet_cli.core.inference import onnx_metadata
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.errors import StorageError, UsageError
from alexnet_cli.recipe import SIDE, Recipe

OPSET, IR_VERSION = 17, 8  # old enough for ONNX Runtime 1.12, new enough for every operator used
LARGEST = 2**31 - 2**20  # bytes of weights in one protobuf message, with room for the rest
APART_BYTES = 2**16
ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}

Array = npt.NDArray[np.float32]
Attributes = Mapping[str, Any]
EMPTY: Attributes = MappingProxyType({})


class _Graph:
    """Adds nodes and constants to a graph, in order. Every method returns the name of its output.

    With `apart`, large constants stay outside: the graph names them and `apart` holds them, uncopied.
    """

    def __init__(self, proto: onnx.GraphProto, apart: dict[str, Array] | None, rows: bool) -> None:
        self.proto, self.apart, self.rows = proto, apart, rows

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        tensor = self.proto.initializer.add(name=name, dims=value.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        if self.apart is None or value.nbytes < APART_BYTES:
            tensor.raw_data = value.tobytes()
            return name
        self.apart[name] = np.ascontiguousarray(value)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="memory")
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, attributes: Attributes = EMPTY) -> str:
        self.proto.node.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def conv(self, x: str, name: str, weight: Array, bias: Array, attributes: Attributes) -> str:
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.node("Conv", inputs, name, {"kernel_shape": list(weight.shape[2:]), **attributes})

    def linear(self, x: str, name: str, weight: Array, bias: Array) -> str:
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.node("Gemm", inputs, name, {"transB": 1})

    def norm(self, x: str, name: str, weight: Array, k: float, beta: float, attributes: Attributes) -> str:
        """x / (k + sums of squares)^beta; `weight` is the convolution that sums the squares, times alpha."""
        square = self.node("Mul", [x, x], f"{name}.square")
        bias = np.full(len(weight), k, np.float32)
        base = self.conv(square, f"{name}.sum", weight, bias, attributes)
        return self.node("Div", [x, self.power(base, name, beta)], name)

    def power(self, base: str, name: str, beta: float) -> str:
        """The denominator: base^beta."""
        if beta != 0.75:
            exponent = self.constant(f"{name}.beta", np.array(beta, np.float32))
            return self.node("Pow", [base, exponent], f"{name}.power")
        root = self.node("Sqrt", [base], f"{name}.root")  # sqrt(z) * sqrt(sqrt(z)): faster than a general power
        fourth = self.node("Sqrt", [root], f"{name}.fourth")
        return self.node("Mul", [root, fourth], f"{name}.power")

    def across_maps(self, x: str, name: str, maps: tuple[int, int], recipe: Recipe) -> str:
        """Section 3.3: the sum runs over `lrn_size` neighboring maps, clipped at a tower's edge.

        `maps`: how many there are, and their side.
        """
        channels, side = maps
        groups = 1 if recipe.lrn_joint else recipe.towers
        size, near = recipe.lrn_size, channels // groups
        alpha = recipe.lrn_alpha * recipe.input_divisor**2 / (size if recipe.lrn_alpha_divided else 1)
        index = np.arange(near)
        band = np.float32(alpha) * (np.abs(index[:, None] - index[None, :]) <= size // 2).astype(np.float32)
        if self.rows:
            return self.over_rows(x, name, band, recipe, [-1, side, side, channels])
        weight = np.tile(band, (groups, 1))[:, :, None, None]
        return self.norm(x, name, weight, recipe.lrn_k, recipe.lrn_beta, {"group": groups})

    def over_rows(self, x: str, name: str, band: Array, recipe: Recipe, shape: Sequence[int]) -> str:
        """The same with the channels of a pixel and a tower as a row, times the band; `shape`: channels last."""
        last = self.node("Transpose", [x], f"{name}.last", {"perm": [0, 2, 3, 1]})
        flat = self.constant(f"{name}.flat", np.array([-1, len(band)], np.int64))
        rows = self.node("Reshape", [last, flat], f"{name}.rows")
        square = self.node("Mul", [rows, rows], f"{name}.square")
        k = np.full(len(band), recipe.lrn_k, np.float32)
        terms = [square, self.constant(f"{name}.band", band), self.constant(f"{name}.k", k)]
        power = self.power(self.node("Gemm", terms, f"{name}.sum"), name, recipe.lrn_beta)
        whole = self.constant(f"{name}.whole", np.array(shape, np.int64))
        quotient = self.node("Reshape", [self.node("Div", [rows, power], f"{name}.quotient"), whole], f"{name}.maps")
        return self.node("Transpose", [quotient], name, {"perm": [0, 3, 1, 2]})

    def within_map(self, x: str, name: str, channels: int, size: int, alpha: float, k: float, beta: float) -> str:
        """The sum runs over a `size` x `size` window of a map, zero outside; each term times `alpha`."""
        weight = np.full((channels, 1, size, size), alpha, np.float32)
        return self.norm(x, name, weight, k, beta, {"group": channels, "pads": [size // 2] * 4})


def build_graph(model: Model, sha256: str = "", rows: bool = False) -> onnx.ModelProto:
    """The whole network as an ONNX model with names, preprocessing and origin in its metadata.

    `sha256` is the hash of the file the weights came from, kept in the metadata when given. `rows`: the same numbers
    in the form from which `quantize.to_int8` starts.

    Raises:
        UsageError: the network is too large for one ONNX file.
    """
    size = sum(tensor.nbytes for tensor in model.tensors.values())
    if size > LARGEST:
        raise UsageError(
            f"{model.path} is {size / 1e9:.1f} GB and one ONNX file holds 2 GB",
            "use the .safetensors file as it is",
        )
    return _assemble(model, sha256, None, rows)


def build_apart(model: Model) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The same with large constants beside the graph, uncopied, for a session in memory."""
    apart: dict[str, Array] = {}
    return _assemble(model, "", apart, False), apart


def _assemble(model: Model, sha256: str, apart: dict[str, Array] | None, rows: bool) -> onnx.ModelProto:
    crop = model.recipe.input_size
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, crop, crop])
    picture.type.denotation = "IMAGE"
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(model.classes)])
        for name in ("logits", "probabilities")
    ]
    proto = helper.make_model(
        helper.make_graph([], "alexnet", [picture], outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="alexnet-cli",
        producer_version=alexnet_cli.__version__,
    )
    helper.set_model_props(proto, onnx_metadata.format_metadata(model, sha256))
    graph = _Graph(proto.graph, apart, rows)
    logits = _fully_connected(graph, _convolutions(graph, _subtract_mean(graph, model), model), model)
    graph.node("Softmax", [logits], "probabilities", {"axis": 1})
    return proto


def _subtract_mean(graph: _Graph, model: Model) -> str:
    """The whole mean image is kept, so that a reader of the file finds it; its center is cut in the graph."""
    if model.recipe.mean == "rgb":
        color = model.mean.mean((1, 2), dtype=np.float64).astype(np.float32)
        return graph.node("Sub", ["input", graph.constant("mean", color[:, None, None])], "centered")
    low = (SIDE - model.recipe.input_size) // 2
    mean = graph.constant("mean", model.mean)
    starts = graph.constant("mean.starts", np.array([low, low], np.int64))
    ends = graph.constant("mean.ends", np.array([low + model.recipe.input_size] * 2, np.int64))
    axes = graph.constant("mean.axes", np.array([1, 2], np.int64))
    center = graph.node("Slice", [mean, starts, ends, axes], "mean.center")
    return graph.node("Sub", ["input", center], "centered")


def _convolutions(graph: _Graph, x: str, model: Model) -> str:
    """Layers 1 to 5 (section 3.5): maps of 55, 27, 13, 13, 13, 6 for the paper's network."""
    recipe, weights = model.recipe, model.tensors
    orders = {"conv1": recipe.stage1_order, "conv2": recipe.stage2_order, "conv5": "relu-pool"}
    side = recipe.input_size
    # A last window that reaches over the edge of its map.
    clipped = recipe.pool_size == 2 or (recipe.input_size == 224 and not recipe.edge_padding)
    for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        weight, attributes = weights[f"{layer}.weight"], _geometry(layer, recipe)
        if layer == "conv1":
            weight = weight / np.float32(recipe.input_divisor)
        x = graph.conv(x, layer, weight, weights[f"{layer}.bias"], attributes)
        before, after = attributes["pads"][0], attributes["pads"][3]
        side = (side + before + after - weight.shape[2]) // attributes.get("strides", [1])[0] + 1
        for step in orders.get(layer, "relu").split("-"):
            if step == "relu":
                x = graph.node(ACTIVATIONS[recipe.activation], [x], f"{layer}.{recipe.activation}")
            elif step == "pool":
                pool = {"kernel_shape": [recipe.pool_size] * 2, "strides": [2, 2]}
                x = graph.node("MaxPool", [x], f"{layer}.pool", pool | ({"ceil_mode": 1} if clipped else {}))
                side = -(-(side - recipe.pool_size) // 2) + 1
            else:
                x = _normalize(graph, x, layer, (len(weight), side), recipe)
    return x


def _geometry(layer: str, recipe: Recipe) -> Attributes:
    """How a convolution moves over its input."""
    if layer == "conv1":
        edge = 3 if recipe.input_size == 224 and recipe.edge_padding else 0  # zero rows and columns, right and bottom
        return {"strides": [4, 4], "pads": [0, 0, edge, edge]}
    narrow = recipe.pool_size == 2  # 2 x 2 pooling gives larger maps: conv2 and conv5 pad less to end at 6 x 6
    pad = {"conv2": 1 if narrow else 2, "conv5": 0 if narrow else 1}.get(layer, 1)
    return {"group": 1 if layer == "conv3" else recipe.towers, "pads": [pad] * 4}


def _normalize(graph: _Graph, x: str, layer: str, maps: tuple[int, int], recipe: Recipe) -> str:
    scale, channels = recipe.input_divisor**2, maps[0]
    if recipe.lrn == "across-maps":
        x = graph.across_maps(x, f"{layer}.norm", maps, recipe)
    elif recipe.lrn == "within-map":
        size = recipe.lrn_size
        alpha = recipe.lrn_alpha * scale / (size**2 if recipe.lrn_alpha_divided else 1)
        x = graph.within_map(x, f"{layer}.norm", channels, size, alpha, recipe.lrn_k, recipe.lrn_beta)
    if layer == "conv2" and recipe.within_norm_2:
        x = graph.within_map(x, f"{layer}.within", channels, 5, 1e-3 * scale / 25, 1.0, 0.75)
    return x


def _fully_connected(graph: _Graph, x: str, model: Model) -> str:
    """Layers 6 to 8: channel-major flattening, dropout's test-time factor folded into layers 7 and 8."""
    recipe, weights = model.recipe, model.tensors
    keep = np.float32(1 if recipe.dropout_inverted else 1 - recipe.dropout)
    x = graph.node("Flatten", [x], "flat", {"axis": 1})
    for layer in ("fc6", "fc7"):
        weight = weights[f"{layer}.weight"]
        x = graph.linear(x, layer, weight if layer == "fc6" or keep == 1 else weight * keep, weights[f"{layer}.bias"])
        x = graph.node(ACTIVATIONS[recipe.activation], [x], f"{layer}.{recipe.activation}")
    weight = weights["fc8.weight"]
    return graph.linear(x, "logits", weight if keep == 1 else weight * keep, weights["fc8.bias"])


def write_graph(model: Model, path: Path) -> None:
    """Write the graph to `path`, or nothing. `export.export` does this and checks the result.

    Raises:
        UsageError: the network is too large for one ONNX file.
        StorageError: the disk is full or the folder cannot be written.
    """
    save_graph(build_graph(model, source_sha256(model)), path)


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph to `path`, or nothing. Raises StorageError."""
    try:
        path.write_bytes(proto.SerializeToString())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror}", "choose another place with -o") from error


def source_sha256(model: Model) -> str:
    """SHA-256 of the file that a model was read from, hexadecimal; empty if there is none."""
    return hash_file(model.path) if model.path.is_file() else ""
