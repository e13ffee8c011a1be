"""An ablation as a picture: what each switch costs, and the paper's figure 1. Needs the extra `charts`; no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alexnet_cli.core.comparison import WINDOW, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 3  # times the largest value: intervals that are longer run out of the picture
OURS, PAPERS = "#0b5394", "#b45f06"
LINES = {"relu": ("#0b5394", "solid"), "tanh": ("#b45f06", "dashed"), "sigmoid": ("#38761d", "dotted")}


def draw(rows: Sequence[Row], title: str, error: float) -> bytes:
    """A PNG: left the differences from the base in points, right the training errors of the activations, if there are
    two or more to compare.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and asks for a display

    compared = [row for row in rows if row.top1_difference]
    activations = [row for row in rows if row.activation and any(row.curves)]
    panels = 2 if len(activations) > 1 else 1
    figure = Figure(figsize=(1 + 5.5 * panels, 1.8 + 0.42 * max(6, len(compared))), dpi=130, layout="constrained")
    figure.suptitle(title)
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    _differences(left, compared)
    for axes in right:
        _speeds(axes, activations, error)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _differences(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axvline(0, color="grey", linewidth=1)
    for height, row in enumerate(rows):
        found = row.top1_difference
        if found is None:
            continue
        axes.plot([100 * v for v in found.values], [height] * len(found.values), ".", color=OURS, alpha=0.5)
        axes.errorbar(100 * found.mean, height, xerr=100 * (found.half or 0), fmt="o", color=OURS, capsize=3)
        if row.switch.top1 is not None:
            axes.plot(100 * row.switch.top1, height, "D", mfc="none", color=PAPERS)
    drawn = [v for row in rows if row.top1_difference for v in (*row.top1_difference.values, row.switch.top1 or 0)]
    low, high = axes.get_xlim()
    most = WIDEST * 100 * max([0.01, *map(abs, drawn)])  # two seeds make intervals beside which all else is a point
    axes.set_xlim(max(low, -most), min(high, most))
    intervals = any(row.top1_difference and row.top1_difference.half is not None for row in rows)
    ours = "here, with the 95 % interval over seeds" if intervals else "here, one seed"
    axes.plot([], [], "o", color=OURS, label=ours)
    axes.plot([], [], "D", mfc="none", color=PAPERS, label="the paper, on ILSVRC")
    axes.set_yticks(range(len(rows)), [row.switch.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 error beyond that of the base, points")
    axes.set_title("What it costs to switch it off")
    axes.legend(loc="best", fontsize="small")


def _speeds(axes: Axes, rows: Sequence[Row], error: float) -> None:
    for row in rows:
        colour, style = LINES[str(row.activation)]
        for number, curve in enumerate(row.curves):
            percent = [100 * e for _, e in curve]
            axes.plot(
                [step for step, _ in curve],
                percent,
                color=colour,
                linestyle=style,
                label=None if number else row.activation,
            )
    axes.axhline(100 * error, color="grey", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training error over the last {WINDOW} steps, %")
    axes.set_title("How fast each activation learns (the paper's figure 1)")
    axes.legend(fontsize="small")
