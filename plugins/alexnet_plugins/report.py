"""`alexnet report`: one HTML page about a run or a network, or about two runs."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, PartialError, UsageError, WeightsError
from alexnet_cli.options import JsonFlag, OwnDataOption, QuietFlag, WeightsOption, complete_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alexnet_cli.core.evaluation.compare import PairedAnswers
    from alexnet_cli.core.report.collect import OpenedModel
    from alexnet_cli.core.report.page import Section
    from alexnet_cli.core.runs.run import Run


def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="A run, as -w names it, or two runs to compare",
            autocompletion=complete_weights,
            show_default=False,
        ),
    ] = None,
    weights: WeightsOption = None,
    data: OwnDataOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="F.html",
            help="File to write [default: report.html in the run; of two runs, report-A-vs-B.html in this folder]",
        ),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write an HTML report of a run, or compare two.

    The report of a run shows recipe, curves, filters, confusions, examples, neighbors and speed. Reuses the results of
    `evaluate` and `neighbors` if they belong to these weights, and computes them otherwise. The report of two runs
    shows what differs in their recipes, curves, filters, and errors on the same validation images.
    """
    reporter, names = Reporter("report", json=json, quiet=quiet), names or []
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {output}: not an .html file", "for example: -o report.html")
    if len(names) > 2:
        raise UsageError(f"{len(names)} runs: only two can be compared", f"alexnet report {shlex.join(names[:2])}")
    if names and weights is not None:
        raise UsageError("-w and a RUN are given", f"leave -w out: alexnet report {shlex.join(names)}")
    if len(names) == 2:
        compare(reporter, names[0], names[1], data, output)
    else:
        report_run(reporter, names[0] if names else weights, data, output)


def report_run(reporter: Reporter, weights: str | None, data: str | None, output: Path | None) -> None:
    """Write the report of the run, or the network, that -w names."""
    from alexnet_cli.core.data.shards import Dataset
    from alexnet_cli.core.parallel.placement import place
    from alexnet_cli.core.report import page
    from alexnet_cli.core.report.collect import collect_report, find_run_data, open_model
    from alexnet_cli.core.runs.resolve import describe_weights, is_best, shorten_path

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
    _show_result(reporter, target, page.write_page(collected, target), {
        "weights": str(path) if path else None,
        "data": str(dataset.path) if isinstance(dataset, Dataset) else None,
        "top1_error": measured.totals["top1_error"] if measured.totals else None,
    })  # fmt: skip
    if measured.failed and (data or "data_path" in collected.about):  # not for a data set that nobody named
        raise PartialError(
            f"{target} is not complete: {measured.failed}", "the page says what is missing; --data D uses another set"
        )


def compare(reporter: Reporter, first: str, second: str, data: str | None, output: Path | None) -> None:
    """Write the page that compares two runs. Without common data or weights it has the rest, and says why."""
    from alexnet_cli.core.evaluation.compare import find_differences
    from alexnet_cli.core.report import page
    from alexnet_cli.core.report.collect import collect_report, open_model
    from alexnet_cli.core.report.compare import Comparison, write_comparison
    from alexnet_cli.core.runs.resolve import describe_weights, shorten_path
    from alexnet_cli.core.runs.run import Run

    pair = Run.open(first), Run.open(second)
    if pair[0].path.resolve() == pair[1].path.resolve():
        raise UsageError(f"{first} and {second} are the same run", f"for one run: alexnet report {pair[0].quoted}")
    target = output or Path(f"report-{'-vs-'.join('-'.join(Path(run.name).parts) for run in pair)}.html")
    page.check_writable(target)
    names = [run.name for run in pair]
    if names[0] == names[1]:
        names = [str(shorten_path(run.path)) for run in pair]
    opened: list[OpenedModel | None] = []
    for name in (first, second):
        _, path = _resolve_weights(name)
        opened.append(open_model(path) if path else None)
        info = opened[-1].model.info if opened[-1] else {}
        reporter.line("weights", describe_weights(path, info) if path else f"{name} has none yet")
    one, other = (
        replace(collect_report(run, network, ""), name=name)
        for run, network, name in zip(pair, opened, names, strict=True)
    )
    answers, missing = None, ""
    try:
        answers = _measure_pair(reporter, pair, opened, data)
    except AlexNetError as error:
        if data is not None:
            raise
        reporter.warn(f"not compared on the same images: {error.what}", error.hint)
        missing = error.what
    comparison = Comparison((one, other), find_differences(*pair), answers, missing)
    _show_result(reporter, target, write_comparison(comparison, target), {
        "runs": names,
        "weights": [str(network.model.path) if network else None for network in opened],
        "differences": comparison.differences, **(answers.summarize() if answers else {}),
    })  # fmt: skip


def _show_result(reporter: Reporter, target: Path, sections: Sequence[Section], record: dict[str, Any]) -> None:
    """Report the page that was written, and what no plotting library means for it."""
    from alexnet_cli.core.report.charts import INSTALL_HINT, can_draw

    size = target.stat().st_size
    listed = [{"id": s.id, "title": s.title, "note": s.note or None} for s in sections]
    reporter.result({"path": str(target), "bytes": size, "charts": can_draw(), **record, "sections": listed})
    if not can_draw():
        reporter.warn("the page has no curves: no plotting library is installed", INSTALL_HINT)
    reporter.line("saved", f"{target} · {size / 1e6:.1f} MB, {len(sections)} sections: open it in a browser")


def _measure_pair(
    reporter: Reporter, pair: Sequence[Run], opened: Sequence[OpenedModel | None], data: str | None
) -> PairedAnswers:
    """Classify the same images with both networks. Raises AlexNetError if there are none, or a run has no network."""
    from alexnet_cli.core.evaluation.compare import classify_pair, find_common_data
    from alexnet_cli.core.parallel.placement import place

    models = [network.model for network in opened if network]
    if len(models) < len(pair):
        run = pair[opened.index(None)]
        raise WeightsError(
            f"run {run.name} has no checkpoint yet", f"train it first: alexnet train --resume {run.quoted}"
        )
    dataset = find_common_data(pair, data, "name one: alexnet report A B --data D")
    images, placement = len(dataset.split("val")), place(None, "fp32")
    reporter.line("data", f"{dataset.path} · val · {images:,} images, center view · {placement.name} · fp32")
    with reporter.progress("val", images) as bar:
        return classify_pair(models, dataset, placement, bar.advance)


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
