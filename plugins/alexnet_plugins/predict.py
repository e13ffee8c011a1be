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
from alexnet_cli.errors import PartialError, UsageError, storage_errors
from alexnet_cli.options import JsonFlag, QuietFlag, ViewsOption, WeightsOption, WithoutTowerOption, complete_layers

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
    without_tower: WithoutTowerOption = None,
    csv: Annotated[Path | None, typer.Option(help="Write the predictions to this CSV file instead of stdout")] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="Write the activations of these layers to the file of -o instead of labels: "
            "conv1, relu1, norm1, pool1 ... fc7, relu7, drop7, fc8",
            autocompletion=complete_layers,
        ),
    ] = None,
    tower: Annotated[
        int | None, typer.Option(help="Keep only this tower's maps and units of --features: 1 or 2 [default: both]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="File for the activations of --features: .npz or .safetensors"
        ),
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
    from alexnet_cli.core.model.architecture import check_layers
    from alexnet_cli.core.runs.resolve import describe_unfinished_run, describe_weights, find_weights

    layers = [name.strip() for name in ",".join(features).split(",")] if features else []
    _check_output(layers, output, tower)
    reporter = Reporter("predict", json=json, quiet=quiet)
    run_images: list[str] = []
    images = expand_inputs(inputs, getattr(sys.stdin, "buffer", None), run_images)
    if output and output.suffix == ".safetensors":
        predicting.check_paths_fit(images)
    needs_model_file = backend == "torch" or without_tower is not None
    model = find_weights(weights, (".safetensors",) if needs_model_file else (".onnx", ".safetensors"))
    fast_start = len(images) * views <= predicting.FAST_START_VIEWS
    classifier = predicting.open_classifier(model, backend, fast_start, layers, without_tower)
    check_layers(classifier.recipe, layers, tower)
    reporter.line("weights", describe_weights(model, classifier.info), always=weights is None)
    if remark := describe_unfinished_run(model):
        reporter.line("note", remark)
    if run_images:
        reporter.line("note", f"skipped {_count_images(len(run_images))} drawn for runs, such as {run_images[0]}")
    if classifier.fallback_reason:
        reporter.warn(f"the network runs on the CPU: {classifier.fallback_reason}", "see `alexnet doctor`")
    started, shows_tables, errors = time.perf_counter(), csv is None and not layers, list[str]()
    with contextlib.ExitStack() as stack:
        write_row = stack.enter_context(_open_csv(csv)) if csv else None
        write_activations = None
        if output:
            write_activations = stack.enter_context(predicting.write_features(output, classifier, tower))
        # A progress bar and tables on one terminal would overwrite each other.
        shows_progress = len(images) > predicting.FAST_START_VIEWS and not (shows_tables and sys.stdout.isatty())
        progress = stack.enter_context(reporter.progress("predict", len(images))) if shows_progress else None
        for prediction in predicting.predict(images, classifier, k, views):
            if prediction.error is not None:
                errors.append(f"{prediction.path}: {prediction.error}")
                if layers and csv is None and not json:  # nothing else shows the error
                    reporter.warn(f"skipped {errors[-1]}")
            if write_row:
                write_row(prediction)
            if write_activations:
                write_activations(prediction)
            if progress:
                progress.advance(1)
            reporter.result(_make_record(prediction) | ({"without_tower": without_tower} if without_tower else {}))
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
        part = f" (tower {tower})" if tower else ""
        what = f"{', '.join(layers)}{part} of {_count_images(len(images) - len(errors))}"
        reporter.line("saved", f"{output} · {what}")
    if errors:
        what = f"cannot read {len(errors):,} of {_count_images(len(images))}"
        if len(errors) == 1:
            raise PartialError(f"{what}: {errors[0]}", "check the file, or leave it out")
        reasons = csv or ("a line above" if layers and not json else "the output")
        raise PartialError(f"{what}, first {errors[0]}", f"{reasons} has the reason for each")


def _check_output(layers: list[str], output: Path | None, tower: int | None) -> None:
    if bool(layers) != (output is not None):
        raise UsageError("--features and -o only work together", "such as --features relu7 -o features.npz")
    if tower is not None and not layers:
        raise UsageError("--tower needs --features", "such as --features relu7 --tower 1 -o features.npz")
    if output is not None and output.suffix not in (".npz", ".safetensors"):
        what = f"-o {output} does not end in .npz or .safetensors"
        raise UsageError(what, f"such as -o {output.stem or 'features'}.npz")
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
    with storage_errors(path, "choose another --csv file"):
        file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    with file:
        table = csvlib.DictWriter(file, COLUMNS, restval="")
        table.writeheader()

        def write(prediction: Prediction) -> None:
            record = _make_record(prediction)
            table.writerows(record | label for label in record.pop("top", [{}]))

        yield write
