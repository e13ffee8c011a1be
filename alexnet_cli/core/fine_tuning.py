"""Starting from another network's weights: layers that fit are taken over, the others start afresh.

The mean that is subtracted stays that of the new training set: features expect inputs around zero, and the zeros that
pad every map stand for the mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_cli.core import weights
from alexnet_cli.core.architecture import LAYERS
from alexnet_cli.core.network import Network
from alexnet_cli.core.runs import Run, find_weights
from alexnet_cli.core.sources import ClassName
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import Recipe

FROZEN = {"none": (), "conv": ("conv1", "conv2", "conv3", "conv4", "conv5")}
MEANING = (  # recipe keys without which a weight is another feature
    "activation", "lrn", "lrn_size", "lrn_k", "lrn_alpha", "lrn_beta", "lrn_alpha_divided", "lrn_joint",
    "within_norm_2", "stage1_order", "stage2_order", "pool_size", "dropout_inverted", "input_divisor",
    "edge_padding", "input_size", "mean",
)  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """What a network takes over: `loaded` layers, and the others with the reason why they start afresh.

    `spec` is what was typed after --init-from; empty where a run begins once more.
    """

    spec: str
    model: Model
    loaded: tuple[str, ...]
    afresh: Mapping[str, str]

    @torch.no_grad()
    def applied(self, network: Network) -> Transfer:
        """Copy the loaded layers into a network. Returns the same without the tensors, whose memory is free again."""
        for name in _tensors(self.loaded):
            network.get_parameter(name).copy_(network.own(name, torch.from_numpy(self.model.tensors[name])))
        return replace(self, model=replace(self.model, tensors={}))

    def tensors(self) -> dict[str, list[str]]:
        """The names of the tensors loaded and of those started afresh."""
        return {"loaded": _tensors(self.loaded), "afresh": _tensors(tuple(self.afresh))}

    def about(self) -> dict[str, Any]:
        """What run.json says, so that the run can begin once more from the same."""
        path = self.model.path.absolute()
        return {"weights": self.spec, "path": str(path), "sha256": checksum(path), **self.tensors()}

    def different(self, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
        """Recipe keys that change what the loaded weights mean: key -> (value here, value there)."""
        keys = MEANING if recipe.dropout_inverted else (*MEANING, "dropout")  # which then counts at test time
        values = {key: (getattr(recipe, key), getattr(self.model.recipe, key)) for key in keys}
        return {key: (here, there) for key, (here, there) in values.items() if here != there}


def source(spec: str | None, run: Run | None) -> Model | None:
    """The network to start from: that of `spec`, as -w takes it, or for a run that has no checkpoint yet, its own.

    None where there is nothing to load: no `spec`, or a run that has gone on from it already.

    Raises:
        UsageError: the run was begun in another way than `spec` says.
        WeightsError: there are no such weights.
    """
    if run is None:
        return weights.read(find_weights(spec)) if spec is not None else None
    begun = run.about.get("init_from")
    if spec is not None and (begun is None or begun["weights"] != spec):
        how = f"from {begun['weights']}" if begun else "without --init-from"
        raise UsageError(
            f"--init-from {spec}: run {run.path.name} was begun {how}", "leave it out, or start a run of another --name"
        )
    if begun is None or any(run.checkpoints.glob("*/meta.json")):
        return None
    path = Path(begun["path"])
    if path.is_file() and checksum(path) != begun["sha256"]:
        raise WeightsError(f"{path} is not as it was when the run began", "start a run of another --name")
    return weights.read(path)


def compare(spec: str | None, model: Model, recipe: Recipe, classes: Sequence[ClassName]) -> Transfer:
    """Which layers of `model` have the shapes of the network that `recipe` describes, weights and biases both.

    The last layer counts as fitting only if the classes are the same, in the same order.

    Raises:
        WeightsError: no layer fits, or one that does holds values that are no numbers.
    """
    with torch.device("meta"):
        network = Network(recipe, len(classes))
    loaded, afresh = [], {}
    for layer in LAYERS:
        pairs = [(tuple(network.get_parameter(name).shape), model.tensors[name].shape) for name in _tensors([layer])]
        if layer == "fc8" and list(model.classes) != list(classes):
            afresh[layer] = f"{len(classes):,} classes here, {len(model.classes):,} there, not the same ones"
        elif any(here != there for here, there in pairs):
            here, there = ("x".join(str(n) for n in shape) for shape in pairs[0])
            afresh[layer] = f"{here} here, {there} there"
        else:
            loaded.append(layer)
    if not loaded:
        settings = f"--set width={model.recipe.width:g} --set towers={model.recipe.towers}"
        raise WeightsError(
            f"no layer of {model.path} fits this network; the first, {LAYERS[0]}, is {afresh[LAYERS[0]]}",
            f"leave --recipe out to take that of the weights, or give {settings}",
        )
    for name in _tensors(loaded):
        if not np.isfinite(model.tensors[name]).all():
            what = f"{model.path}: {name} holds values that are no numbers"
            raise WeightsError(what, "training broke down before it was saved: take an earlier checkpoint")
    return Transfer(spec or "", model, tuple(loaded), afresh)


def freeze(network: Network, recipe: Recipe) -> None:
    """Have the layers that the recipe freezes learn nothing: no gradient is computed, so no update is made."""
    for layer in FROZEN[recipe.frozen]:
        network.get_submodule(layer).requires_grad_(False)


def checksum(path: Path) -> str:
    """SHA-256 of a weights file, by which a run says what it began from."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(layers: Sequence[str]) -> list[str]:
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
