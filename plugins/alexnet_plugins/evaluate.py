"""`alexnet evaluate`: top-1 and top-5 error of trained weights on a prepared data set, by the paper's protocol."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter, visible
from alexnet_cli.errors import DataError, StorageError
from alexnet_cli.options import (
    BatchOption,
    GpusOption,
    JobsOption,
    JsonFlag,
    OwnDataOption,
    QuietFlag,
    ViewsOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from alexnet_cli.core.evaluate import Classify, Evaluation
    from alexnet_cli.core.shards import Split
    from alexnet_cli.core.sources import ClassName
    from alexnet_cli.recipe import Recipe

    Judge = tuple[Classify, Sequence[ClassName], Recipe, str, Mapping[str, Any]]

AT_ONCE = 128
WORST = 10  # classes and pairs to show, but no more than half of the classes


def evaluate(
    weights: WeightsOption = None,
    data: OwnDataOption = None,
    split: Annotated[str, typer.Option(help="Which split of the data set.")] = "val",
    views: ViewsOption = 1,
    batch_size: BatchOption = None,
    gpus: GpusOption = None,
    jobs: JobsOption = None,
    predictions: Annotated[Path | None, typer.Option(help="Write one JSON line per image to this file.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for classes and confusions. [default: eval/ of the run]"),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure top-1 and top-5 error.

    On the validation split, with the centre view or the paper's ten.
    """
    from alexnet_cli.core import results
    from alexnet_cli.core.evaluate import matching
    from alexnet_cli.core.neighbours import sha256
    from alexnet_cli.core.published import published
    from alexnet_cli.core.resolve import (
        describe_unfinished_run,
        describe_weights,
        find_run_folder,
        find_training_data,
        find_weights,
        is_training_data,
    )
    from alexnet_cli.core.shards import find_dataset, open_dataset

    reporter = Reporter("evaluate", json=json, quiet=quiet)
    path = find_weights(weights, (".safetensors", ".onnx"))
    dataset = open_dataset(find_dataset(data or find_training_data(path)))
    images = dataset.split(split)
    if not len(images):
        raise DataError(f"{dataset.path}: split {split} holds no images", "prepare it anew with --val-fraction 0.1")
    backend = "onnx" if path.suffix == ".onnx" else "torch"
    classify, classes, recipe, place, about = (_onnx if backend == "onnx" else _torch)(path, views, gpus)
    output_of = matching(classes, dataset.classes, path)
    reporter.line("weights", describe_weights(path, about))
    if remark := describe_unfinished_run(path):
        reporter.line("note", remark)
    reporter.line("data", f"{dataset.path} · {split} · {len(images):,} images, each counted once")
    reporter.line("mode", f"{results.PROTOCOL[views]} · {backend} · {place}")
    if len(dataset.classes) < len(classes):
        known = f"{len(dataset.classes):,} of the {len(classes):,} classes that the network can answer"
        reporter.line("note", f"the data set has {known}: an answer outside of them counts as wrong")
    run = find_run_folder(path)
    folder = output or (run / "eval" if run else None)
    if folder:
        results.make(folder)
    counts = _counted(reporter, path, images, classify, classes, output_of, batch_size, jobs, predictions)
    figure = published(recipe, dataset.classes)
    totals = results.numbers(counts, views, backend, figure) | results.origin(split, path, sha256(path), dataset)
    _report(reporter, counts, classes, totals, results.compared(figure, views, counts.images) if figure else "")
    if (split, views, backend) == ("val", 1, "torch") and is_training_data(path, dataset):
        _explain(reporter, about, run, counts.top1_error)
    if folder:
        files = results.write(folder, results.stem(split, views, path, dataset), counts, classes, totals)
        reporter.line("files", f"{files[0].parent}: {', '.join(file.name for file in files)}")
    else:
        reporter.line("files", "none, since the weights lie in no run: -o DIR writes classes and confusions")
    reporter.line("next", f"alexnet predict PICTURE{f' -w {shlex.quote(weights)}' if weights else ''}")


def _counted(
    reporter: Reporter,
    path: Path,
    images: Split,
    classify: Classify,
    classes: Sequence[ClassName],
    output_of: Any,
    batch_size: int | None,
    jobs: int | None,
    predictions: Path | None,
) -> Evaluation:
    """Every image of the split, counted; its answers in the file of predictions, if there is to be one."""
    from alexnet_cli.core import loader as loading
    from alexnet_cli.core import results
    from alexnet_cli.core.backoff import Backoff
    from alexnet_cli.core.evaluate import Evaluation
    from alexnet_cli.core.evaluate import evaluate as run
    from alexnet_cli.core.placement import threads_for_decoding

    counts, size = Evaluation.empty(len(classes)), min(batch_size or AT_ONCE, len(images))
    classify = Backoff(
        classify, lambda n: reporter.warn(f"the memory holds no more than {n} images at a time", f"-b {n}")
    )
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(_opened(predictions)) if predictions else None
        loader = stack.enter_context(loading.Loader(images, size, threads_for_decoding(jobs)))
        bar = stack.enter_context(reporter.progress(images.name, total=len(images)))
        batches = loader.batches(loading.all_batches(len(images), size))
        for batch, top, chances in run(classify, batches, counts, output_of):
            counts.check(path)
            bar.advance(len(batch.rows))
            if out:
                labels = batch.labels.numpy() if output_of is None else output_of[batch.labels.numpy()]
                keys = [images.key(int(row)) for row in batch.rows]
                out.writelines(results.prediction_lines(keys, labels, top, chances, classes))
    assert counts.images == len(images), "every image is counted once"
    return counts


def _torch(path: Path, views: int, gpus: str | None) -> Judge:
    """A model file's network in PyTorch."""
    from alexnet_cli.core.augment import Pixels
    from alexnet_cli.core.evaluate import TorchClassifier
    from alexnet_cli.core.network import from_model
    from alexnet_cli.core.placement import place
    from alexnet_cli.core.weights import read

    model, placement = read(path), place(gpus, "fp32")
    pixels = Pixels(model.recipe, model.mean, None, None, placement.device)
    network = from_model(model).to(placement.device)
    classify = TorchClassifier(network, pixels, placement, views)
    return classify, model.classes, model.recipe, f"{placement.name} · fp32", model.info


def _onnx(path: Path, views: int, gpus: str | None) -> Judge:
    """An ONNX file's network in ONNX Runtime."""
    from alexnet_cli.core.placement import one
    from alexnet_cli.core.predict import probabilities
    from alexnet_cli.core.session import Session

    gpu = None if gpus is None else one(gpus)
    session = Session(path, provider="auto" if gpus is None else "cpu" if gpu is None else "cuda", gpu=gpu or 0)
    place = f"{session.device}, since {session.fallback}" if session.fallback else session.device
    classify = lambda images: probabilities(images.numpy(), session, views)  # noqa: E731 - its type is Judge's
    return classify, session.classes, session.recipe, place, session.about


def _report(
    reporter: Reporter, counts: Evaluation, classes: Sequence[ClassName], totals: dict[str, Any], compared: str
) -> None:
    """The result for people and programs."""
    from alexnet_cli.core import chance, results

    reporter.result(totals)
    for k, error in ((1, counts.top1_error), (5, counts.top5_error)):
        if k < len(classes):
            low, high = chance.interval(error, counts.images)
            guess = f"{chance.beside(totals['chance_error'], totals['commonest_error'])}; " if k == 1 else ""
            reporter.show(
                f"top-{k}   error {error:.1%}   ({guess}95 % interval {low:.1%} to {high:.1%}; {1 - error:.1%} right)"
            )
    if remark := chance.guessed(totals):
        reporter.line("note", remark)
    if remark := chance.one_sided(counts.confusion, [name.name for name in classes]):
        reporter.warn(remark, chance.LEARN)
    if compared:
        reporter.show(f"known   {compared}")
    most = max(1, min(WORST, len(classes) // 2))
    rows = [
        (row["name"], f"{1 - row['top1_error']:.0%} of {row['images']} right")
        for row in results.worst(counts, classes, most)
    ]
    pairs = [(f"{true} taken for {seen}", f"{times}x") for true, seen, times in results.confused(counts, classes, most)]
    for word, lines in (("worst", rows), ("mixed", pairs)):
        width = max((len(left) for left, _ in lines), default=0)
        for left, right in lines:
            reporter.show(visible(f"{word:<8}{left:<{width}}   {right}"))
            word = ""


def _explain(reporter: Reporter, about: Mapping[str, Any], run: Path | None, error: float) -> None:
    """Say why training told another error of these weights, where it did: it validates with its own arithmetic."""
    from alexnet_cli.core.runs import Run

    metrics, trained = about.get("metrics"), Run(run).about if run else {}
    told = metrics.get("top1_error") if isinstance(metrics, Mapping) else None
    precision = [trained, *trained.get("resumed", [])][-1].get("precision", "fp32")
    if isinstance(told, float) and precision != "fp32" and f"{told:.1%}" != f"{error:.1%}":
        reporter.line("note", f"training told {told:.1%} of these weights: it validates in {precision}, this is fp32")


def _opened(path: Path) -> Any:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "choose another --predictions file") from error
