"""The page that compares two runs: what differs in them, their curves, errors on the same images, and filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_cli.core.analysis import filter_picture
from alexnet_cli.core.analysis.units import read_images
from alexnet_cli.core.data.classes import make_names_unique
from alexnet_cli.core.evaluation.compare import PairedAnswers
from alexnet_cli.core.files import write_text
from alexnet_cli.core.intervals import PairedCounts, format_points, wilson_interval
from alexnet_cli.core.report import page, sections
from alexnet_cli.core.report.charts import INSTALL_HINT, can_draw, draw_comparison
from alexnet_cli.core.report.collect import EXAMPLES, Report, alternate_classes
from alexnet_cli.core.report.page import Section
from alexnet_cli.core.report.sections import MOST, Row, Values
from alexnet_cli.errors import storage_errors
from alexnet_cli.recipe import describe_setting

LONGEST_NAME = 24  # characters of a run's name in a chart
OTHER_CLASS = "a class that the data set lacks"


@dataclass(frozen=True)
class Comparison:
    """What the page shows of two runs. `missing` says why there are no answers for the same images."""

    reports: tuple[Report, Report]
    differences: Sequence[Mapping[str, Any]]
    answers: PairedAnswers | None
    missing: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """The names of the runs."""
        first, second = (page.make_printable(report.name) for report in self.reports)
        return first, second


def write_comparison(comparison: Comparison, path: Path) -> list[Section]:
    """Write the page atomically. Returns its sections.

    Raises:
        StorageError: the page cannot be written.
    """
    names, answers, charts = comparison.names, comparison.answers, []
    if can_draw():
        charts = draw_comparison(name_lines(names), [report.history for report in comparison.reports])
    shown = _list_sections(comparison, len(charts))
    text = page.render_template(
        "compare.html",
        title=f"AlexNet, run {names[0]} and run {names[1]}",
        lead=[_write_lead(answers, names)] if answers else [],
        remarks=[f"{report.name}: {text}" for report in comparison.reports for text in page.list_remarks(report)],
        facts=_list_facts(comparison),
        sections=shown,
        differences=_list_differences(comparison),
        results=_describe_answers(answers, names) if answers else None,
        curves=[sections.embed_chart(chart) for chart in charts],
        filters=_describe_filters(comparison),
        examples=_describe_examples(answers, names) if answers else [],
    )
    with storage_errors(path):
        write_text(path, text)
    return shown


def name_lines(names: tuple[str, str]) -> list[str]:
    """Names that fit into the legend of a chart, and differ."""
    half = LONGEST_NAME // 2
    short = [name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}" for name in names]
    return ["first run", "second run"] if short[0] == short[1] else [f"run {name}" for name in short]


def _list_sections(comparison: Comparison, charts: int) -> list[Section]:
    missing = f"Not compared on the same images: {comparison.missing}." if comparison.missing else ""
    no_curves = "" if can_draw() else f"Curves need a plotting library: {INSTALL_HINT}."
    unknown = [report.name for report in comparison.reports if not report.towers]
    return [
        Section(
            "differences", "What differs", "" if comparison.differences else "Recipe, data and versions are the same."
        ),
        Section("results", "Errors on the same images", missing),
        Section("examples", "Images that only one gets right", missing),
        Section("filters", "First-layer filters", f"No filters to show of {' and '.join(unknown)}." if unknown else ""),
        Section("curves", "Error, loss and learning rate", no_curves if not charts else ""),
    ]


def _write_lead(answers: PairedAnswers, names: tuple[str, str]) -> str:
    whole = answers.whole
    low, high = whole.interval
    images = f"the same {whole.images:,} validation images of {answers.data.name}"
    points = f"{100 * abs(whole.difference):.1f} points"
    if low <= 0 <= high:
        interval = f"95% interval {100 * low:+.1f} to {100 * high:+.1f}"
        return f"On {images}, the top-1 errors differ by {points}, which may be chance ({interval})."
    (lower, better), (higher, worse) = sorted(zip(whole.errors, names, strict=True))
    low, high = sorted((abs(low), abs(high)))
    return (
        f"{better} is better than {worse}: it gets {lower:.1%} of {images} wrong, not {higher:.1%} (top-1 error). "
        f"The difference is {points} (95% interval {100 * low:.1f} to {100 * high:.1f})."
    )


def _list_facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = []
    for name, report in zip(comparison.names, comparison.reports, strict=True):
        epochs = f", {len(report.history.epochs)} of {report.recipe.epochs} epochs" if report.is_trained else ""
        facts.append((f"Run {name}", f"recipe {report.recipe.name}{epochs}"))
    return facts


def _list_differences(comparison: Comparison) -> Values:
    rows, about = list[Row](), {}
    for difference in comparison.differences:
        key = str(difference["key"])
        values = (", ".join(map(str, v)) if isinstance(v, list) else v for v in difference["values"])
        rows.append((key, *map(sections.format_value, values)))
        kind, _, setting = key.partition(" ")
        about[key] = describe_setting(setting)[0] if kind == "recipe" and setting != "name" else ""
    return {"heads": ("", *comparison.names), "rows": rows, "about": about}


def _describe_answers(answers: PairedAnswers, names: tuple[str, str]) -> Values:
    """The errors, who is right, and the classes with the largest differences."""
    whole, classes = answers.whole, make_names_unique(answers.data.classes)
    errors = [
        (name, f"{error:.1%} ({low:.1%} to {high:.1%})")
        for name, error in zip(names, whole.errors, strict=True)
        for low, high in [wilson_interval(error, whole.images)]
    ]
    errors.append((f"{names[1]} minus {names[0]}, points", format_points(whole.difference, whole.interval)))
    neither = whole.images - whole.both - whole.only_first - whole.only_second
    agreement = [
        (who, f"{count:,}", f"{count / whole.images:.1%}")
        for who, count in (
            ("Both", whole.both), (f"Only {names[0]}", whole.only_first), (f"Only {names[1]}", whole.only_second),
            ("Neither", neither),
        )
    ]  # fmt: skip
    ranked = answers.list_classes()
    return {
        "errors": errors, "agreement": agreement,
        "heads": ("Class", "Images", *(f"Error of {name}" for name in names), f"{names[1]} minus {names[0]}, points"),
        "classes": [_class_row(classes[index], counts) for index, counts in ranked[:MOST]],
        "words": f"Positive: {names[1]} has more errors. The interval of a class is wide, and of {len(ranked)} classes "
        "about one in 20 misses 0 by chance.",
    }  # fmt: skip


def _class_row(name: str, counts: PairedCounts) -> Row:
    errors = [f"{error:.0%}" for error in counts.errors]
    return name, f"{counts.images:,}", *errors, format_points(counts.difference, counts.interval)


def _describe_filters(comparison: Comparison) -> Values:
    """The filters of each run that has any, one scale in each run, and how far color separates its towers."""
    runs, rows = [], list[Row]()
    for name, report in zip(comparison.names, comparison.reports, strict=True):
        measured = report.specialization
        if measured is None:
            continue
        limits = filter_picture.shared_limits(report.towers)
        numbered = enumerate(zip(report.towers, limits, strict=True), 1)
        towers = [sections.draw_tower(kernels, limit, number, measured.means) for number, (kernels, limit) in numbered]
        runs.append((name, towers))
        auc = interval = p_value = ""
        if measured.auc is not None and measured.interval is not None and measured.p_value is not None:
            auc, p_value = f"{measured.auc:.2f}", f"{measured.p_value:.4f}"
            interval = "{:.2f} to {:.2f}".format(*measured.interval)
        shares = ", ".join(f"{mean:.2f}" for mean in measured.means)
        rows.append((name, auc, interval, p_value, shares, sum(map(len, report.towers))))
    heads = ("Run", "AUC", "95% interval", "p", "Color share of each tower", "Filters")
    return {"runs": runs, "heads": heads, "rows": rows}


def _describe_examples(answers: PairedAnswers, names: tuple[str, str]) -> list[tuple[str, list[Values]]]:
    """For each run, images that it alone gets right, where the other one is surest of its mistake."""
    classes, shown = [*make_names_unique(answers.data.classes), OTHER_CLASS], []
    val, right = answers.data.split("val"), answers.right
    for winner, loser in ((0, 1), (1, 0)):
        rows = np.flatnonzero(right[winner] & ~right[loser])
        ranked = rows[np.argsort(-answers.probabilities[loser, rows], kind="stable")].tolist()
        chosen, images = alternate_classes(ranked, answers.labels), []
        for row, image in zip(chosen, read_images(val, chosen), strict=True):
            true, mistake = classes[answers.labels[row]], classes[answers.predicted[loser, row]]
            images.append({
                "uri": sections.encode_image(image), "alt": f"Image of {true}.",
                "caption": f"{true}, not {mistake} ({answers.probabilities[loser, row]:.0%})",
            })  # fmt: skip
        title = f"Only {names[winner]} is right: {len(rows):,} images"
        shown.append((title if len(rows) <= EXAMPLES else f"{title}, {len(images)} of them", images))
    return shown
