"""Fine-tuning: copy layers of the same shape from other weights; the others keep their random initial values.

The mean image is that of the new training set, because the layers expect inputs around zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.files import hash_file
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.architecture import LAYERS, SHAPE_KEYS, list_layers
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.model.network import Network
from alexnet_cli.core.runs.resolve import find_weights
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import Recipe, compare_recipes, format_set_option

FROZEN = {"none": (), "conv": ("conv1", "conv2", "conv3", "conv4", "conv5")}
SEMANTIC_KEYS = {  # recipe keys that change what a trained weight computes
    "activation", "lrn", "lrn_size", "lrn_k", "lrn_alpha", "lrn_beta", "lrn_alpha_divided", "lrn_joint",
    "within_norm_2", "stage1_order", "stage2_order", "pool_size", "pool_ceil", "dropout_inverted",
    "input_divisor", "edge_padding", "input_size", "mean", "left_out_layers",
}  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """The `loaded` layers of `model`, and the `initialized` ones, each with the reason why it starts at random.

    `spec` is the value of --init-from; empty if a run starts a second time.
    """

    spec: str
    model: Model
    loaded: tuple[str, ...]
    initialized: Mapping[str, str]

    @torch.no_grad()
    def apply(self, network: Network) -> Transfer:
        """Copy the loaded layers into a network. Returns a copy without the tensors, to free their memory."""
        for name in _parameters(self.loaded):
            network.get_parameter(name).copy_(network.slice_own(name, torch.from_numpy(self.model.tensors[name])))
        return replace(self, model=replace(self.model, tensors={}))

    def parameters(self) -> dict[str, list[str]]:
        """Names of the parameters that are loaded and of those that are initialized."""
        return {"loaded": _parameters(self.loaded), "initialized": _parameters(tuple(self.initialized))}

    def about(self) -> dict[str, Any]:
        """The entry in run.json, from which the run can start a second time."""
        path = self.model.path.absolute()
        return {"weights": self.spec, "path": str(path), "sha256": hash_file(path), **self.parameters()}

    def compare_recipe(self, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
        """Keys of `recipe` that change what the loaded weights compute: key -> (value here, value of the weights)."""
        differences = compare_recipes(recipe, self.model.recipe)
        keys = SEMANTIC_KEYS if recipe.dropout_inverted else {*SEMANTIC_KEYS, "dropout"}  # scales activations in tests
        return {key: values for key, values in differences.items() if key in keys}


def load_source(spec: str | None, run: Run | None) -> Model | None:
    """Read the weights to start from: those of `spec` (as for -w), or those of a run without a checkpoint.

    Returns None without `spec`, or if the run has checkpoints of its own.

    Raises:
        UsageError: the run was started from other weights than `spec`.
        WeightsError: there are no such weights.
    """
    if run is None:
        return model_file.read_model(find_weights(spec)) if spec is not None else None
    origin = run.about.get("init_from")
    if spec is not None and (origin is None or origin["weights"] != spec):
        how = f"from {origin['weights']}" if origin else "without --init-from"
        raise UsageError(
            f"--init-from {spec}: run {run.path.name} was started {how}",
            "remove --init-from, or start a new run with another --name",
        )
    if origin is None or any(run.checkpoints.glob("*/meta.json")):
        return None
    path = Path(origin["path"])
    if path.is_file() and hash_file(path) != origin["sha256"]:
        raise WeightsError(f"{path} has changed since the run started", "start a new run with another --name")
    return model_file.read_model(path)


def match_layers(spec: str | None, model: Model, recipe: Recipe, classes: Sequence[ClassName]) -> Transfer:
    """Find the layers of `model` whose parameters have the shapes of the network of `recipe`.

    The last layer fits only if the classes are the same, in the same order.

    Raises:
        WeightsError: no layer fits, or a layer that fits has NaN or infinite values.
    """
    with torch.device("meta"):
        network = Network(recipe, len(classes))
    loaded, initialized = list[str](), dict[str, str]()
    for layer in list_layers(recipe):
        if layer in model.recipe.left_out_layers:
            initialized[layer] = "left out in the weights"
            continue
        names = _parameters([layer])
        pairs = [(tuple(network.get_parameter(name).shape), model.tensors[name].shape) for name in names]
        if layer == "fc8" and list(model.classes) != list(classes):
            initialized[layer] = (
                f"the data set has {len(classes):,} other classes than the weights ({len(model.classes):,})"
            )
        elif any(here != there for here, there in pairs):
            here, there = ("x".join(str(n) for n in shape) for shape in pairs[0])
            initialized[layer] = f"shape {here}, in the weights {there}"
        else:
            loaded.append(layer)
    if not loaded:
        values = compare_recipes(model.recipe, recipe)
        settings = " ".join(format_set_option(key, values[key][0]) for key in SHAPE_KEYS if key in values)
        raise WeightsError(
            f"no layer of {model.path} fits this network, not even {LAYERS[0]} ({initialized[LAYERS[0]]})",
            f"remove --recipe to use the recipe of the weights, or give {settings}",
        )
    for name in _parameters(loaded):
        if not np.isfinite(model.tensors[name]).all():
            what = f"{model.path}: {name} has NaN or infinite values"
            raise WeightsError(what, "the training that saved it had diverged: use an earlier checkpoint")
    return Transfer(spec or "", model, tuple(loaded), initialized)


def freeze(network: Network, recipe: Recipe) -> None:
    """Switch off the gradients of the layers that the recipe freezes; they are never updated."""
    for layer in list_layers(recipe):
        if layer in FROZEN[recipe.frozen]:
            network.get_submodule(layer).requires_grad_(False)


def _parameters(layers: Sequence[str]) -> list[str]:
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
