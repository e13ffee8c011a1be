"""Weights files of other programs, written byte by byte, and what those programs compute with them, literally.

Nothing here uses the code under test: tensors are in the layout of the file, pictures in the channels of the program.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from test_onnx_graph import convolved, pooled

Maps = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Tensors = Mapping[str, tuple[Floats, Floats]]

C = {"conv1": 6, "conv2": 16, "conv3": 24, "conv4": 24, "conv5": 16, "fc6": 256, "fc7": 256}  # a sixteenth
SHAPES: dict[str, tuple[int, ...]] = {
    "conv1": (6, 3, 11, 11), "conv2": (16, 3, 5, 5), "conv3": (24, 16, 3, 3), "conv4": (24, 12, 3, 3),
    "conv5": (16, 12, 3, 3), "fc6": (256, 16 * 36), "fc7": (256, 256), "fc8": (10, 256),
}  # fmt: skip
GROUPS = {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "conv5": 2}
STRIDES, PADS = {"conv1": 4}, {"conv2": 2, "conv3": 1, "conv4": 1, "conv5": 1}
MEAN_BGR = (104.007, 116.669, 122.679)


def tensors(seed: int = 0, classes: int = 10) -> dict[str, tuple[Floats, Floats]]:
    """Weights that make response normalisation matter: activations of about 100 after layer 1."""
    generator, made = np.random.default_rng(seed), {}
    for layer, shape in (SHAPES | {"fc8": (classes, 256)}).items():
        scale = np.sqrt(2 / np.prod(shape[1:]))
        weight = (scale * generator.standard_normal(shape)).astype(np.float32)
        made[layer] = (weight, (0.3 * generator.standard_normal(shape[0])).astype(np.float32))
    return made


def picture(side: int, seed: int = 3) -> npt.NDArray[np.uint8]:
    """3 x side x side, in whatever channels."""
    return np.random.default_rng(seed).integers(0, 256, (3, side, side), np.uint8)


# Protocol buffers


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def inside(number: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def single(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)


def floats(number: int, values: Floats, packed: bool = True) -> bytes:
    if packed:
        return inside(number, values.astype("<f4").tobytes())
    return b"".join(single(number, float(value)) for value in values.ravel())


def blob(value: Floats, *, legacy: bool, packed: bool = True) -> bytes:
    """BlobProto, with num, channels, height, width as Caffe wrote until 2014, or with a shape; and gradients."""
    if legacy:
        four = (1,) * (4 - value.ndim) + value.shape
        shape = b"".join(integer(i + 1, n) for i, n in enumerate(four))
    else:
        shape = inside(7, inside(1, b"".join(map(varint, value.shape))))
    return shape + floats(5, value, packed) + floats(6, np.zeros(2, np.float32)) + inside(99, b"unknown")


STAGES = {
    "relu-norm-pool": ("relu", "norm", "pool"),
    "relu-pool-norm": ("relu", "pool", "norm"),
}
V1_TYPES = {"conv": 4, "fc": 14, "relu": 18, "norm": 15, "pool": 17, "data": 5, "dropout": 6, "loss": 21}
V2_TYPES = {
    "conv": "Convolution", "fc": "InnerProduct", "relu": "ReLU", "norm": "LRN", "pool": "Pooling",
    "data": "Data", "dropout": "Dropout", "loss": "SoftmaxWithLoss",
}  # fmt: skip
V0_TYPES = {
    "conv": "conv", "fc": "innerproduct", "relu": "relu", "norm": "lrn", "pool": "pool",
    "data": "data", "dropout": "dropout", "loss": "softmax_loss",
}  # fmt: skip


def caffe_sequence(order: str) -> list[tuple[str, str]]:
    """Kind and name of each layer of bvlc_alexnet (or CaffeNet), from data to loss."""
    sequence = [("data", "data")]
    for i, layer in enumerate(SHAPES, 1):
        sequence.append(("conv" if i <= 5 else "fc", layer))
        words: Sequence[str] = ("relu",)
        if i <= 2:
            words = STAGES[order]
        elif i == 5:
            words = ("relu", "pool")
        elif i in (6, 7):
            words = ("relu", "dropout")
        elif i == 8:
            words = ("loss",)
        sequence += [(word, f"{word}{i}") for word in words]
    return sequence


def caffemodel(
    weights: Tensors,
    version: int = 2,
    order: str = "relu-norm-pool",
    *,
    packed: bool = True,
    bare: bool = False,
    name: str = "AlexNet",
    k: float | None = None,
) -> bytes:
    """A .caffemodel with layers of that version; `bare`: without settings and without layers that have no weights."""
    out = inside(1, name)
    for kind, layer in caffe_sequence(order):
        if bare and kind not in ("conv", "fc"):
            continue
        blobs = [blob(value, legacy=version < 2, packed=packed) for value in weights.get(layer, ())]
        settings = b"" if bare else _settings(kind, layer, version, k)
        if version == 2:
            body = inside(1, layer) + inside(2, V2_TYPES[kind]) + inside(3, "below")
            out += inside(100, body + b"".join(inside(7, b) for b in blobs) + settings)
        elif version == 1:
            body = inside(2, "below") + inside(4, layer) + integer(5, V1_TYPES[kind]) + single(7, 1) + single(7, 2)
            out += inside(2, body + b"".join(inside(6, b) for b in blobs) + settings)
        else:
            body = inside(1, layer) + inside(2, V0_TYPES[kind]) + b"".join(inside(50, b) for b in blobs) + settings
            out += inside(2, inside(2, "below") + inside(1, body))
    return out


def _settings(kind: str, layer: str, version: int, k: float | None) -> bytes:
    """Settings as bvlc_alexnet has them; `k` is given only where it is not Caffe's default of 1."""
    if kind == "conv":
        pad, stride, group, kernel = PADS.get(layer, 0), STRIDES.get(layer, 1), GROUPS[layer], SHAPES[layer][-1]
        numbers = (7, 8, 9, 10) if version == 0 else (3, 4, 5, 6)
        values = zip(numbers, (pad, kernel, group, stride), strict=True)
        content = b"".join(integer(n, value) for n, value in values if value not in (0, None))
    elif kind == "norm":
        size, alpha, beta, constant = (13, 14, 15, 22) if version == 0 else (1, 2, 3, 5)
        content = integer(size, 5) + single(alpha, 1e-4) + single(beta, 0.75)
        content += b"" if k is None else single(constant, k)
    elif kind == "pool":
        content = integer(8, 3) + integer(10, 2) if version == 0 else integer(1, 0) + integer(2, 3) + integer(3, 2)
    elif kind == "data" and version > 0:
        content = integer(2, 1) + integer(3, 227)
    else:
        return b""
    number = {"conv": (10, 106), "norm": (18, 118), "pool": (19, 121), "data": (36, 100)}[kind]
    return content if version == 0 else inside(number[version - 1], content)


# What Caffe computes


def normalised(x: Maps, alpha_per_term: float, k: float, beta: float = 0.75, size: int = 5) -> Maps:
    """Across maps, all of x together."""
    out = np.empty_like(x)
    for i in range(len(x)):
        near = x[max(0, i - size // 2) : i + size // 2 + 1]
        out[i] = x[i] / (k + alpha_per_term * (near**2).sum(0)) ** beta
    return out


def caffe_forward(
    weights: Tensors,
    bgr: npt.NDArray[np.uint8],
    mean_bgr: Any = MEAN_BGR,
    order: str = "relu-norm-pool",
    k: float = 1.0,
) -> Maps:
    """Scores of a BGR crop of 227: floor in convolutions, ceil in pooling, alpha over the number of terms."""
    x = bgr.astype(np.float64) - np.asarray(mean_bgr, np.float64).reshape(
        3, *(np.ndim(mean_bgr) == 1) * (1, 1), *np.shape(mean_bgr)[1:]
    )
    for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        weight, bias = (value.astype(np.float64) for value in weights[layer])
        x = convolved(x, weight, bias, STRIDES.get(layer, 1), PADS.get(layer, 0), GROUPS[layer])
        words = STAGES[order] if layer in ("conv1", "conv2") else ("relu", "pool") if layer == "conv5" else ("relu",)
        for word in words:
            x = np.maximum(x, 0) if word == "relu" else pooled(x, 3) if word == "pool" else normalised(x, 1e-4 / 5, k)
    return connected(weights, x.reshape(-1), 1.0)


def connected(weights: Tensors, v: Maps, keep: float) -> Maps:
    """The last three layers, channel-major."""
    for layer in ("fc6", "fc7"):
        v = keep * np.maximum(weights[layer][0].astype(np.float64) @ v + weights[layer][1], 0)
    result: Maps = weights["fc8"][0].astype(np.float64) @ v + weights["fc8"][1]
    return result


# ONNX


def attribute(name: str, value: int | float | Sequence[int]) -> bytes:
    content = inside(1, name)
    if isinstance(value, int):
        content += integer(3, value) + integer(20, 2)
    elif isinstance(value, float):
        content += single(2, value) + integer(20, 1)
    else:
        content += b"".join(integer(8, n) for n in value) + integer(20, 7)
    return inside(5, content)


def node(operator: str, inputs: Sequence[str], output: str, **attributes: int | float | Sequence[int]) -> bytes:
    content = b"".join(inside(1, i) for i in inputs) + inside(2, output) + inside(4, operator)
    return inside(1, content + b"".join(attribute(name, value) for name, value in attributes.items()))


def onnx_tensor(name: str, value: npt.NDArray[Any], raw: bool = True) -> bytes:
    dims = b"".join(integer(1, n) for n in value.shape)
    kind = {"float32": 1, "int64": 7}[value.dtype.name]
    return dims + integer(2, kind) + inside(8, name) + (inside(9, value.tobytes()) if raw else floats(4, value))


def onnx_value(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(inside(1, integer(1, n)) for n in shape)
    return inside(1, name) + inside(2, inside(1, integer(1, 1) + inside(2, dims)))


def onnx_model(weights: Tensors, *, side: int = 224, raw: bool = True, trans: bool = True) -> bytes:
    """The model zoo's bvlcalexnet: names as Caffe2 gave them, unpadded 224 pixels, pooling padded at the end."""
    graph, last = b"", "data_0"

    def add(operator: str, extra: Sequence[str] = (), **attributes: int | float | Sequence[int]) -> None:
        nonlocal graph, last
        output = f"{operator}_{len(graph)}"
        graph += node(operator, [last, *extra], output, **attributes)
        last = output

    for layer in SHAPES:
        names = [f"{layer}_w_0", f"{layer}_b_0"]
        if layer.startswith("conv"):
            stride, pad = [STRIDES.get(layer, 1)] * 2, [PADS.get(layer, 0)] * 4
            kernel = [SHAPES[layer][-1]] * 2
            add("Conv", names, group=GROUPS[layer], kernel_shape=kernel, pads=pad, strides=stride)
        else:
            if layer == "fc6":
                add("Reshape", ["shape"])
            add("Gemm", names, alpha=1.0, beta=1.0, transB=int(trans))
        if layer != "fc8":
            add("Relu")
        if layer in ("conv1", "conv2"):
            add("LRN", alpha=1e-4, beta=0.75, bias=1.0, size=5)
        if layer in ("conv1", "conv2", "conv5"):
            end = 1 if side == 224 else 0
            add("MaxPool", kernel_shape=[3, 3], pads=[0, 0, end, end], strides=[2, 2])
    add("Softmax", axis=1)
    values = onnx_tensor("shape", np.array([-1, 576], np.int64))
    content = inside(5, values)
    for layer, (weight, bias) in weights.items():
        weight = weight if trans or weight.ndim == 4 else np.ascontiguousarray(weight.T)
        content += inside(5, onnx_tensor(f"{layer}_w_0", weight, raw)) + inside(
            5, onnx_tensor(f"{layer}_b_0", bias, raw)
        )
    content += inside(11, onnx_value("data_0", (1, 3, side, side))) + inside(12, onnx_value(last, (1, 10)))
    return (
        integer(1, 8)
        + inside(7, graph + inside(2, "bvlc_alexnet") + content)
        + inside(8, inside(1, "") + integer(2, 12))
    )


# Pickles of Python 2


class Old:
    """An instance of a class of old, such as cuda-convnet's options: module, name, attributes."""

    def __init__(self, module: str, name: str, state: dict[str, Any]) -> None:
        self.module, self.name, self.state = module, name, state


def pickled(value: Any) -> bytes:
    """As cPickle of Python 2 wrote it with protocol 2: strings are bytes, arrays reconstructed by NumPy."""
    memo: dict[int, int] = {}
    return b"\x80\x02" + _pickled(value, memo) + b"."


def _pickled(value: Any, memo: dict[int, int]) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str | bytes):
        raw = value.encode("latin-1") if isinstance(value, str) else value
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(v, memo) for v in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(_pickled(v, memo) for v in value) + b"e"
    if isinstance(value, Old):
        return b"(i" + f"{value.module}\n{value.name}\n".encode() + _pickled(value.state, memo) + b"b"
    if isinstance(value, dict):
        if id(value) in memo:
            return b"j" + struct.pack("<I", memo[id(value)])
        memo[id(value)] = len(memo)
        put = b"r" + struct.pack("<I", memo[id(value)])
        return b"}" + put + b"(" + b"".join(_pickled(k, memo) + _pickled(v, memo) for k, v in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    return array_pickled(value.shape, value.dtype.str, value.tobytes("A"), value.flags.f_contiguous and value.ndim > 1)


def array_pickled(shape: tuple[int, ...], dtype: str, raw: bytes, fortran: bool = False) -> bytes:
    """A NumPy array as Python 2 pickled it, whether or not its parts agree."""
    none: dict[int, int] = {}
    made = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _pickled((0,), none) + _pickled("b", none) + b"tR"
    )
    kind = b"cnumpy\ndtype\n" + _pickled((dtype[1:], 0, 1), none) + b"R"
    kind += _pickled((3, dtype[0], None, None, None, -1, -1, 0), none) + b"b"
    return made + b"(K\x01" + _pickled(shape, none) + kind + _pickled(fortran, none) + _pickled(raw, none) + b"tb"
