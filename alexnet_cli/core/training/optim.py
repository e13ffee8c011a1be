"""The paper's update rule and its learning rate schedules (section 5)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alexnet_cli.core.model.kernels import kernels_for
from alexnet_cli.recipe import Recipe

Groups = dict[tuple[float, float], list[tuple[Tensor, Tensor, Tensor]]]
"""(rate, decay) -> the weights with their velocities and gradients that share them."""

WARM_UP_SHARE = 0.15  # one-cycle: share of the steps in which the rate rises
FIRST_RATE, LAST_RATE = 1 / 25, 1 / 1000  # one-cycle: relative to the highest rate


class PaperSGD:
    """v <- momentum * v - decay * rate * w - rate * gradient;  w <- w + v.

    The rate is inside the velocity, unlike in torch.optim.SGD: after a drop the old velocity decays with the momentum.
    Weights and biases may have different rates and decay. Layer 1 may be slowed and frozen, as in the authors' code.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], recipe: Recipe) -> None:
        self.recipe = recipe
        self.parameters = dict(parameters)
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        kernels = kernels_for(next(iter(self.parameters.values())).device)
        self.update: Callable[[Groups, float], None] = kernels.fused_update if kernels else update

    @torch.no_grad()
    def step(self, rate: float, epoch: int) -> None:
        """Update all parameters that have a gradient. `epoch` counts from 1; a rate of 0 also switches off decay."""
        groups: Groups = defaultdict(list)
        for name, parameter in self.parameters.items():
            group = self.rate_and_decay(name, rate, epoch)
            if parameter.grad is not None and group[0] != 0:
                groups[group].append((parameter, self.velocity[name], parameter.grad))
        self.update(groups, self.recipe.momentum)

    def rate_and_decay(self, name: str, rate: float, epoch: int) -> tuple[float, float]:
        """Learning rate and weight decay of one parameter in an epoch; `rate` is the rate of the schedule."""
        recipe = self.recipe
        decay = recipe.weight_decay
        if name.endswith(".bias"):
            rate = (rate if recipe.bias_rate_drops else recipe.learning_rate) * recipe.bias_rate
            decay = recipe.weight_decay if recipe.bias_decay else 0.0
        if name == "conv1.weight" and recipe.conv1_slow_epoch and epoch > recipe.conv1_slow_epoch:
            rate /= 10
        return (rate if self.is_learning(name, epoch) else 0.0), decay

    def is_learning(self, name: str, epoch: int) -> bool:
        """Whether a parameter changes in an epoch: a recipe may freeze layer 1 after some epoch."""
        freeze = self.recipe.conv1_freeze_epoch
        return not (name.startswith("conv1.") and freeze and epoch > freeze)


@torch.no_grad()
def update(groups: Groups, momentum: float) -> None:
    """Update weights and velocities in place."""
    for (rate, decay), tensors in groups.items():
        weights, velocity, gradients = map(list, zip(*tensors, strict=True))
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, gradients, alpha=-rate)
        if decay:
            torch._foreach_add_(velocity, weights, alpha=-decay * rate)
        torch._foreach_add_(weights, velocity)


@dataclass
class Schedule:
    """The learning rate of each step: `plateau` (section 5), `fixed` (the authors' code) or `one-cycle`.

    `plateau` divides the rate by 10 when the validation error stops falling, and ends the training after the last drop.
    """

    recipe: Recipe
    steps_per_epoch: int
    drops: int = 0
    best_error: float = math.inf
    epochs_since_best: int = 0

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        recipe = self.recipe
        if recipe.schedule == "plateau":
            return float(recipe.learning_rate / 10**self.drops)
        if recipe.schedule == "fixed":
            epochs_done = step // self.steps_per_epoch
            return float(recipe.learning_rate / 10 ** sum(epochs_done >= drop for drop in recipe.drop_epochs))
        return recipe.learning_rate * _one_cycle(step / (self.steps_per_epoch * recipe.epochs))

    def highest_rate(self, step: int) -> float:
        """Highest learning rate of the steps up to `step`, counted from 0."""
        recipe, rising = self.recipe, WARM_UP_SHARE * self.steps_per_epoch * self.recipe.epochs
        return self.learning_rate(step) if recipe.schedule == "one-cycle" and step < rising else recipe.learning_rate

    def observe(self, error: float) -> None:
        """Take in an epoch's validation error."""
        if error < self.best_error:
            self.best_error, self.epochs_since_best = error, 0
            return
        self.epochs_since_best += 1
        if self.recipe.schedule == "plateau" and self.epochs_since_best >= self.recipe.plateau_epochs:
            self.drops, self.epochs_since_best = self.drops + 1, 0

    @property
    def is_finished(self) -> bool:
        """Whether the error has stopped falling after the last drop of the rate (the paper dropped it three times)."""
        return self.recipe.schedule == "plateau" and self.drops > self.recipe.plateau_drops

    def state(self) -> dict[str, Any]:
        """The state to keep in a checkpoint, as JSON values."""
        best = self.best_error if math.isfinite(self.best_error) else None
        return {"drops": self.drops, "best_error": best, "epochs_since_best": self.epochs_since_best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint. Raises KeyError, TypeError or ValueError if it is invalid."""
        self.drops, self.epochs_since_best = int(state["drops"]), int(state["epochs_since_best"])
        self.best_error = math.inf if state["best_error"] is None else float(state["best_error"])


def _one_cycle(done: float) -> float:
    """Rate relative to the highest one when the share `done` of all steps is done: half a cosine up, half one down."""
    if done < WARM_UP_SHARE:
        return FIRST_RATE + (1 - FIRST_RATE) * (1 - math.cos(math.pi * done / WARM_UP_SHARE)) / 2
    left = (1 + math.cos(math.pi * min(1.0, (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))) / 2
    return LAST_RATE + (1 - LAST_RATE) * left
