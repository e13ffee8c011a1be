"""Reads a network from named tensors, in a .pth or .safetensors file.

Names differ from program to program. Weights of four axes are the convolutions, weights of two the fully connected
layers, both in natural order of their names (conv10 after conv9). A bias has the name of its weight.
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

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys of the state dict in checkpoints
STATE_DICT_HINT = "save the state dict alone: torch.save(network.state_dict(), FILE)"


def read_safetensors(path: Path, recipe: Recipe, pixels: ChannelOrder) -> ImportedNetwork:
    """Read a .safetensors file. `recipe` and `pixels` say how the network was built and what its input was.

    Raises:
        WeightsError: it is damaged, was written by this toolkit, or is another network.
    """
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("schema") == SCHEMA:
                raise unsupported(path, "it was written by this toolkit", f"use it as it is: -w {path}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", "it should contain float tensors") from error
    return _convert(path, "safetensors", tensors, recipe, pixels)


def read_torch(path: Path, recipe: Recipe, pixels: ChannelOrder) -> ImportedNetwork:
    """Read a state dict, or a checkpoint that has one. `recipe` and `pixels` are as in `read_safetensors`.

    Not memory-mapped: PyTorch would map a compressed archive as if it were uncompressed and return wrong numbers.

    Raises:
        WeightsError: it is damaged, could run code, or is another network.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key in WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        values = {str(name): value for name, value in dict(content).items() if isinstance(value, torch.Tensor)}
        tensors = {name: _to_numpy(value) for name, value in values.items()}
    except pickle.UnpicklingError as error:
        what = "PyTorch's safe loader refuses it: it has more than tensors inside, or is damaged"
        raise unsupported(path, what, STATE_DICT_HINT) from error
    except Exception as error:  # PyTorch has no exception class for a damaged file
        raise corrupt(path, str(error).partition("\n")[0][:200]) from error
    if not tensors:
        raise unsupported(path, "it has no state dict inside", STATE_DICT_HINT)
    return _convert(path, "PyTorch", tensors, recipe, pixels)


def _to_numpy(value: Any) -> Array:
    """Return a tensor as an array; floats as float32, since NumPy has no bfloat16.

    Raises:
        ValueError: the tensor repeats its numbers, so that a small file would fill the memory.
    """
    if value.numel() > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {value.numel():,} numbers in {value.untyped_storage().nbytes():,} bytes")
    array: Array = (value.float() if value.is_floating_point() else value).detach().numpy()
    return array


def _convert(
    path: Path, file_format: str, tensors: Mapping[str, Array], recipe: Recipe, pixels: ChannelOrder
) -> ImportedNetwork:
    """Assign named tensors to the eight layers. Raises WeightsError if they are not those of this network."""
    weights: dict[int, list[str]] = {4: [], 2: []}  # names by number of axes
    for name in sorted((name for name in tensors if name.endswith(".weight")), key=_natural_key):
        if tensors[name].ndim not in weights:
            raise unsupported(path, f"{name} has {tensors[name].ndim} axes, in this network 4 or 2")
        weights[tensors[name].ndim].append(name)
    layers = {}
    used = set()
    for layer, name in imported.name_layers(path, weights[4], weights[2]).items():
        bias = name.removesuffix(".weight") + ".bias"
        if bias not in tensors:
            raise unsupported(path, f"{name} has no {bias}")
        layers[layer] = imported.check_tensors(path, layer, tensors[name], tensors[bias])
        used |= {name, bias, "mean", "std"}
    for name in sorted(set(tensors) - used):
        if np.asarray(tensors[name]).dtype.kind == "f":
            raise unsupported(path, f"it also has {name}, which no layer of this network has")
    return ImportedNetwork(path, file_format, layers, recipe, pixels, CAFFE_MEAN, is_order_known=False)


def _natural_key(name: str) -> list[Any]:
    """Return a sort key by which conv10 follows conv9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"([0-9]+)", name)]
