"""What a network makes of pictures, for its report: errors, confusions, examples, neighbours.

Results of `alexnet evaluate` and the index of `alexnet neighbors` are used where they are of the very same weights and
data. What else it takes is computed: all of it, or what a training that has just ended can wait for.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alexnet_cli.core import neighbourhoods, neighbours, results
from alexnet_cli.core.augment import Pixels
from alexnet_cli.core.backoff import Backoff
from alexnet_cli.core.evaluate import Classify, Evaluation, TorchClassifier, evaluate
from alexnet_cli.core.images import Pixels as Picture
from alexnet_cli.core.loader import Loader, all_batches
from alexnet_cli.core.neighbourhoods import Neighbourhood
from alexnet_cli.core.network import from_model
from alexnet_cli.core.origin import is_best, own_data
from alexnet_cli.core.placement import Placement, threads_for_decoding
from alexnet_cli.core.published import published
from alexnet_cli.core.responses import pictures
from alexnet_cli.core.shards import Dataset, Split
from alexnet_cli.core.weights import Model

AT_ONCE = 128
SAMPLE = 256  # pictures among which examples are looked for
EXAMPLES = 8  # right ones, and as many wrong ones
FILES = ("val-1", "val-10")  # as `alexnet evaluate` calls its results on the validation split

Output = npt.NDArray[np.int64] | None
"""For each class of the data set the network's output, or None where they are numbered alike."""


@dataclass(frozen=True)
class Example:
    """A picture, uint8 256 x 256 x 3, its class, what the network saw, and how sure it was, 0..1."""

    picture: Picture
    true: int
    seen: int
    probability: float


@dataclass(frozen=True)
class Evidence:
    """All of it; what is missing is empty, and `missing` says why: by `results`, `examples`, `neighbours`."""

    totals: tuple[Mapping[str, Any], ...] = ()
    counts: Evaluation | None = None
    right: tuple[Example, ...] = ()
    wrong: tuple[Example, ...] = ()
    nearest: tuple[Neighbourhood, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """Of what: a network, the directory of its run if it has one, and the pictures that it is to be shown."""

    model: Model
    run: Path | None
    data: Dataset
    output_of: Output
    placement: Placement


def collect(
    subject: Subject, affordable: Callable[[int], bool], advance: Callable[[int], None] = lambda n: None
) -> Evidence:
    """Everything that may be computed: `affordable` is asked whether so many pictures may go through the network.

    Raises:
        DataError: a picture of the data set is damaged.
        WeightsError: what the network computes is no number.
        StorageError: the index or the results cannot be written.
    """
    val, weights = subject.data.split("val"), neighbours.sha256(subject.model.path)
    missing: dict[str, str] = {}
    wait = "it takes more time than the end of a training has: alexnet report adds it"
    found = stored(subject.run, weights, subject) if subject.run else []
    sample, counted = min(SAMPLE, len(val)), 0 if found else len(val)
    classify = None
    if len(val) and affordable(counted) and (counted or affordable(sample)):
        classify = _classifier(subject)
    if not found and classify:
        found = [_measured(subject, weights, classify, val, advance)]
    right: tuple[Example, ...] = ()
    wrong: tuple[Example, ...] = ()
    if classify and affordable(counted + sample):
        right, wrong = examples(classify, val, subject.output_of)
    nearest = neighbourhoods.find(subject.model, subject.run, subject.data, affordable, advance) if len(val) else ()
    for name, there in (("results", found), ("examples", right or wrong), ("neighbours", nearest)):
        if not there:
            missing[name] = wait if len(val) else "the data set has no validation pictures"
    counts = found[0][1] if found else None
    return Evidence(tuple(totals for totals, _ in found), counts, right, wrong, nearest, missing)


def stored(run: Path, weights: str, subject: Subject) -> list[tuple[Mapping[str, Any], Evaluation]]:
    """The results in a run's eval/ that are of these weights and data, one for each number of views."""
    found: list[tuple[Mapping[str, Any], Evaluation]] = []
    for stem in (file + _of_other_data(subject) for file in FILES):
        try:
            totals = dict(json.loads((run / "eval" / f"{stem}.json").read_text(encoding="utf-8")))
            if (totals["weights_sha256"], totals["data_hash"]) != (weights, subject.data.hash):
                continue
            counts = _read(run / "eval" / stem, len(subject.model.classes), float(totals["loss"]))
            if counts.images != totals["images"] or totals["views"] not in results.PROTOCOL or not counts.images:
                continue
            figure = published(subject.model.recipe, subject.data.classes)
            totals = results.numbers(counts, totals["views"], str(totals["backend"]), figure)
        except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError, csv.Error):
            continue  # whatever is the matter with them, they are made anew
        found.append((totals, counts))
    return found


def _read(stem: Path, classes: int, loss: float) -> Evaluation:
    """Counts out of the tables that results.write has written."""
    with stem.with_name(f"{stem.name}_confusion.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as f:
        confusion = np.array([[int(n) for n in row[1:]] for row in list(csv.reader(f))[1:]], np.int64)
    counts = Evaluation(confusion.reshape(classes, classes), np.zeros(classes, np.int64))
    with stem.with_name(f"{stem.name}_per_class.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as f:
        for row in csv.DictReader(f):
            counts.top5_hits[int(row["index"])] = round((1 - float(row["top5_error"])) * int(row["images"]))
    counts.loss_sum = loss * counts.images
    return counts


def _of_other_data(subject: Subject) -> str:
    """How the names of such results end where the data set is not the run's own, as `alexnet evaluate` has it."""
    return "" if own_data(subject.model.path, subject.data) else f"-{subject.data.path.resolve().name}"


def _classifier(subject: Subject) -> Classify:
    model, placement = subject.model, subject.placement
    pixels = Pixels(model.recipe, model.mean, None, None, placement.device)
    return Backoff(TorchClassifier(from_model(model).to(placement.device), pixels, placement), lambda n: None)


def _measured(
    subject: Subject, weights: str, classify: Classify, val: Split, advance: Callable[[int], None]
) -> tuple[Mapping[str, Any], Evaluation]:
    """Every picture of the split, its centre view, as `alexnet evaluate` counts; left in the run for the next time."""
    model = subject.model
    counts, size = Evaluation.empty(len(model.classes)), min(AT_ONCE, len(val))
    with Loader(val, size, threads_for_decoding(None)) as loader:
        batches = loader.batches(all_batches(len(val), size))
        for batch, _, _ in evaluate(classify, batches, counts, subject.output_of):
            advance(len(batch.rows))
    totals = results.numbers(counts, 1, "torch", published(model.recipe, subject.data.classes))
    totals |= {"split": "val", "weights": str(model.path), "weights_sha256": weights}
    totals |= {"data": str(subject.data.path), "data_hash": subject.data.hash}
    if subject.run and is_best(model.path):
        results.write(subject.run / "eval", FILES[0] + _of_other_data(subject), counts, model.classes, totals)
    return totals, counts


def examples(classify: Classify, split: Split, output_of: Output) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Of SAMPLE pictures spread evenly over the split those that the network was surest of, right and wrong.

    Each class once, then each a second time, and so on.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).round().astype(np.int64))
    true = split.labels[rows].astype(np.int64)
    true = true if output_of is None else output_of[true]
    chances = np.concatenate([
        classify(torch.from_numpy(np.stack(list(pictures(split, part.tolist())))))
        for part in np.array_split(rows, -(-len(rows) // AT_ONCE))
    ])  # fmt: skip
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
