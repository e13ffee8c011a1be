"""The history of a training, read from its records: epochs, curves, drops of the learning rate, speed. No torch."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alexnet_cli.recipe import Recipe

POINTS = 200  # in a curve, at most
MAX_NUMBER = 1e38  # about the largest float32
MAX_COUNT = 2**53  # steps or epochs
MIN_SPEED = 1e-6  # images per second
DROP = 0.5  # a drop is a learning rate below this share of the last epoch's; the paper divides by ten

Curve = list[tuple[float, float]]
"""(epochs done, value)"""


@dataclass(frozen=True)
class StepWindow:
    """Consecutive steps: the number of the last one, their count, and means over them."""

    step: int
    steps: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """The history of a training. Errors are shares, losses nats, speeds images per second."""

    epochs: tuple[Mapping[str, Any], ...]
    """The validation record of each epoch, in order."""
    windows: tuple[StepWindow, ...]
    steps_per_epoch: int | None
    batch: int
    drops: tuple[int, ...]
    """Epochs after which the learning rate dropped."""

    def epoch_curve(self, key: str) -> Curve:
        """A column of the validation records, for the epochs that have it."""
        column = ((float(epoch["epoch"]), get_number(epoch, key)) for epoch in self.epochs)
        return [(epoch, value) for epoch, value in column if value is not None]

    def step_curve(self, key: str) -> Curve:
        """A column of the step records: means over windows of similar size, at most POINTS."""
        groups = self._group_windows(key)
        means = [sum(w.values[key] * w.steps for w in group) / sum(w.steps for w in group) for group in groups]
        return [(self._epochs_at(group[-1]), mean) for group, mean in zip(groups, means, strict=True)]

    def rate_curve(self) -> Curve:
        """The learning rate at the end of each window, not the mean, which was never used if there is a drop."""
        return [(self._epochs_at(group[-1]), group[-1].values["lr"]) for group in self._group_windows("lr")]

    def _group_windows(self, key: str) -> list[list[StepWindow]]:
        """The windows that have a value, in at most POINTS groups.

        The short window at the end of an epoch joins the one before: a mean of few steps would stick out.
        """
        windows = [window for window in self.windows if key in window.values]
        usual = statistics.median(window.steps for window in windows) if windows else 0
        joined: list[list[StepWindow]] = []
        for window in windows:
            if joined and window.steps < usual / 2:
                joined[-1].append(window)
            else:
                joined.append([window])
        count = min(POINTS, len(joined))
        ends = [len(joined) * i // count for i in range(count + 1)] if count else []
        return [list(itertools.chain(*joined[first:end])) for first, end in itertools.pairwise(ends)]

    def _epochs_at(self, window: StepWindow) -> float:
        """Number of epochs done at the end of a window."""
        return window.step / (self.steps_per_epoch or 1)

    @property
    def begun(self) -> int:
        """The epoch of the last step; 0 if unknown."""
        return math.ceil(self._epochs_at(self.windows[-1])) if self.windows and self.steps_per_epoch else 0

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The epoch whose network is the best one, as the training chose it."""
        improved = (epoch for epoch in reversed(self.epochs) if epoch.get("best") is True)
        return next((epoch for epoch in improved if get_number(epoch, "top1_error") is not None), None)

    @property
    def seconds(self) -> float | None:
        """Wall time of all steps, without validation and pauses; None if unknown.

        With one step per epoch the number of images in a step is unknown.
        """
        rates = [(w.steps * self.batch, w.values.get("images_per_second", 0.0)) for w in self.windows]
        if not rates or (self.steps_per_epoch or 0) < 2 or min(rate for _, rate in rates) < MIN_SPEED:
            return None
        return sum(images / rate for images, rate in rates)

    @property
    def speed(self) -> float | None:
        """Median of the recorded images per second."""
        rates = [w.values["images_per_second"] for w in self.windows if w.values.get("images_per_second")]
        return statistics.median(rates) if rates else None


def read_history(records: Iterable[Mapping[str, Any]], recipe: Recipe) -> History:
    """Read the history from the records of a run. Records that lack a field they need are skipped."""
    epochs: list[Mapping[str, Any]] = []
    windows: list[StepWindow] = []
    per_epoch = None
    for record in records:
        step, steps = _get_count(record, "step"), _get_count(record, "steps_per_epoch")
        if record.get("event") == "start" and steps is not None:
            per_epoch = max(1, steps)
        elif record.get("event") == "validation" and _get_count(record, "epoch") is not None:
            epochs.append(record)
        elif record.get("event") == "step" and step is not None:
            before = windows[-1].step if windows else 0
            values = {key: value for key in record if (value := get_number(record, key)) is not None}
            if step > before:
                windows.append(StepWindow(step, step - before, values))
    return History(tuple(epochs), tuple(windows), per_epoch, recipe.batch_size, _find_drops(epochs, recipe))


def describe_drops(drops: Sequence[int]) -> str:
    """The epochs with a drop in words: "epoch 20", or "epochs 20, 40"."""
    return f"epoch{'s' if len(drops) > 1 else ''} {', '.join(map(str, drops))}"


def get_number(record: Mapping[str, Any], key: str) -> float | None:
    """A number of a record, or None if it is missing or not a number that a training can write."""
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_NUMBER:
        return None
    return float(value)


def _get_count(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def _find_drops(epochs: list[Mapping[str, Any]], recipe: Recipe) -> tuple[int, ...]:
    """Epochs after which the learning rate dropped; none for one-cycle, which changes it at every step."""
    if recipe.schedule == "one-cycle":
        return ()
    rates = [(int(epoch["epoch"]), get_number(epoch, "lr")) for epoch in epochs]
    pairs = itertools.pairwise(rates)
    return tuple(epoch for (epoch, rate), (_, after) in pairs if rate and after and after < DROP * rate)
