"""Starting from another network's weights: layers with the same shapes are copied, the others keep random values.

The mean image is that of the new training set: the layers expect inputs around zero, and zero padding stands for the
mean.
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
from alexnet_cli.core.model.architecture import LAYERS
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.model.network import Network
from alexnet_cli.core.runs.resolve import find_weights
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import Recipe

FROZEN = {"none": (), "conv": ("conv1", "conv2", "conv3", "conv4", "conv5")}
SEMANTIC_KEYS = (  # recipe keys that change what a trained weight computes
    "activation", "lrn", "lrn_size", "lrn_k", "lrn_alpha", "lrn_beta", "lrn_alpha_divided", "lrn_joint",
    "within_norm_2", "stage1_order", "stage2_order", "pool_size", "dropout_inverted", "input_divisor",
    "edge_padding", "input_size", "mean",
)  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """The `loaded` layers, and the others (`afresh`) with the reason why they start from random values.

    `spec` is the value of --init-from; empty if a run starts a second time.
    """

    spec: str
    model: Model
    loaded: tuple[str, ...]
    afresh: Mapping[str, str]

    @torch.no_grad()
    def apply(self, network: Network) -> Transfer:
        """Copy the loaded layers into a network. Returns the same without the tensors, to free their memory."""
        for name in _tensors(self.loaded):
            network.get_parameter(name).copy_(network.slice_own(name, torch.from_numpy(self.model.tensors[name])))
        return replace(self, model=replace(self.model, tensors={}))

    def tensors(self) -> dict[str, list[str]]:
        """Names of the tensors that are loaded and of those that are not."""
        return {"loaded": _tensors(self.loaded), "afresh": _tensors(tuple(self.afresh))}

    def about(self) -> dict[str, Any]:
        """The entry in run.json, from which the run can start a second time."""
        path = self.model.path.absolute()
        return {"weights": self.spec, "path": str(path), "sha256": hash_file(path), **self.tensors()}

    def different(self, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
        """Recipe keys that change what the loaded weights mean: key -> (value here, value there)."""
        keys = (
            SEMANTIC_KEYS if recipe.dropout_inverted else (*SEMANTIC_KEYS, "dropout")
        )  # scales activations at test time
        values = {key: (getattr(recipe, key), getattr(self.model.recipe, key)) for key in keys}
        return {key: (here, there) for key, (here, there) in values.items() if here != there}


def load_source(spec: str | None, run: Run | None) -> Model | None:
    """The network to start from: that of `spec` (as for -w), or the one that a run without checkpoint started from.

    None if there is nothing to load: no `spec`, or a run that has checkpoints of its own.

    Raises:
        UsageError: the run was started from other weights than `spec`.
        WeightsError: there are no such weights.
    """
    if run is None:
        return model_file.read_model(find_weights(spec)) if spec is not None else None
    started = run.about.get("init_from")
    if spec is not None and (started is None or started["weights"] != spec):
        how = f"from {started['weights']}" if started else "without --init-from"
        raise UsageError(
            f"--init-from {spec}: run {run.path.name} was started {how}",
            "remove it, or start a run with another --name",
        )
    if started is None or any(run.checkpoints.glob("*/meta.json")):
        return None
    path = Path(started["path"])
    if path.is_file() and hash_file(path) != started["sha256"]:
        raise WeightsError(f"{path} has changed since the run started", "start a run with another --name")
    return model_file.read_model(path)


def match_layers(spec: str | None, model: Model, recipe: Recipe, classes: Sequence[ClassName]) -> Transfer:
    """Find the layers of `model` whose weights and biases have the shapes of the network of `recipe`.

    The last layer fits only if the classes are the same, in the same order.

    Raises:
        WeightsError: no layer fits, or one that fits holds NaN or infinite values.
    """
    with torch.device("meta"):
        network = Network(recipe, len(classes))
    loaded, afresh = [], {}
    for layer in LAYERS:
        pairs = [(tuple(network.get_parameter(name).shape), model.tensors[name].shape) for name in _tensors([layer])]
        if layer == "fc8" and list(model.classes) != list(classes):
            afresh[layer] = f"{len(classes):,} classes here, {len(model.classes):,} there, different ones"
        elif any(here != there for here, there in pairs):
            here, there = ("x".join(str(n) for n in shape) for shape in pairs[0])
            afresh[layer] = f"{here} here, {there} there"
        else:
            loaded.append(layer)
    if not loaded:
        settings = f"--set width={model.recipe.width:g} --set towers={model.recipe.towers}"
        raise WeightsError(
            f"no layer of {model.path} fits this network; the first, {LAYERS[0]}, is {afresh[LAYERS[0]]}",
            f"remove --recipe to use the recipe of the weights, or give {settings}",
        )
    for name in _tensors(loaded):
        if not np.isfinite(model.tensors[name]).all():
            what = f"{model.path}: {name} holds NaN or infinite values"
            raise WeightsError(what, "training diverged before it was saved: use an earlier checkpoint")
    return Transfer(spec or "", model, tuple(loaded), afresh)


def freeze(network: Network, recipe: Recipe) -> None:
    """Switch off gradients of the layers that the recipe freezes, so that they are never updated."""
    for layer in FROZEN[recipe.frozen]:
        network.get_submodule(layer).requires_grad_(False)


def _tensors(layers: Sequence[str]) -> list[str]:
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
