"""`alexnet predict`: classify images. Starts fast, because it does not import PyTorch."""

from __future__ import annotations

import contextlib
import csv as csvlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alexnet_cli.console import Reporter, format_probabilities, make_printable
from alexnet_cli.errors import PartialError, StorageError, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag, ViewsOption, WeightsOption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alexnet_cli.core.inference.predict import Prediction

COLUMNS = ("path", "rank", "label", "wnid", "index", "probability", "error")


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|DIR|GLOB|@LIST|-",
            help="Images, folders or patterns; @FILE reads paths from a file, - paths or one image from stdin",
        ),
    ],
    weights: WeightsOption = None,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="Number of labels to show")] = 5,
    views: ViewsOption = 1,
    csv: Annotated[Path | None, typer.Option(help="Write the predictions to this CSV file instead of stdout")] = None,
    features: Annotated[
        Literal["fc6", "fc7"] | None,
        typer.Option(help="Write this layer's activations (after ReLU) to the file of -o instead of labels"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="F.npz", help="File for the activations of --features")
    ] = None,
    backend: Annotated[
        Literal["auto", "onnx", "torch"], typer.Option(help="Library that runs the network; auto is ONNX Runtime")
    ] = "auto",
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Classify images.

    Shows the most probable labels of each image.
    """
    from alexnet_cli.core.inference import predict as predicting
    from alexnet_cli.core.inference.inputs import expand_inputs
    from alexnet_cli.core.runs.resolve import describe_unfinished_run, describe_weights, find_weights

    _check_output(features, output)
    reporter = Reporter("predict", json=json, quiet=quiet)
    run_images: list[str] = []
    images = expand_inputs(inputs, getattr(sys.stdin, "buffer", None), run_images)
    model = find_weights(weights, (".safetensors",) if backend == "torch" else (".onnx", ".safetensors"))
    fast_start = len(images) * views <= predicting.FAST_START_VIEWS
    classifier = predicting.open_classifier(model, backend, fast_start, features)
    reporter.line("weights", describe_weights(model, classifier.info), always=weights is None)
    if remark := describe_unfinished_run(model):
        reporter.line("note", remark)
    if run_images:
        reporter.line("note", f"skipped {_count_images(len(run_images))} drawn for runs, such as {run_images[0]}")
    if classifier.fallback_reason:
        reporter.warn(f"the network runs on the CPU: {classifier.fallback_reason}", "see `alexnet doctor`")
    started, shows_tables, errors = time.perf_counter(), csv is None and features is None, list[str]()
    with contextlib.ExitStack() as stack:
        write_row = stack.enter_context(_open_csv(csv)) if csv else None
        write_activations = None
        if features and output:
            write_activations = stack.enter_context(predicting.write_features(output, classifier, features))
        # A progress bar and tables on one terminal would overwrite each other.
        shows_progress = len(images) > predicting.FAST_START_VIEWS and not (shows_tables and sys.stdout.isatty())
        progress = stack.enter_context(reporter.progress("predict", len(images))) if shows_progress else None
        for prediction in predicting.predict(images, classifier, k, views, features is not None):
            if prediction.error is not None:
                errors.append(f"{prediction.path}: {prediction.error}")
                if features and csv is None and not json:  # nothing else shows the error
                    reporter.warn(f"skipped {errors[-1]}")
            if write_row:
                write_row(prediction)
            if write_activations:
                write_activations(prediction)
            if progress:
                progress.advance(1)
            reporter.result(_make_record(prediction))
            if shows_tables:
                reporter.show(_format_table(prediction, with_path=len(images) > 1))
    seconds = time.perf_counter() - started
    library = "torch" if backend == "torch" else "onnx"
    unreadable = f" · {len(errors):,} unreadable" if errors else ""
    speed = f"{1000 * seconds:.0f} ms" if len(images) == 1 else f"{len(images) / seconds:.0f} img/s"
    summary = f"{_count_images(len(images))}{unreadable} · {speed} · {library} · {classifier.device}"
    reporter.line("done", summary)
    if csv:
        reporter.line("saved", f"{csv}")
    if output:
        reporter.line("saved", f"{output} · {features} of {_count_images(len(images) - len(errors))}")
    if errors:
        what = f"cannot read {len(errors):,} of {_count_images(len(images))}"
        if len(errors) == 1:
            raise PartialError(f"{what}: {errors[0]}", "check the file, or leave it out")
        raise PartialError(f"{what}, first {errors[0]}", f"{csv or 'the output'} has the reason for each")


def _check_output(features: str | None, output: Path | None) -> None:
    if (features is None) != (output is None):
        raise UsageError("--features and -o only work together", "such as --features fc7 -o features.npz")
    if output is not None and output.suffix != ".npz":
        raise UsageError(f"-o {output} does not end in .npz", f"such as -o {output.stem or 'features'}.npz")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: the folder {output.parent} does not exist", "create it first")


def _count_images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _make_record(prediction: Prediction) -> dict[str, Any]:
    """Return the JSON record of a prediction: the classes, or the error."""
    if prediction.error is not None:
        return {"path": prediction.path, "error": prediction.error}
    return {"path": prediction.path, "top": [asdict(label) for label in prediction.top]}


def _format_table(prediction: Prediction, with_path: bool) -> str:
    """Return the lines of an image: each class with its probability, or why it cannot be read."""
    lines = [make_printable(prediction.path)] if with_path or prediction.error is not None else []
    if prediction.error is not None:
        lines.append(f"  cannot be read: {make_printable(prediction.error)}")
    lines += [f"  {line}" for line in format_probabilities((top.label, top.probability) for top in prediction.top)]
    return "\n".join(lines)


@contextlib.contextmanager
def _open_csv(path: Path) -> Iterator[Callable[[Prediction], None]]:
    """Give a function that writes a prediction to the CSV file, one row per class."""
    try:
        file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "choose another --csv file") from error
    with file:
        table = csvlib.DictWriter(file, COLUMNS, restval="")
        table.writeheader()

        def write(prediction: Prediction) -> None:
            record = _make_record(prediction)
            table.writerows(record | label for label in record.pop("top", [{}]))

        yield write
