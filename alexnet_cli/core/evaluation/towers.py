"""What each tower does: the error of the whole network and of each tower alone, on color and on gray images.

A tower alone is the network with the other one switched off (`model_file.silence_tower`), not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.loader import Batch, Loader
from alexnet_cli.core.data.shards import Split
from alexnet_cli.core.evaluation import baselines
from alexnet_cli.core.evaluation.evaluate import Classify, Evaluation, to_gray
from alexnet_cli.core.evaluation.results import summarize
from alexnet_cli.core.files import read_file, write_text
from alexnet_cli.core.intervals import PairedCounts, wilson_interval
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.parallel.placement import choose_decode_threads
from alexnet_cli.errors import DataError

BATCH = 128
SAMPLE = 500  # images: six passes of a full-width network over more take minutes
NETWORKS = (None, 2, 1)  # the tower that is switched off: none, tower 2, tower 1
Condition = tuple[int | None, bool]
"""The tower that is switched off, and whether the images are gray."""
CONDITIONS: tuple[Condition, ...] = tuple((tower, gray) for gray in (False, True) for tower in NETWORKS)
WHOLE, TOWER1, TOWER2 = CONDITIONS[:3]  # on color images
LEAST_NEED = 0.1  # how much more of its images a class that needs a tower loses without it, at least
OVERUSED = 2  # an answer is overused if it is given to more than so many times the images that there are of the class

Interval = tuple[float, float]


@dataclass(frozen=True)
class TowerError:
    """The errors under one condition. Differences are in shares of the images, each with its 95 % interval."""

    without_tower: int | None
    grayscale: bool
    top1_error: float
    top1_error_interval: Interval
    top5_error: float
    top5_error_interval: Interval
    loss: float
    top_answer: int
    """The class that is the answer to the most images, right or wrong."""
    top_answer_share: float
    """The share of the images that get that answer."""
    lost_without_tower: float | None
    """How much higher the top-1 error is than that of the whole network on the same images; None for that network."""
    lost_without_tower_interval: Interval | None
    lost_in_gray: float | None
    """How much higher the top-1 error is than that of the same network in color; None in color."""
    lost_in_gray_interval: Interval | None


@dataclass(frozen=True)
class ClassNeed:
    """How much the whole network and each tower alone know of one class; lists are in the order of CONDITIONS."""

    index: int
    wnid: str
    name: str
    images: int
    top1_errors: list[float]
    answers: list[int]
    """How many images, of any class, are taken for this one."""
    difference: float
    """In color: top-1 error without tower 1, minus that without tower 2. Positive: tower 1 is needed more."""
    difference_interval: Interval

    @property
    def lost_without(self) -> tuple[float, float]:
        """In color: how much the top-1 error rises without tower 1, and without tower 2."""
        whole, tower1, tower2 = self.top1_errors[:3]
        return tower2 - whole, tower1 - whole

    @property
    def needed_tower(self) -> int | None:
        """The tower that the class needs more, from 1; None if that is not certain.

        A tower alone that overuses this answer gets the class right without knowing it, which says nothing.
        """
        low, high = self.difference_interval
        tower = 1 if low > LEAST_NEED else 2 if high < -LEAST_NEED else None
        return tower if tower and not self.overuses(tower) else None

    def overuses(self, network: int) -> bool:
        """Whether a network (0 the whole, 1 or 2 that tower alone) gives this answer too often to know the class."""
        return self.answers[network] > OVERUSED * self.images


@dataclass(frozen=True)
class TowerTable:
    """What each tower does: the errors under each of CONDITIONS, and what each class needs."""

    images: int
    errors: list[TowerError]
    classes: list[ClassNeed]
    """Those with images, first those that need tower 1 more, last those that need tower 2."""
    chance_error: float
    """Top-1 error of guessing."""
    commonest_error: float
    """Top-1 error of always answering the most frequent class."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TowerTable:
        """Return the table in a record of `TowerCounts.make_record`."""
        errors = [TowerError(**row) for row in record["towers"]]
        classes = [ClassNeed(**row) for row in record["classes"]]
        return cls(record["images"], errors, classes, record["chance_error"], record["commonest_error"])

    def list_remarks(self) -> list[str]:
        """Return for each of CONDITIONS a remark if the answers are no better than guessing, else an empty text."""
        return [
            baselines.describe_no_better(
                row.top1_error, row.top1_error_interval[1], self.chance_error, self.commonest_error
            )
            for row in self.errors
        ]

    def has_weak_tower(self) -> bool:
        """Whether a tower alone is no better than guessing in color: it has nothing to lose, in gray or of a class."""
        return any(self.list_remarks()[1:3])

    def find_color_tower(self) -> int | None:
        """The tower, from 1, that loses more in gray; None if that is not certain."""
        (low1, high1), (low2, high2) = (row.lost_in_gray_interval or (0, 0) for row in self.errors[4:])
        if self.has_weak_tower():
            return None
        return 1 if low1 > high2 else 2 if low2 > high1 else None

    def list_needs(self, tower: int) -> list[ClassNeed]:
        """The classes that certainly need the tower more, by how much; none if a tower is weak."""
        order = self.classes if tower == 1 else self.classes[::-1]
        return [] if self.has_weak_tower() else [need for need in order if need.needed_tower == tower]


@dataclass
class TowerCounts:
    """Counts over the images so far, under every condition."""

    evaluations: dict[Condition, Evaluation]
    right: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    """For each batch, conditions x images: whether the top-1 answer is right."""
    labels: list[npt.NDArray[np.int64]] = field(default_factory=list)

    @classmethod
    def empty(cls, classes: int) -> TowerCounts:
        """Return zero counts for so many classes."""
        return cls({condition: Evaluation.empty(classes) for condition in CONDITIONS})

    @property
    def images(self) -> int:
        """Number of images counted."""
        return sum(map(len, self.labels))

    def check_finite(self, path: Path) -> None:
        """Raise WeightsError if a probability was NaN."""
        for evaluation in self.evaluations.values():
            evaluation.check_finite(path)

    def list_errors(self) -> list[TowerError]:
        """Return the errors under each of CONDITIONS."""
        right = dict(zip(CONDITIONS, np.concatenate(self.right, axis=1), strict=True))
        rows = []
        for (tower, gray), counts in self.evaluations.items():
            lost_tower = _compare(right[None, gray], right[tower, gray]) if tower else (None, None)
            lost_gray = _compare(right[tower, False], right[tower, True]) if gray else (None, None)
            intervals = [wilson_interval(error, self.images) for error in (counts.top1_error, counts.top5_error)]
            errors = (counts.top1_error, intervals[0], counts.top5_error, intervals[1], counts.loss)
            answers = counts.confusion.sum(axis=0)
            most = (int(answers.argmax()), int(answers.max()) / self.images)
            rows.append(TowerError(tower, gray, *errors, *most, *lost_tower, *lost_gray))
        return rows

    def list_classes(self, classes: Sequence[ClassName]) -> list[ClassNeed]:
        """Return a row for each class with images, first those that need tower 1 more, last those that need tower 2."""
        right, labels = np.concatenate(self.right, axis=1), np.concatenate(self.labels)
        answers = [evaluation.confusion.sum(axis=0) for evaluation in self.evaluations.values()]
        rows = []
        for index in np.unique(labels).tolist():
            of_class = right[:, labels == index]
            alone = (of_class[CONDITIONS.index(condition)] for condition in (TOWER1, TOWER2))
            errors, times = (1 - of_class.mean(axis=1)).tolist(), [int(counts[index]) for counts in answers]
            name = classes[index]
            head = (index, name.wnid or "", name.name, of_class.shape[1])
            rows.append(ClassNeed(*head, errors, times, *_compare(*alone)))
        return sorted(rows, key=lambda row: -row.difference)

    def make_record(self, classes: Sequence[ClassName], views: int, source: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of `alexnet evaluate --towers`. `source` says of which weights and data it is."""
        totals = summarize(self.evaluations[WHOLE], views, "torch")
        kept = ("images", "views", "protocol", "chance_error", "commonest_error", "backend")
        return {
            **{key: totals[key] for key in kept}, **source,
            "towers": [asdict(row) for row in self.list_errors()],
            "classes": [asdict(row) for row in self.list_classes(classes)],
        }  # fmt: skip


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record of `TowerCounts.make_record`. Raises OSError."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def read_table(path: Path, source: Mapping[str, Any]) -> TowerTable | None:
    """Read the table that `write_record` wrote for this `source`; None if there is none, or it is corrupt."""
    try:
        record = json.loads(read_file(path))
        return TowerTable.from_record(record) if source.items() <= record.items() else None
    except (OSError, DataError, ValueError, TypeError, KeyError, AttributeError):
        return None


def evaluate_towers(
    classify: Mapping[int | None, Classify],
    batches: Iterable[Batch],
    counts: TowerCounts,
    output_of: npt.NDArray[np.int64] | None = None,
) -> Iterator[Batch]:
    """Count every batch in `counts` under each of CONDITIONS, and yield it.

    `classify` has a classifier for each of NETWORKS; `output_of` is as for `evaluate.evaluate`.
    """
    for batch in batches:
        labels = batch.labels.numpy()
        labels = labels if output_of is None else output_of[labels]
        images, answers = {False: batch.images, True: to_gray(batch.images)}, []
        for (tower, gray), evaluation in counts.evaluations.items():
            answers.append(evaluation.add(classify[tower](images[gray]), labels)[:, 0])
        counts.right.append(np.stack(answers) == labels)
        counts.labels.append(labels)
        yield batch


def count_sample(
    classify: Mapping[int | None, Classify],
    model: Model,
    split: Split,
    output_of: npt.NDArray[np.int64] | None,
    advance: Callable[[int], None],
) -> TowerCounts:
    """Count SAMPLE images of a split, or all if it has fewer, under each of CONDITIONS.

    `advance` is called with the number of images of each batch.

    Raises:
        WeightsError: a probability is NaN.
    """
    rows, counts = split.spread_rows(SAMPLE), TowerCounts.empty(len(model.classes))
    plan = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    with Loader(split, min(BATCH, len(rows)), choose_decode_threads(None)) as loader:
        for batch in evaluate_towers(classify, loader.batches(plan), counts, output_of):
            counts.check_finite(model.path)
            advance(len(batch.rows))
    return counts


def _compare(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[float, Interval]:
    """How much more often `first` is right than `second` on the same images, with the 95 % interval."""
    counts = PairedCounts.from_right(first, second)
    return counts.difference, counts.interval
