"""Checkpoints of cuda-convnet, the program that trained the network of 2012, and of cuda-convnet2.

A pickle of Python 2: {"model_state": {"layers": {name: layer}}, "op": options}. A tower is a chain of layers of its
own, so that the network is read by following `inputs` upwards, not by names. Weights are (inputs * k * k) x filters,
a matrix for each input in the order of `inputs`: the second half of layer 7 has them as (b, a). Pictures are RGB,
0..255, less the centre of the mean image; hidden units are halved at test time, so that no weight needs a factor here.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from alexnet_cli.core import foreign
from alexnet_cli.core.architecture import KERNELS
from alexnet_cli.core.foreign import CONVNET_MEAN, Array, Foreign, damaged, refused
from alexnet_cli.core.unpickler import NUMPY, Inert, PickledArray, load, text
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import KRIZHEVSKY

OPTIONS = ("options", "python_util.options")  # modules whose objects describe the command line that was used
ALLOWED = {
    **NUMPY,
    **{(module, "*"): None for module in OPTIONS},
    ("__builtin__", "object"): Inert,
    ("copy_reg", "_reconstructor"): Inert,
}
DEEPEST = 64  # layers between two with weights
WITHIN = {"size": 5, "alpha": 4e-5, "pow": 0.75}  # the second normalisation of net #145, per term

Layer = Mapping[str, Any]


def unpickled(path: Path) -> Any:
    """What a pickle of Python 2 holds, as plain containers and arrays.

    Raises:
        WeightsError: it is damaged, or wants more than that.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return load(cast(IO[bytes], data), ALLOWED)
    except pickle.UnpicklingError as error:
        raise refused(path, f"not read, as {error}", "nothing but numbers and containers is read") from error
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def read(path: Path) -> Foreign:
    """Read a checkpoint.

    Raises:
        WeightsError: it is damaged, wants to run code, or is another network.
    """
    try:
        return _network(path, _layers(path, unpickled(path)))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise damaged(path, f"not as cuda-convnet writes it ({error})") from error


def entries(content: object) -> dict[str, Any]:
    """A dict of Python 2 under plain strings; nothing for what is no dict."""
    if not isinstance(content, dict):
        return {}
    return {text(key): value for key, value in content.items() if isinstance(key, str | bytes)}


def _layers(path: Path, content: object) -> dict[str, Layer]:
    found = entries(entries(content).get("model_state")).get("layers")
    listed: list[Layer] = [entries(layer) for layer in (found.values() if isinstance(found, dict) else found or ())]
    layers = {text(layer["name"]): layer for layer in listed if "name" in layer and "type" in layer}
    if not layers:
        raise WeightsError(f"{path} is no checkpoint of cuda-convnet: it has no layers", "name one of its files")
    return layers


def _kind(layer: Layer) -> str:
    return text(layer["type"])


def _inputs(layers: Mapping[str, Layer], layer: Layer) -> list[str]:
    """Names of a layer's inputs; the first cuda-convnet gave their places instead."""
    names = layer.get("inputs", ())
    return [list(layers)[i] if isinstance(i, int) else text(i) for i in names]


def _below(path: Path, layers: Mapping[str, Layer], name: str) -> tuple[str, list[str]]:
    """The layer with weights (or the data) that `name` comes from, and the layers passed on the way, in order."""
    passed: list[str] = []
    while _kind(layers[name]) not in ("conv", "fc", "data"):
        above = _inputs(layers, layers[name])
        if len(above) != 1 or len(passed) > DEEPEST:
            raise refused(path, f"layer {name} of type {_kind(layers[name])} is none of this network's")
        passed.insert(0, name)
        name = above[0]
    return name, passed


def _network(path: Path, layers: Mapping[str, Layer]) -> Foreign:
    weighted = [name for name, layer in layers.items() if _kind(layer) in ("conv", "fc")]
    if len(weighted) > 100:
        raise refused(path, f"it has {len(weighted)} layers with weights")
    below = {name: [_below(path, layers, i) for i in _inputs(layers, layers[name])] for name in weighted}
    levels = _levels(path, layers, weighted, {name: [source for source, _ in below[name]] for name in weighted})
    tensors: dict[str, tuple[Array, Array]] = {}
    places = {"data": 0}
    for level, names in levels.items():
        places.update({name: place for place, name in enumerate(names)})
        parts = [_tensors(path, level, layers[n], [places.get(source, 0) for source, _ in below[n]]) for n in names]
        weight, bias = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        tensors[level] = foreign.shaped(path, level, weight, bias)
    chain = [layers[name] for name in _chain(path, layers, levels, below)]
    first = layers[levels["conv1"][0]]
    side = _first(first.get("imgSize"), 224)
    if side not in (224, 227):
        raise refused(path, f"it takes crops of {side} pixels, this network 224 or 227")
    joint = len(levels["conv1"]) == 1 and tensors["conv2"][0].shape[1] * 2 == len(tensors["conv1"][0])
    values = {"mean": "rgb", "input_size": side, "lrn_joint": joint} | _settings(path, chain)
    recipe = foreign.built(path, KRIZHEVSKY, values)
    return Foreign(path, "cuda-convnet", tensors, recipe, "rgb", CONVNET_MEAN, "ids", order_known=True)


def _levels(
    path: Path, layers: Mapping[str, Layer], weighted: list[str], sources: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """This network's layers, each with the one or two that make it, tower 1 first.

    A layer that sees its own tower alone belongs to the tower of its input; where all see both, names decide.
    """
    depth: dict[str, int] = {}
    while len(depth) < len(weighted):
        known = len(depth)
        for name in weighted:
            above = [source for source in sources[name] if _kind(layers[source]) != "data"]
            if name not in depth and all(source in depth for source in above):
                depth[name] = 1 + max((depth[source] for source in above), default=0)
        if known == len(depth):
            raise ValueError("layers that feed themselves")
    ranks = [
        sorted(name for name in weighted if depth[name] == d) for d in range(1, max(depth.values(), default=0) + 1)
    ]
    kinds = [_kind(layers[names[0]]) for names in ranks]
    split = ([r for r, kind in zip(ranks, kinds, strict=True) if kind == its] for its in ("conv", "fc"))
    levels: dict[str, list[str]] = foreign.named(path, *split)
    before: list[str] = []
    for level, names in levels.items():
        if len(names) > 2 or {_kind(layers[name]) for name in names} != {level[:-1]}:
            raise refused(path, f"{level} is made of {', '.join(names[:5])}, in this network of a layer a tower")
        wanted = len(before) if level in ("conv3", "fc6", "fc7", "fc8") else 1
        for name in names:
            if len(sources[name]) != wanted:
                raise refused(path, f"{name} has {len(sources[name])} inputs, {level} of this network {wanted}")
        if before and wanted == 1:
            names.sort(key=lambda name: before.index(sources[name][0]))
        before = names
    return levels


def _tensors(path: Path, level: str, layer: Layer, places: list[int]) -> tuple[Array, Array]:
    """Weight and bias of one layer, its inputs in the order of the towers they come from."""
    name = text(layer["name"])
    parts = [_array(path, name, part) for part in layer["weights"]]
    bias = _array(path, name, layer["biases"]).reshape(-1)
    if len(parts) != len(places) or any(part.ndim != 2 for part in parts):
        raise refused(path, f"{name} has {len(parts)} matrices for {len(places)} inputs")
    if sorted(places) != list(range(len(places))) and len(places) > 1:
        raise refused(path, f"{name} does not read every tower once")
    if level not in KERNELS:
        return np.concatenate([parts[i].T for i in np.argsort(places)], axis=1), bias
    side = _first(layer.get("filterSize"), KERNELS[level])
    padding = layer.get("padding")
    foreign.geometry(
        path,
        level,
        _first(layer.get("stride"), foreign.STRIDES[level]),
        None if padding is None else abs(_first(padding, 0)),
    )
    if side != KERNELS[level] or any(len(part) % side**2 for part in parts):
        raise refused(
            path, f"{name} has filters of {side}x{side}, {level} of this network {KERNELS[level]}x{KERNELS[level]}"
        )
    shaped = [parts[i].reshape(-1, side, side, parts[i].shape[1]).transpose(3, 0, 1, 2) for i in np.argsort(places)]
    return np.concatenate(shaped, axis=1), bias


def _array(path: Path, name: str, found: object) -> Array:
    if not isinstance(found, PickledArray):
        raise refused(path, f"{name} has no weights that are arrays")
    array = found.array()
    if array.dtype.kind != "f":
        raise refused(path, f"{name} has weights of type {array.dtype}, not floats")
    return array


def _first(value: object, default: int) -> int:
    """The first of a list (one a layer's input), or the value itself."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return value if isinstance(value, int) else default


def _chain(
    path: Path,
    layers: Mapping[str, Layer],
    levels: Mapping[str, list[str]],
    below: Mapping[str, list[tuple[str, list[str]]]],
) -> Iterator[str]:
    """Every layer of tower 1, in order; the other tower must be made of the same kinds."""
    for names in levels.values():
        kinds = {tuple(_kind(layers[p]) for p in passed) for name in names for _, passed in below[name]}
        if len(kinds) != 1:
            raise refused(path, f"the towers differ before {names[0]}")
        if _kind(layers[below[names[0]][0][0]]) != "data":
            yield from below[names[0]][0][1]
        yield names[0]


def _settings(path: Path, chain: list[Layer]) -> dict[str, Any]:
    """Recipe values of the layers without weights."""
    words, norms, within, kept = [], [], [], []
    for layer in chain:
        kind = _kind(layer)
        if kind in ("conv", "fc"):
            words.append(kind)
        elif kind == "neuron":
            neuron = entries(layer["neuron"])
            if text(neuron.get("type", layer["neuron"] if not neuron else "")) != "relu":
                raise refused(path, f"layer {text(layer['name'])} is no ReLU")
            words.append("relu")
        elif kind == "pool":
            if (layer["sizeX"], layer["stride"], text(layer["pool"])) != (3, 2, "max"):
                raise refused(path, f"layer {text(layer['name'])} does not take the maximum of 3x3 at stride 2")
            words.append("pool")
        elif kind == "cmrnorm":
            words.append("norm")
            norms.append(_norm(layer) | {"lrn_k": float(layer.get("minDiv", 1.0))})
        elif kind == "rnorm":
            within.append(words.count("conv"))
            if _norm(layer) != {"lrn_size": 5, "lrn_alpha": 1e-3 / 5, "lrn_beta": 0.75} or words[-1] != "norm":
                raise refused(path, f"layer {text(layer['name'])} is not the normalisation within maps of net #145")
        elif kind in ("hs", "dropout", "dropout2"):
            kept.append((float(layer.get("keep", 0.5)), kind == "dropout"))
        else:
            raise refused(path, f"layer {text(layer['name'])} of type {kind} is none of this network's")
    if within not in ([], [2]):
        raise refused(path, "it normalises within maps elsewhere than in stage 2")
    if len(kept) not in (0, 2) or len(set(kept)) > 1:
        raise refused(path, "it drops units elsewhere than in layers 6 and 7")
    keep, inverted = kept[0] if kept else (1.0, False)
    order, _ = foreign.orders(path, words)
    drops = {"dropout": round(1 - keep, 7), "dropout_inverted": inverted, "within_norm_2": bool(within)}
    return foreign.same(path, norms) | order | drops


def _norm(layer: Layer) -> dict[str, Any]:
    """Size, alpha and power; the file has alpha divided by the size already (its square, within a map)."""
    size = int(layer["size"])
    alpha = float(f"{float(layer['scale']) * size:.7g}")
    return {"lrn_size": size, "lrn_alpha": alpha, "lrn_beta": float(layer["pow"])}
