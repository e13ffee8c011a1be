"""What an expert looking over one's shoulder would say, before the first step and when nothing is being learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet_cli.core.records import Record
from alexnet_cli.core.shards import DUPLICATES, Dataset
from alexnet_cli.knob import setting
from alexnet_cli.recipe import Recipe, closest

FAR = 4  # times off what the batch asks for: a rate that is worth a question
NEAR = 0.02  # share of ln(classes) within which a loss is that of guessing
SHOWN = 5  # names in a message


def before(recipe: Recipe, data: Dataset, different: Mapping[str, tuple[Any, Any]] | None = None) -> Iterator[Record]:
    """Warnings that need no step.

    `different`: the recipe keys that weights taken over disagree on, as (here, there); None if none were taken over.
    """
    yield from _empty_classes(data)
    leaks = data.record.get("duplicates", {}).get("across_splits", 0)
    if leaks:
        yield _warning(
            f"{leaks:,} {'picture is' if leaks == 1 else 'pictures are'} in train and in val",
            f"the validation error will look too good; {data.path / DUPLICATES} lists them all",
        )
    yield from odd_rate(recipe, min(recipe.batch_size, len(data.split("train"))), different is not None)
    if recipe.frozen != "none" and different is None:
        yield _warning("layers 1 to 5 are frozen at random values", "--init-from W starts from those of a network")
    if different:
        told = ", ".join(f"{key} = {here} here, {there} there" for key, (here, there) in different.items())
        settings = " ".join(setting(key, there) for key, (_, there) in different.items())
        yield _warning(
            f"the weights were trained with another recipe: {told}", f"leave --recipe out, or give {settings}"
        )


def _empty_classes(data: Dataset) -> Iterator[Record]:
    means = {
        "train": ("training", "what is never seen is never learned: such pictures in val count as mistakes"),
        "val": ("validation", "the validation error does not tell how well they are learned"),
    }
    for split, (kind, meaning) in means.items():
        counts = np.bincount(data.split(split).labels, minlength=len(data.classes))
        empty = [name.name for name, count in zip(data.classes, counts, strict=True) if not count]
        if empty:
            names = ", ".join(empty[:SHOWN]) + (" …" if len(empty) > SHOWN else "")
            have = "has" if len(empty) == 1 else "have"
            what = f"{len(empty):,} of {len(data.classes):,} classes {have} no {kind} picture: {names}"
            yield _warning(what, meaning)


def odd_rate(recipe: Recipe, batch: int, fine_tuning: bool) -> Iterator[Record]:
    """A batch k times as large takes sqrt(k) to k times the rate (Krizhevsky 2014); fine-tuning takes less.

    `batch`: that of the recipe, or all pictures where there are fewer.
    """
    named = closest(recipe)
    if (recipe.learning_rate, recipe.batch_size) == (named.learning_rate, named.batch_size):
        return
    k = batch / named.batch_size
    low, high = sorted((named.learning_rate * math.sqrt(k), named.learning_rate * k))
    if recipe.learning_rate > FAR * high or (recipe.learning_rate < low / FAR and not fine_tuning):
        yield _warning(
            f"rate {recipe.learning_rate:g} is far from what batch {batch} asks for: recipe {named.name} "
            f"has {named.learning_rate:g} at {named.batch_size}, which makes {low:.2g} to {high:.2g}",
            f"a batch k times as large takes sqrt(k) to k times the rate: --lr {named.learning_rate * k:.2g}",
        )


@dataclass
class Guessing:
    """Watches for a loss that is no better than guessing once `patience` steps are done, and says so once."""

    recipe: Recipe
    classes: int
    patience: int
    told: bool = False

    @classmethod
    def at(cls, recipe: Recipe, classes: int, steps: int) -> Guessing:
        """Patient for a tenth of the steps that the recipe takes, at least 100 and at most 2,000.

        Where there are fewer than 100 it is patient to the last; fewer than 20 say nothing.
        """
        return cls(recipe, classes, min(2000, max(20, min(100, steps), steps // 10)))

    def heed(self, record: Record) -> Record | None:
        """Look at a record; the warning, if it is due."""
        chance = math.log(self.classes)
        if record.event != "step" or self.told or self.classes == 1 or record.step < self.patience:
            return None
        if record.loss is None or record.loss < (1 - NEAR) * chance:
            return None
        self.told = True
        what = f"the loss is still {record.loss:.3f} at step {record.step:,}, no better than guessing"
        return _warning(f"{what} (ln {self.classes} = {chance:.3f})", self._remedy(), record)

    def _remedy(self) -> str:
        recipe = self.recipe
        if recipe.init == "gaussian" and recipe.conv345_std < 0.03:
            return "start anew with wider initial values, as the authors' code: --set conv345_std=0.03"
        if recipe.init == "gaussian" and recipe.bias > 0.1:
            return "start anew with smaller initial biases, as Caffe's authors: --set bias=0.1; or --recipe fast"
        return f"are the labels right? otherwise another rate than {recipe.learning_rate:g} (--lr)"


def _warning(text: str, hint: str, at: Record | None = None) -> Record:
    return Record("warning", at.epoch if at else 1, at.step if at else 0, text=text, hint=hint)
