"""A checkpoint of cuda-convnet, net #145 at a sixteenth of the width, and what that program computes with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from foreign_files import Old, normalised, pickled
from test_onnx_graph import convolved, normalised_within, pooled

Floats = npt.NDArray[np.float32]
Maps = npt.NDArray[np.float64]
Net = dict[str, dict[str, Any]]

WIDTHS = {"conv1": 3, "conv2": 8, "conv3": 12, "conv4": 12, "conv5": 8}
GEOMETRY = {"conv1": (11, 4, 0), "conv2": (5, 1, 2), "conv3": (3, 1, 1), "conv4": (3, 1, 1), "conv5": (3, 1, 1)}


def layers(seed: int = 0, *, second: bool = False, classes: int = 10) -> Net:
    """Layers by name, in the file's layout. `second`: as cuda-convnet2 has them, with inverted dropout."""
    generator = np.random.default_rng(seed)
    net: Net = {"data": {"name": "data", "type": "data", "outputs": 3 * 224 * 224}}

    def add(name: str, kind: str, inputs: list[str], **settings: Any) -> str:
        net[name] = {"name": name, "type": kind, "inputs": inputs, "inputLayers": [net[i] for i in inputs], **settings}
        return name

    def relu(name: str) -> str:
        neuron = {"type": "relu", "params": {}, "usesActs": True, "usesInputs": False}
        return add(f"{name}_neuron", "neuron", [name], neuron=neuron)

    def conv(name: str, inputs: list[str], channels: int) -> str:
        side, stride, pad = GEOMETRY[name[:-1]]
        filters = WIDTHS[name[:-1]]
        parts = [_drawn(generator, channels * side**2, filters, len(inputs)) for _ in inputs]
        bias = (0.3 * generator.standard_normal((filters, 1))).astype(np.float32)
        many = {"filterSize": side, "stride": stride, "padding": -pad, "channels": channels, "groups": 1}
        lists = {key: [value] * len(inputs) for key, value in many.items()}
        image = {"imgSize": [224 if name[:-1] == "conv1" else 0] * len(inputs)}
        return add(name, "conv", inputs, weights=parts, biases=bias, weightsInc=[0], filters=filters, **lists, **image)

    def fc(name: str, inputs: list[str], each: int, outputs: int) -> str:
        parts = [np.asfortranarray(_drawn(generator, each, outputs, len(inputs))) for _ in inputs]
        bias = (0.3 * generator.standard_normal((1, outputs))).astype(np.float32)
        return add(name, "fc", inputs, weights=parts, biases=bias, outputs=outputs)

    def norm(name: str, below: str, kind: str = "cmrnorm") -> str:
        terms = {"size": 5, "scale": 1e-4 / 5, "pow": 0.75, "minDiv": 2.0}
        return add(name, kind, [below], **(terms if kind == "cmrnorm" else terms | {"scale": 1e-3 / 25}))

    def pool(name: str, below: str) -> str:
        return add(name, "pool", [below], pool="max", sizeX=3, stride=2, start=0)

    def drop(name: str, below: str) -> str:
        return add(name, "dropout" if second else "hs", [below], keep=0.5)

    tops = []
    for t in "ab":
        x = relu(pool(f"pool1{t}", norm(f"rnorm1{t}", conv(f"conv1{t}", ["data"], 3))))
        x = norm(f"rnorm2{t}", relu(conv(f"conv2{t}", [x], 3)))
        tops.append(pool(f"pool2{t}", norm(f"cnorm2{t}", x, "rnorm")))
    tops = [relu(conv(f"conv3{t}", tops, 8)) for t in "ab"]
    tops = [relu(conv(f"conv4{t}", [x], 12)) for t, x in zip("ab", tops, strict=True)]
    tops = [relu(pool(f"pool3{t}", conv(f"conv5{t}", [x], 12))) for t, x in zip("ab", tops, strict=True)]
    tops = [drop(f"hs1{t}", relu(fc(f"fc2048{t}", tops, 8 * 36, 128))) for t in "ab"]
    tops = [
        drop("hs2a", relu(fc("fc2048ba", tops, 128, 128))),
        drop("hs2b", relu(fc("fc2048bb", tops[::-1], 128, 128))),  # the second half reads the second half first
    ]
    last = fc("fc1000", tops, 128, classes)
    add("probs", "softmax", [last])
    return net


def _drawn(generator: np.random.Generator, rows: int, columns: int, inputs: int) -> Floats:
    values: Floats = generator.standard_normal((rows, columns)).astype(np.float32)
    return values * np.float32(np.sqrt(2 / (rows * inputs)))


def options() -> Old:
    """The command line that the checkpoint carries: objects of classes that nobody here has."""
    state = {"letter": "batch_size", "value": 128, "parser": None}
    return Old("options", "OptionsParser", {"options": {"batch_size": Old("options", "Option", state)}})


def checkpoint(net: Net) -> bytes:
    return pickled({"model_state": {"layers": net, "epoch": 91, "train_outputs": [([1.5, 0.5], 128)]}, "op": options()})


def forward(net: Net, rgb: npt.NDArray[np.uint8], mean: Any = (127.30, 119.72, 104.91)) -> Maps:
    """Scores of a crop of 224, RGB: layer after layer, as their dicts say; every tower apart."""
    keep = {"dropout": 1.0, "hs": 0.5}
    middle = np.asarray(mean, np.float64)
    middle = middle[:, None, None] if middle.ndim == 1 else middle
    values: dict[str, Maps] = {"data": rgb - middle}
    for name, layer in net.items():
        kind, below = layer["type"], [values[i] for i in layer.get("inputs", ())]
        if kind == "conv":
            values[name] = sum(_convolution(layer, i, x) for i, x in enumerate(below)) + layer["biases"][:, :, None]
        elif kind == "fc":
            parts = zip(below, layer["weights"], strict=True)
            values[name] = sum(x.reshape(-1) @ w.astype(np.float64) for x, w in parts) + layer["biases"][0]
        elif kind == "neuron":
            values[name] = np.maximum(below[0], 0)
        elif kind == "pool":
            values[name] = pooled(below[0], 3)
        elif kind == "cmrnorm":
            values[name] = normalised(below[0], layer["scale"], layer["minDiv"], layer["pow"], layer["size"])
        elif kind == "rnorm":
            values[name] = normalised_within(below[0], layer["size"], 1.0, layer["scale"], layer["pow"])
        elif kind in keep:
            values[name] = keep[kind] * below[0]
    return values["fc1000"]


def _convolution(layer: dict[str, Any], i: int, x: Maps) -> Maps:
    """1 + ceil((2 pad + side - k) / stride) windows, zeros outside the picture; a matrix has rows of channel, y, x."""
    side, stride, pad = layer["filterSize"][i], layer["stride"][i], -layer["padding"][i]
    windows = 1 + -(-(2 * pad + x.shape[1] - side) // stride)
    reach = (windows - 1) * stride + side - pad - x.shape[1]
    x = np.pad(x, ((0, 0), (pad, reach), (pad, reach)))
    matrix = layer["weights"][i].astype(np.float64)
    weight = matrix.T.reshape(matrix.shape[1], x.shape[0], side, side)
    return convolved(x, weight, np.zeros(len(weight)), stride, 0, 1)
