"""Where numbers first stopped being numbers (Inf, NaN): in a layer's output on the way up, or in its weights; and what
to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_cli.core.architecture import LAYERS
from alexnet_cli.core.augment import Draws
from alexnet_cli.core.gradient import Gradient
from alexnet_cli.core.learning import Momentum, Schedule
from alexnet_cli.core.loader import Batch
from alexnet_cli.core.network import Network
from alexnet_cli.recipe import find_closest_recipe

LOST = 10  # times the loss of guessing: one that learned by heart, and is sure where it is wrong, has less


def weights(network: Network) -> str:
    """The layer whose weights went first, or "" if all are numbers.

    A gradient that overflows spoils its layer and those before it, so the last of them was the first. Where every layer
    is spoilt, as after an update with the gradient of a loss that is no number, nothing can be told.
    """
    layers = [
        layer
        for layer in LAYERS
        if not all(bool(torch.isfinite(p).all()) for p in network.get_submodule(layer).parameters())
    ]
    if len(layers) == len(LAYERS):
        return "every layer by the time it was seen"
    return f"the weights of {layers[-1]}" if layers else ""


def outputs(gradient: Gradient, batch: Batch, draws: Draws, step: int, epoch: int) -> str:
    """The first layer, in the order of computing, whose output for this batch is no number; else its weights, or ""."""
    network, found = gradient.network, []
    ranks, spoilt = gradient.placement.ranks, weights(network)
    if spoilt or ranks.columns:  # a forward takes everyone there, and others may have losses that are numbers
        return spoilt

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not bool(torch.isfinite(output).all()):
                found.append(layer)

        return look

    handles = [network.get_submodule(layer).register_forward_hook(watch(layer)) for layer in LAYERS[:-1]]
    try:
        for first in range(0, len(batch.rows), gradient.piece):
            part = slice(first, first + gradient.piece)
            network.draw_dropout(step, ranks.share(gradient.images).start + first)
            with torch.no_grad(), gradient.placement.arithmetic():
                network(gradient.pixels.train(batch.images[part], batch.rows[part], draws, epoch))
            if found:
                break
    finally:
        for handle in handles:
            handle.remove()
    return f"the outputs of {found[0] if found else LAYERS[-1]}"


def spoilt(records: Iterable[Mapping[str, Any]], classes: int) -> str:
    """How the last validation shows a network that is lost for learning, far worse than one that only guesses."""
    losses = [r.get("loss") for r in records if r.get("event") == "validation"]
    guessing = math.log(max(2, classes))
    if not losses or not isinstance(losses[-1], float) or losses[-1] <= LOST * guessing:
        return ""
    return f"validated at a loss of {losses[-1]:.3g}, where guessing has {guessing:.3g}"


def remedy(optimiser: Momentum, schedule: Schedule, step: int, epoch: int, way_on: str, spoilt: bool = False) -> str:
    """What to do when the loss of `step`, from 1, is no number: a tenth of the highest rate until then, or the named
    recipe's own if that is lower still. `way_on`: how to go on, if there is a checkpoint, but for the rate. Of one
    that was `spoilt` before, the rate of now is not to blame.
    """
    update = step - 2  # the last one before that loss, from 0
    rate = schedule.rate(max(0, update))
    if update < 0 or rate == 0:
        return "no rate is to blame before the first update: look at the recipe's initial values, norms and input"
    bias, _ = optimiser.rate_and_decay("fc8.bias", rate, epoch)
    named = find_closest_recipe(schedule.recipe)
    if spoilt and rate <= named.learning_rate:
        return f"start anew, as another run, with --set learning_rate={named.learning_rate:.3g}"
    lower = schedule.highest(update) / 10
    if named.learning_rate < 10 * lower:
        lower = min(lower, named.learning_rate)
    setting = f"--set learning_rate={lower:.3g}"
    told = f"the rate was {rate:.2g}" + (f", that of biases {bias:.2g}" if bias != rate else "")
    return f"{told}; start anew with {setting}" + (f"{way_on} {setting}" if way_on else "")
