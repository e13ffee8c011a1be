"""What a network makes of pictures, for its report: errors, confusions, examples, neighbours.

Results of `alexnet evaluate` and the index of `alexnet neighbors` are used where they are of the very same weights and
data. What else it takes is computed: all of it, or what a training that has just ended can wait for.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from alexnet_cli.core import neighbourhoods, results
from alexnet_cli.core.augment import Pixels
from alexnet_cli.core.backoff import Backoff
from alexnet_cli.core.evaluate import Classify, Evaluation, TorchClassifier, evaluate
from alexnet_cli.core.images import Pixels as Picture
from alexnet_cli.core.loader import Loader, all_batches
from alexnet_cli.core.neighbourhoods import Neighbourhood
from alexnet_cli.core.network import from_model
from alexnet_cli.core.patience import Patience, Spent
from alexnet_cli.core.placement import Placement, threads_for_decoding
from alexnet_cli.core.published import published
from alexnet_cli.core.resolve import is_best
from alexnet_cli.core.responses import pictures
from alexnet_cli.core.shards import Dataset, Split
from alexnet_cli.core.weights import Model, read
from alexnet_cli.errors import DataError, StorageError, WeightsError

AT_ONCE = 128
SAMPLE = 256  # pictures among which examples are looked for
EXAMPLES = 8  # right ones, and as many wrong ones
PARTS = ("results", "examples", "neighbours")
TRIES = 3  # to open what a training may just have replaced
WAIT = "it takes more time than the end of a training has: alexnet report adds it"

Found = TypeVar("Found")
Output = npt.NDArray[np.int64] | None
"""For each class of the data set the network's output, or None where they are numbered alike."""


@dataclass(frozen=True)
class Example:
    """A picture, uint8 256 x 256 x 3, its class, what the network saw, and how sure it was, 0..1."""

    picture: Picture
    true: int
    seen: int
    probability: float


Examples = tuple[Example, ...]


@dataclass(frozen=True)
class Opened:
    """A network as it was read, and the SHA-256 of the file."""

    model: Model
    sha256: str


def opened(path: Path) -> Opened:
    """Read a model file. What a pointer such as `best` points to may be dropped meanwhile by a training that goes on.

    Raises:
        WeightsError: it is missing, damaged or foreign.
    """
    for _ in range(TRIES):
        real = path.parent.parent / os.readlink(path.parent) / path.name if path.parent.is_symlink() else path
        try:
            with real.open("rb") as file:
                return Opened(read(real), hashlib.file_digest(file, "sha256").hexdigest())
        except (FileNotFoundError, WeightsError):
            if real.exists():
                raise
    raise WeightsError(f"{path} does not exist", "name a run, a checkpoint or a .safetensors file")


@dataclass(frozen=True)
class Evidence:
    """All of it; what is missing is empty, and `missing` says why, by the names of PARTS.

    `looked` is among how many pictures examples were looked for. `unkept`: why what was computed is not in the run too.
    `failed`: what is wrong with the network or the pictures.
    """

    totals: tuple[Mapping[str, Any], ...] = ()
    counts: Evaluation | None = None
    right: Examples = ()
    wrong: Examples = ()
    looked: int = 0
    nearest: tuple[Neighbourhood, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    unkept: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Subject:
    """Of what: a network, the directory of its run if it has one, and the pictures that it is to be shown."""

    opened: Opened
    run: Path | None
    data: Dataset
    output_of: Output
    placement: Placement

    @property
    def model(self) -> Model:
        """The network at rest."""
        return self.opened.model

    @cached_property
    def classify(self) -> Classify:
        """The network at work."""
        model, placement = self.model, self.placement
        pixels = Pixels(model.recipe, model.mean, None, None, placement.device)
        return Backoff(TorchClassifier(from_model(model).to(placement.device), pixels, placement), lambda n: None)

    @property
    def unkept(self) -> str:
        """Why nothing can be left in the run, or beside a file of none; empty where it can."""
        place = self.run or self.model.path.parent
        return "" if os.access(place, os.W_OK) else f"{place} cannot be written to"


def collect(subject: Subject, patience: Patience) -> Evidence:
    """Everything that there is patience for. What only neighbours need may fail without the rest.

    Raises:
        DataError: a validation picture is damaged.
        WeightsError: what the network computes is no number.
    """
    val, unkept = subject.data.split("val"), subject.unkept
    if not len(val):
        return Evidence(missing=dict.fromkeys(PARTS, "the data set has no validation pictures"))
    found = stored(subject)
    if not found and (counts := _unless_spent(lambda: _measured(subject, val, patience), None)):
        found = [(_numbers(subject, counts, 1, "torch"), counts)]
        try:
            _keep(subject, counts)
        except StorageError as error:
            unkept = unkept or error.what
    nothing: tuple[Examples, Examples] = ((), ())
    right, wrong = _unless_spent(lambda: examples(subject.classify, val, subject.output_of, patience), nothing)
    missing = {} if found else {"results": WAIT}
    missing |= {} if right or wrong else {"examples": WAIT}
    nearest: tuple[Neighbourhood, ...] = ()
    failed = ""
    try:
        nearest = neighbourhoods.find(
            subject.model, subject.opened.sha256, subject.run, subject.data, not unkept, patience
        )
        missing |= {} if nearest else {"neighbours": "the data set has no training pictures"}
    except (Spent, StorageError, DataError) as error:
        missing["neighbours"] = WAIT if isinstance(error, Spent) else error.what
        failed = error.what if isinstance(error, DataError) else ""
    looked = len(sample(val)) if right or wrong else 0
    totals, counted = tuple(totals for totals, _ in found), found[0][1] if found else None
    return Evidence(totals, counted, right, wrong, looked, nearest, missing, unkept, failed)


def _unless_spent(work: Callable[[], Found], otherwise: Found) -> Found:
    try:
        return work()
    except Spent:
        return otherwise


def stored(subject: Subject) -> list[tuple[Mapping[str, Any], Evaluation]]:
    """The results in a run's eval/ that are of these weights and data, one for each number of views."""
    model, data, run = subject.model, subject.data, subject.run
    of = {"weights_sha256": subject.opened.sha256, "data_hash": data.hash}
    found: list[tuple[Mapping[str, Any], Evaluation]] = []
    for views in results.PROTOCOL:
        stem = results.stem("val", views, model.path, data)
        if run and (there := results.read(run / "eval", stem, len(model.classes), of)):
            totals, counts = there
            found.append((_numbers(subject, counts, totals["views"], totals["backend"]), counts))
    return found


def _numbers(subject: Subject, counts: Evaluation, views: int, backend: str) -> dict[str, Any]:
    figure = published(subject.model.recipe, subject.data.classes)
    return results.numbers(counts, views, backend, figure)


def _measured(subject: Subject, val: Split, patience: Patience) -> Evaluation:
    """Every picture of the split, its centre view, as `alexnet evaluate` counts."""
    advance = patience.part(len(val))
    counts, size = Evaluation.empty(len(subject.model.classes)), min(AT_ONCE, len(val))
    with Loader(val, size, threads_for_decoding(None)) as loader:
        batches = loader.batches(all_batches(len(val), size))
        for batch, _, _ in evaluate(subject.classify, batches, counts, subject.output_of):
            counts.check(subject.model.path)
            advance(len(batch.rows))
    return counts


def _keep(subject: Subject, counts: Evaluation) -> None:
    """Leave the results in the run for the next time, if the run stands for these weights."""
    model, data = subject.model, subject.data
    if not subject.run or subject.unkept or not is_best(model.path):
        return
    totals = _numbers(subject, counts, 1, "torch") | results.origin("val", model.path, subject.opened.sha256, data)
    results.write(subject.run / "eval", results.stem("val", 1, model.path, data), counts, model.classes, totals)


def sample(split: Split, most: int = SAMPLE) -> npt.NDArray[np.int64]:
    """Rows spread evenly over a split."""
    return np.unique(np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(np.int64))


def examples(classify: Classify, split: Split, output_of: Output, patience: Patience) -> tuple[Examples, Examples]:
    """Of SAMPLE pictures spread evenly over the split those that the network was surest of, right and wrong.

    Each class once, then each a second time, and so on.
    """
    rows = sample(split)
    advance = patience.part(len(rows))
    true = split.labels[rows].astype(np.int64)
    true = true if output_of is None else output_of[true]
    answers = []
    for part in np.array_split(rows, -(-len(rows) // AT_ONCE)):
        answers.append(classify(torch.from_numpy(np.stack(list(pictures(split, part.tolist()))))))
        advance(len(part))
    chances = np.concatenate(answers)
    seen, sure = chances.argmax(axis=1), chances.max(axis=1)
    found = []
    for chosen in (np.flatnonzero(seen == true), np.flatnonzero(seen != true)):
        best = _spread(chosen[np.argsort(-sure[chosen], kind="stable")].tolist(), true)
        shown = pictures(split, rows[best].tolist())
        found.append(tuple(
            Example(picture, int(true[i]), int(seen[i]), float(sure[i]))
            for i, picture in zip(best, shown, strict=True)
        ))  # fmt: skip
    return found[0], found[1]


def _spread(order: Sequence[int], classes: npt.NDArray[np.int64]) -> list[int]:
    """The first EXAMPLES, those first that are their class's first, then the second ones."""
    times: Counter[int] = Counter()
    turns = []
    for i in order:
        turns.append((times[int(classes[i])], i))
        times[int(classes[i])] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])][:EXAMPLES]
