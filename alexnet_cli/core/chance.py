"""What answers are worth that are given without a look at the pictures, and whether a network's are worth more.

Guessing takes each class as often; who knows the data better always answers the class that most of the pictures are of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
"""Pictures, class by class."""

FEWEST = 10  # pictures of other classes, of fewer of which nothing can be said
NEARLY_ALL = 0.9  # share of the pictures of other classes that one class takes from a network that tells nothing apart
LEARN = "it has learned too little yet, or from far more pictures of that class than of others"


def counted(labels: npt.NDArray[np.int64], classes: int) -> Counts:
    """How many pictures there are of each class."""
    return np.bincount(labels, minlength=classes)


def guessing(classes: int) -> float:
    """The top-1 error of guessing, each of the network's classes as likely."""
    return 1 - 1 / classes


def commonest(pictures: Counts) -> float:
    """The top-1 error of always answering the commonest class."""
    return 1 - int(pictures.max()) / int(pictures.sum())


def flat_loss(pictures: Counts, smoothing: float = 0.0) -> float:
    """The lowest loss, nats, of the same answer for every picture: ln(classes) where the classes are equal."""
    total = int(pictures.sum())
    shares = [(1 - smoothing) * count / total + smoothing / len(pictures) for count in pictures.tolist()]
    return -math.fsum(share * math.log(share) for share in shares if share)


def interval(error: float, images: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share measured on so many images (Wilson's, which stays between 0 and 1)."""
    middle = (error + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(error * (1 - error) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    return max(0.0, middle - half), min(1.0, middle + half)


def lowest_reaches(error: float, images: int, epochs: int) -> float:
    """The upper end of that interval for the lowest error of so many epochs, of which some are low by chance."""
    return interval(error, images, NormalDist().inv_cdf(1 - 0.025 / max(1, epochs)))[1]


def beside(guess: float, always: float) -> str:
    """Both errors in words, to stand beside a network's: the second only where the classes are not equal."""
    told = f"guessing: {guess:.1%}"
    return told if f"{always:.1%}" == f"{guess:.1%}" else f"{told}, always the commonest class: {always:.1%}"


def no_better(guess: float, always: float, reaches: float) -> str:
    """What to say of an error whose interval `reaches` that of answers without a look; nothing of a lower one."""
    if reaches < always or not always:
        return ""
    equal = f"{always:.1%}" == f"{guess:.1%}"
    return f"no better than {'guessing' if equal else 'always answering the commonest class'}"


def guessed(totals: Mapping[str, Any]) -> str:
    """The same of an evaluation's totals, with the interval."""
    always = totals["commonest_error"]
    said = no_better(totals["chance_error"], always, totals["top1_error_interval"][1])
    return f"{said}: the 95 % interval reaches {always:.1%}" if said else ""


def one_sided(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """What to say of a network that takes nearly all pictures of other classes for one; nothing of any other.

    `confusion[true, predicted]` counts pictures.
    """
    answers, pictures = confusion.sum(axis=0), confusion.sum(axis=1)
    seen, images = int(answers.argmax()), int(pictures.sum())
    others, taken = images - int(pictures[seen]), int(answers[seen]) - int(confusion[seen, seen])
    if others < FEWEST or taken < NEARLY_ALL * others:
        return ""
    share, true = answers[seen] / images, pictures[seen] / images
    return (
        f"{share:.1%} of the answers are {names[seen]}, and {true:.1%} of the pictures: it hardly tells classes apart"
    )
