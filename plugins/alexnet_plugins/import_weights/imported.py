"""A network of another program, as a reader returns it: tensors in this toolkit's layout, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from alexnet_cli import recipe_io
from alexnet_cli.core.model.architecture import CONV_LAYERS, LAYERS, layer_specs
from alexnet_cli.errors import RecipeError, WeightsError
from alexnet_cli.recipe import CAFFE, Order, Recipe

Array = npt.NDArray[Any]
ChannelOrder = Literal["rgb", "bgr", "imagenet"]
"""rgb, bgr: 0..255 minus a mean. imagenet: RGB in 0..1, minus torchvision's mean, divided by its std."""

CAFFE_MEAN = (122.679, 116.669, 104.007)  # of ILSVRC 2012, RGB: Caffe's ilsvrc_2012_mean.npy
FC_LAYERS = ("fc6", "fc7", "fc8")


@dataclass(frozen=True)
class ImportedNetwork:
    """The network in a file of another program."""

    path: Path
    format: str
    layers: Mapping[str, tuple[Array, Array]]
    """Layer -> weight (out x in x k x k, or out x in) and bias, tower 1 first, for input channels as in `pixels`."""
    recipe: Recipe
    """All but the width and the number of towers, which follow from the shapes."""
    pixels: ChannelOrder
    mean: tuple[float, float, float]
    """Mean color to subtract, RGB, 0..255."""
    is_order_known: bool
    """Whether the file itself shows what follows layers 1 and 2."""


def unsupported(path: Path, why: str, hint: str = "import-weights reads two-tower AlexNets") -> WeightsError:
    """Return the error for a file that is a network, but not this one."""
    return WeightsError(f"{path}: {why}", hint)


def corrupt(path: Path, error: object) -> WeightsError:
    """Return the error for a file that cannot be read to its end."""
    return WeightsError(f"{path} is damaged: {error}", "download it again")


def format_shape(shape: Sequence[int]) -> str:
    """Format a shape as 96x3x11x11."""
    return "x".join(map(str, shape))


def build_recipe(path: Path, values: Mapping[str, Any]) -> Recipe:
    """Return recipe `caffe` with the values that a file gives. Raises WeightsError for values no recipe can have."""
    try:
        return recipe_io.apply_changes(CAFFE, values)
    except RecipeError as error:
        raise unsupported(path, f"it has a setting that this network cannot have ({error.what})") from error


def find_stage_orders(path: Path, words: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Return recipe values for what follows layers 1 and 2, and whether the file shows it.

    `words`: the file's layers in order, each as conv, fc, relu, norm or pool.

    Raises:
        WeightsError: a layer is followed by something else than in this network.
    """
    stages: list[list[str]] = []
    for word in words:
        if word in ("conv", "fc"):
            stages.append([])
        elif stages:
            stages[-1].append(word)
    if not any(stages) or len(stages) != len(LAYERS):  # name_layers checks the number of layers
        return {}, False
    following = dict(zip(LAYERS, ("-".join(stage) for stage in stages), strict=True))
    has_norm = any("norm" in following[layer] for layer in ("conv1", "conv2"))
    pooled = ("relu-pool", "pool-relu")
    first_two = get_args(Order) if has_norm else pooled
    allowed = {"conv1": first_two, "conv2": first_two, "conv5": pooled, "fc8": ("",)}
    for layer, steps in following.items():
        if steps not in allowed.get(layer, ("relu",)):
            expected = " or ".join(allowed.get(layer, ("relu",))) or "nothing"
            raise unsupported(path, f"{layer} is followed by {steps or 'nothing'}, in this network by {expected}")
    if not has_norm:
        return {"lrn": "none"}, True
    return {"stage1_order": following["conv1"], "stage2_order": following["conv2"]}, True


def name_layers(path: Path, convolutions: Sequence[Any], connected: Sequence[Any]) -> dict[str, Any]:
    """Return the layers by name. Raises WeightsError unless there are five and three."""
    for kind, layers, names in (
        ("convolutions", convolutions, CONV_LAYERS),
        ("fully connected layers", connected, FC_LAYERS),
    ):
        if len(layers) != len(names):
            raise unsupported(path, f"it has {len(layers)} {kind} with weights, this network has {len(names)}")
    return dict(zip(LAYERS, (*convolutions, *connected), strict=True))


def check_tensors(path: Path, layer: str, weight: Array, bias: Array) -> tuple[Array, Array]:
    """Return weight and bias without the leading ones of old formats. Raises WeightsError unless they are floats."""
    dimensions = 4 if layer in CONV_LAYERS else 2
    shape = weight.shape
    while len(shape) > dimensions and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != dimensions or 0 in shape:
        raise unsupported(path, f"{layer}.weight is {format_shape(weight.shape)}, not an array of {dimensions} axes")
    if weight.dtype.kind != "f" or bias.dtype.kind != "f":
        raise unsupported(path, f"{layer} has {weight.dtype} and {bias.dtype} values, not floats")
    return weight.reshape(shape), bias.reshape(-1)


def check_geometry(path: Path, layer: str, stride: int, padding: int) -> None:
    """Raise WeightsError if stride or padding of a convolution differ from this network's."""
    spec = layer_specs(CAFFE, 1000)[LAYERS.index(layer)]
    if stride != spec.stride:
        raise unsupported(path, f"{layer} has stride {stride}, in this network {spec.stride}")
    if padding != spec.padding[0]:
        raise unsupported(path, f"{layer} has padding {padding}, in this network {spec.padding[0]}")


def merge_settings(path: Path, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that several layers share. Raises WeightsError if they differ."""
    for other in settings[1:]:
        if other != settings[0]:
            raise unsupported(path, f"its layers have different settings: {dict(settings[0])} and {dict(other)}")
    return dict(settings[0]) if settings else {}


def to_decimal(value: float) -> float:
    """Return a float32 as the decimal number it was written as: 0.0001, not 0.00009999999747."""
    return float(f"{value:.7g}")


def reshape_array(values: Array, shape: Sequence[int]) -> Array:
    """Return values, uncopied, in the shape that a file gives. Raises ValueError if their number does not fit."""
    if not shape or any(n <= 0 for n in shape) or len(shape) > 8:
        raise ValueError(f"a shape of {list(shape)[:8]}")
    if math.prod(shape) != values.size:
        raise ValueError(f"{values.size:,} numbers for a shape of {format_shape(shape)}")
    return np.reshape(values, tuple(shape))
