"""`alexnet report`: one HTML page about a run, to be opened from disk, printed, or shown to a class."""

from __future__ import annotations

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
        raise UsageError(f"-o {output}: not an .html file", "such as -o report.html")
    run, path = _resolve_weights(weights)
    # The run's own page is of its best checkpoint, and no other's is written over it.
    other = "" if path is None or is_best(path) else f"-{path.resolve().parent.name}"
    target = output or (run.path if run else Path()) / f"report{other}.html"
    page.check_writable(target)
    network = open_model(path) if path else None
    there = (
        describe_weights(path, network.model.info) if path and network else f"none yet in {run.path if run else path}"
    )
    reporter.line("weights", there)
    dataset = find_run_data(run, data)
    reporter.line("data", str(shorten_path(dataset.path)) if isinstance(dataset, Dataset) else dataset)
    with reporter.progress("report", total=None) as progress:
        found = collect_report(run, network, dataset, place(None, "fp32") if path else None, progress.advance)
    if found.evidence.unsaved:
        reporter.line("note", f"what was computed is on the page alone: {found.evidence.unsaved}")
    sections = page.write_page(found, target)
    size = target.stat().st_size
    reporter.result({
        "path": str(target), "bytes": size, "weights": str(path) if path else None, "charts": can_draw(),
        "data": str(dataset.path) if isinstance(dataset, Dataset) else None,
        "top1_error": found.evidence.totals[0]["top1_error"] if found.evidence.totals else None,
        "sections": [{"id": s.id, "title": s.title, "note": s.note or None} for s in sections],
    })  # fmt: skip
    if not can_draw():
        reporter.warn("the page has tables in the place of curves: no plotting library is installed", INSTALL_HINT)
    reporter.line("saved", f"{target} · {size / 1e6:.1f} MB, {len(sections)} sections: open it in a browser")
    failed = found.evidence.failed
    if failed and (data or "data_path" in found.about):  # not for a set that was merely lying about
        raise PartialError(f"{target} is not complete: {failed}", "it says what is missing; --data D names another set")


def _resolve_weights(spec: str | None) -> tuple[Run | None, Path | None]:
    """What -w means: a run, with its best weights if it has any, or weights alone."""
    from alexnet_cli.core.runs.resolve import find_run_folder, find_weights
    from alexnet_cli.core.runs.run import Run

    try:
        path = find_weights(spec)
    except WeightsError:
        try:
            return Run.open(spec or "latest"), None
        except UsageError:
            pass
        raise
    run = find_run_folder(path)
    return (Run(run) if run else None), path
