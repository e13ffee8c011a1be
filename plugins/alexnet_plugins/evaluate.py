"""`alexnet evaluate`: top-1 and top-5 error of trained weights on a prepared data set, by the paper's protocol."""

from __future__ import annotations

import csv
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import DataError, StorageError
from alexnet_cli.options import BatchOption, DataOption, GpusOption, JobsOption, JsonFlag, QuietFlag, ViewsOption, WeightsOption

if TYPE_CHECKING:
    from alexnet_cli.core.evaluate import Evaluation
    from alexnet_cli.core.sources import ClassName
    from alexnet_cli.core.weights import Model

PROTOCOL = {1: "centre view", 10: "ten views, probabilities averaged (section 4.1)"}


def evaluate(
    weights: WeightsOption = None,
    data: DataOption = None,
    split: Annotated[str, typer.Option(help="Which split of the data set.")] = "val",
    views: ViewsOption = 1,
    batch_size: BatchOption = None,
    gpus: GpusOption = None,
    jobs: JobsOption = None,
    predictions: Annotated[Path | None, typer.Option(help="Write one JSON line per image to this file.")] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure top-1 and top-5 error on the validation split, with the centre view or the paper's ten."""
    import contextlib

    from alexnet_cli.core import loader as loading
    from alexnet_cli.core.augment import Pixels
    from alexnet_cli.core.evaluate import Evaluation, TorchClassifier, matching
    from alexnet_cli.core.evaluate import evaluate as run
    from alexnet_cli.core.network import from_model
    from alexnet_cli.core.placement import place, threads_for_decoding
    from alexnet_cli.core.runs import find_weights, run_of
    from alexnet_cli.core.shards import find_dataset, open_dataset
    from alexnet_cli.core.weights import read

    reporter = Reporter("evaluate", json=json, quiet=quiet)
    path = find_weights(weights)
    model = read(path)
    dataset = open_dataset(find_dataset(data))
    images = dataset.split(split)
    if not len(images):
        raise DataError(f"{dataset.path}: split {split} holds no images", "prepare it with --val-fraction 0.1")
    output_of = matching(model.classes, dataset.classes, path)
    placement = place(gpus, "fp32")
    pixels = Pixels(model.recipe, model.mean, None, None, placement.device)
    classify = TorchClassifier(from_model(model).to(placement.device), pixels, placement, views)
    reporter.line("weights", str(path))
    reporter.line("data", f"{dataset.path} · {split} · {len(images):,} images, each counted once")
    reporter.line("mode", f"{PROTOCOL[views]} · {placement.name} · {placement.precision}")
    size = batch_size or 128
    counts = Evaluation.empty(len(model.classes))
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(_opened(predictions)) if predictions else None
        loader = stack.enter_context(loading.Loader(images, size, threads_for_decoding(jobs)))
        bar = stack.enter_context(reporter.progress(split, total=len(images)))
        batches = loader.batches(loading.all_batches(len(images), size))
        for batch, top, chances, counts in run(classify, batches, len(model.classes), output_of):
            bar.advance(len(batch.rows))
            if out:
                keys = [images.key(int(row)) for row in batch.rows]
                labels = batch.labels.numpy() if output_of is None else output_of[batch.labels.numpy()]
                out.writelines(_lines(keys, labels, top, chances, model.classes))
    if counts.images != len(images):
        raise AssertionError("every image is counted once")
    run_path = run_of(path)
    files = _write(run_path / "eval" if run_path else None, f"{split}-{views}", counts, model)
    _report(reporter, counts, views, model, files)


def _report(reporter: Reporter, counts: Evaluation, views: int, model: Model, files: list[Path]) -> None:
    result = _numbers(counts, views)
    reporter.result(result | {"files": [str(f) for f in files]})
    margin = {k: 1.96 * (e * (1 - e) / counts.images) ** 0.5 for k, e in ((1, counts.top1_error), (5, counts.top5_error))}
    rows = [f"top-1   {1 - counts.top1_error:.1%} right, error {counts.top1_error:.1%} ± {margin[1]:.1%}"]
    if len(model.classes) > 5:
        rows.append(f"top-5   {1 - counts.top5_error:.1%} right, error {counts.top5_error:.1%} ± {margin[5]:.1%}")
    worst = sorted(_per_class(counts, model), key=lambda row: row["top1_error"])[::-1][:3]
    rows.append("worst   " + " · ".join(f"{row['name']} {1 - row['top1_error']:.0%}" for row in worst if row["images"]))
    pairs = _confused(counts, model.classes)
    if pairs:
        rows.append("mixed   " + " · ".join(f"{a} seen as {b} {n}x" for a, b, n in pairs))
    for row in rows:
        reporter.show(row)
    if files:
        reporter.line("files", f"{files[0].parent}: {', '.join(f.name for f in files)}   next: alexnet predict PICTURE")


def _numbers(counts: Evaluation, views: int) -> dict[str, Any]:
    return {
        "images": counts.images, "views": views,
        "top1_error": counts.top1_error, "top5_error": counts.top5_error,
        "top1_accuracy": 1 - counts.top1_error, "top5_accuracy": 1 - counts.top5_error,
        "loss": counts.loss, "backend": "torch",
    }  # fmt: skip


def _per_class(counts: Evaluation, model: Model) -> list[dict[str, Any]]:
    """One row per class of the network: images, errors."""
    rows = []
    for i, name in enumerate(model.classes):
        n = int(counts.confusion[i].sum())
        hits, hits5 = int(counts.confusion[i, i]), int(counts.top5_hits[i])
        rows.append({
            "index": i, "wnid": name.wnid or "", "name": name.name, "images": n,
            "top1_error": 1 - hits / n if n else 0.0, "top5_error": 1 - hits5 / n if n else 0.0,
        })  # fmt: skip
    return rows


def _confused(counts: Evaluation, classes: tuple[ClassName, ...]) -> list[tuple[str, str, int]]:
    """The three most frequent mistakes."""
    wrong = counts.confusion.copy()
    wrong[range(len(wrong)), range(len(wrong))] = 0
    found = []
    for place in wrong.ravel().argsort()[::-1][:3]:
        true, seen = divmod(int(place), len(wrong))
        if wrong[true, seen]:
            found.append((classes[true].name, classes[seen].name, int(wrong[true, seen])))
    return found


def _write(folder: Path | None, stem: str, counts: Evaluation, model: Model) -> list[Path]:
    """The numbers, per class and the confusion matrix as files in the run; nothing for weights outside a run."""
    if folder is None:
        return []
    names = [c.name for c in model.classes]
    files = [folder / f"{stem}.json", folder / f"{stem}_per_class.csv", folder / f"{stem}_confusion.csv"]
    try:
        folder.mkdir(exist_ok=True)
        text = jsonlib.dumps(_numbers(counts, int(stem.rpartition("-")[2])), indent=2)
        files[0].write_text(text + "\n", encoding="utf-8")
        with files[1].open("w", encoding="utf-8", newline="") as file:
            rows = _per_class(counts, model)
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        with files[2].open("w", encoding="utf-8", newline="") as file:
            matrix = csv.writer(file)
            matrix.writerow(["true \\ predicted", *names])
            matrix.writerows([name, *row] for name, row in zip(names, counts.confusion.tolist(), strict=True))
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}", "free some space, or check its permissions") from error
    return files


def _opened(path: Path) -> Any:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "choose another --predictions file") from error


def _lines(keys: list[str], labels: Any, top: Any, chances: Any, classes: tuple[ClassName, ...]) -> list[str]:
    """One JSON line per image: its key, its class, the likeliest classes with their probabilities."""
    lines = []
    for key, label, best, p in zip(keys, labels.tolist(), top.tolist(), chances.tolist(), strict=True):
        ranked = [{"rank": i + 1, "label": classes[c].name, "index": c, "probability": v} for i, (c, v) in enumerate(zip(best, p, strict=True))]
        lines.append(jsonlib.dumps({"key": key, "label": classes[label].name, "index": label, "top": ranked}) + "\n")
    return lines
