"""Weights files of other programs, Caffe's byte by byte, and what those programs compute with them, literally.

Nothing here uses the code under test: tensors are in the layout of the file, pictures in the channels of the program.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
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


def floats(number: int, values: Floats) -> bytes:
    return inside(number, values.astype("<f4").tobytes())


def blob(value: Floats, *, legacy: bool) -> bytes:
    """BlobProto, with num, channels, height, width as Caffe wrote until 2014, or with a shape; and gradients."""
    if legacy:
        four = (1,) * (4 - value.ndim) + value.shape
        shape = b"".join(integer(i + 1, n) for i, n in enumerate(four))
    else:
        shape = inside(7, inside(1, b"".join(map(varint, value.shape))))
    return shape + floats(5, value) + floats(6, np.zeros(2, np.float32)) + inside(99, b"unknown")


STAGES = {
    "relu-norm-pool": ("relu", "norm", "pool"),
    "relu-pool-norm": ("relu", "pool", "norm"),
}
V1_TYPES = {"conv": 4, "fc": 14, "relu": 18, "norm": 15, "pool": 17, "data": 5, "dropout": 6, "loss": 21}
V2_TYPES = {
    "conv": "Convolution", "fc": "InnerProduct", "relu": "ReLU", "norm": "LRN", "pool": "Pooling",
    "data": "Data", "dropout": "Dropout", "loss": "SoftmaxWithLoss",
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
    bare: bool = False,
    name: str = "AlexNet",
    k: float | None = None,
) -> bytes:
    """A .caffemodel with layers of that version; `bare`: without settings and without layers that have no weights."""
    out = inside(1, name)
    for kind, layer in caffe_sequence(order):
        if bare and kind not in ("conv", "fc"):
            continue
        blobs = [blob(value, legacy=version < 2) for value in weights.get(layer, ())]
        settings = b"" if bare else _settings(kind, layer, version, k)
        if version == 2:
            body = inside(1, layer) + inside(2, V2_TYPES[kind]) + inside(3, "below")
            out += inside(100, body + b"".join(inside(7, b) for b in blobs) + settings)
        else:
            body = inside(2, "below") + inside(4, layer) + integer(5, V1_TYPES[kind]) + single(7, 1) + single(7, 2)
            out += inside(2, body + b"".join(inside(6, b) for b in blobs) + settings)
    return out


def _settings(kind: str, layer: str, version: int, k: float | None) -> bytes:
    """Settings as bvlc_alexnet has them; `k` is given only where it is not Caffe's default of 1."""
    if kind == "conv":
        pad, stride, group, kernel = PADS.get(layer, 0), STRIDES.get(layer, 1), GROUPS[layer], SHAPES[layer][-1]
        values = zip((3, 4, 5, 6), (pad, kernel, group, stride), strict=True)
        content = b"".join(integer(n, value) for n, value in values if value)
    elif kind == "norm":
        content = integer(1, 5) + single(2, 1e-4) + single(3, 0.75)
        content += b"" if k is None else single(5, k)
    elif kind == "pool":
        content = integer(1, 0) + integer(2, 3) + integer(3, 2)
    elif kind == "data":
        content = integer(2, 1) + integer(3, 227)
    else:
        return b""
    number = {"conv": (10, 106), "norm": (18, 118), "pool": (19, 121), "data": (36, 100)}[kind]
    return inside(number[version - 1], content)


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


def onnx_model(weights: Tensors, *, side: int = 224, raw: bool = True, trans: bool = True) -> bytes:
    """The model zoo's bvlcalexnet: names as Caffe2 gave them, unpadded 224 pixels, pooling padded at the end."""
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, extra: Sequence[str] = (), **attributes: Any) -> None:
        last = nodes[-1].output[0] if nodes else "data_0"
        nodes.append(helper.make_node(operator, [last, *extra], [f"{operator}_{len(nodes)}"], **attributes))

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
    values = [numpy_helper.from_array(np.array([-1, 576]), "shape")]
    for layer, (weight, bias) in weights.items():
        weight = weight if trans or weight.ndim == 4 else np.ascontiguousarray(weight.T)
        for name, value in ((f"{layer}_w_0", weight), (f"{layer}_b_0", bias)):
            numbers = value.tobytes() if raw else value.ravel()
            values.append(helper.make_tensor(name, onnx.TensorProto.FLOAT, value.shape, numbers, raw))
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("data_0", (1, 3, side, side)), (nodes[-1].output[0], (1, 10)))
    ]
    graph = helper.make_graph(nodes, "bvlc_alexnet", ends[:1], ends[1:], values)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 12)])
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
