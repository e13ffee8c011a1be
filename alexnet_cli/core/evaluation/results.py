"""Results of an evaluation: totals, errors per class, confusions, published errors, and the files they are kept in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName, is_ilsvrc
from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.evaluation import baselines
from alexnet_cli.core.evaluation.confusion_matrix import draw_confusion_matrix
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.files import read_file
from alexnet_cli.core.intervals import wilson_interval
from alexnet_cli.core.runs.resolve import is_best, is_training_data
from alexnet_cli.errors import DataError, storage_errors
from alexnet_cli.recipe import Recipe

SUFFIXES = (".json", "_per_class.csv", "_confusion.csv", "_confusion.png")
LARGEST_LOSS = 70.0  # nats per image: probabilities below 1e-30 count as 1e-30
LARGEST_COUNT = 2**31
PROTOCOL = {1: "center view", 10: "ten views, mean of softmax (paper 4.1)"}


@dataclass(frozen=True)
class PublishedErrors:
    """Errors of one network on the 50,000 validation images of ILSVRC 2012, as shares, and with how many views."""

    source: str
    views: int
    top1_error: float
    top5_error: float


VALIDATION_IMAGES = 50_000
# The paper gives no center-view error for ILSVRC 2012; its 39.0 and 18.3 % are for ILSVRC 2010.
PAPER_ERRORS = PublishedErrors("the paper, one network", 10, 0.407, 0.182)
PUBLISHED = {
    "krizhevsky": PublishedErrors("the authors' log of net #145", 10, 0.40664, 0.18210),
    "caffe": PublishedErrors("bvlc_alexnet of Caffe", 1, 0.429, 0.198),
    "caffenet": PublishedErrors("bvlc_reference_caffenet of Caffe", 1, 0.426, 0.196),
}


def find_published(recipe: Recipe, classes: Sequence[ClassName]) -> PublishedErrors | None:
    """Return the published errors for a recipe, else the paper's; None if the classes are not ILSVRC 2012's."""
    if not is_ilsvrc([name.wnid or "" for name in classes]):
        return None
    is_caffenet = recipe.name == "caffe" and recipe.stage1_order == "relu-pool-norm"
    return PUBLISHED.get("caffenet" if is_caffenet else recipe.name, PAPER_ERRORS)


def summarize(counts: Evaluation, views: int, backend: str, published: PublishedErrors | None = None) -> dict[str, Any]:
    """Return the totals: errors, accuracies and 95 % intervals as shares, loss in nats per image."""
    totals = {
        "images": counts.images,
        "views": views,
        "protocol": f"{PROTOCOL[views]}, every image once",
        "top1_error": counts.top1_error,
        "top5_error": counts.top5_error,
        "top1_error_interval": wilson_interval(counts.top1_error, counts.images),
        "top5_error_interval": wilson_interval(counts.top5_error, counts.images),
        "top1_accuracy": 1 - counts.top1_error,
        "top5_accuracy": 1 - counts.top5_error,
        "chance_error": baselines.guessing_error(len(counts.confusion)),
        "commonest_error": baselines.majority_error(counts.confusion.sum(axis=1)),
        "loss": counts.loss,
        "backend": backend,
    }
    return totals if published is None else totals | {"published": asdict(published)}


def describe_source(split: str, weights: Path, sha256: str, dataset: Dataset) -> dict[str, Any]:
    """Return the weights and the data of an evaluation, for its JSON."""
    data = {"data": str(dataset.path), "data_hash": dataset.hash}
    return {"split": split, "weights": str(weights), **data, "weights_sha256": sha256}


def make_file_stem(split: str, views: int, weights: Path, dataset: Dataset, condition: Sequence[str] = ()) -> str:
    """Return the stem of the result files. It differs between the weights files and data sets of one run.

    `condition` says what else differs from a usual evaluation, such as "gray".
    """
    parts = [split, str(views)]
    if weights.suffix == ".onnx":
        parts.append(weights.stem)
    elif not is_best(weights):
        parts.append(weights.resolve().parent.name)
    if not is_training_data(weights, dataset):
        parts.append(dataset.path.resolve().name)
    return "-".join([*parts, *condition])


def name_views(views: int) -> str:
    """Return "center view" or "ten views"."""
    return PROTOCOL[views].partition(",")[0]


def format_published(published: PublishedErrors, views: int, images: int) -> str:
    """Return published errors in words, with the differences between that measurement and this one."""
    differences = [f"this is the {name_views(views)}"] if published.views != views else []
    differences += [f"these are {images:,} images"] if images != VALIDATION_IMAGES else []
    remark = f"; {' and '.join(differences)}" if differences else ""
    protocol = name_views(published.views)
    errors = f"top-1 error {published.top1_error:.1%}, top-5 {published.top5_error:.1%}"
    return f"{errors}   ({published.source}, {protocol}, the {VALIDATION_IMAGES:,} validation images of 2012{remark})"


def count_per_class(counts: Evaluation, classes: Sequence[ClassName]) -> list[dict[str, Any]]:
    """Return a row for every class of the network that the data set has images of."""
    rows = []
    for i, name in enumerate(classes):
        images = int(counts.confusion[i].sum())
        if images:
            errors = {
                "top1_error": 1 - int(counts.confusion[i, i]) / images,
                "top5_error": 1 - int(counts.top5_hits[i]) / images,
            }
            rows.append({"index": i, "wnid": name.wnid or "", "name": name.name, "images": images, **errors})
    return rows


def find_worst_classes(counts: Evaluation, classes: Sequence[ClassName], most: int) -> list[dict[str, Any]]:
    """Return the rows with the highest top-1 error, highest first, without classes that are always right."""
    rows = sorted(count_per_class(counts, classes), key=lambda row: -float(row["top1_error"]))
    return [row for row in rows[:most] if row["top1_error"]]


def find_mistakes(counts: Evaluation, most: int) -> list[tuple[int, int, int]]:
    """Return the most frequent mistakes: true class, predicted class, number of images."""
    wrong = counts.confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = [divmod(int(place), len(wrong)) for place in np.argsort(-wrong, axis=None, kind="stable")[:most]]
    return [(true, predicted, int(wrong[true, predicted])) for true, predicted in places if wrong[true, predicted]]


def make_folder(folder: Path) -> None:
    """Create the folder of results; call it before the work, so that a bad path fails early. Raises StorageError."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_results(
    folder: Path, stem: str, counts: Evaluation, classes: Sequence[ClassName], totals: dict[str, Any]
) -> list[Path]:
    """Write STEM.json, STEM_per_class.csv, STEM_confusion.csv and STEM_confusion.png.

    Raises:
        StorageError: they cannot be written.
    """
    make_folder(folder)
    files = [folder / f"{stem}{end}" for end in SUFFIXES]
    names = [c.name for c in classes]
    with storage_errors(folder):
        files[0].write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")
        with files[1].open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = count_per_class(counts, classes)
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        with files[2].open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            matrix = csv.writer(file)
            matrix.writerow(["true \\ predicted", *names])
            matrix.writerows([name, *row] for name, row in zip(names, counts.confusion.tolist(), strict=True))
        title = f"{stem} · {totals['protocol']} · {counts.images:,} images · top-1 error {counts.top1_error:.1%}"
        draw_confusion_matrix(counts.confusion, names, title).save(files[3], "PNG")
    return files


def read_results(
    folder: Path, stem: str, classes: int, source: Mapping[str, Any]
) -> tuple[dict[str, Any], Evaluation] | None:
    """Return the totals and counts that `write_results` wrote for this `source` (see describe_source).

    Returns None if there are none, or if they are corrupt or contradict each other.
    """
    try:
        totals = dict(json.loads(read_file(folder / f"{stem}{SUFFIXES[0]}")))
        if any(totals[key] != value for key, value in source.items()):
            return None
        rows, confusion = (
            list(csv.reader(io.StringIO(read_file(folder / f"{stem}{end}").decode("utf-8", "surrogateescape"))))
            for end in SUFFIXES[1:3]
        )
        counts = _parse_counts(rows, confusion, classes)
        counts.loss_sum = float(totals["loss"]) * counts.images
        if not 0 <= totals["loss"] <= LARGEST_LOSS or (totals["images"] != counts.images) or not counts.images:
            return None
        return summarize(counts, totals["views"], str(totals["backend"])), counts
    except (
        OSError,
        DataError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        ArithmeticError,
        RecursionError,
        csv.Error,
    ):
        return None


def find_evaluations(folder: Path, sha256: str) -> list[dict[str, Any]]:
    """Return the totals of every evaluation in a folder of the weights with this checksum, ordered by file name.

    Only of the whole network on images as they are.
    The intervals are computed again. Files that are corrupt, or no evaluations, are left out.
    """
    found = []
    for path in sorted(folder.glob(f"*{SUFFIXES[0]}")):
        try:
            totals = dict(json.loads(read_file(path)))
            images, protocol = totals["images"], PROTOCOL[totals["views"]]
            if totals["weights_sha256"] != sha256 or type(images) is not int or images < 1:
                continue
            if totals.keys() & {"without_tower", "grayscale"}:
                continue
            for key in ("top1_error", "top5_error"):
                totals[key] = float(totals[key])
                if not 0 <= totals[key] <= 1:
                    raise ValueError(f"{key} is {totals[key]}")
                totals[f"{key}_interval"] = wilson_interval(totals[key], images)
            texts = {key: str(totals[key]) for key in ("split", "data")}
            found.append(totals | texts | {"protocol": f"{protocol}, every image once"})
        except (OSError, DataError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


def _parse_counts(rows: list[list[str]], confusion: list[list[str]], classes: int) -> Evaluation:
    """Return the counts in the two tables, without the loss. Raises ValueError if they contradict each other."""
    matrix = np.array([[int(n) for n in row[1:]] for row in confusion[1:]], np.int64).reshape(classes, classes)
    images, hits = matrix.sum(axis=1), np.zeros(classes, np.int64)
    column = {name: rows[0].index(name) for name in ("index", "images", "top5_error")}
    listed = [int(row[column["index"]]) for row in rows[1:]]
    for i, row in zip(listed, rows[1:], strict=True):
        hits[i] = round((1 - float(row[column["top5_error"]])) * int(row[column["images"]]))
    is_plausible = listed == np.flatnonzero(images).tolist() and 0 <= matrix.min() <= matrix.max() < LARGEST_COUNT
    if not is_plausible or (hits < matrix.diagonal()).any() or (hits > images).any():
        raise ValueError("the tables contradict each other")
    return Evaluation(matrix, hits)


def format_predictions(
    keys: Sequence[str],
    labels: npt.NDArray[np.int64],
    top: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    classes: Sequence[ClassName],
) -> Iterator[str]:
    """Yield a JSON line per image: its key, its class, and the most probable classes with their probabilities."""
    for key, label, best, chances in zip(keys, labels.tolist(), top.tolist(), probabilities.tolist(), strict=True):
        ranked = [
            {"rank": i, "label": classes[c].name, "wnid": classes[c].wnid, "index": c, "probability": p}
            for i, (c, p) in enumerate(zip(best, chances, strict=True), 1)
        ]
        yield json.dumps({"key": key, "label": classes[label].name, "index": label, "top": ranked}) + "\n"
