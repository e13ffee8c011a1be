"""The sentences at the top of a report: how good the network is, what its towers do, if that is as in the paper.

What has not been measured, or is not certain, is left out.
"""

from __future__ import annotations

from contextlib import suppress

from alexnet_cli.core.evaluation import baselines, results
from alexnet_cli.core.report.charts import join_names
from alexnet_cli.core.report.collect import Report
from alexnet_cli.core.report.history import get_number
from alexnet_cli.errors import DataError

MOST_NAMES = 3  # classes named for a tower
PAPER_ERROR = "The paper's network got 37.5% of ILSVRC-2010 wrong: 1,000 classes, 60 million parameters."


def summarize_report(report: Report) -> list[str]:
    """Return the paragraphs."""
    towers = f"{_describe_color(report)} {_describe_needs(report)}".strip()
    return [text for text in (_describe_error(report), towers, _compare_with_paper(report)) if text]


def _describe_error(report: Report) -> str:
    totals, best, name = report.measurements.totals, report.history.best, report.about.get("data")
    if totals:
        name = report.data.name if report.data else name
        start, images = "The network", f"the {totals['images']:,} validation images"
        guessing = baselines.format_baselines(totals["chance_error"], totals["commonest_error"])
    elif best:
        totals, start, images = best, f"After its best epoch ({best['epoch']}), the network", "the validation images"
        guessing = _format_guessing(report)
    else:
        return ""
    text = f"{start} gets {totals['top1_error']:.1%} of {images}{f' of {name}' if name else ''} wrong"
    views = results.name_views(totals.get("views", 1))
    text += f" (top-1 error, {views}{f'; {guessing}' if guessing else ''})."
    top5 = get_number(totals, "top5_error")
    if top5 is not None and not report.has_few_classes:
        text += f" For {top5:.1%}, the right class is not among the five most probable ones (top-5 error)."
    return text + _rate_error(report)


def _format_guessing(report: Report) -> str:
    """The error of guessing on the run's own validation images, if they are there."""
    with suppress(DataError):
        if report.data and report.is_own_data and len(labels := report.data.split("val").labels):
            counts = baselines.count_images(labels, len(report.classes))
            guessing, majority = baselines.guessing_error(len(report.classes)), baselines.majority_error(counts)
            return baselines.format_baselines(guessing, majority)
    return ""


def _rate_error(report: Report) -> str:
    """Sentences that say if the error is no better than guessing, or the answers are nearly all one class."""
    totals, counts = report.measurements.totals, report.measurements.counts
    if totals is None or counts is None:
        return ""
    remarks = baselines.describe_totals(totals), baselines.describe_one_sided(counts.confusion, report.class_names)
    return (f" This is {remarks[0]}." if remarks[0] else "") + (f" {remarks[1]}." if remarks[1] else "")


def _describe_color(report: Report) -> str:
    """Which tower has the color, if the filters are trained and the difference is no chance."""
    measured = report.specialization
    if measured is None or measured.undertrained or not measured.is_significant:
        return ""
    (gray, less), (color, more) = sorted(enumerate(measured.means, 1), key=lambda tower: tower[1])
    return (
        f"Tower {color} has more color in its first-layer filters than tower {gray}: "
        f"a color share of {more:.2f} against {less:.2f} (0 is only light and dark, 1 only color)."
    )


def _describe_needs(report: Report) -> str:
    """Which classes need which tower, if each tower alone is better than guessing."""
    table = report.measurements.towers
    if table is None:
        return ""
    texts = list[str]()
    for tower in (1, 2):
        needs = table.list_needs(tower)[:MOST_NAMES]
        names = [report.class_names[need.index] for need in needs]
        if names:
            texts.append(f"tower {tower} {'' if texts else 'matters more '}for {join_names(names)}")
    text = ", ".join(texts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _compare_with_paper(report: Report) -> str:
    measured = report.specialization
    if measured is None or measured.p_value is None:
        return ""
    if measured.undertrained:
        return "The first-layer filters still look like their random initial values: it is too early to compare them."
    if measured.is_significant:
        return f"{PAPER_ERROR} There, one tower learned color in every run, as here; one run does not settle it."
    return f"{PAPER_ERROR} There, one tower learned color in every run; here, they differ by no more than chance."
