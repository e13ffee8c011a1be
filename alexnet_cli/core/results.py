"""What an evaluation says: the numbers, per class, the confusions, and the files they are written to."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.confusion_picture import draw
from alexnet_cli.core.evaluate import Evaluation
from alexnet_cli.core.published import IMAGES, Figure
from alexnet_cli.core.sources import ClassName
from alexnet_cli.errors import StorageError

PROTOCOL = {1: "centre view", 10: "ten views, mean of softmax (paper 4.1)"}


def numbers(counts: Evaluation, views: int, backend: str, figure: Figure | None = None) -> dict[str, Any]:
    """The totals; errors, accuracies and 95 % intervals are shares, loss is in nats per image."""
    totals = {
        "images": counts.images,
        "views": views,
        "protocol": f"{PROTOCOL[views]}, every image once",
        "top1_error": counts.top1_error,
        "top5_error": counts.top5_error,
        "top1_error_interval": interval(counts.top1_error, counts.images),
        "top5_error_interval": interval(counts.top5_error, counts.images),
        "top1_accuracy": 1 - counts.top1_error,
        "top5_accuracy": 1 - counts.top5_error,
        "loss": counts.loss,
        "backend": backend,
    }
    return totals if figure is None else totals | {"published": asdict(figure)}


def compared(figure: Figure, views: int, images: int) -> str:
    """A published figure in words, with what makes it another measurement than this one."""
    differs = [f"this is the {PROTOCOL[views].partition(',')[0]}"] if figure.views != views else []
    differs += [f"these are {images:,} images"] if images != IMAGES else []
    other = f"; {' and '.join(differs)}" if differs else ""
    protocol = PROTOCOL[figure.views].partition(",")[0]
    errors = f"top-1 error {figure.top1_error:.1%}, top-5 {figure.top5_error:.1%}"
    return f"{errors}   ({figure.source}, {protocol}, the {IMAGES:,} validation images of 2012{other})"


def interval(error: float, images: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share measured on so many images (Wilson's, which stays between 0 and 1)."""
    middle = (error + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(error * (1 - error) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    return max(0.0, middle - half), min(1.0, middle + half)


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


def confused(counts: Evaluation, classes: Sequence[ClassName], most: int) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: true class, class seen instead, how often."""
    wrong = counts.confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = [divmod(int(place), len(wrong)) for place in np.argsort(-wrong, axis=None, kind="stable")[:most]]
    return [(classes[t].name, classes[s].name, int(wrong[t, s])) for t, s in places if wrong[t, s]]


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
    files = [folder / f"{stem}{end}" for end in (".json", "_per_class.csv", "_confusion.csv", "_confusion.png")]
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
