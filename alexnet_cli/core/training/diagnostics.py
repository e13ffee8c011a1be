"""Warnings and remedies: odd settings before the first step, a loss that does not fall, NaN and infinity."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from alexnet_cli.core.data.loader import Batch
from alexnet_cli.core.data.shards import DUPLICATES, Dataset
from alexnet_cli.core.evaluation import baselines
from alexnet_cli.core.evaluation.baselines import ClassCounts
from alexnet_cli.core.model.architecture import LAYERS
from alexnet_cli.core.model.network import Network
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.training.optim import PaperSGD, Schedule
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.recipe import Recipe, find_closest_recipe, format_set_option, format_toml

ODD_RATE_FACTOR = 4  # a learning rate this many times off what the batch size suggests is worth a warning
PLATEAU_TOLERANCE = 0.02  # a loss within this share of the loss of guessing is a plateau
PLATEAU_RECORDS = (
    10  # whose mean must be on the plateau too: a batch may by chance hold few images of the commonest class
)
UNEQUAL_FACTOR = 10  # with this many times more images in the commonest class, the rarest is hardly learned
LEAST_STEPS = 20  # before which no network has learned anything
FEW_STEPS = 100  # after which hardly any network has learned anything
ENOUGH_STEPS = 300  # after which a small one has
EPOCHS_TOLERANCE = 0.1  # a number of epochs within this share of the recipe's needs no other drop epochs
SHOWN_NAMES = 5
LOST_FACTOR = 10  # a validation loss this many times that of guessing: overfitted networks stay below
EVEN_OUT = "add images of rare classes, or leave common ones out"


def check_settings(
    recipe: Recipe, data: Dataset, different: Mapping[str, tuple[Any, Any]] | None = None
) -> Iterator[Record]:
    """Warnings about recipe and data before the first step.

    `different` holds the recipe keys whose values differ from those of the loaded weights, as (here, there); None if no
    weights were loaded.
    """
    yield from check_empty_classes(data)
    pictures = baselines.count_images(data.split("train").labels, len(data.classes))
    if far := describe_imbalance([name.name for name in data.classes], pictures):
        yield _warning(*far)
    leaks = data.record.get("duplicates", {}).get("across_splits", 0)
    if leaks:
        yield _warning(
            f"{leaks:,} {'image is' if leaks == 1 else 'images are'} in both train and val",
            f"the validation error will look too good; {data.path / DUPLICATES} lists them",
        )
    yield from check_rate(recipe, min(recipe.batch_size, len(data.split("train"))), different is not None)
    yield from check_epochs(recipe)
    if recipe.frozen != "none" and different is None:
        yield _warning("layers 1 to 5 are frozen at random values", "--init-from W starts from trained ones")
    if different:
        listed = ", ".join(f"{key} = {here} here, {there} there" for key, (here, there) in different.items())
        settings = " ".join(format_set_option(key, there) for key, (_, there) in different.items())
        yield _warning(
            f"the weights were trained with another recipe: {listed}", f"remove --recipe, or give {settings}"
        )


def check_empty_classes(data: Dataset) -> Iterator[Record]:
    """A warning for each split that lacks images of some class."""
    means = {
        "train": ("training", "the network cannot learn them: their images in val count as errors"),
        "val": ("validation", "the validation error says nothing about them"),
    }
    for split, (kind, meaning) in means.items():
        counts = baselines.count_images(data.split(split).labels, len(data.classes))
        empty = [name.name for name, count in zip(data.classes, counts, strict=True) if not count]
        if empty:
            names = ", ".join(empty[:SHOWN_NAMES]) + (" …" if len(empty) > SHOWN_NAMES else "")
            have = "has" if len(empty) == 1 else "have"
            what = f"{len(empty):,} of {len(data.classes):,} classes {have} no {kind} image: {names}"
            yield _warning(what, meaning)


def describe_imbalance(names: Sequence[str], pictures: ClassCounts) -> tuple[str, str] | None:
    """Warning and hint if the commonest class has UNEQUAL_FACTOR times the images of the rarest (empty ones aside)."""
    most, least = int(pictures.argmax()), int(np.where(pictures, pictures, pictures.max() + 1).argmin())
    if pictures[most] < UNEQUAL_FACTOR * pictures[least]:
        return None
    counts = f"{pictures[most]:,} training images of {names[most]}, {pictures[least]:,} of {names[least]}"
    error = f"always answering {names[most]} errs in only {baselines.majority_error(pictures):.1%} of them"
    return f"the classes are very unequal: {counts}", f"{error}: {EVEN_OUT}"


def check_rate(recipe: Recipe, batch: int, fine_tuning: bool) -> Iterator[Record]:
    """Warn of an unusual learning rate. A batch k times as large takes sqrt(k) to k times the rate (Krizhevsky 2014).

    `batch` is the number of images in a step; fine-tuning may use a lower rate.
    """
    named = find_closest_recipe(recipe)
    if (recipe.learning_rate, recipe.batch_size) == (named.learning_rate, named.batch_size):
        return
    k = batch / named.batch_size
    low, high = sorted((named.learning_rate * math.sqrt(k), named.learning_rate * k))
    if recipe.learning_rate > ODD_RATE_FACTOR * high or (
        recipe.learning_rate < low / ODD_RATE_FACTOR and not fine_tuning
    ):
        asked = " to ".join(dict.fromkeys((f"{low:.2g}", f"{high:.2g}")))  # one number where both round to it
        has = f"recipe {named.name} has {named.learning_rate:g} at {named.batch_size}"
        why = f"{has}, which makes {asked}" if k != 1 else has
        rule = "a batch k times as large takes sqrt(k) to k times the rate: " if k != 1 else ""
        yield _warning(
            f"rate {recipe.learning_rate:g} is far from what batch {batch} asks for: {why}",
            f"{rule}--lr {named.learning_rate * k:.2g}",
        )


def check_epochs(recipe: Recipe) -> Iterator[Record]:
    """Warn if `epochs` was changed, but not what the recipe does after some epochs (rate drops, freezing layer 1).

    In a shorter training only the rate drops matter.
    """
    named = find_closest_recipe(recipe)
    keys = ["drop_epochs"] if recipe.schedule == "fixed" else []
    if recipe.epochs > named.epochs:
        keys += ["conv1_slow_epoch", "conv1_freeze_epoch"] if recipe.frozen == "none" else []
        keys += ["color_shift_epochs"] if recipe.color_shift else []
    kept = {key: value for key in keys if (value := getattr(recipe, key)) and value == getattr(named, key)}
    if not kept or abs(recipe.epochs / named.epochs - 1) < EPOCHS_TOLERANCE:
        return

    def scaled(epoch: int) -> int:
        return max(1, round(epoch * recipe.epochs / named.epochs))

    listed = ", ".join(f"{key} = {format_toml(value)}" for key, value in kept.items())
    ours = {k: scaled(v) if isinstance(v, int) else _within(map(scaled, v), recipe.epochs) for k, v in kept.items()}
    yield _warning(
        f"epochs = {recipe.epochs} with {listed}, made for the {named.epochs} of recipe {named.name}",
        f"in proportion: {' '.join(format_set_option(key, value) for key, value in ours.items())}",
    )


def _within(drops: Iterable[int], epochs: int) -> list[int]:
    """Drops that another epoch follows, each once."""
    return sorted({drop for drop in drops if drop < epochs})


@dataclass
class LossPlateauCheck:
    """Warns once if the loss is no better than guessing after `patience` steps. `pictures` counts images per class."""

    recipe: Recipe
    pictures: ClassCounts
    patience: int
    warned: bool = False
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=PLATEAU_RECORDS))

    @classmethod
    def for_training(cls, recipe: Recipe, pictures: ClassCounts, steps: int) -> LossPlateauCheck:
        """A check with a patience of a tenth of all `steps`, between 100 and 2,000.

        A training of less than 100 steps is checked at its last step; one of less than 20 is not.
        """
        return cls(recipe, pictures, min(2000, max(LEAST_STEPS, min(FEW_STEPS, steps), steps // 10)))

    @cached_property
    def flat_loss(self) -> float:
        """Loss of always giving the class frequencies as the answer."""
        return baselines.constant_loss(self.pictures, self.recipe.label_smoothing)

    def update(self, record: Record) -> Record | None:
        """Take in a record. Returns the warning if it is due."""
        if record.event != "step" or record.loss is None:
            return None
        self.recent.append(record.loss)
        if self.warned or record.step < self.patience or np.count_nonzero(self.pictures) == 1:
            return None
        loss, classes = self.flat_loss, len(self.pictures)
        if min(record.loss, sum(self.recent) / len(self.recent)) < (1 - PLATEAU_TOLERANCE) * loss:
            return None
        self.warned = True
        what = f"the loss is still {record.loss:.3f} at step {record.step:,}, no better than guessing"
        equal = math.isclose(loss, math.log(classes), rel_tol=1e-9)
        source = f"ln {classes}" if equal else "the same answer for every image"
        return _warning(f"{what} ({source} = {loss:.3f})", suggest_fix(self.recipe), record)


def suggest_fix(recipe: Recipe) -> str:
    """Hint for a network that does not start to learn."""
    if recipe.init == "gaussian" and recipe.conv345_std < 0.03:
        return "train again with larger initial weights, as in the authors' code: --set conv345_std=0.03"
    if recipe.init == "gaussian" and recipe.bias > 0.1:
        return "train again with smaller initial biases, as in Caffe: --set bias=0.1; or use --recipe fast"
    return f"check the labels; if they are right, try a learning rate other than {recipe.learning_rate:g} (--lr)"


def next_command(recipe: Recipe, pictures: ClassCounts, steps: int, epochs: int) -> str:
    """Hint after a training of `steps` steps and `epochs` epochs whose best error does not beat guessing."""
    if recipe.batch_size > (rows := int(pictures.sum())):
        return f"each step uses all {rows:,} images: train again with -b {max(1, rows // 10)}"
    if steps < FEW_STEPS:
        enough = math.ceil(ENOUGH_STEPS * epochs / max(1, steps))
        return f"{steps:,} step{'' if steps == 1 else 's'} may be too few: train again with --epochs {enough:,}"
    return EVEN_OUT if describe_imbalance([""] * len(pictures), pictures) else suggest_fix(recipe)


def check_one_sided(confusion: npt.NDArray[np.int64], names: Sequence[str], at: Record) -> Record | None:
    """Warning, at the end of training, if the network gives almost the same answer for every image."""
    said = baselines.describe_one_sided(confusion, names) if at.step >= LEAST_STEPS else ""
    return _warning(said, baselines.ONE_SIDED_HINT, at) if said else None


def _warning(text: str, hint: str, at: Record | None = None) -> Record:
    return Record("warning", at.epoch if at else 1, at.step if at else 0, text=text, hint=hint)


def find_nonfinite_weights(network: Network) -> str:
    """Where NaN or infinite weights began, such as "the weights of conv3"; "" if all are finite.

    A gradient that overflows spoils its layer and those before it, so the last spoiled layer was the first. If every
    layer is spoiled, as after an update with the gradient of a NaN loss, the origin is unknown.
    """
    layers = [
        layer
        for layer in LAYERS
        if not all(bool(torch.isfinite(p).all()) for p in network.get_submodule(layer).parameters())
    ]
    if len(layers) == len(LAYERS):
        return "every layer"
    return f"the weights of {layers[-1]}" if layers else ""


def find_nonfinite_output(trainer: Trainer, batch: Batch) -> str:
    """The first layer whose output for this batch is NaN or infinite, or whose weights are; "" if unknown."""
    network, ranks, found = trainer.network, trainer.placement.ranks, list[str]()
    spoiled = find_nonfinite_weights(network)
    if spoiled or ranks.columns:  # a forward pass then needs all ranks, and others may have finite losses
        return spoiled

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not bool(torch.isfinite(output).all()):
                found.append(layer)

        return look

    handles = [network.get_submodule(layer).register_forward_hook(watch(layer)) for layer in LAYERS[:-1]]
    try:
        for first in range(0, len(batch.rows), trainer.micro_batch):
            part = slice(first, first + trainer.micro_batch)
            network.draw_dropout(trainer.steps_done, ranks.batch_slice(trainer.batch_size).start + first)
            with torch.no_grad(), trainer.placement.precision_context():
                network(
                    trainer.augment.training_views(batch.images[part], batch.rows[part], trainer.draws, trainer.epoch)
                )
            if found:
                break
    finally:
        for handle in handles:
            handle.remove()
    return f"the outputs of {found[0] if found else LAYERS[-1]}"


def describe_divergence(records: Iterable[Mapping[str, Any]], classes: int) -> str:
    """How the last validation shows a network that diverged, far worse than guessing; "" if it did not."""
    losses = [r.get("loss") for r in records if r.get("event") == "validation"]
    guessing = math.log(max(2, classes))
    if not losses or not isinstance(losses[-1], float) or losses[-1] <= LOST_FACTOR * guessing:
        return ""
    return f"its validation loss is {losses[-1]:.3g}, guessing has {guessing:.3g}"


def suggest_rate(
    optimizer: PaperSGD, schedule: Schedule, step: int, epoch: int, resume: str, diverged: bool = False
) -> str:
    """Hint when the loss of `step` (from 1) is NaN: a tenth of the highest rate so far, or the recipe's own if lower.

    `resume` says how to continue from a checkpoint, if there is one. If the network had `diverged` before, the current
    rate is not the cause.
    """
    last_update = step - 2  # before that loss, counted from 0
    rate = schedule.rate(max(0, last_update))
    if last_update < 0 or rate == 0:
        return (
            "the learning rate is not the cause before the first update: check initial weights, normalization and input"
        )
    bias, _ = optimizer.rate_and_decay("fc8.bias", rate, epoch)
    named = find_closest_recipe(schedule.recipe)
    if diverged and rate <= named.learning_rate:
        return f"start a new run with --set learning_rate={named.learning_rate:.3g}"
    lower = schedule.highest_rate(last_update) / 10
    if named.learning_rate < 10 * lower:
        lower = min(lower, named.learning_rate)
    option = f"--set learning_rate={lower:.3g}"
    rates = f"the rate was {rate:.2g}" + (f", that of biases {bias:.2g}" if bias != rate else "")
    return f"{rates}; train again with {option}" + (f"{resume} {option}" if resume else "")
