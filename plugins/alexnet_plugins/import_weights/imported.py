"""What a reader of another program's weights hands over: tensors in this network's layout, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from alexnet_cli import recipe_io
from alexnet_cli.core.model.architecture import CONV_LAYERS, layer_specs
from alexnet_cli.errors import RecipeError, WeightsError
from alexnet_cli.recipe import CAFFE, Order, Recipe

Array = npt.NDArray[Any]
ChannelOrder = Literal["rgb", "bgr", "imagenet"]
"""RGB or BGR in 0..255 less a mean; or RGB in 0..1, less torchvision's mean and divided by its deviation."""

CAFFE_MEAN = (122.679, 116.669, 104.007)  # of ILSVRC 2012, RGB: Caffe's ilsvrc_2012_mean.npy
CONVOLUTIONS = CONV_LAYERS
CONNECTED = ("fc6", "fc7", "fc8")
GEOMETRY = {spec.name: spec for spec in layer_specs(CAFFE, 1000)}


@dataclass(frozen=True)
class ImportedNetwork:
    """Another program's network. The recipe lacks only the width and the number of towers, which the shapes tell.

    `layers`: layer -> weight (out x in x k x k, or out x in) and bias, tower 1 first, for the channels of `pixels`.
    `order_known`: whether the file itself shows what follows layers 1 and 2.
    """

    path: Path
    format: str
    layers: Mapping[str, tuple[Array, Array]]
    recipe: Recipe
    pixels: ChannelOrder
    mean: tuple[float, float, float]
    order_known: bool


def built(path: Path, base: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with the values that a file gives. Raises WeightsError for those that no recipe can have."""
    try:
        return recipe_io.apply_changes(base, values)
    except RecipeError as error:
        raise unsupported(path, f"it has a setting that this network cannot have ({error.what})") from error


def unsupported(path: Path, why: str, hint: str = "import-weights takes two-tower AlexNets") -> WeightsError:
    """The error for a file that is a network, but not this one."""
    return WeightsError(f"{path}: {why}", hint)


def corrupt(path: Path, error: object) -> WeightsError:
    """The error for a file that cannot be read to its end."""
    return WeightsError(f"{path} is damaged: {error}", "fetch it again")


def orders(path: Path, words: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Recipe values from the layers in their order, each as conv, fc, relu, norm or pool; and whether they were shown.

    Raises:
        WeightsError: they come in another order than this network has.
    """
    stages: list[list[str]] = []
    for word in words:
        if word in ("conv", "fc"):
            stages.append([])
        elif stages:
            stages[-1].append(word)
    if not any(stages) or len(stages) != 8:  # the number of layers is checked where they are named
        return {}, False
    found = ["-".join(stage) for stage in stages]
    for layer, stage, allowed in zip(
        (*CONVOLUTIONS[2:], *CONNECTED),
        found[2:],
        (("relu",), ("relu",), ("relu-pool", "pool-relu"), ("relu",), ("relu",), ("",)),
        strict=True,
    ):
        if stage not in allowed:
            raise unsupported(
                path, f"{layer} is followed by {stage or 'nothing'}, in this network by {allowed[0] or 'nothing'}"
            )
    if all(stage in ("relu-pool", "pool-relu") for stage in found[:2]):
        return {"lrn": "none"}, True
    for layer, stage in zip(CONVOLUTIONS, found[:2], strict=False):
        if stage not in get_args(Order):
            raise unsupported(
                path, f"{layer} is followed by {stage or 'nothing'}, not by one of {', '.join(get_args(Order))}"
            )
    return {"stage1_order": found[0], "stage2_order": found[1]}, True


def named(path: Path, convolutions: Sequence[Any], connected: Sequence[Any]) -> dict[str, Any]:
    """The layers by name, given in order. Raises WeightsError unless there are five and three."""
    for what, found, wanted in (("convolutions", convolutions, 5), ("fully connected layers", connected, 3)):
        if len(found) != wanted:
            raise unsupported(path, f"it has {len(found)} {what} with weights, this network has {wanted}")
    return dict(zip((*CONVOLUTIONS, *CONNECTED), (*convolutions, *connected), strict=True))


def shaped(path: Path, layer: str, weight: Array, bias: Array) -> tuple[Array, Array]:
    """A weight with the leading ones of old formats dropped, and a flat bias. Raises WeightsError if it cannot be."""
    wanted = 4 if layer in CONVOLUTIONS else 2
    shape = weight.shape
    while len(shape) > wanted and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != wanted or 0 in shape:
        raise unsupported(
            path, f"{layer}.weight is {'x'.join(map(str, weight.shape))}, which has no {wanted} dimensions"
        )
    if weight.dtype.kind != "f" or bias.dtype.kind != "f":
        raise unsupported(path, f"{layer} holds {weight.dtype} and {bias.dtype}, not floats")
    return weight.reshape(shape), bias.reshape(-1)


def geometry(path: Path, layer: str, stride: int, padding: int | None) -> None:
    """Raise WeightsError if a convolution moves or is padded otherwise than this network's."""
    ours = GEOMETRY[layer]
    if stride != ours.stride:
        raise unsupported(path, f"{layer} has stride {stride}, this network {ours.stride}")
    if padding is not None and padding != ours.padding[0]:
        raise unsupported(path, f"{layer} is padded by {padding}, this network's by {ours.padding[0]}")


def same(path: Path, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that several layers share. Raises WeightsError if they differ."""
    if any(dict(settings) != dict(found[0]) for settings in found):
        raise unsupported(path, f"its layers disagree: {dict(found[0])} and {dict(found[1])}")
    return dict(found[0]) if found else {}


def decimal(value: float) -> float:
    """A float32 as the decimal number that somebody wrote: 0.0001, not 0.00009999999747."""
    return float(f"{value:.7g}")


def array(values: Array, shape: Sequence[int]) -> Array:
    """Values in a shape that a file claims, uncopied. Raises ValueError if they do not fill it."""
    if not shape or any(n <= 0 for n in shape) or len(shape) > 8:
        raise ValueError(f"a shape of {list(shape)[:8]}")
    count = 1
    for n in shape:
        count *= n
    if count != values.size:
        raise ValueError(f"{values.size:,} numbers for a shape of {'x'.join(map(str, shape))}")
    return np.reshape(values, tuple(shape))
