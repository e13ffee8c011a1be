"""Warnings of a training: unusual settings, a loss that does not fall, a loss that is NaN or infinite."""

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
from alexnet_cli.core.intervals import wilson_interval
from alexnet_cli.core.model.architecture import list_layers
from alexnet_cli.core.model.network import Network
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.training.optim import PaperSGD, Schedule
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.recipe import Recipe, find_closest_recipe, format_set_option, format_toml

UNUSUAL_RATE_FACTOR = 3  # warn of a learning rate this many times above or below what the batch size suggests
PLATEAU_TOLERANCE = 0.02  # a loss within this share of the loss of guessing is a plateau
PLATEAU_RECORDS = 10  # the median of so many losses must be on the plateau too: one batch may differ by chance
IMBALANCE_FACTOR = 10  # warn if the commonest class has this many times the images of the rarest
FEW_PER_CLASS = 100  # training images of each class; hardly any network learns from fewer, starting at random
VAL_SHARE = 0.3  # of the images, to validate on if there are few; advised if it is less than half of this
LEAST_STEPS = 20  # no network has learned anything before
FEW_STEPS = 100  # hardly any network has learned anything before
ENOUGH_STEPS = 300  # a small network has learned something after
EPOCHS_TOLERANCE = 0.1  # a number of epochs within this share of the recipe's needs no other drop epochs
SHOWN_NAMES = 5
DIVERGENCE_FACTOR = 10  # a validation loss this many times that of guessing; overfitted networks stay below
BALANCE_HINT = "add images of rare classes, or leave out images of common ones"
FEW_IMAGES_HINT = f"add images ({FEW_PER_CLASS} of each class are a start), or start from trained weights: --init-from"


def check_settings(
    recipe: Recipe, data: Dataset, differences: Mapping[str, tuple[Any, Any]] | None = None
) -> Iterator[Record]:
    """Warnings about recipe and data before the first step.

    `differences` are the recipe keys whose values differ from those of the loaded weights: (here, in the weights).
    None means that no weights were loaded.
    """
    yield from check_empty_classes(data)
    counts = baselines.count_images(data.split("train").labels, len(data.classes))
    if imbalance := describe_imbalance([name.name for name in data.classes], counts):
        yield _warning(*imbalance)
    if leaks := data.record.get("duplicates", {}).get("across_splits", 0):
        yield _warning(
            f"{leaks:,} {'image is' if leaks == 1 else 'images are'} in both train and val",
            f"the validation error will look too good; {data.path / DUPLICATES} lists them",
        )
    yield from check_few_images(data, differences is not None)
    yield from check_batch(recipe, len(data.split("train")), differences is not None)
    yield from check_epochs(recipe)
    if recipe.frozen != "none" and differences is None:
        yield _warning("conv1 to conv5 are frozen at random weights", "load trained weights with --init-from")
    if differences:
        values = ", ".join(
            f"{key} = {format_toml(theirs)} (here {format_toml(here)})" for key, (here, theirs) in differences.items()
        )
        settings = " ".join(format_set_option(key, theirs) for key, (_, theirs) in differences.items())
        yield _warning(
            f"the weights were trained with other settings: {values}",
            f"to use these, remove --recipe or add {settings}",
        )


def check_empty_classes(data: Dataset) -> Iterator[Record]:
    """A warning for each split in which some class has no image."""
    consequences = {
        "train": ("training", "the network cannot learn them; their validation images count as errors"),
        "val": ("validation", "the validation error does not cover them"),
    }
    for split, (kind, consequence) in consequences.items():
        counts = baselines.count_images(data.split(split).labels, len(data.classes))
        empty = [name.name for name, count in zip(data.classes, counts, strict=True) if not count]
        if empty:
            names = ", ".join(empty[:SHOWN_NAMES]) + (" …" if len(empty) > SHOWN_NAMES else "")
            have = "has" if len(empty) == 1 else "have"
            what = f"{len(empty):,} of {len(data.classes):,} classes {have} no {kind} image: {names}"
            yield _warning(what, consequence)


def describe_imbalance(names: Sequence[str], counts: ClassCounts) -> tuple[str, str] | None:
    """Warning and hint if the largest class has IMBALANCE_FACTOR times the images of the smallest that is not empty."""
    most, least = int(counts.argmax()), int(np.where(counts, counts, counts.max() + 1).argmin())
    if counts[most] < IMBALANCE_FACTOR * counts[least]:
        return None
    sizes = f"{counts[most]:,} training images of {names[most]}, {counts[least]:,} of {names[least]}"
    error = f"always answering {names[most]} has an error of only {baselines.majority_error(counts):.1%}"
    return f"the classes are very unequal: {sizes}", f"{error}: {BALANCE_HINT}"


def check_few_images(data: Dataset, is_fine_tuning: bool) -> Iterator[Record]:
    """Warn of few images to learn from, and of few to validate on, which leave the error uncertain."""
    train, val = len(data.split("train")), len(data.split("val"))
    if has_few_images(train, len(data.classes)) and not is_fine_tuning:
        yield _warning(f"{_count(train, 'training image')} are few to learn from", FEW_IMAGES_HINT)
    if val < baselines.FEW_IMAGES:
        low, high = wilson_interval(0.5, val)
        yield _warning(
            f"{_count(val, 'validation image')}: the error is uncertain (for 50%, the 95 % interval is {low:.0%} to "
            f"{high:.0%}); the best epoch is the one with the lowest loss",
            suggest_validation(train, val),
        )


def has_few_images(train: int, classes: int) -> bool:
    """Whether so many training images are few to learn from if the weights start at random."""
    return train < FEW_PER_CLASS * classes


def suggest_validation(train: int, val: int) -> str:
    """The hint for a data set with few validation images."""
    if val >= VAL_SHARE / 2 * (train + val):
        return "add images"
    return f"add images, or keep more of them: alexnet prepare --val-fraction {VAL_SHARE} --overwrite"


def check_batch(recipe: Recipe, images: int, is_fine_tuning: bool) -> Iterator[Record]:
    """Warn of a batch larger than the training set, or of a learning rate and a batch size that do not fit.

    For k times the batch size, sqrt(k) to k times the rate is usual (Krizhevsky, 2014). Fine-tuning may use less.
    """
    named, batch = find_closest_recipe(recipe), min(recipe.batch_size, images)
    k = batch / named.batch_size
    low, high = sorted((named.learning_rate * math.sqrt(k), named.learning_rate * k))
    is_too_low = recipe.learning_rate < low / UNUSUAL_RATE_FACTOR and not is_fine_tuning
    is_usual = (recipe.learning_rate, recipe.batch_size) == (named.learning_rate, named.batch_size)
    if not is_usual and (recipe.learning_rate > UNUSUAL_RATE_FACTOR * high or is_too_low):
        reason = f"recipe {named.name} has {named.learning_rate:g} for {named.batch_size}"
        if k != 1:
            reason += ", which scales to " + " to ".join(dict.fromkeys((f"{low:.2g}", f"{high:.2g}")))
        unless = "unless a higher rate diverged, " if is_too_low else ""
        yield _warning(
            f"learning rate {recipe.learning_rate:g} is unusual for batch size {batch}: {reason}",
            f"{unless}try {_scale_batch(batch, named.learning_rate, named.batch_size)}",
        )
    elif recipe.batch_size > images:
        smaller = max(1, images // 10)
        yield _warning(
            f"batch size {recipe.batch_size:,} is larger than the training set ({_count(images, 'image')}); each step "
            "uses all of it",
            f"with {_scale_batch(smaller, recipe.learning_rate, images)}, an epoch has {images // smaller} steps",
        )


def _scale_batch(batch: int, rate: float, images: int) -> str:
    """Options that set the batch size, and the learning rate in proportion to a `rate` for steps of so many images."""
    return f"-b {batch} --lr {rate * batch / images:.2g}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_epochs(recipe: Recipe) -> Iterator[Record]:
    """Warn if `epochs` was changed without the epochs at which the recipe drops the rate or freezes layer 1.

    In a shorter training only the drops of the rate matter.
    """
    named = find_closest_recipe(recipe)
    keys = ["drop_epochs"] if recipe.schedule == "fixed" else []
    if recipe.epochs > named.epochs:
        keys += ["conv1_slow_epoch", "conv1_freeze_epoch"] if recipe.frozen == "none" else []
        keys += ["color_shift_epochs"] if recipe.color_shift else []
    kept = {key: value for key in keys if (value := getattr(recipe, key)) and value == getattr(named, key)}
    if not kept or abs(recipe.epochs / named.epochs - 1) < EPOCHS_TOLERANCE:
        return

    def scale(value: Any) -> Any:
        """An epoch or several, in proportion; drops that no epoch would follow are left out."""
        if isinstance(value, int):
            return max(1, round(value * recipe.epochs / named.epochs))
        return sorted({epoch for epoch in map(scale, value) if epoch < recipe.epochs})

    values = ", ".join(f"{key} = {format_toml(value)}" for key, value in kept.items())
    options = " ".join(format_set_option(key, scale(value)) for key, value in kept.items())
    yield _warning(
        f"{values} is meant for the {named.epochs} epochs of recipe {named.name}, not for {recipe.epochs}",
        f"scaled to {recipe.epochs} epochs: {options}",
    )


@dataclass
class LossPlateauCheck:
    """Warns once if the loss is no better than guessing after `patience` steps. `counts` is images per class."""

    recipe: Recipe
    counts: ClassCounts
    patience: int
    is_fine_tuning: bool = False
    has_warned: bool = False
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=PLATEAU_RECORDS))

    @classmethod
    def for_training(
        cls, recipe: Recipe, counts: ClassCounts, steps: int, is_fine_tuning: bool = False
    ) -> LossPlateauCheck:
        """A check after a tenth of all `steps`, but not before step 100 or after step 2,000.

        A training of less than 100 steps is checked at its last step, one of less than 20 never.
        """
        patience = min(2000, max(LEAST_STEPS, min(FEW_STEPS, steps), steps // 10))
        return cls(recipe, counts, patience, is_fine_tuning)

    @cached_property
    def flat_loss(self) -> float:
        """The loss of predicting the class frequencies for every image."""
        return baselines.constant_loss(self.counts, self.recipe.label_smoothing)

    def update(self, record: Record) -> Record | None:
        """Check a new record. Returns the warning if it is due."""
        if record.event != "step" or record.loss is None:
            return None
        self.recent_losses.append(record.loss)
        if self.has_warned or record.step < self.patience or np.count_nonzero(self.counts) == 1:
            return None
        if min(record.loss, np.median(self.recent_losses)) < (1 - PLATEAU_TOLERANCE) * self.flat_loss:
            return None
        self.has_warned = True
        classes = len(self.counts)
        is_balanced = math.isclose(self.flat_loss, math.log(classes), rel_tol=1e-9)
        source = f"ln {classes} = " if is_balanced else "the class frequencies give "
        text = f"the loss is still {record.loss:.3f} at step {record.step:,}, no better than guessing"
        hint = suggest_fix(self.recipe, self.counts, self.is_fine_tuning)
        return _warning(f"{text} ({source}{self.flat_loss:.3f})", hint, record)


def suggest_fix(recipe: Recipe, counts: ClassCounts, is_fine_tuning: bool) -> str:
    """The hint for a network that does not start to learn. `counts` is training images per class."""
    images = int(counts.sum())
    if not is_fine_tuning:
        if recipe.init == "gaussian" and recipe.conv345_std < 0.03:
            return "train again with larger initial weights, as in the authors' code: --set conv345_std=0.03"
        if recipe.init == "gaussian" and recipe.bias > 0.1:
            return "train again with smaller initial biases, as in Caffe: --set bias=0.1; or use --recipe fast"
        if has_few_images(images, len(counts)):
            return f"{_count(images, 'training image')} are few: {FEW_IMAGES_HINT}"
    return f"check the labels; if they are right, try another learning rate than {recipe.learning_rate:g} (--lr)"


def next_command(
    recipe: Recipe, train: ClassCounts, val: ClassCounts, error: float, steps: int, epochs: int, is_fine_tuning: bool
) -> str:
    """The hint after a training of `steps` steps in `epochs` epochs whose best `error` does not surely beat guessing.

    No hint leads to a training whose hint leads back. `train` and `val` are images per class.
    """
    images, validated = int(train.sum()), int(val.sum())
    if steps < FEW_STEPS:
        smaller, per_epoch, options = max(1, images // 10), max(1, steps) / epochs, list[str]()
        if recipe.schedule == "plateau":  # which would end as early again
            options.append("--set schedule=one-cycle")
        if recipe.batch_size > images:
            per_epoch = images // smaller
            options.append(_scale_batch(smaller, recipe.learning_rate, images))
        options.append(f"--epochs {math.ceil(ENOUGH_STEPS / per_epoch)}")
        return f"{_count(steps, 'step')} may be too few: train again with {' '.join(options)}"
    if error < baselines.majority_error(val) and validated < baselines.FEW_IMAGES:
        return suggest_validation(images, validated)
    is_unequal = describe_imbalance([""] * len(train), train) is not None
    return BALANCE_HINT if is_unequal else suggest_fix(recipe, train, is_fine_tuning)


def check_one_sided(confusion: npt.NDArray[np.int64], names: Sequence[str], at: Record) -> Record | None:
    """A warning at the end of training if the network gives almost the same answer for every image."""
    text = baselines.describe_one_sided(confusion, names) if at.step >= LEAST_STEPS else ""
    return _warning(text, baselines.ONE_SIDED_HINT, at) if text else None


def _warning(text: str, hint: str, at: Record | None = None) -> Record:
    return Record("warning", at.epoch if at else 1, at.step if at else 0, text=text, hint=hint)


def find_nonfinite_weights(network: Network) -> str:
    """Where NaN or infinite weights began, such as "the weights of conv3"; "" if all are finite.

    A gradient that overflows also spoils all layers before it, so the last spoiled layer is the origin. After a NaN
    loss all layers are spoiled, and the origin is unknown.
    """

    def is_finite(layer: str) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in network.get_submodule(layer).parameters())

    all_layers = list_layers(network.recipe)
    layers = [layer for layer in all_layers if not is_finite(layer)]
    if len(layers) == len(all_layers):
        return "the weights of all layers"
    return f"the weights of {layers[-1]}" if layers else ""


def find_nonfinite_output(trainer: Trainer, batch: Batch) -> str:
    """The first layer whose output for this batch is NaN or infinite, or whose weights are; "" if unknown."""
    network, ranks, layers = trainer.network, trainer.placement.ranks, list[str]()
    weights = find_nonfinite_weights(network)
    if weights or ranks.columns:  # with columns, a forward pass needs all ranks, and others may have finite losses
        return weights

    def make_hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not bool(torch.isfinite(output).all()):
                layers.append(layer)

        return hook

    *hooked, last = list_layers(network.recipe)
    handles = [network.get_submodule(layer).register_forward_hook(make_hook(layer)) for layer in hooked]
    try:
        for first in range(0, len(batch.rows), trainer.micro_batch):
            part = slice(first, first + trainer.micro_batch)
            network.draw_dropout(trainer.steps_done, ranks.batch_slice(trainer.batch_size).start + first)
            with torch.no_grad(), trainer.placement.precision_context():
                network(
                    trainer.augment.training_views(batch.images[part], batch.rows[part], trainer.draws, trainer.epoch)
                )
            if layers:
                break
    finally:
        for handle in handles:
            handle.remove()
    return f"the outputs of {layers[0] if layers else last}"


def describe_divergence(records: Iterable[Mapping[str, Any]], classes: int) -> str:
    """The last validation loss if it is far worse than that of guessing, as of a diverged network; otherwise ""."""
    losses = [r.get("loss") for r in records if r.get("event") == "validation"]
    guessing = math.log(max(2, classes))
    if not losses or not isinstance(losses[-1], float) or losses[-1] <= DIVERGENCE_FACTOR * guessing:
        return ""
    return f"validation loss {losses[-1]:.3g}, guessing {guessing:.3g}"


def suggest_rate(
    optimizer: PaperSGD, schedule: Schedule, step: int, epoch: int, resume: str, diverged: bool = False
) -> str:
    """The hint for a NaN loss at `step` (from 1): a tenth of the highest rate so far, or the recipe's own if lower.

    `resume` is the command that continues from a checkpoint, "" without one. If the network had `diverged` before, the
    current rate is not the cause.
    """
    last_update = step - 2  # the update before that loss, counted from 0
    rate = schedule.learning_rate(max(0, last_update))
    if last_update < 0 or rate == 0:
        return "no weight was updated yet: check the initial weights, the normalization and the images"
    bias_rate, _ = optimizer.rate_and_decay("fc8.bias", rate, epoch)
    named = find_closest_recipe(schedule.recipe)
    if diverged and rate <= named.learning_rate:
        return f"train again with --set learning_rate={named.learning_rate:.3g}"
    lower = schedule.highest_rate(last_update) / 10
    if named.learning_rate < 10 * lower:
        lower = min(lower, named.learning_rate)
    option = f"--set learning_rate={lower:.3g}"
    rates = f"the learning rate was {rate:.2g}" + (f" ({bias_rate:.2g} for biases)" if bias_rate != rate else "")
    return f"{rates}; train again with {option}" + (f", or continue: {resume} {option}" if resume else "")
