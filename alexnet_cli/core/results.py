"""What an evaluation says: the numbers, per class, the confusions, and the files they are written to."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import chance
from alexnet_cli.core.confusion_picture import draw
from alexnet_cli.core.evaluate import Evaluation
from alexnet_cli.core.listing import read_file
from alexnet_cli.core.published import IMAGES, Figure
from alexnet_cli.core.resolve import is_training_data
from alexnet_cli.core.shards import Dataset
from alexnet_cli.core.sources import ClassName
from alexnet_cli.errors import DataError, StorageError

ENDS = (".json", "_per_class.csv", "_confusion.csv", "_confusion.png")
LARGEST_LOSS = 70.0  # nats a picture: no probability is counted as less than 1e-30
LARGEST_COUNT = 2**31
PROTOCOL = {1: "centre view", 10: "ten views, mean of softmax (paper 4.1)"}


def numbers(counts: Evaluation, views: int, backend: str, figure: Figure | None = None) -> dict[str, Any]:
    """The totals; errors, accuracies and 95 % intervals are shares, loss is in nats per image."""
    totals = {
        "images": counts.images,
        "views": views,
        "protocol": f"{PROTOCOL[views]}, every image once",
        "top1_error": counts.top1_error,
        "top5_error": counts.top5_error,
        "top1_error_interval": chance.interval(counts.top1_error, counts.images),
        "top5_error_interval": chance.interval(counts.top5_error, counts.images),
        "top1_accuracy": 1 - counts.top1_error,
        "top5_accuracy": 1 - counts.top5_error,
        "chance_error": chance.guessing(len(counts.confusion)),
        "commonest_error": chance.commonest(counts.confusion.sum(axis=1)),
        "loss": counts.loss,
        "backend": backend,
    }
    return totals if figure is None else totals | {"published": asdict(figure)}


def origin(split: str, weights: Path, sha256: str, dataset: Dataset) -> dict[str, Any]:
    """What an evaluation is of."""
    data = {"data": str(dataset.path), "data_hash": dataset.hash}
    return {"split": split, "weights": str(weights), **data, "weights_sha256": sha256}


def stem(split: str, views: int, weights: Path, dataset: Dataset) -> str:
    """How its files are called. A run has several weights files and is measured on several data sets; none is to
    overwrite what another gave.
    """
    other = [weights.stem] * (weights.suffix == ".onnx")
    other += [dataset.path.resolve().name] * (not is_training_data(weights, dataset))
    return "-".join([split, str(views), *other])


def compared(figure: Figure, views: int, images: int) -> str:
    """A published figure in words, with what makes it another measurement than this one."""
    differs = [f"this is the {PROTOCOL[views].partition(',')[0]}"] if figure.views != views else []
    differs += [f"these are {images:,} images"] if images != IMAGES else []
    other = f"; {' and '.join(differs)}" if differs else ""
    protocol = PROTOCOL[figure.views].partition(",")[0]
    errors = f"top-1 error {figure.top1_error:.1%}, top-5 {figure.top5_error:.1%}"
    return f"{errors}   ({figure.source}, {protocol}, the {IMAGES:,} validation images of 2012{other})"


def per_class(counts: Evaluation, classes: Sequence[ClassName]) -> list[dict[str, Any]]:
    """A row for every class of the network that the data set has images of."""
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


def worst(counts: Evaluation, classes: Sequence[ClassName], most: int) -> list[dict[str, Any]]:
    """The rows of the classes with the highest top-1 error, highest first; none that are always right."""
    rows = sorted(per_class(counts, classes), key=lambda row: -float(row["top1_error"]))
    return [row for row in rows[:most] if row["top1_error"]]


def mistakes(counts: Evaluation, most: int) -> list[tuple[int, int, int]]:
    """The most frequent ones: true class, class seen instead, how often."""
    wrong = counts.confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = [divmod(int(place), len(wrong)) for place in np.argsort(-wrong, axis=None, kind="stable")[:most]]
    return [(true, seen, int(wrong[true, seen])) for true, seen in places if wrong[true, seen]]


def confused(counts: Evaluation, classes: Sequence[ClassName], most: int) -> list[tuple[str, str, int]]:
    """The same with the names of the classes."""
    return [(classes[true].name, classes[seen].name, times) for true, seen, times in mistakes(counts, most)]


def make(folder: Path) -> None:
    """The folder of results, so that a wrong one is known before the work is done. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}", "free space, or choose another -o") from error


def write(
    folder: Path, stem: str, counts: Evaluation, classes: Sequence[ClassName], totals: dict[str, Any]
) -> list[Path]:
    """Write STEM.json, STEM_per_class.csv, STEM_confusion.csv and STEM_confusion.png.

    Raises:
        StorageError: they cannot be written.
    """
    make(folder)
    files = [folder / f"{stem}{end}" for end in ENDS]
    names = [c.name for c in classes]
    try:
        files[0].write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")
        with files[1].open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = per_class(counts, classes)
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        with files[2].open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            matrix = csv.writer(file)
            matrix.writerow(["true \\ predicted", *names])
            matrix.writerows([name, *row] for name, row in zip(names, counts.confusion.tolist(), strict=True))
        title = f"{stem} · {totals['protocol']} · {counts.images:,} images · top-1 error {counts.top1_error:.1%}"
        draw(counts.confusion, names, title).save(files[3], "PNG")
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}", "free space, or check permissions") from error
    return files


def read(folder: Path, stem: str, classes: int, origin: Mapping[str, Any]) -> tuple[dict[str, Any], Evaluation] | None:
    """The totals and counts that `write` has written, if they have what `origin` says; None where there are none, or
    they are damaged or contradict themselves.
    """
    try:
        totals = dict(json.loads(read_file(folder / f"{stem}{ENDS[0]}")))
        if any(totals[key] != value for key, value in origin.items()):
            return None
        rows, confusion = (
            list(csv.reader(io.StringIO(read_file(folder / f"{stem}{end}").decode("utf-8", "surrogateescape"))))
            for end in ENDS[1:3]
        )
        counts = _counts(rows, confusion, classes)
        counts.loss_sum = float(totals["loss"]) * counts.images
        if not 0 <= totals["loss"] <= LARGEST_LOSS or (totals["images"] != counts.images) or not counts.images:
            return None
        return numbers(counts, totals["views"], str(totals["backend"])), counts
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


def _counts(rows: list[list[str]], confusion: list[list[str]], classes: int) -> Evaluation:
    """Counts out of the two tables, without their loss. Raises ValueError where they are none, or not of each other."""
    found = np.array([[int(n) for n in row[1:]] for row in confusion[1:]], np.int64).reshape(classes, classes)
    images, hits = found.sum(axis=1), np.zeros(classes, np.int64)
    place = {name: rows[0].index(name) for name in ("index", "images", "top5_error")}
    listed = [int(row[place["index"]]) for row in rows[1:]]
    for i, row in zip(listed, rows[1:], strict=True):
        hits[i] = round((1 - float(row[place["top5_error"]])) * int(row[place["images"]]))
    whole = listed == np.flatnonzero(images).tolist() and 0 <= found.min() <= found.max() < LARGEST_COUNT
    if not whole or (hits < found.diagonal()).any() or (hits > images).any():
        raise ValueError("the tables contradict each other")
    return Evaluation(found, hits)


def prediction_lines(
    keys: Sequence[str],
    labels: npt.NDArray[np.int64],
    top: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    classes: Sequence[ClassName],
) -> Iterator[str]:
    """One JSON line per image: its key, its class, and the likeliest classes with their probabilities."""
    for key, label, best, chances in zip(keys, labels.tolist(), top.tolist(), probabilities.tolist(), strict=True):
        ranked = [
            {"rank": i, "label": classes[c].name, "wnid": classes[c].wnid, "index": c, "probability": p}
            for i, (c, p) in enumerate(zip(best, chances, strict=True), 1)
        ]
        yield json.dumps({"key": key, "label": classes[label].name, "index": label, "top": ranked}) + "\n"
