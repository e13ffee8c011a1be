"""Tensors by name, from a .pth or .safetensors file, as the eight layers of this network.

Names are everybody's own: convolutions are the weights of four dimensions, fully connected layers those of two, each in
the order of the names, numbers in them counted as numbers; each bias is called as its weight.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from alexnet_cli.core.model.model_file import SCHEMA, check_header
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import Recipe
from alexnet_plugins.import_weights import imported
from alexnet_plugins.import_weights.imported import (
    CAFFE_MEAN,
    Array,
    ChannelOrder,
    ImportedNetwork,
    corrupt,
    unsupported,
)

WRAPPERS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep it
SUFFIXES = (".weight", ".bias")
STRANGE = ("running_mean", "running_var")


def read_safetensors(path: Path, recipe: Recipe, pixels: ChannelOrder) -> ImportedNetwork:
    """Read a .safetensors file of a network that was built and fed as `recipe` and `pixels` say.

    Raises:
        WeightsError: it is damaged, ours already, or another network.
    """
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("schema") == SCHEMA:
                raise unsupported(path, "it is a model file of this toolkit already", f"use it as it is: -w {path}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", "it should hold float tensors") from error
    return network(path, "safetensors", tensors, recipe, pixels)


def read_torch(path: Path, recipe: Recipe, pixels: ChannelOrder) -> ImportedNetwork:
    """Read a state dict, or a checkpoint that has one, of a network built and fed as `recipe` and `pixels` say.

    Not memory-mapped: PyTorch maps a compressed archive as if it were none, which gives wrong numbers.

    Raises:
        WeightsError: it is damaged, wants to run code, or is another network.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key in WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        values = {str(name): value for name, value in dict(content).items() if isinstance(value, torch.Tensor)}
        tensors = {name: _floats(value) for name, value in values.items()}
    except pickle.UnpicklingError as error:
        what = "PyTorch's safe loader refuses it: it holds more than tensors, or is damaged"
        raise unsupported(path, what, "save the state dict alone: torch.save(network.state_dict(), FILE)") from error
    except Exception as error:  # whatever PyTorch raises for a damaged file: it has no error of its own
        raise corrupt(path, str(error).partition("\n")[0][:200]) from error
    if not tensors:
        raise unsupported(path, "it holds no state dict", "save one: torch.save(network.state_dict(), FILE)")
    return network(path, "PyTorch", tensors, recipe, pixels)


def _floats(value: Any) -> Array:
    """A tensor for NumPy, which has no bfloat16. Raises ValueError for one that repeats its numbers without end."""
    if value.numel() > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {value.numel():,} numbers in {value.untyped_storage().nbytes():,} bytes")
    found: Array = (value.float() if value.is_floating_point() else value).detach().numpy()
    return found


def network(
    path: Path, form: str, tensors: Mapping[str, Array], recipe: Recipe, pixels: ChannelOrder
) -> ImportedNetwork:
    """Eight layers from named tensors. Raises WeightsError where they are not those of this network."""
    for name in tensors:
        if name.endswith(STRANGE):
            raise unsupported(path, f"{name} belongs to batch normalization, which this network does not have")
    names = sorted((name for name in tensors if name.endswith(SUFFIXES[0])), key=_natural)
    by_dimensions = {n: [name for name in names if tensors[name].ndim == n] for n in (4, 2)}
    other = [name for name in names if tensors[name].ndim not in by_dimensions]
    if other:
        raise unsupported(path, f"{other[0]} has {tensors[other[0]].ndim} dimensions, this network's have 4 or 2")
    layers = {}
    for layer, name in imported.named(path, by_dimensions[4], by_dimensions[2]).items():
        bias = name.removesuffix(SUFFIXES[0]) + SUFFIXES[1]
        if bias not in tensors:
            raise unsupported(path, f"{name} has no {bias}, this network's layers have one")
        layers[layer] = imported.shaped(path, layer, tensors[name], tensors[bias])
    left = sorted(set(tensors) - {n.removesuffix(".weight") + end for n in names for end in SUFFIXES})
    floats = [name for name in left if np.asarray(tensors[name]).dtype.kind == "f" and name not in ("mean", "std")]
    if floats:
        raise unsupported(path, f"it also holds {floats[0]}, which no layer of this network has")
    return ImportedNetwork(path, form, layers, recipe, pixels, CAFFE_MEAN, order_known=False)


def _natural(name: str) -> list[Any]:
    """A sort key by which conv10 follows conv9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"([0-9]+)", name)]
