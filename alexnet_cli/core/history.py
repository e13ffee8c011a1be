"""The course of a training, as its records tell it: epochs, curves, drops of the rate, speed, time. No torch."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alexnet_cli.recipe import Recipe

POINTS = 200  # of a curve, at most: more is not to be seen
DROP = 0.5  # a rate that falls below this share of the last epoch's was dropped; the paper divides by ten

Curve = list[tuple[float, float]]
"""(epochs done, value)"""


@dataclass(frozen=True)
class Piece:
    """Some steps that follow one another: their last, how many they are, and means over them."""

    step: int
    steps: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """What has been trained. Errors are shares, losses nats, rates images per second."""

    epochs: tuple[Mapping[str, Any], ...]
    """The validation record of each epoch, in order."""
    pieces: tuple[Piece, ...]
    steps_per_epoch: int | None
    batch: int
    drops: tuple[int, ...]
    """Epochs after which the rate was divided."""

    def curve(self, key: str) -> Curve:
        """The values of a column at the end of each epoch that has one."""
        found = ((epoch["epoch"], number(epoch, key)) for epoch in self.epochs)
        return [(float(at), value) for at, value in found if value is not None]

    def steps(self, key: str) -> Curve:
        """The same in the course of the steps: means over so many that there are POINTS at most."""
        told = [piece for piece in self.pieces if key in piece.values]
        size = -(-len(told) // POINTS) or 1
        groups = [told[i : i + size] for i in range(0, len(told), size)]
        means = [sum(p.values[key] * p.steps for p in group) / sum(p.steps for p in group) for group in groups]
        return [(group[-1].step / (self.steps_per_epoch or 1), mean) for group, mean in zip(groups, means, strict=True)]

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The epoch with the lowest top-1 error."""
        told = [epoch for epoch in self.epochs if number(epoch, "top1_error") is not None]
        return min(told, key=lambda epoch: float(epoch["top1_error"]), default=None)

    @property
    def seconds(self) -> float | None:
        """Wall time of all steps together, without validation and pauses; None where it was not told.

        An epoch of one step says nothing of how many pictures a step has.
        """
        rates = [(p.steps * self.batch, p.values.get("images_per_second", 0.0)) for p in self.pieces]
        if not rates or (self.steps_per_epoch or 0) < 2 or min(rate for _, rate in rates) <= 0:
            return None
        return sum(images / rate for images, rate in rates)

    @property
    def speed(self) -> float | None:
        """Images per second, the median of what the records tell."""
        rates = [p.values["images_per_second"] for p in self.pieces if p.values.get("images_per_second")]
        return statistics.median(rates) if rates else None


def of(records: Iterable[Mapping[str, Any]], recipe: Recipe) -> History:
    """The history that a run's records tell. Records without what they should have are passed over."""
    epochs: list[Mapping[str, Any]] = []
    pieces: list[Piece] = []
    per_epoch = None
    for record in records:
        step = record.get("step")
        if record.get("event") == "start" and type(record.get("steps_per_epoch")) is int:
            per_epoch = max(1, record["steps_per_epoch"])
        elif record.get("event") == "validation" and type(record.get("epoch")) is int:
            epochs.append(record)
        elif record.get("event") == "step" and type(step) is int:
            before = pieces[-1].step if pieces else 0
            values = {key: value for key in record if (value := number(record, key)) is not None}
            if step > before:
                pieces.append(Piece(step, step - before, values))
    return History(tuple(epochs), tuple(pieces), per_epoch, recipe.batch_size, _drops(epochs, recipe))


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number out of a record, or None."""
    value = record.get(key)
    told = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if told and value is not None else None


def _drops(epochs: list[Mapping[str, Any]], recipe: Recipe) -> tuple[int, ...]:
    """One cycle changes the rate at every step, and has none."""
    if recipe.schedule == "one-cycle":
        return ()
    rates = [(int(epoch["epoch"]), number(epoch, "lr")) for epoch in epochs]
    return tuple(at for (at, rate), (_, after) in itertools.pairwise(rates) if rate and after and after < DROP * rate)
