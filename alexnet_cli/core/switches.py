"""The paper's claims as switches of a recipe: what turns each idea off, and what the paper says it was worth. No torch.

Differences are those of switching off, as shares of the images: the paper says how much an idea lowers the error, so
that without it the error is that much higher. It measured them on ILSVRC with ten views.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import Recipe
from alexnet_cli.recipe_io import apply_changes


@dataclass(frozen=True, eq=False)
class Switch:
    """One idea turned off: the recipe's `changes`, the section, and the paper's claim in words and in numbers.

    `harmful` says that the paper claims a higher error without the idea, whether it gives a number or not.
    """

    name: str
    section: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    top1: float | None = None
    top5: float | None = None
    harmful: bool = False

    @property
    def settings(self) -> str:
        """The changes as one types them after --set."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items())

    def applied(self, base: Recipe) -> Recipe:
        """The base with the idea turned off."""
        return apply_changes(base, self.changes)


BASE = Switch("base", "-")
OVERFITTING = "substantial overfitting"
SWITCHES: tuple[Switch, ...] = (
    BASE,
    # 148, the authors' network without normalisation, had none of the extra one in stage 2 either
    Switch("no-norm", "3.3", {"lrn": "none", "within_norm_2": False}, "+1.4 / +1.2", 0.014, 0.012, True),
    Switch("norm-within-map", "3.3", {"lrn": "within-map"}),
    Switch("pool-2x2", "3.4", {"pool_size": 2}, "+0.4 / +0.3", 0.004, 0.003, True),
    Switch("one-tower", "3.2", {"towers": 1}, "+1.7 / +1.2", 0.017, 0.012, True),
    Switch("no-crops-flips", "4.1", {"crops": False, "flips": False}, OVERFITTING, harmful=True),
    Switch("no-colour-shift", "4.1", {"colour_shift": 0.0}, "more than +1", 0.01, harmful=True),
    Switch("no-dropout", "4.2", {"dropout": 0.0}, OVERFITTING, harmful=True),
    Switch("tanh", "3.1", {"activation": "tanh"}, "6 times the steps"),
    Switch("sigmoid", "3.1", {"activation": "sigmoid"}),
)
ACTIVATIONS = {"base", "tanh", "sigmoid"}
"""The switches of the paper's figure 1: the base's activation, and two others."""


def chosen(base: Recipe, only: Sequence[str] = ()) -> tuple[list[Switch], list[Switch]]:
    """The switches to train, the base first, and those left out because the base has them off already.

    `only` names some; none are all.

    Raises:
        UsageError: a name is unknown.
    """
    names = [switch.name for switch in SWITCHES]
    for name in only:
        if name not in names:
            near = [switch.name for switch in SWITCHES if name in switch.changes]  # the recipe's own word for it
            near = near or difflib.get_close_matches(name, names, 1)
            guess = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(f"--only {name}: no switch is called so", f"{guess}there are: {', '.join(names)}")
    wanted = [switch for switch in SWITCHES if not only or switch is BASE or switch.name in only]
    off = [switch for switch in wanted if switch is not BASE and switch.applied(base) == base]
    return [switch for switch in wanted if switch not in off], off
