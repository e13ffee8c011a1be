"""What an expert looking over one's shoulder would say, before the first step and when nothing is being learned."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import baselines
from alexnet_cli.core.baselines import ClassCounts
from alexnet_cli.core.records import Record
from alexnet_cli.core.shards import DUPLICATES, Dataset
from alexnet_cli.recipe import Recipe, find_closest_recipe, format_set_option, format_toml

FAR = 4  # times off what the batch asks for: a rate that is worth a question
NEAR = 0.02  # share of the loss of guessing within which a loss is that
RECENT = 10  # records whose mean must be that too: where classes are unequal, a batch may have few of the commonest
UNEQUAL = 10  # times as many pictures of the commonest class as of the rarest: what is rare is then hardly learned
NONE = 20  # steps, before which nobody knows anything
MUCH = 0.1  # share by which the epochs must be others for it to matter what was counted in them
FEW = 100  # steps, after which hardly any network knows anything
SOME = 300  # after which a small one does
SHOWN = 5  # names in a message
EVEN_OUT = "add pictures of rare classes, or leave common ones out"


def before(recipe: Recipe, data: Dataset, different: Mapping[str, tuple[Any, Any]] | None = None) -> Iterator[Record]:
    """Warnings that need no step.

    `different`: the recipe keys that weights taken over disagree on, as (here, there); None if none were taken over.
    """
    yield from _empty_classes(data)
    pictures = baselines.count_images(data.split("train").labels, len(data.classes))
    if far := unequal([name.name for name in data.classes], pictures):
        yield _warning(*far)
    leaks = data.record.get("duplicates", {}).get("across_splits", 0)
    if leaks:
        yield _warning(
            f"{leaks:,} {'picture is' if leaks == 1 else 'pictures are'} in train and in val",
            f"the validation error will look too good; {data.path / DUPLICATES} lists them all",
        )
    yield from odd_rate(recipe, min(recipe.batch_size, len(data.split("train"))), different is not None)
    yield from odd_epochs(recipe)
    if recipe.frozen != "none" and different is None:
        yield _warning("layers 1 to 5 are frozen at random values", "--init-from W starts from those of a network")
    if different:
        told = ", ".join(f"{key} = {here} here, {there} there" for key, (here, there) in different.items())
        settings = " ".join(format_set_option(key, there) for key, (_, there) in different.items())
        yield _warning(
            f"the weights were trained with another recipe: {told}", f"leave --recipe out, or give {settings}"
        )


def _empty_classes(data: Dataset) -> Iterator[Record]:
    means = {
        "train": ("training", "what is never seen is never learned: such pictures in val count as mistakes"),
        "val": ("validation", "the validation error does not tell how well they are learned"),
    }
    for split, (kind, meaning) in means.items():
        counts = baselines.count_images(data.split(split).labels, len(data.classes))
        empty = [name.name for name, count in zip(data.classes, counts, strict=True) if not count]
        if empty:
            names = ", ".join(empty[:SHOWN]) + (" …" if len(empty) > SHOWN else "")
            have = "has" if len(empty) == 1 else "have"
            what = f"{len(empty):,} of {len(data.classes):,} classes {have} no {kind} picture: {names}"
            yield _warning(what, meaning)


def unequal(names: Sequence[str], pictures: ClassCounts) -> tuple[str, str] | None:
    """What is to be said where the commonest class has UNEQUAL times the pictures of the rarest, and what to do.

    Classes without any are another matter.
    """
    most, least = int(pictures.argmax()), int(np.where(pictures, pictures, pictures.max() + 1).argmin())
    if pictures[most] < UNEQUAL * pictures[least]:
        return None
    counts = f"{pictures[most]:,} training pictures of {names[most]}, {pictures[least]:,} of {names[least]}"
    error = f"always answering {names[most]} errs in only {baselines.majority_error(pictures):.1%} of them"
    return f"the classes are far from equal: {counts}", f"{error}: {EVEN_OUT}"


def odd_rate(recipe: Recipe, batch: int, fine_tuning: bool) -> Iterator[Record]:
    """A batch k times as large takes sqrt(k) to k times the rate (Krizhevsky 2014); fine-tuning takes less.

    `batch`: that of the recipe, or all pictures where there are fewer.
    """
    named = find_closest_recipe(recipe)
    if (recipe.learning_rate, recipe.batch_size) == (named.learning_rate, named.batch_size):
        return
    k = batch / named.batch_size
    low, high = sorted((named.learning_rate * math.sqrt(k), named.learning_rate * k))
    if recipe.learning_rate > FAR * high or (recipe.learning_rate < low / FAR and not fine_tuning):
        asked = " to ".join(dict.fromkeys((f"{low:.2g}", f"{high:.2g}")))  # one number where both round to it
        has = f"recipe {named.name} has {named.learning_rate:g} at {named.batch_size}"
        why = f"{has}, which makes {asked}" if k != 1 else has
        rule = "a batch k times as large takes sqrt(k) to k times the rate: " if k != 1 else ""
        yield _warning(
            f"rate {recipe.learning_rate:g} is far from what batch {batch} asks for: {why}",
            f"{rule}--lr {named.learning_rate * k:.2g}",
        )


def odd_epochs(recipe: Recipe) -> Iterator[Record]:
    """Epochs were changed, and what a recipe does after some of them was not: drops of the rate, layer 1 at rest.

    In a shorter training only the drops matter: what else would come never does no harm by that.
    """
    named = find_closest_recipe(recipe)
    keys = ["drop_epochs"] if recipe.schedule == "fixed" else []
    if recipe.epochs > named.epochs:
        keys += ["conv1_slow_epoch", "conv1_freeze_epoch"] if recipe.frozen == "none" else []
        keys += ["colour_shift_epochs"] if recipe.colour_shift else []
    kept = {key: value for key in keys if (value := getattr(recipe, key)) and value == getattr(named, key)}
    if not kept or abs(recipe.epochs / named.epochs - 1) < MUCH:
        return

    def scaled(epoch: int) -> int:
        return max(1, round(epoch * recipe.epochs / named.epochs))

    told = ", ".join(f"{key} = {format_toml(value)}" for key, value in kept.items())
    ours = {k: scaled(v) if isinstance(v, int) else _within(map(scaled, v), recipe.epochs) for k, v in kept.items()}
    yield _warning(
        f"epochs = {recipe.epochs} with {told}, made for the {named.epochs} of recipe {named.name}",
        f"in proportion: {' '.join(format_set_option(key, value) for key, value in ours.items())}",
    )


def _within(drops: Iterable[int], epochs: int) -> list[int]:
    """Drops that another epoch follows, each once."""
    return sorted({drop for drop in drops if drop < epochs})


@dataclass
class Guessing:
    """Watches for a loss that is no better than guessing once `patience` steps are done, and says so once.

    `pictures`: how many there are to train on, class by class.
    """

    recipe: Recipe
    pictures: ClassCounts
    patience: int
    told: bool = False
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @classmethod
    def at(cls, recipe: Recipe, pictures: ClassCounts, steps: int) -> Guessing:
        """Patient for a tenth of the steps that the recipe takes, at least 100 and at most 2,000.

        Where there are fewer than 100 it is patient to the last; fewer than 20 say nothing.
        """
        return cls(recipe, pictures, min(2000, max(NONE, min(FEW, steps), steps // 10)))

    @cached_property
    def flat_loss(self) -> float:
        """The loss of guessing."""
        return baselines.constant_loss(self.pictures, self.recipe.label_smoothing)

    def heed(self, record: Record) -> Record | None:
        """Look at a record; the warning, if it is due."""
        if record.event != "step" or record.loss is None:
            return None
        self.recent.append(record.loss)
        if self.told or record.step < self.patience or np.count_nonzero(self.pictures) == 1:
            return None
        loss, classes = self.flat_loss, len(self.pictures)
        if min(record.loss, sum(self.recent) / len(self.recent)) < (1 - NEAR) * loss:
            return None
        self.told = True
        what = f"the loss is still {record.loss:.3f} at step {record.step:,}, no better than guessing"
        equal = math.isclose(loss, math.log(classes), rel_tol=1e-9)
        whence = f"ln {classes}" if equal else "the same answer for every picture"
        return _warning(f"{what} ({whence} = {loss:.3f})", remedy(self.recipe), record)


def remedy(recipe: Recipe) -> str:
    """What to do about a network that does not begin to learn."""
    if recipe.init == "gaussian" and recipe.conv345_std < 0.03:
        return "start anew with wider initial values, as the authors' code: --set conv345_std=0.03"
    if recipe.init == "gaussian" and recipe.bias > 0.1:
        return "start anew with smaller initial biases, as Caffe's authors: --set bias=0.1; or --recipe fast"
    return f"are the labels right? otherwise another rate than {recipe.learning_rate:g} (--lr)"


def way_on(recipe: Recipe, pictures: ClassCounts, steps: int, epochs: int) -> str:
    """What to do about a training of so many steps and epochs whose lowest error is no better than guessing."""
    if recipe.batch_size > (rows := int(pictures.sum())):
        return f"a step takes all {rows:,} pictures: start anew with -b {max(1, rows // 10)}"
    if steps < FEW:
        enough = math.ceil(SOME * epochs / max(1, steps))
        return f"{steps:,} step{' is' if steps == 1 else 's are'} few: start anew with --epochs {enough:,}"
    return EVEN_OUT if unequal([""] * len(pictures), pictures) else remedy(recipe)


def one_sided(confusion: npt.NDArray[np.int64], names: Sequence[str], at: Record) -> Record | None:
    """The warning, at the end of training, of a network that takes nearly all pictures of other classes for one."""
    said = baselines.describe_one_sided(confusion, names) if at.step >= NONE else ""
    return _warning(said, baselines.ONE_SIDED_HINT, at) if said else None


def _warning(text: str, hint: str, at: Record | None = None) -> Record:
    return Record("warning", at.epoch if at else 1, at.step if at else 0, text=text, hint=hint)
