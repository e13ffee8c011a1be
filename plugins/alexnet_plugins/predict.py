"""`alexnet predict`: what a trained network sees in pictures. Starts fast: PyTorch is not imported."""

from __future__ import annotations

import contextlib
import csv as csvlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import PartialError, StorageError, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag, ViewsOption, WeightsOption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alexnet_cli.core.inference.predict import Classifier, Prediction

BAR, NAME = 24, 20  # characters: a full bar, a name at least
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
    import time

    from alexnet_cli.core.inference.inputs import expand_inputs
    from alexnet_cli.core.inference.predict import FEW, open_classifier
    from alexnet_cli.core.inference.predict import predict as run
    from alexnet_cli.core.runs.resolve import describe_unfinished_run, describe_weights, find_weights

    if (features is None) != (output is None):
        raise UsageError("--features and -o belong together", "such as --features fc7 -o features.npz")
    if output is not None and output.suffix != ".npz":
        raise UsageError(f"-o {output} does not end in .npz", f"such as -o {output.stem or 'features'}.npz")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}", "make it first")
    reporter = Reporter("predict", json=json, quiet=quiet)
    ours: list[str] = []
    sources = expand_inputs(inputs, getattr(sys.stdin, "buffer", None), ours)
    model = find_weights(weights, (".safetensors",) if backend == "torch" else (".onnx", ".safetensors"))
    classifier = open_classifier(model, backend, few=len(sources) * views <= FEW, layer=features)
    reporter.line("weights", describe_weights(model, classifier.about))
    if remark := describe_unfinished_run(model):
        reporter.line("note", remark)
    if ours:
        drawn = "a picture" if len(ours) == 1 else f"{len(ours):,} pictures"
        reporter.line("note", f"left out: {drawn} drawn for runs, such as {ours[0]}")
    if classifier.fallback:
        reporter.warn(f"the network runs on the CPU: {classifier.fallback}", "see `alexnet doctor`")
    started, tables, unread, units = time.perf_counter(), csv is None and features is None, list[str](), 0
    with _csv(csv) as write, _features(output, classifier, features) as keep, contextlib.ExitStack() as stack:
        # A moving line and tables on one terminal would overwrite each other.
        bar = len(sources) > FEW and not (tables and sys.stdout.isatty())
        progress = stack.enter_context(reporter.progress("predict", len(sources))) if bar else None
        for prediction in run(sources, classifier, k, views, features is not None):
            if prediction.error is not None:
                unread.append(f"{prediction.path}: {prediction.error}")
                if features and csv is None and not json:  # there is no other place for the reason
                    reporter.warn(f"left out {unread[-1]}")
            elif prediction.features is not None:
                units = len(prediction.features)
            write(prediction)
            keep(prediction)
            if progress:
                progress.advance(1)
            reporter.result(_record(prediction))
            if tables:
                reporter.show(_table(prediction, headed=len(sources) > 1))
    name = "torch" if backend == "torch" else "onnx"
    _conclude(reporter, len(sources), len(unread), time.perf_counter() - started, f"{name} · {classifier.device}")
    shape = f" · {len(sources) - len(unread):,} x {units:,}"
    for path, holds in ((csv, ""), (output, shape)):
        if path is not None:
            reporter.line("saved", f"{path}{holds}")
    if unread:
        what = f"{len(unread):,} of {_pictures(len(sources))} could not be read"
        if len(unread) == 1:
            raise PartialError(f"{what}: {unread[0]}", "look at the file, or leave it out")
        raise PartialError(f"{what}; the first is {unread[0]}", f"the reasons of all are in {csv or 'the results'}")


def _conclude(reporter: Reporter, pictures: int, failed: int, seconds: float, by: str) -> None:
    """How many, how fast, by what."""
    speed = f"{1000 * seconds:.0f} ms" if pictures == 1 else f"{pictures / seconds:.0f} img/s"
    unread = f" · {failed:,} unreadable" if failed else ""
    reporter.line("done", f"{_pictures(pictures)}{unread} · {speed} · {by}")


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def _record(prediction: Prediction) -> dict[str, Any]:
    """What a JSON line holds: the answers, or the reason why there are none."""
    if prediction.error is not None:
        return {"path": prediction.path, "error": prediction.error}
    return {"path": prediction.path, "top": [asdict(label) for label in prediction.top]}


def _table(prediction: Prediction, headed: bool) -> str:
    """A line for each label: name, probability, bar. Plain text: loading a table library takes time."""
    lines = [_printable(prediction.path)] if headed or prediction.error is not None else []
    if prediction.error is not None:
        lines.append(f"  cannot be read: {_printable(prediction.error)}")
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    names = [_printable(label.label) for label in prediction.top]
    width = max([NAME, *map(len, names)])
    for name, label in zip(names, prediction.top, strict=True):
        lines.append(f"  {name:<{width}}  {label.probability:.2f}  {block * round(BAR * label.probability)}".rstrip())
    return "\n".join(lines)


def _printable(text: str) -> str:
    """The text with a question mark for whatever a terminal could take for a command, or cannot show."""
    return "".join(c if c.isprintable() else "?" for c in text)


@contextlib.contextmanager
def _csv(path: Path | None) -> Iterator[Callable[[Prediction], None]]:
    """A function that writes a prediction to the CSV file, a row for each label; idle without a path."""
    if path is None:
        yield lambda prediction: None
        return
    try:
        file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "choose another --csv file") from error
    with file:
        table = csvlib.DictWriter(file, COLUMNS, restval="")
        table.writeheader()

        def write(prediction: Prediction) -> None:
            record = _record(prediction)
            table.writerows(record | label for label in record.pop("top", [{}]))

        yield write


def _features(
    path: Path | None, classifier: Classifier, layer: str | None
) -> contextlib.AbstractContextManager[Callable[[Prediction], None]]:
    """A function that takes a prediction for the file of activations; idle without a path."""
    if path is None or layer is None:
        return contextlib.nullcontext(lambda prediction: None)
    from alexnet_cli.core.inference.predict import write_features

    return write_features(path, classifier, layer)
