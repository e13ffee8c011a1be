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
LARGEST = 1e38  # of a number that is believed: float32 ends there
MOST = 2**53  # of steps and epochs
SLOWEST = 1e-6  # images per second
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
        """The same in the course of the steps: means over windows that are alike, POINTS at most."""
        windows = self._windows(key)
        means = [sum(p.values[key] * p.steps for p in w) / sum(p.steps for p in w) for w in windows]
        return [(self._at(w[-1]), mean) for w, mean in zip(windows, means, strict=True)]

    def rates(self) -> Curve:
        """The learning rate at the end of each window: a mean over a drop would be a rate that never was."""
        return [(self._at(w[-1]), w[-1].values["lr"]) for w in self._windows("lr")]

    def _windows(self, key: str) -> list[list[Piece]]:
        """The pieces that have a value. An epoch's short rest goes with the piece before: its mean would stick out."""
        told = [piece for piece in self.pieces if key in piece.values]
        usual = statistics.median(piece.steps for piece in told) if told else 0
        wholes: list[list[Piece]] = []
        for piece in told:
            if wholes and piece.steps < usual / 2:
                wholes[-1].append(piece)
            else:
                wholes.append([piece])
        count = min(POINTS, len(wholes))
        ends = [len(wholes) * i // count for i in range(count + 1)] if count else []
        return [list(itertools.chain(*wholes[first:end])) for first, end in itertools.pairwise(ends)]

    def _at(self, piece: Piece) -> float:
        """Epochs done after a piece."""
        return piece.step / (self.steps_per_epoch or 1)

    @property
    def begun(self) -> int:
        """The epoch that the last step is of; 0 where that is not told."""
        return math.ceil(self._at(self.pieces[-1])) if self.pieces and self.steps_per_epoch else 0

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
        if not rates or (self.steps_per_epoch or 0) < 2 or min(rate for _, rate in rates) < SLOWEST:
            return None
        return sum(images / rate for images, rate in rates)

    @property
    def speed(self) -> float | None:
        """Images per second, the median of what the records tell."""
        rates = [p.values["images_per_second"] for p in self.pieces if p.values.get("images_per_second")]
        return statistics.median(rates) if rates else None


def read_history(records: Iterable[Mapping[str, Any]], recipe: Recipe) -> History:
    """The history that a run's records tell. Records without what they should have are passed over."""
    epochs: list[Mapping[str, Any]] = []
    pieces: list[Piece] = []
    per_epoch = None
    for record in records:
        step, steps = _count(record, "step"), _count(record, "steps_per_epoch")
        if record.get("event") == "start" and steps is not None:
            per_epoch = max(1, steps)
        elif record.get("event") == "validation" and _count(record, "epoch") is not None:
            epochs.append(record)
        elif record.get("event") == "step" and step is not None:
            before = pieces[-1].step if pieces else 0
            values = {key: value for key in record if (value := number(record, key)) is not None}
            if step > before:
                pieces.append(Piece(step, step - before, values))
    return History(tuple(epochs), tuple(pieces), per_epoch, recipe.batch_size, _drops(epochs, recipe))


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A number out of a record, or None if it is none that a training can tell."""
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST:
        return None
    return float(value)


def _count(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if type(value) is int and 0 <= value <= MOST else None


def _drops(epochs: list[Mapping[str, Any]], recipe: Recipe) -> tuple[int, ...]:
    """One cycle changes the rate at every step, and has none."""
    if recipe.schedule == "one-cycle":
        return ()
    rates = [(int(epoch["epoch"]), number(epoch, "lr")) for epoch in epochs]
    return tuple(at for (at, rate), (_, after) in itertools.pairwise(rates) if rate and after and after < DROP * rate)
