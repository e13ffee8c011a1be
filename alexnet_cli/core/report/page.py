"""Write a report as a single HTML file without scripts or external files. The same run gives the same bytes."""

from __future__ import annotations

import shlex
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import alexnet_cli
from alexnet_cli.core.data.shards import ROOT
from alexnet_cli.core.files import write_text
from alexnet_cli.core.report import sections
from alexnet_cli.core.report.charts import INSTALL_HINT, can_draw, draw_charts
from alexnet_cli.core.report.collect import Report
from alexnet_cli.core.report.history import get_number
from alexnet_cli.core.report.summary import summarize_report
from alexnet_cli.core.runs.records import get_failure
from alexnet_cli.core.runs.resolve import shorten_path
from alexnet_cli.errors import UsageError, storage_errors

FILE = "report.html"
DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder the line
INVISIBLE = frozenset(("Cc", "Cs"))  # Unicode categories: controls, surrogates
STATUS = {
    "running": "This run is still training, or was killed. The page shows its records so far.",
    "interrupted": "This run was interrupted ({reason}). Continue it with: alexnet train --resume {name}",
    "failed": "This run failed{error}. The page shows its records up to then.",
}


@dataclass(frozen=True)
class Section:
    """A section of the page. `note` says what is missing in it."""

    id: str
    title: str
    note: str = ""


def check_writable(path: Path) -> None:
    """Check that a page can be written to `path`, before computing it.

    Raises:
        UsageError: `path` is a folder.
        StorageError: its folder cannot be created or written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", f"name a file in it, such as -o {path / FILE}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_page(report: Report, path: Path) -> list[Section]:
    """Write the page atomically. Returns its sections.

    Raises:
        StorageError: the page cannot be written.
    """
    text, shown = render_page(report)
    with storage_errors(path):
        write_text(path, text)
    return shown


def render_page(report: Report) -> tuple[str, list[Section]]:
    """Return the page as HTML, and its sections."""
    charts = draw_charts(report.history, report.has_few_classes) if can_draw() else {}
    shown = list_sections(report)
    text = render_template(
        "report.html",
        title=f"AlexNet, {'run' if report.is_trained else 'network'} {report.name}",
        lead=summarize_report(report),
        remarks=list_remarks(report),
        facts=_list_facts(report),
        sections=shown,
        network=sections.describe_network(report, can_draw()),
        recipe=sections.compare_recipe(report),
        curves=sections.describe_curves(report, charts),
        filters=sections.describe_filters(report, charts),
        results=sections.describe_results(report),
        towers=sections.describe_towers(report),
        examples=sections.describe_examples(report),
        neighbors=sections.describe_neighbors(report),
        speed=_list_speed(report),
        origin=_list_origin(report),
    )
    return text, shown


def render_template(name: str, **values: Any) -> str:
    """Fill in a template of pages/; all values are escaped."""
    environment = Environment(
        loader=PackageLoader("alexnet_cli.core.report", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=make_printable,
    )
    style = Markup(environment.get_template("report.css").render())
    return environment.get_template(name).render(style=style, version=alexnet_cli.__version__, **values)


def list_sections(report: Report) -> list[Section]:
    """The sections of the page, what most readers look for first; some belong to training runs only."""
    missing = report.measurements.missing
    filters = "" if report.towers else "Layer 1 has weights that are NaN or infinite."
    listed = [
        Section("filters", "First-layer filters", filters if report.model else "The run has no checkpoint yet."),
        Section("towers", "What each tower does", _explain_missing_towers(report)),
        Section("results", "Errors and confusions", _explain_missing(missing.get("results"))),
        Section("examples", "Correct and wrong predictions", _explain_missing(missing.get("examples"))),
        Section("neighbors", "Nearest training images", _explain_missing(missing.get("neighbors"))),
    ]
    if report.is_trained:
        listed.append(Section("curves", "Loss, error and learning rate", _explain_missing_curves(report)))
    listed += [
        Section("network", "The network", "" if report.classes else "The number of classes is not known yet."),
        Section("recipe", "Recipe, compared with the paper"),
    ]
    if report.is_trained:
        listed.append(Section("speed", "Speed and devices"))
    if report.about:
        listed.append(Section("origin", "How to repeat this run"))
    return listed


def _explain_missing_curves(report: Report) -> str:
    if not report.history.windows and not report.history.epochs:
        return "No step has been recorded yet."
    return "" if can_draw() else f"Curves need a plotting library: {INSTALL_HINT}, then alexnet report."


def _explain_missing_towers(report: Report) -> str:
    if report.model and report.model.recipe.towers == 1:
        return "The network has a single tower: there is none to switch off."
    return _explain_missing(report.measurements.missing.get("towers"))


def _explain_missing(reason: str | None) -> str:
    return f"Missing: {reason}." if reason else ""


def list_remarks(report: Report) -> list[str]:
    """What the reader should know first: that the run is not finished, or the page not complete."""
    about, failed = report.about, report.measurements.failed
    error, hint = get_failure(about)
    status = STATUS.get(str(about.get("status")), "").format(
        reason=about.get("reason", "reason unknown"),
        name=shlex.quote(report.name),
        error=(f": {error}" if error else "") + (f". Hint: {hint}" if hint else ""),
    )
    return [text for text in (status, f"This page is not complete: {failed}." if failed else "") if text]


def _list_facts(report: Report) -> list[tuple[str, str]]:
    """Terms and values at the top of the page."""
    about, history, info = report.about, report.history, report.model.info if report.model else {}
    begun, done = max(history.begun, int(get_number(info, "epoch") or 0)), len(history.epochs)
    progress = f"in epoch {begun}" if begun > done else str(done)
    measured_on = report.data.name if report.data else ""
    return _drop_empty([
        ("Status", "imported" if about.get("imported") else about.get("status")),
        ("Data set", about.get("data") or measured_on),
        ("Measured on", "" if report.is_own_data else measured_on),
        ("Classes", f"{len(report.classes):,}" if report.classes else ""),
        ("Epochs", f"{progress} of {report.recipe.epochs}" if report.is_trained else ""),
        ("Checkpoint", f"epoch {info['epoch']}, step {info['step']}" if "epoch" in info and "step" in info else ""),
        ("Parameters", f"{report.parameters / 1e6:,.2f} million" if report.parameters else ""),
        ("Towers", f"{report.recipe.towers}, {report.recipe.width:.0%} of the paper's width"),
        ("Training time", _format_duration(history.seconds)),
    ])  # fmt: skip


def _drop_empty(rows: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """The rows that have a value, as text."""
    return [(term, str(value)) for term, value in rows if value is not None and value != ""]


def _list_speed(report: Report) -> list[tuple[str, str]]:
    about, history = report.about, report.history
    placement, time = _as_dict(about.get("placement")), _format_duration(history.seconds)
    return _drop_empty([
        ("Images per second", f"{history.speed:,.0f} (median)" if history.speed else ""),
        ("Training time", f"{time}, without validation and pauses" if time else ""),
        ("Devices", ", ".join(_as_words(about.get("devices")))),
        *(
            (f"Device of {tower}", place)
            for tower, place in placement.items()
            if len(set(map(str, placement.values()))) > 1
        ),
        ("Replicas", about.get("replicas") if about.get("replicas") != 1 else ""),
        ("Precision", _describe_precision(report)),
        ("Batch size", f"{report.recipe.batch_size:,} images"),
    ])  # fmt: skip


def _describe_precision(report: Report) -> str:
    """The precision of the training, and that of the recipe if it differs, as on a device that lacks it."""
    recipe_precision = report.recipe.precision
    differs = report.precision not in ("", recipe_precision)
    return report.precision + (f" (recipe: {recipe_precision})" if differs else "")


def _list_origin(report: Report) -> list[tuple[str, str]]:
    about = report.about
    resumed = about.get("resumed")
    commands = [
        part.get("command") for part in (resumed if isinstance(resumed, list) else ()) if isinstance(part, dict)
    ]
    return _drop_empty([
        ("Command", shlex.join(_repeat_command(about))),
        *(("Then", shlex.join(_as_words(command))) for command in commands),
        ("Started", about.get("started")),
        ("Seed", about.get("seed")),
        ("Data set, SHA-256", about.get("data_hash")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in _as_dict(about.get("versions")).items())),
        *((f"Imported: {key}", value) for key, value in _as_dict(about.get("imported")).items() if value),
    ])  # fmt: skip


def _repeat_command(about: Mapping[str, Any]) -> list[str]:
    """The command of the run, with --data even if the run chose the data set itself."""
    words, path = _as_words(about.get("command")), about.get("data_path")
    if not words or not isinstance(path, str) or any(word.partition("=")[0] == "--data" for word in words):
        return words
    data = Path(path)
    return [*words, "--data", data.name if data.parent.name == ROOT.name else str(shorten_path(data))]


def _as_dict(value: Any) -> dict[str, Any]:
    """A value of run.json if it is an object, else nothing."""
    return value if isinstance(value, dict) else {}


def _as_words(value: Any) -> list[str]:
    """A value of run.json, which may be anything, as a list of words."""
    if isinstance(value, list):
        return [str(word) for word in value]
    return [] if value is None else [str(value)]


def _format_duration(seconds: float | None) -> str:
    """For example 45 s, 3 min 20 s, 5 h 12 min; empty if unknown."""
    if not seconds:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def make_printable(value: Any) -> Any:
    """Replace invisible characters and direction marks, which names may contain, by question marks."""
    if isinstance(value, Markup):
        return value
    text = str(value)
    if text.isprintable():  # fast, which matters for embedded images
        return text
    return "".join("?" if c in DIRECTION_MARKS or unicodedata.category(c) in INVISIBLE else c for c in text)
