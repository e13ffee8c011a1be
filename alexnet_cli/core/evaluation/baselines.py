"""Error of trivial baselines (uniform guessing, majority class), and whether a network is better than they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.intervals import wilson_interval

ClassCounts = npt.NDArray[np.int64]
"""Number of images of each class."""

FEW_IMAGES = 100  # with fewer, one image is more than a point of the error, which is too coarse to choose by
FEWEST_OTHERS = 10  # images of other classes; fewer say nothing about a one-sided network
ONE_SIDED_SHARE = 0.9  # a network is one-sided if it takes this share of the images of other classes for one class
ONE_SIDED_HINT = "train it longer, or with about as many images in each class"


def count_images(labels: npt.NDArray[np.int64], classes: int) -> ClassCounts:
    """Return the number of images of each class."""
    return np.bincount(labels, minlength=classes)


def guessing_error(classes: int) -> float:
    """Return the top-1 error of guessing every class with the same probability."""
    return 1 - 1 / classes


def majority_error(counts: ClassCounts) -> float:
    """Return the top-1 error of always predicting the most frequent class."""
    return 1 - int(counts.max()) / int(counts.sum())


def constant_loss(counts: ClassCounts, smoothing: float = 0.0) -> float:
    """Return the lowest loss, in nats, of one prediction for all images: ln(classes) if the classes are equal."""
    total = int(counts.sum())
    shares = [(1 - smoothing) * count / total + smoothing / len(counts) for count in counts.tolist()]
    return -math.fsum(share * math.log(share) for share in shares if share)


def rank_network(error: float, loss: float, images: int) -> tuple[float, float]:
    """Return a key that sorts networks, best first: lowest error, then loss; with fewer than FEW_IMAGES, loss alone."""
    return (error if images >= FEW_IMAGES else 0.0, loss)


def bound_lowest_error(error: float, images: int, epochs: int) -> float:
    """Return the upper end of that interval for the lowest error of several epochs, some of which are low by chance."""
    return wilson_interval(error, images, NormalDist().inv_cdf(1 - 0.025 / max(1, epochs)))[1]


def format_baselines(guessing: float, majority: float) -> str:
    """Format the error of guessing and, if the classes are unequal, of the majority class."""
    text = f"guessing: {guessing:.1%}"
    return text if f"{majority:.1%}" == f"{guessing:.1%}" else f"{text}, always the most frequent class: {majority:.1%}"


def describe_no_better(error: float, upper: float, guessing: float, majority: float) -> str:
    """Return a remark if the `upper` end of an error's interval reaches that of a baseline, else an empty text."""
    if upper < majority or not majority:
        return ""
    is_equal = f"{majority:.1%}" == f"{guessing:.1%}"
    baseline = "guessing" if is_equal else "always predicting the most frequent class"
    return f"{'no' if error >= majority else 'not certainly'} better than {baseline} ({majority:.1%})"


def describe_totals(totals: Mapping[str, Any]) -> str:
    """Return the remark of `describe_no_better` for the totals of an evaluation."""
    upper = totals["top1_error_interval"][1]
    return describe_no_better(totals["top1_error"], upper, totals["chance_error"], totals["commonest_error"])


def describe_one_sided(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """Return a remark if a network takes nearly all images of other classes for one class, else an empty text.

    `confusion[true, predicted]` counts images.
    """
    predicted, actual = confusion.sum(axis=0), confusion.sum(axis=1)
    favorite, images = int(predicted.argmax()), int(actual.sum())
    others = images - int(actual[favorite])
    wrong = int(predicted[favorite]) - int(confusion[favorite, favorite])
    if others < FEWEST_OTHERS or wrong < ONE_SIDED_SHARE * others:
        return ""
    share, true = predicted[favorite] / images, actual[favorite] / images
    return (
        f"{share:.1%} of the predictions are {names[favorite]}, but only {true:.1%} of the images: "
        "the network hardly distinguishes classes"
    )
