"""`alexnet evaluate`: top-1 and top-5 error of trained weights on a prepared data set, by the paper's protocol."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter, make_printable
from alexnet_cli.errors import UsageError, storage_errors
from alexnet_cli.options import (
    BatchOption,
    GpusOption,
    JobsOption,
    JsonFlag,
    OwnDataOption,
    QuietFlag,
    ViewsOption,
    WeightsOption,
    WithoutTowerOption,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from alexnet_cli.core.data.classes import ClassName
    from alexnet_cli.core.data.shards import Split
    from alexnet_cli.core.evaluation.evaluate import Classify, Evaluation
    from alexnet_cli.core.evaluation.towers import ClassNeed, TowerCounts
    from alexnet_cli.core.model.model_file import Model
    from alexnet_cli.recipe import Recipe

DEFAULT_BATCH_SIZE = 128
MOST_LISTED = 10  # classes and pairs of classes, but at most half of the classes
NO_FILES = "none, because the weights are not in a run; use -o DIR to write per-class errors"


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to classify. `device_name` is for people, `info` is the metadata of its file."""

    path: Path
    classify: Classify
    classes: Sequence[ClassName]
    recipe: Recipe
    device_name: str
    info: Mapping[str, Any]
    device: torch.device | None = None
    """Where it takes images; None is the CPU."""


def evaluate(
    weights: WeightsOption = None,
    data: OwnDataOption = None,
    split: Annotated[str, typer.Option(help="Split of the data set: train or val")] = "val",
    views: ViewsOption = 1,
    without_tower: WithoutTowerOption = None,
    grayscale: Annotated[
        bool, typer.Option("--grayscale", help="Make the images gray first", show_default=False)
    ] = False,
    towers: Annotated[
        bool,
        typer.Option(
            "--towers", help="Compare the whole network and each tower alone, in color and gray", show_default=False
        ),
    ] = False,
    batch_size: BatchOption = None,
    gpus: GpusOption = None,
    jobs: JobsOption = None,
    predictions: Annotated[Path | None, typer.Option(help="File for predictions, one JSON line per image")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for per-class errors and confusions [default: eval/ of the run]"),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure top-1 and top-5 error.

    Uses the validation split, with the center view or the paper's ten views.
    """
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.evaluation import results
    from alexnet_cli.core.evaluation.evaluate import match_classes, to_gray
    from alexnet_cli.core.evaluation.towers import NETWORKS
    from alexnet_cli.core.files import hash_file
    from alexnet_cli.core.runs.resolve import (
        describe_unfinished_run,
        describe_weights,
        find_run_folder,
        find_training_data,
        find_weights,
        is_training_data,
    )

    reporter = Reporter("evaluate", json=json, quiet=quiet)
    if towers and (without_tower is not None or grayscale or predictions):
        what = "--towers does not go with --without-tower, --grayscale or --predictions"
        raise UsageError(what, "it measures all towers and each alone, in color and gray; leave the others out")
    has_silent_tower = towers or without_tower is not None
    path = find_weights(weights, (".safetensors",) if has_silent_tower else (".safetensors", ".onnx"))
    dataset = open_dataset(find_dataset(data or find_training_data(path)))
    images = dataset.nonempty_split(split)
    backend = "onnx" if path.suffix == ".onnx" else "torch"
    networks = _load_networks(path, NETWORKS if towers else (without_tower,), views, gpus)
    model = networks[without_tower]
    if grayscale:
        classify = model.classify
        model = replace(model, classify=lambda images: classify(to_gray(images)))
    classes = model.classes
    output_of = match_classes(classes, dataset.classes, path)
    reporter.line("weights", describe_weights(path, model.info), always=weights is None)
    if remark := describe_unfinished_run(path):
        reporter.line("note", remark)
    reporter.line("data", f"{dataset.path} · {split} · {len(images):,} images, each counted once")
    gray = " · gray images" if grayscale else ""
    reporter.line("mode", f"{results.PROTOCOL[views]} · {backend} · {model.device_name}{gray}")
    if len(dataset.classes) < len(classes):
        share = f"{len(dataset.classes):,} of the network's {len(classes):,} classes"
        reporter.line("note", f"the data set has {share}; predictions of the other classes count as errors")
    run = find_run_folder(path)
    folder = output or (run / "eval" if run else None)
    if folder:
        results.make_folder(folder)
    source = results.describe_source(split, path, hash_file(path), dataset)
    condition = [f"without-tower{without_tower}"] if without_tower else ["towers"] if towers else []
    stem = results.make_file_stem(split, views, path, dataset, condition + ["gray"] * grayscale)
    if towers:
        tower_counts = _count_towers(reporter, networks, images, output_of, batch_size, jobs)
        record = _report_towers(reporter, tower_counts, classes, views, source)
        _write_record(reporter, folder, stem, record)
        return
    counts = _count_images(reporter, model, images, output_of, batch_size, jobs, predictions)
    published = results.find_published(model.recipe, dataset.classes)
    totals = results.summarize(counts, views, backend, published)
    totals |= source | ({"without_tower": without_tower} if without_tower else {})
    totals |= {"grayscale": True} if grayscale else {}
    _report(reporter, counts, classes, totals)
    if published:
        reporter.show(f"known   {results.format_published(published, views, counts.images)}")
    _report_worst(reporter, counts, classes)
    is_usual = (split, views, backend, without_tower, grayscale) == ("val", 1, "torch", None, False)
    if is_usual and is_training_data(path, dataset):
        _explain_difference(reporter, model.info, run, counts.top1_error)
    if folder:
        files = results.write_results(folder, stem, counts, classes, totals)
        reporter.line("files", f"{files[0].parent}: {', '.join(file.name for file in files)}")
    else:
        reporter.line("files", NO_FILES)
    reporter.line("next", f"alexnet predict IMAGE{f' -w {shlex.quote(weights)}' if weights else ''}")


def _count_images(
    reporter: Reporter,
    model: LoadedModel,
    images: Split,
    output_of: Any,
    batch_size: int | None,
    jobs: int | None,
    predictions: Path | None,
) -> Evaluation:
    """Classify every image of the split once, and write the file of --predictions."""
    from alexnet_cli.core.data import loader as loading
    from alexnet_cli.core.evaluation import results
    from alexnet_cli.core.evaluation.evaluate import Evaluation, HalvingClassifier
    from alexnet_cli.core.evaluation.evaluate import evaluate as evaluate_batches
    from alexnet_cli.core.parallel.placement import choose_decode_threads

    counts = Evaluation.empty(len(model.classes))
    size = min(batch_size or DEFAULT_BATCH_SIZE, len(images))
    classify = HalvingClassifier(model.classify, lambda n: _warn_of_halving(reporter, n))
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(_open_predictions(predictions)) if predictions else None
        loader = stack.enter_context(loading.Loader(images, size, choose_decode_threads(jobs), model.device))
        bar = stack.enter_context(reporter.progress(images.name, total=len(images)))
        batches = loader.batches(loading.all_batches(len(images), size))
        for batch, top, probabilities in evaluate_batches(classify, batches, counts, output_of):
            counts.check_finite(model.path)
            bar.advance(len(batch.rows))
            if out:
                labels = batch.labels.numpy() if output_of is None else output_of[batch.labels.numpy()]
                keys = [images.key(int(row)) for row in batch.rows]
                out.writelines(results.format_predictions(keys, labels, top, probabilities, model.classes))
    assert counts.images == len(images), "every image is counted once"
    return counts


def _warn_of_halving(reporter: Reporter, batch_size: int) -> None:
    reporter.warn(f"out of memory: using a batch size of {batch_size}", f"start with -b {batch_size}")


def _count_towers(
    reporter: Reporter,
    networks: Mapping[int | None, LoadedModel],
    images: Split,
    output_of: Any,
    batch_size: int | None,
    jobs: int | None,
) -> TowerCounts:
    """Classify every image of the split by the whole network and by each tower alone, in color and gray."""
    from alexnet_cli.core.data.loader import Loader, all_batches
    from alexnet_cli.core.evaluation.evaluate import HalvingClassifier
    from alexnet_cli.core.evaluation.towers import TowerCounts, evaluate_towers
    from alexnet_cli.core.parallel.placement import choose_decode_threads

    whole, size = networks[None], min(batch_size or DEFAULT_BATCH_SIZE, len(images))
    counts = TowerCounts.empty(len(whole.classes))
    halving = {
        tower: HalvingClassifier(network.classify, lambda n: _warn_of_halving(reporter, n))
        for tower, network in networks.items()
    }
    with (
        Loader(images, size, choose_decode_threads(jobs), whole.device) as loader,
        reporter.progress(images.name, total=len(images)) as bar,
    ):
        batches = loader.batches(all_batches(len(images), size))
        for batch in evaluate_towers(halving, batches, counts, output_of):
            counts.check_finite(whole.path)
            bar.advance(len(batch.rows))
    return counts


def _report_towers(
    reporter: Reporter, counts: TowerCounts, classes: Sequence[ClassName], views: int, source: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what each tower does as JSON or as text. Returns the record."""
    from alexnet_cli.core.evaluation.towers import TowerTable
    from alexnet_cli.core.intervals import format_points
    from alexnet_cli.core.model.model_file import name_towers

    record = counts.make_record(classes, views, source)
    table = TowerTable.from_record(record)
    errors = table.errors
    reporter.result(record)
    reporter.show(f"{'top-1 error':<16}{'color':>7}{'gray':>8}   {'gray costs, points':<24}says most often, in color")
    for color, gray in zip(errors[:3], errors[3:], strict=True):
        most = f"{classes[color.top_answer].name}, {color.top_answer_share:.0%}"
        cost = format_points(gray.lost_in_gray, gray.lost_in_gray_interval)
        name = name_towers(color.without_tower)
        numbers = f"{color.top1_error:>7.1%}{gray.top1_error:>8.1%}   {cost:<24}"
        reporter.show(make_printable(f"{name:<16}{numbers}{most}"))
    for color, gray in zip(errors[2:0:-1], errors[5:3:-1], strict=True):
        costs = [format_points(row.lost_without_tower, row.lost_without_tower_interval) for row in (color, gray)]
        reporter.show(f"switching tower {color.without_tower} off costs {costs[0]} points in color, {costs[1]} in gray")
    _report_needs(reporter, table.classes)
    return record


def _report_needs(reporter: Reporter, needs: Sequence[ClassNeed]) -> None:
    """Show the classes where it matters most which tower is left, in color."""

    half = MOST_LISTED // 2
    listed = needs if len(needs) <= MOST_LISTED else [*needs[:half], *needs[-half:]]
    width = max(14, *(len(row.name) for row in listed)) + 2
    heads = "".join(f"{head:>16}" for head in ("whole network", "tower 1 alone", "tower 2 alone"))
    reporter.show("images of each class that are right (in brackets: images of any class with this answer)")
    reporter.show(f"{'':<{width}}{heads}   points lost without tower 1, 2")
    for row in listed:
        cells = [f"{1 - row.top1_errors[i]:.0%} ({row.answers[i]:,})" for i in range(3)]
        lost = " ".join(f"{100 * share:>6.0f}" for share in row.lost_without)
        reporter.show(make_printable(f"{row.name:<{width}}{''.join(f'{cell:>16}' for cell in cells)}  {lost}"))
    reporter.line("note", "a tower alone was not trained to work alone: it may answer one class for most images")


def _write_record(reporter: Reporter, folder: Path | None, stem: str, record: Mapping[str, Any]) -> None:
    """Write the record of --towers into the folder of results, if there is one."""
    from alexnet_cli.core.evaluation.towers import write_record

    if folder is None:
        reporter.line("files", NO_FILES)
        return
    path = folder / f"{stem}.json"
    with storage_errors(path):
        write_record(path, record)
    reporter.line("files", str(path))


def _load_networks(
    path: Path, silenced: Sequence[int | None], views: int, gpus: str | None
) -> dict[int | None, LoadedModel]:
    """Load the network once for each tower to switch off; None is the whole network. An ONNX file is always whole."""
    from alexnet_cli.core.model.model_file import read_model, silence_tower

    if path.suffix == ".onnx":
        return {None: _load_onnx(path, views, gpus)}
    model = read_model(path)
    return {
        tower: _load_torch(model if tower is None else silence_tower(model, tower), views, gpus) for tower in silenced
    }


def _load_torch(model: Model, views: int, gpus: str | None) -> LoadedModel:
    """Load the content of a model file in PyTorch."""
    from alexnet_cli.core.evaluation.evaluate import TorchClassifier
    from alexnet_cli.core.parallel.placement import place

    placement = place(gpus, "fp32")
    classify = TorchClassifier.from_model(model, placement, views)
    name = f"{placement.name} · fp32"
    return LoadedModel(model.path, classify, model.classes, model.recipe, name, model.info, placement.device)


def _load_onnx(path: Path, views: int, gpus: str | None) -> LoadedModel:
    """Load an ONNX file in ONNX Runtime."""
    from alexnet_cli.core.inference.predict import compute_probabilities
    from alexnet_cli.core.inference.session import Session
    from alexnet_cli.core.parallel.placement import single_gpu

    gpu = None if gpus is None else single_gpu(gpus)
    session = Session(path, provider="auto" if gpus is None else "cpu" if gpu is None else "cuda", gpu=gpu or 0)
    device = f"{session.device}, since {session.fallback_reason}" if session.fallback_reason else session.device

    def classify(images: Tensor) -> npt.NDArray[np.float32]:
        return compute_probabilities(images.numpy(), session, views)

    return LoadedModel(path, classify, session.classes, session.recipe, device, session.info)


def _report(reporter: Reporter, counts: Evaluation, classes: Sequence[ClassName], totals: dict[str, Any]) -> None:
    """Write the totals as JSON or as text, with remarks on a network that is no better than guessing."""
    from alexnet_cli.core.evaluation import baselines
    from alexnet_cli.core.intervals import wilson_interval

    reporter.result(totals)
    for k, error in ((1, counts.top1_error), (5, counts.top5_error)):
        if k < len(classes):
            low, high = wilson_interval(error, counts.images)
            guessing = baselines.format_baselines(totals["chance_error"], totals["commonest_error"])
            prefix = f"{guessing}; " if k == 1 else ""
            reporter.show(
                f"top-{k}   error {error:.1%}   ({prefix}95 % interval {low:.1%} to {high:.1%}; {1 - error:.1%} right)"
            )
    if remark := baselines.describe_totals(totals):
        reporter.line("note", remark)
    if remark := baselines.describe_one_sided(counts.confusion, [name.name for name in classes]):
        if "without_tower" in totals:
            reporter.line("note", remark)
        else:
            reporter.warn(remark, baselines.ONE_SIDED_HINT)


def _report_worst(reporter: Reporter, counts: Evaluation, classes: Sequence[ClassName]) -> None:
    """Show the classes with the highest error and the most frequent mistakes."""
    from alexnet_cli.core.evaluation import results

    most = max(1, min(MOST_LISTED, len(classes) // 2))
    rows = [
        (row["name"], f"{1 - row['top1_error']:.0%} of {row['images']} right")
        for row in results.find_worst_classes(counts, classes, most)
    ]
    pairs = [
        (f"{classes[true].name} taken for {classes[predicted].name}", f"{times}x")
        for true, predicted, times in results.find_mistakes(counts, most)
    ]
    for label, lines in (("worst", rows), ("mixed", pairs)):
        width = max((len(left) for left, _ in lines), default=0)
        for number, (left, right) in enumerate(lines):
            reporter.show(make_printable(f"{'' if number else label:<8}{left:<{width}}   {right}"))


def _explain_difference(reporter: Reporter, info: Mapping[str, Any], run: Path | None, error: float) -> None:
    """Explain why training recorded another error for these weights, if it validated in another precision."""
    from alexnet_cli.core.runs.run import Run

    metrics = info.get("metrics")
    recorded = metrics.get("top1_error") if isinstance(metrics, Mapping) else None
    run_info = Run(run).about if run else {}
    precision = [run_info, *run_info.get("resumed", [])][-1].get("precision", "fp32")
    if isinstance(recorded, float) and precision != "fp32" and f"{recorded:.1%}" != f"{error:.1%}":
        reporter.line("note", f"training recorded {recorded:.1%} for these weights in {precision}; this is fp32")


def _open_predictions(path: Path) -> Any:
    with storage_errors(path, "choose another --predictions file"):
        return path.open("w", encoding="utf-8")
