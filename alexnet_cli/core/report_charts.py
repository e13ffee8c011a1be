"""The curves of a report as SVG, each with the text that says the same. Needs the extra `charts`; no torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_cli.core.history import Curve, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHANCE = 2 / 3  # colour share of independent random weights
FEW_POINTS = 30  # that can be marked without covering their line
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay text: small, sharp, and in the font of the page
    "svg.hashsalt": "alexnet",  # else every drawing would have other names inside
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
INKS = ("#0b5394", "#b45f06", "#38761d")  # each at least 4.5 : 1 on white
LINES = ("solid", "dashed", "dashdot")  # for those who do not tell them apart


class Chart(NamedTuple):
    """A drawing, what it says for those who do not see it, and its caption."""

    svg: str
    alt: str
    caption: str


class Line(NamedTuple):
    """A curve with its name, and whether its values are marked one by one."""

    name: str
    points: Curve
    marked: bool = True
    constant: bool = False
    """Whether each value holds since the one before it, as the rate of a schedule does."""


def charts(history: History, few_classes: bool = False) -> dict[str, Chart]:
    """`loss`, `errors`, `rate` and `towers`, as far as there is something to draw; of few classes no top-5 error."""
    top5 = [] if few_classes else [Line("top-5, validation", history.curve("top5_error"))]
    drawn = {
        "loss": _curves(
            "Loss", "nats a picture", history,
            [Line("training", history.steps("loss"), False), Line("validation", history.curve("loss"))],
        ),
        "errors": _curves(
            "Error", "% of the pictures", history,
            [
                Line("top-1, training", history.steps("top1_error"), False),
                Line("top-1, validation", history.curve("top1_error")), *top5,
            ], percent=True,
        ),
        "rate": _curves(
            "Learning rate", "rate", history, [Line("rate", history.rates(), False, bool(history.drops))], log=True,
        ),
        "towers": _curves(
            "Specialisation", "share, and area under the curve", history,
            [
                Line("told apart by colour (AUC)", history.curve("specialisation")),
                Line("colour share, tower 1", history.curve("chroma_tower1")),
                Line("colour share, tower 2", history.curve("chroma_tower2")),
            ], level=(CHANCE, "colour share of noise"),
        ),
    }  # fmt: skip
    return {name: chart for name, chart in drawn.items() if chart}


def _curves(
    title: str,
    unit: str,
    history: History,
    lines: Sequence[Line],
    percent: bool = False,
    log: bool = False,
    level: tuple[float, str] | None = None,
) -> Chart | None:
    """The lines over the epochs, the drops of the rate marked; None where there is nothing to draw, as of one rate."""
    told = [(line, look) for line, look in zip(lines, zip(INKS, LINES, strict=True), strict=False) if line.points]
    if not told or (log and max(len(line.points) for line, _ in told) == 1):
        return None
    factor = 100 if percent else 1

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for line, (ink, style) in told:
            marker = "o" if len(line.points) == 1 or (line.marked and len(line.points) <= FEW_POINTS) else None
            steps = "steps-pre" if line.constant else "default"
            places, values = [at for at, _ in line.points], [factor * value for _, value in line.points]
            axes.plot(places, values, color=ink, linestyle=style, marker=marker, ms=4, ds=steps, label=line.name)
        for number, drop in enumerate(history.drops):
            axes.axvline(drop, color="#555555", linestyle="dotted", label=None if number else "rate drops")
        if level:
            axes.axhline(level[0], color="#555555", linewidth=0.8, label=level[1])
        if log and min(value for line, _ in told for _, value in line.points) > 0:
            axes.set_yscale("log")
        elif not level:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_ylabel(unit)
        if len(told) > 1 or history.drops:
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.46, -0.17), ncols=2)

    words = "; ".join(_told(line, factor, "%" if percent else "") for line, _ in told)
    drops = ", ".join(str(drop) for drop in history.drops)
    caption = f"{title} over the epochs" + (f"; the rate was divided after epoch {drops}" if drops else "")
    return Chart(
        svg(draw),
        f"{title} over the epochs: {words}." + (f" Rate drops after epoch {drops}." if drops else ""),
        caption,
    )


def _told(line: Line, factor: float, unit: str) -> str:
    first, last = line.points[0][1], line.points[-1][1]
    lowest = min(value for _, value in line.points)
    ends = f"{line.name} from {factor * first:.3g}{unit} to {factor * last:.3g}{unit}"
    return ends + (f", lowest {factor * lowest:.3g}{unit}" if lowest < min(first, last) else "")


def svg(draw: Callable[[Axes], None], height: float = 3.5, margin: float = 1.0) -> str:
    """A drawing `height` inches high; `margin` is the share of the usual one, for axes. Same input, same bytes."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and asks for a display

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, height))
        left, bottom, rest = 0.14 * margin, 0.29 * margin, 0.03 * margin
        figure.subplots_adjust(left=left, right=1 - rest, top=1 - rest, bottom=bottom)  # a layout engine draws it twice
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
