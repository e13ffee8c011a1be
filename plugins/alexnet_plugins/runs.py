"""`alexnet runs`: list the runs, or compare two of them."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter, format_duration, make_printable
from alexnet_cli.errors import AlexNetError, DataError, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag, complete_data, complete_weights

if TYPE_CHECKING:
    from rich.table import Table

    from alexnet_cli.core.runs.run import Run

PARTS_OF_A_RUN = ("run.json", "recipe.toml", "metrics.jsonl", "checkpoints")
LONGEST_TEXT = 60  # characters of a cell; --json has the whole text
DATE = "%Y-%m-%dT%H:%M:%S%z"
HEADS = ("run", "data", "recipe", "epochs", "top-1 error", "weights", "date", "status")


@dataclass(frozen=True)
class RunSummary:
    """A row of the list. What is not known is None; `problem` says why a run cannot be read or has failed."""

    name: str
    started: str
    updated: str
    status: str
    problem: str = ""
    data: str | None = None
    recipe: str | None = None
    epochs: int = 0
    epochs_planned: int | None = None
    top1_error: float | None = None
    best_epoch: int | None = None
    bytes: int | None = None

    @property
    def error(self) -> str:
        """The top-1 error of the best epoch, for people."""
        return "-" if self.top1_error is None else f"{self.top1_error:.1%} (epoch {self.best_epoch})"


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Nothing to list all runs, an ablation to list its runs, or two runs to compare",
            autocompletion=complete_weights,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="D",
            help="Prepared data set to compare two runs on [default: the one of their training]",
            autocompletion=complete_data,
        ),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """List the runs, or compare two.

    The list has data, recipe, epochs, top-1 error of the best epoch, size of the weights, date and status of each run,
    newest first. The comparison has what differs in recipe, data and versions, and classifies the same validation
    images with both networks.
    """
    from alexnet_cli.core.runs.run import Run

    reporter, names = Reporter("runs", json=json, quiet=quiet), names or []
    if len(names) > 2:
        raise UsageError(f"{len(names)} runs: only two can be compared", f"alexnet runs {shlex.join(names[:2])}")
    if len(names) == 2:
        compare_runs(reporter, (Run.open(names[0]), Run.open(names[1])), data)
        return
    if data is not None:
        raise UsageError("--data only works with two runs", "alexnet runs A B --data D")
    list_all(reporter, names[0] if names else None)


def list_all(reporter: Reporter, name: str | None) -> None:
    """Show every run, or those that a name stands for; the runs of an ablation are one line unless it is named."""
    from alexnet_cli.core.runs.run import Run, list_runs, runs_root

    folders = list(find_run_folders(runs_root()))
    if name is not None:
        named = {(runs_root() / name).resolve(), Path(name).resolve()}
        folders = [path for path in folders if named & {path.resolve(), path.resolve().parent}] or [Run.open(name).path]
    summaries = sorted((summarize_run(Run(path)) for path in folders), key=lambda s: s.started, reverse=True)
    reporter.result({"runs": [asdict(summary) for summary in summaries]})
    if not summaries:
        reporter.show(f"no runs in {runs_root().absolute()}; {list_runs()}")
        return
    reporter.show(make_table(summaries, grouped=name is None))
    if name is None and (studies := sorted({s.name.partition("/")[0] for s in summaries if "/" in s.name})):
        reporter.line("next", f"the runs of an ablation: alexnet runs {studies[0]}")


def find_run_folders(root: Path) -> Iterator[Path]:
    """Yield the folder of each run, also of those inside an ablation, and of what is left of a run."""
    for path in _list_folders(root):
        inside = [] if _is_run(path) else [sub for sub in _list_folders(path) if _is_run(sub)]
        if inside or _is_run(path):
            yield from inside or [path]


def _list_folders(path: Path) -> list[Path]:
    """Return the folders in a folder, without `latest`; none if it cannot be read."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.name != "latest" and entry.is_dir())
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    try:
        return any((path / part).exists() for part in PARTS_OF_A_RUN)
    except OSError:  # a folder without permission is listed with that reason
        return True


def summarize_run(run: Run) -> RunSummary:
    """Return the row of a run. A run that cannot be read gets the status broken and the reason."""
    from alexnet_cli.core.runs.records import get_failure, get_int

    date, updated = _find_date(run.path), _find_date(run.path / "metrics.jsonl", run.path)
    try:
        about, recipe, records = run.about, run.recipe, run.records()
    except (AlexNetError, OSError) as error:
        return RunSummary(run.name, date, updated, "broken", _describe_problem(run, error))
    validations = [r for r in records if r.get("event") == "validation" and isinstance(r.get("top1_error"), float)]
    best: Mapping[str, Any] = next((record for record in reversed(validations) if record.get("best")), {})
    return RunSummary(
        run.name,
        str(about.get("started") or date),
        updated,
        "imported" if "imported" in about else str(about.get("status")),
        get_failure(about)[0],
        str(about["data"]) if about.get("data") else None,
        recipe.name,
        max((get_int(record, "epoch") for record in validations), default=0),
        None if "imported" in about else recipe.epochs,
        best.get("top1_error"),
        get_int(best, "epoch") or None,
        _find_size(run),
    )


def _describe_problem(run: Run, error: Exception) -> str:
    if isinstance(error.__cause__, FileNotFoundError):
        return f"{Path(str(error.__cause__.filename)).name} is missing"
    what = error.what if isinstance(error, AlexNetError) else str(error)
    return what.replace(f"{run.path}{os.sep}", "")


def _find_date(*paths: Path) -> str:
    """Return when the first of the paths that exists was last changed, in the form of run.json."""
    for path in paths:
        with contextlib.suppress(OSError):
            return datetime.fromtimestamp(path.stat().st_mtime).astimezone().strftime(DATE)
    return ""


def _find_size(run: Run) -> int | None:
    """Return the bytes of the weights that -w means by a run; None if it has none yet."""
    from alexnet_cli.core.runs.resolve import find_weights

    try:
        return find_weights(str(run.path.absolute())).stat().st_size
    except (AlexNetError, OSError):
        return None


def make_table(summaries: Sequence[RunSummary], *, grouped: bool) -> Table:
    """Return the list for people. With `grouped`, all runs of an ablation are one line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEADS, box=None, pad_edge=False)
    studies: dict[str, list[RunSummary]] = {}
    for summary in summaries:  # newest first, so an ablation stands where its newest run would
        study = summary.name.partition("/")[0] if grouped and "/" in summary.name else ""
        studies.setdefault(study or f"/{summary.name}", []).append(summary)
    for study, rows in studies.items():
        cells = _format_run(rows[0]) if study.startswith("/") else _format_study(study, rows)
        table.add_row(*(Text(make_printable(cell)) for cell in cells))
    return table


def _format_run(summary: RunSummary) -> tuple[str, ...]:
    epochs = "-" if summary.epochs_planned is None else f"{summary.epochs}/{summary.epochs_planned}"
    status = summary.status
    if summary.problem:
        status += f": {_format_value(summary.problem)}"
    if summary.status == "running" and summary.updated:  # one that was killed still has this status
        age = (datetime.now().astimezone() - datetime.strptime(summary.updated, DATE)).total_seconds()
        status += f", last record {format_duration(age)} ago"
    return (
        summary.name, summary.data or "-", summary.recipe or "-", epochs, summary.error,
        "-" if summary.bytes is None else f"{summary.bytes / 1e6:,.1f} MB", _format_date(summary.started), status,
    )  # fmt: skip


def _format_study(name: str, rows: Sequence[RunSummary]) -> tuple[str, ...]:
    """Return the line of an ablation: the range of its errors, and how many runs have which status."""
    errors = [row.top1_error for row in rows if row.top1_error is not None]
    data, recipes = ({row.data or "-" for row in rows}, {row.recipe or "-" for row in rows})
    statuses = ", ".join(f"{count} {status}" for status, count in Counter(row.status for row in rows).items())
    span = f"{min(errors):.1%} to {max(errors):.1%}" if errors else "-"
    return f"{name}/", ", ".join(data), ", ".join(recipes), "", span, "", _format_date(rows[0].started), statuses


def _format_date(started: str) -> str:
    return started[:16].replace("T", " ")


def compare_runs(reporter: Reporter, pair: tuple[Run, Run], data: str | None) -> None:
    """Show what differs between two runs, and their errors on the same images if both can classify them."""
    from rich.table import Table
    from rich.text import Text

    from alexnet_cli.core.evaluation.compare import find_differences

    summaries = [summarize_run(run) for run in pair]
    if broken := next((summary for summary in summaries if summary.status == "broken"), None):
        raise DataError(f"run {broken.name} cannot be read: {broken.problem}", "alexnet runs lists those that can")
    differences = find_differences(*pair)
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    rows = [*zip(HEADS, *map(_format_run, summaries), strict=True)]
    rows += [(difference["key"], *map(_format_value, difference["values"])) for difference in differences]
    for head, *cells in rows:
        table.add_row(head, *(Text(make_printable(cell)) for cell in cells))
    reporter.show(table)
    try:
        measured = measure_pair(reporter, pair, data)
    except AlexNetError as error:
        if data is not None:
            raise
        reporter.warn(f"not compared on the same images: {error.what}", error.hint)
        measured = {}
    reporter.result({"runs": [asdict(summary) for summary in summaries], "differences": differences, **measured})
    if measured:
        _show_measured(reporter, [summary.name for summary in summaries], measured)


def _format_value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def measure_pair(reporter: Reporter, pair: tuple[Run, Run], data: str | None) -> dict[str, Any]:
    """Classify the validation images with the best weights of both runs, center view, and count who is right.

    Raises:
        DataError: there is no common data set, or a run has no weights.
    """
    from alexnet_cli.core.evaluation.compare import classify_pair, find_common_data
    from alexnet_cli.core.model.model_file import read_model
    from alexnet_cli.core.parallel.placement import place
    from alexnet_cli.core.runs.resolve import find_weights

    models = [read_model(find_weights(str(run.path.absolute()))) for run in pair]
    dataset = find_common_data(pair, data, "name one: alexnet runs A B --data D")
    images, placement = len(dataset.split("val")), place(None, "fp32")
    reporter.line("data", f"{dataset.path} · val · {images:,} images, center view · {placement.name} · fp32")
    with reporter.progress("val", images) as bar:
        return classify_pair(models, dataset, placement, bar.advance).summarize()


def _show_measured(reporter: Reporter, names: Sequence[str], measured: Mapping[str, Any]) -> None:
    first, second = map(make_printable, names)
    errors, (low, high) = measured["top1_error"], measured["difference_interval"]
    reporter.show(f"top-1   error {errors[0]:.1%} and {errors[1]:.1%} on the same {measured['images']:,} images")
    better = first if low > 0 else second if high < 0 else ""
    verdict = f"{better} is better" if better else "it may be chance"
    reporter.show(
        f"differ  {second} - {first} = {100 * measured['difference']:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}): {verdict}"
    )
    only = measured["only_right"]
    reporter.show(f"right   both {measured['both_right']:,} · only {first} {only[0]:,} · only {second} {only[1]:,}")
