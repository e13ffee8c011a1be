"""`alexnet report`: one HTML page about a run or a network."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import PartialError, UsageError, WeightsError
from alexnet_cli.options import JsonFlag, OwnDataOption, QuietFlag, WeightsOption

if TYPE_CHECKING:
    from alexnet_cli.core.runs.run import Run


def report(
    weights: WeightsOption = None,
    data: OwnDataOption = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="F.html", help="File to write [default: report.html in the run]"),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write an HTML report of a run.

    It shows recipe, curves, filters, confusions, examples, neighbors and speed. Reuses the results of `evaluate` and
    `neighbors` if they belong to these weights, and computes them otherwise.
    """
    from alexnet_cli.core.data.shards import Dataset
    from alexnet_cli.core.parallel.placement import place
    from alexnet_cli.core.report import page
    from alexnet_cli.core.report.charts import INSTALL_HINT, can_draw
    from alexnet_cli.core.report.collect import collect_report, find_run_data, open_model
    from alexnet_cli.core.runs.resolve import describe_weights, is_best, shorten_path

    reporter = Reporter("report", json=json, quiet=quiet)
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {output}: not an .html file", "for example: -o report.html")
    run, path = _resolve_weights(weights)
    # report.html is about the best checkpoint; another checkpoint gets a page of its own.
    suffix = "" if path is None or is_best(path) else f"-{path.resolve().parent.name}"
    target = output or (run.path if run else Path()) / f"report{suffix}.html"
    page.check_writable(target)
    opened = open_model(path) if path else None
    if path and opened:
        reporter.line("weights", describe_weights(path, opened.model.info), always=weights is None)
    elif run:
        reporter.line("weights", f"none yet in {run.path}")
    dataset = find_run_data(run, data)
    reporter.line("data", str(shorten_path(dataset.path)) if isinstance(dataset, Dataset) else dataset)
    with reporter.progress("report", total=None) as progress:
        collected = collect_report(run, opened, dataset, place(None, "fp32") if path else None, progress.advance)
    measured = collected.measurements
    if measured.unsaved:
        reporter.line("note", f"the computed results are only on the page: {measured.unsaved}")
    sections = page.write_page(collected, target)
    size = target.stat().st_size
    reporter.result({
        "path": str(target), "bytes": size, "weights": str(path) if path else None, "charts": can_draw(),
        "data": str(dataset.path) if isinstance(dataset, Dataset) else None,
        "top1_error": measured.totals["top1_error"] if measured.totals else None,
        "sections": [{"id": s.id, "title": s.title, "note": s.note or None} for s in sections],
    })  # fmt: skip
    if not can_draw():
        reporter.warn("the page has tables instead of curves: no plotting library is installed", INSTALL_HINT)
    reporter.line("saved", f"{target} · {size / 1e6:.1f} MB, {len(sections)} sections: open it in a browser")
    if measured.failed and (data or "data_path" in collected.about):  # not for a data set that nobody named
        raise PartialError(
            f"{target} is not complete: {measured.failed}", "the page says what is missing; --data D uses another set"
        )


def _resolve_weights(spec: str | None) -> tuple[Run | None, Path | None]:
    """The run that -w names and its best weights; None for the weights of a run without any, or a file of no run."""
    from alexnet_cli.core.runs.resolve import find_run_folder, find_weights
    from alexnet_cli.core.runs.run import Run

    try:
        path = find_weights(spec)
    except WeightsError:
        with suppress(UsageError):
            return Run.open(spec or "latest"), None
        raise
    folder = find_run_folder(path)
    return (Run(folder) if folder else None), path
