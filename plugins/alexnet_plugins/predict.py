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
from alexnet_cli.errors import PartialError, StorageError
from alexnet_cli.options import JsonFlag, QuietFlag, ViewsOption, WeightsOption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alexnet_cli.core.predict import Prediction

BAR, NAME = 24, 20  # characters: a full bar, a name at least
COLUMNS = ("path", "rank", "label", "wnid", "index", "probability", "error")


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE|DIR|GLOB|-", help="Pictures, folders, patterns; - reads paths from stdin."),
    ],
    weights: WeightsOption = None,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="How many labels to give.")] = 5,
    views: ViewsOption = 1,
    csv: Annotated[Path | None, typer.Option(help="Write all answers to this CSV file instead of tables.")] = None,
    backend: Annotated[
        Literal["auto", "onnx", "torch"], typer.Option(help="What runs the network; auto is ONNX Runtime.")
    ] = "auto",
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Classify pictures: the likeliest labels of each, with their probabilities."""
    import time

    from alexnet_cli.core.predict import FEW, expand, open_classifier
    from alexnet_cli.core.predict import predict as run
    from alexnet_cli.core.runs import find_weights

    reporter = Reporter("predict", json=json, quiet=quiet)
    paths = expand(inputs, sys.stdin)
    model = find_weights(weights, (".safetensors",) if backend == "torch" else (".onnx", ".safetensors"))
    classifier = open_classifier(model, backend, few=len(paths) * views <= FEW)
    if classifier.fallback:
        reporter.warn(f"the network runs on the CPU: {classifier.fallback}", "see `alexnet doctor`")
    started = time.perf_counter()
    failed = 0
    with _csv(csv) as write, contextlib.ExitStack() as stack:
        # A moving line and tables on one terminal would overwrite each other.
        bar = len(paths) > FEW and (csv is not None or not sys.stdout.isatty())
        progress = stack.enter_context(reporter.progress("predict", len(paths))) if bar else None
        for prediction in run(paths, classifier, k, views):
            failed += prediction.error is not None
            write(prediction)
            if progress:
                progress.advance(1)
            reporter.result(_record(prediction))
            if csv is None:
                reporter.show(_table(prediction, headed=len(paths) > 1))
    seconds = time.perf_counter() - started
    name = "torch" if backend == "torch" else "onnx"
    speed = f"{1000 * seconds:.0f} ms" if len(paths) == 1 else f"{len(paths) / seconds:.0f} img/s"
    unread = f" · {failed:,} unreadable" if failed else ""
    count = "1 picture" if len(paths) == 1 else f"{len(paths):,} pictures"
    reporter.line("done", f"{count}{unread} · {name} · {classifier.device} · {speed} · {model}")
    if csv is not None:
        reporter.line("saved", str(csv))
    if failed:
        raise PartialError(f"{failed} of {count} could not be read", "the reasons are in the results")


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
