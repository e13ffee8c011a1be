"""Caffe's .caffemodel (its caffe.proto): layers of version 2 (`layer`), version 1 (`layers`), and version 0 inside 1.

The weights lie as here; the channels of a picture are BGR. Caffe rounds pooling up and clips windows at the edge, as
this network does, and subtracts the part of the mean that lies under the crop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_cli.core import foreign
from alexnet_cli.core.foreign import CAFFE_MEAN, Array, Foreign, damaged, refused
from alexnet_cli.core.protobuf import Message, mapped
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import CAFFE

NET_LAYERS_V2, NET_LAYERS_V1 = 100, 2
WORDS = {
    "Convolution": "conv", "InnerProduct": "fc", "ReLU": "relu", "LRN": "norm", "Pooling": "pool",
    4: "conv", 14: "fc", 18: "relu", 15: "norm", 17: "pool",
    "conv": "conv", "innerproduct": "fc", "relu": "relu", "lrn": "norm", "pool": "pool",
}  # fmt: skip
IDLE = {  # what does nothing to a picture at test time
    "Data", "ImageData", "Input", "DummyData", "HDF5Data", "MemoryData", "WindowData", "Dropout", "Softmax",
    "SoftmaxWithLoss", "Accuracy", "Split", "Flatten", "Silence", "MultinomialLogisticLoss",
    5, 12, 24, 29, 32, 9, 6, 20, 21, 1, 22, 8, 36, 16,
    "data", "images", "dropout", "softmax", "softmax_loss", "accuracy", "split", "flatten", "padding",
}  # fmt: skip


@dataclass(frozen=True)
class Fields:
    """Where a version of the format keeps a layer's parts: field numbers. 0: it has no such message."""

    name: int
    kind: int
    blobs: int
    conv: int
    pool: int
    norm: int
    transform: int
    pad: int = 3
    kernel: int = 2
    stride: int = 6
    pool_stride: int = 3
    norm_values: tuple[int, int, int, int] = (1, 2, 3, 5)  # size, alpha, beta, k


V2 = Fields(1, 2, 7, 106, 121, 118, 100)
V1 = Fields(4, 5, 6, 10, 19, 18, 36)
V0 = Fields(1, 2, 50, 0, 0, 0, 0, 7, 8, 10, 10, (13, 14, 15, 22))


@dataclass(frozen=True)
class Layer:
    """One layer: where its fields are, and the message that has them."""

    message: Message
    at: Fields

    @property
    def kind(self) -> str | int:
        """Its type: a name, or in version 1 a number."""
        return self.message.integer(self.at.kind) if self.at is V1 else self.message.text(self.at.kind)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.message.text(self.at.name)

    def settings(self, number: int) -> Message:
        """The message of its settings; version 0 keeps them in the layer."""
        return self.message.message(number) if number else self.message


def read(path: Path) -> Foreign:
    """Read a .caffemodel.

    Raises:
        WeightsError: it is damaged, or another network.
    """
    try:
        net = Message(mapped(path))
        layers = [layer for layer in _layers(net) if not _idle(path, layer)]
        data = [layer for layer in _layers(net) if layer.kind in IDLE]
        return _network(path, net, layers, data)
    except (ValueError, OverflowError, IndexError) as error:
        raise damaged(path, error) from error


def blob(message: Message) -> Array:
    """A BlobProto: numbers in the shape that it gives, in the new way or the old. Raises ValueError if damaged."""
    values = message.numbers(5, np.dtype("<f4"))
    if not len(values):
        values = message.numbers(8, np.dtype("<f8"))
    shape = message.message(7).integers(1) or [message.integer(n, 1) for n in (1, 2, 3, 4)]
    return foreign.array(values, shape)


def _layers(net: Message) -> Iterator[Layer]:
    for number, value, _ in net.fields():
        if number not in (NET_LAYERS_V1, NET_LAYERS_V2) or not isinstance(value, memoryview):
            continue
        layer = Message(value, net.budget)
        if number == NET_LAYERS_V2:
            yield Layer(layer, V2)
            continue
        inner = list(layer.messages(1))
        yield Layer(inner[-1], V0) if inner else Layer(layer, V1)


def _idle(path: Path, layer: Layer) -> bool:
    if layer.kind in IDLE:
        return True
    if layer.kind not in WORDS:
        raise refused(path, f"layer {layer.name} is of type {layer.kind}, which this network does not have")
    return False


def _network(path: Path, net: Message, layers: list[Layer], data: list[Layer]) -> Foreign:
    if not layers and not data:
        raise WeightsError(f"{path} is no .caffemodel: it holds no layers", "name a weights file")
    words = [WORDS[layer.kind] for layer in layers]
    of = {word: [layer for layer, its in zip(layers, words, strict=True) if its == word] for word in set(words)}
    weighted = [[layer for layer in of.get(word, ()) if layer.message.all(layer.at.blobs)] for word in ("conv", "fc")]
    tensors: dict[str, tuple[Array, Array]] = {}
    for name, layer in foreign.named(path, *weighted).items():
        blobs = list(layer.message.messages(layer.at.blobs))
        if len(blobs) != 2:
            raise refused(path, f"{name} has {len(blobs)} tensors, this network's layers have a weight and a bias")
        tensors[name] = foreign.shaped(path, name, blob(blobs[0]), blob(blobs[1]))
        if name in foreign.CONVOLUTIONS:
            _check_convolution(path, name, layer)
    for layer in of.get("pool", ()):
        _check_pooling(path, layer)
    order, shown = foreign.orders(path, words)
    if not shown and "caffenet" in net.text(1).lower():
        order = {"stage1_order": "relu-pool-norm", "stage2_order": "relu-pool-norm"}
    norms = foreign.same(path, [_norm(layer) for layer in of.get("norm", ())])
    crop, mean = _transform(path, data, net.integers(4)[2:3])
    grid = {"input_size": crop, "edge_padding": crop != 224}
    recipe = foreign.built(path, CAFFE, {"mean": "rgb"} | grid | norms | order)
    form = {V2: "Caffe, `layer`", V1: "Caffe, old `layers`", V0: "Caffe, old `layers` with layers of version 0"}
    return Foreign(path, form[layers[0].at], tensors, recipe, "bgr", mean, "wnids", shown)


def _check_convolution(path: Path, name: str, layer: Layer) -> None:
    settings = layer.settings(layer.at.conv)
    if not settings.data:  # the weights alone were kept
        return
    padded = settings.integers(layer.at.pad)
    # In version 0 a layer of its own may pad instead.
    padding = None if layer.at is V0 and not padded else (padded or [0])[-1]
    foreign.geometry(path, name, (settings.integers(layer.at.stride) or [1])[-1], padding)


def _check_pooling(path: Path, layer: Layer) -> None:
    settings = layer.settings(layer.at.pool)
    average = settings.integer(11 if layer.at is V0 else 1)
    size, stride = settings.integer(layer.at.kernel), settings.integer(layer.at.pool_stride, 1)
    pad = settings.integer(7 if layer.at is V0 else 4)
    if average or pad or (size, stride) != (3, 2):
        what = f"{'average' if average else 'maximum'} of {size}x{size} at stride {stride}, padded by {pad}"
        raise refused(path, f"{layer.name} takes the {what}; this network the maximum of 3x3 at stride 2")


def _norm(layer: Layer) -> dict[str, Any]:
    """Recipe values of a response normalisation; what is left out has Caffe's defaults."""
    settings = layer.settings(layer.at.norm)
    size, alpha, beta, k = layer.at.norm_values
    within = layer.at is not V0 and settings.integer(4) == 1
    return {
        "lrn": "within-map" if within else "across-maps",
        "lrn_size": settings.integer(size, 5),
        "lrn_alpha": settings.number(alpha, 1.0),
        "lrn_beta": settings.number(beta, 0.75),
        "lrn_k": 1.0 if within else settings.number(k, 1.0),
    }


def _transform(path: Path, data: list[Layer], inputs: list[int]) -> tuple[int, tuple[float, float, float]]:
    """Side of the crop and mean colour (RGB), as far as the net's input or layers that read pictures tell them."""
    crop, mean = (inputs or [227])[0], CAFFE_MEAN
    for layer in data:
        settings = layer.settings(layer.at.transform) if layer.at.transform else None
        if settings is None or not settings.data:
            continue
        crop = settings.integer(3) or crop
        if settings.number(1, 1.0) != 1.0:
            raise refused(path, f"{layer.name} multiplies pixels by {settings.number(1, 1.0):g}")
        colour = [float(value) for value in settings.numbers(5, np.dtype("<f4"))]
        if len(colour) == 3:
            mean = (colour[2], colour[1], colour[0])
    if crop not in (224, 227):
        raise refused(path, f"it takes crops of {crop} pixels, this network 227 or 224")
    return crop, mean
