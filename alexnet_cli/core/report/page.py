"""A report as one HTML file that needs nothing beside it: no script, no font, no picture from elsewhere. No dates but
those of the run: the same run gives the same bytes.
"""

from __future__ import annotations

import shlex
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import alexnet_cli
from alexnet_cli.core.data.shards import ROOT
from alexnet_cli.core.evaluation import baselines, results
from alexnet_cli.core.files import write_text
from alexnet_cli.core.report import sections
from alexnet_cli.core.report.charts import INSTALL_HINT, can_draw, draw_charts
from alexnet_cli.core.report.collect import Report, make_names_unique
from alexnet_cli.core.report.history import get_number
from alexnet_cli.core.runs.records import failure
from alexnet_cli.core.runs.resolve import shorten_path
from alexnet_cli.errors import DataError, StorageError, UsageError

FILE = "report.html"
DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # the line around
INVISIBLE = frozenset(("Cc", "Cs"))  # controls and halves of characters
STATUS = {
    "running": "This run is under way, or was ended without a word: the page shows it as far as it has come.",
    "interrupted": "This run was interrupted ({reason}) and can be continued: alexnet train --resume {name}",
    "failed": "This run failed{told}. What it had reached until then is below.",
}


@dataclass(frozen=True)
class Section:
    """A section of the page; `note` says what is missing in it."""

    id: str
    title: str
    note: str = ""


def check_writable(path: Path) -> None:
    """Check that a page can be written there, before it is computed.

    Raises:
        UsageError: it is a folder.
        StorageError: its folder cannot be made or written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", f"name a file in it, such as -o {path / FILE}")
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_page(report: Report, path: Path) -> list[Section]:
    """Write the page, whole or not at all. Returns its sections.

    Raises:
        StorageError: it cannot be written.
    """
    text, shown = render_page(report)
    with _storage_errors(path):
        write_text(path, text)
    return shown


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", "choose another place with -o") from error


def render_page(report: Report) -> tuple[str, list[Section]]:
    """The page as HTML, and its sections."""
    charts = draw_charts(report.history, report.has_few_classes) if can_draw() else {}
    names = {
        "network": sections.describe_network(report, can_draw()),
        "recipe": sections.compare_recipe(report), "curves": sections.describe_curves(report, charts),
        "filters": sections.describe_filters(report, charts), "results": sections.describe_results(report),
        "examples": sections.describe_examples(report), "nearest": sections.describe_neighbors(report),
        "speed": _list_speed(report), "origin": _list_origin(report),
    }  # fmt: skip
    environment = Environment(
        loader=PackageLoader("alexnet_cli.core.report", "pages"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_make_printable,
    )  # fmt: skip
    style = Markup(environment.get_template("report.css").render())
    shown, title = list_sections(report), f"AlexNet, {'run' if report.is_trained else 'network'} {report.name}"
    text = environment.get_template("report.html").render(
        names, title=title, lead=_write_lead(report), remarks=_list_remarks(report), facts=_list_facts(report),
        sections=shown, style=style, version=alexnet_cli.__version__,
    )  # fmt: skip
    return text, shown


def list_sections(report: Report) -> list[Section]:
    """The sections that a page has: those of a training only if there was one."""
    history, missing = report.history, report.evidence.missing
    trained = report.is_trained
    unknown = "" if report.classes else "The number of classes is not known: no checkpoint yet, and no data set."
    found = [Section("network", "The network", unknown), Section("recipe", "The recipe beside the paper's")]
    if trained:
        none = "" if history.windows or history.epochs else "No step has been recorded yet."
        undrawn = "" if can_draw() or none else f"Curves need a plotting library: {INSTALL_HINT}, then alexnet report."
        found.append(Section("curves", "Loss and errors", none or undrawn))
    absent = "" if report.towers else "Layer 1 holds values that are no numbers."
    absent = absent if report.model else "The run has no checkpoint yet."
    found += [
        Section("filters", "Filters of the towers", absent),
        Section("results", "Classes and confusions", _explain_missing(missing.get("results"))),
        Section("examples", "Right and wrong pictures", _explain_missing(missing.get("examples"))),
        Section("neighbors", "Neighbors", _explain_missing(missing.get("neighbors"))),
    ]
    if trained:
        found.append(Section("speed", "Speed and placement"))
    if report.about:
        found.append(Section("origin", "To make it again"))
    return found


def _explain_missing(reason: str | None) -> str:
    return f"Not here: {reason}." if reason else ""


def _write_lead(report: Report) -> str:
    """One sentence with the error, or an empty string."""
    totals, best, few = report.evidence.totals, report.history.best, report.has_few_classes
    if totals:
        first, of = totals[0], _name_data(report.data.name if report.data else None)
        low, high = first["top1_error_interval"]
        guess = baselines.format_baselines(first["chance_error"], first["commonest_error"])
        five = "" if few else f", top-5 error {first['top5_error']:.1%}"
        return (
            f"Top-1 error {first['top1_error']:.1%} ({guess}; 95 % interval {low:.1%} to {high:.1%})"
            f"{five}, on the {first['images']:,} validation pictures{of}, "
            f"{results.PROTOCOL[first['views']]}.{_rate_result(report, first)}"
        )
    if best:
        five = "" if few or get_number(best, "top5_error") is None else f", top-5 error {best['top5_error']:.1%}"
        at = f"after epoch {best['epoch']}, on the validation pictures"
        error = f"Lowest top-1 error {best['top1_error']:.1%}{_compare_with_guessing(report)}{five}"
        return f"{error}, {at}{_name_data(report.about.get('data'))}."
    return ""


def _rate_result(report: Report, totals: Mapping[str, Any]) -> str:
    """A sentence if the error is no better than guessing or always the same class; else empty."""
    counts, names = report.evidence.counts, make_names_unique(report.classes)
    same = f" {said}." if counts and (said := baselines.describe_one_sided(counts.confusion, names)) else ""
    return (f" This is {said}." if (said := baselines.describe_totals(totals)) else "") + same


def _compare_with_guessing(report: Report) -> str:
    """The error of guessing on the run's own validation images, in brackets, if they are there."""
    with suppress(DataError):
        if report.data and report.is_own_data and len(labels := report.data.split("val").labels):
            of_each = baselines.count_images(labels, len(report.classes))
            guessing, majority = baselines.guessing_error(len(report.classes)), baselines.majority_error(of_each)
            return f" ({baselines.format_baselines(guessing, majority)})"
    return ""


def _name_data(data: Any) -> str:
    return f" of {data}" if data else ""


def _list_remarks(report: Report) -> list[str]:
    about = report.about
    what, hint = failure(about)
    said = STATUS.get(str(about.get("status")), "").format(
        reason=about.get("reason", "no reason told"), name=shlex.quote(report.name),
        told=(f": {what}" if what else "") + (f". What to do: {hint}" if hint else ""),
    )  # fmt: skip
    return [text for text in (said, _explain_missing(report.evidence.failed)) if text]


def _list_facts(report: Report) -> list[tuple[str, str]]:
    """Terms and values at the top of the page."""
    about, history, info = report.about, report.history, report.model.info if report.model else {}
    done, measured = len(history.epochs), report.data.name if report.data else ""
    begun = max(history.begun, int(get_number(info, "epoch") or 0)) if report.is_trained else 0
    progress = f"in epoch {begun}" if begun > done else str(done)
    time = _format_duration(history.seconds) if history.seconds else ""
    imported = about.get("imported")
    found = [
        ("Status", "imported" if imported else str(about.get("status", ""))),
        ("Data set", str(about.get("data") or measured)),
        ("Measured on", "" if report.is_own_data else measured),
        ("Classes", f"{len(report.classes):,}" if report.classes else ""),
        ("Epochs", f"{progress} of {report.recipe.epochs}" if report.is_trained else ""),
        ("Weights of", f"epoch {info['epoch']}, step {info['step']}" if "epoch" in info and "step" in info else ""),
        ("Parameters", f"{report.parameters / 1e6:,.2f} million" if report.parameters else ""),
        ("Towers", f"{report.recipe.towers}, width {report.recipe.width:g}"),
        ("Time of training", time),
    ]  # fmt: skip
    return [(term, text) for term, text in found if text]


def _list_speed(report: Report) -> list[tuple[str, str]]:
    about, history = report.about, report.history
    placement = about.get("placement")
    towers = placement.items() if isinstance(placement, dict) else ()
    found = [
        ("Images per second", f"{history.speed:,.0f} (the median)" if history.speed else ""),
        (
            "Time of all steps",
            f"{_format_duration(history.seconds)}, validation and pauses not counted" if history.seconds else "",
        ),
        ("Devices", ", ".join(_as_words(about.get("devices")))),
        *((f"Where {tower} was computed", str(place)) for tower, place in towers),
        ("Replicas", str(about.get("replicas") or "")),
        ("Arithmetic", str(about.get("precision") or "")),
        ("Batch", f"{report.recipe.batch_size:,} pictures"),
    ]
    return [(term, text) for term, text in found if text]


def _list_origin(report: Report) -> list[tuple[str, str]]:
    about = report.about
    versions, imported, resumed = about.get("versions"), about.get("imported"), about.get("resumed")
    later = [part.get("command") for part in (resumed if isinstance(resumed, list) else ()) if isinstance(part, dict)]
    found = [
        ("Command", shlex.join(_repeat_command(about))),
        *(("And then", shlex.join(_as_words(words))) for words in later),
        ("Started", str(about.get("started") or "")),
        ("Seed", str(about.get("seed", ""))),
        ("Data set, SHA-256", str(about.get("data_hash") or "")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""),
        *((f"Imported: {k}", str(v)) for k, v in (imported.items() if isinstance(imported, dict) else ()) if v),
    ]
    return [(term, text) for term, text in found if text]


def _repeat_command(about: Mapping[str, Any]) -> list[str]:
    """The command of the run, with --data also if the run chose the data set itself."""
    words, path = _as_words(about.get("command")), about.get("data_path")
    if not words or not isinstance(path, str) or any(word.partition("=")[0] == "--data" for word in words):
        return words
    data = Path(path)
    return [*words, "--data", data.name if data.parent.name == ROOT.name else str(shorten_path(data))]


def _as_words(found: Any) -> list[str]:
    """A value of run.json, which may be anything, as a list of words."""
    return list(map(str, found)) if isinstance(found, list) else [] if found is None else [str(found)]


def _format_duration(seconds: float) -> str:
    """For example 45 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _make_printable(value: Any) -> Any:
    """Names can hold anything: invisible characters and direction marks become question marks."""
    if isinstance(value, Markup):
        return value
    text = str(value)
    if text.isprintable():  # as most are, and the pictures, which are long
        return text
    return "".join("?" if c in DIRECTION_MARKS or unicodedata.category(c) in INVISIBLE else c for c in text)
