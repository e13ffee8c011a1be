"""The drawings of a report as SVG, each with the text that says the same: curves, and the network. No torch.

Drawing needs matplotlib, the extra `charts`, which is imported in functions only.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_cli.core.model.architecture import describe_kernel
from alexnet_cli.core.report.history import Curve, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alexnet_cli.core.model.architecture import LayerSpec, Step
    from alexnet_cli.recipe import Recipe

INSTALL_HINT = "pip install 'alexnet-cli[charts]'"
CHANCE = 2 / 3  # color share of independent random weights
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


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


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


def draw_charts(history: History, few_classes: bool = False) -> dict[str, Chart]:
    """`loss`, `errors`, `rate` and `towers`, as far as there is something to draw; of few classes no top-5 error."""
    top5 = [] if few_classes else [Line("top-5, validation", history.epoch_curve("top5_error"))]
    drawn = {
        "loss": _draw_curves(
            "Loss", "nats a picture", history,
            [Line("training", history.step_curve("loss"), False), Line("validation", history.epoch_curve("loss"))],
        ),
        "errors": _draw_curves(
            "Error", "% of the pictures", history,
            [
                Line("top-1, training", history.step_curve("top1_error"), False),
                Line("top-1, validation", history.epoch_curve("top1_error")), *top5,
            ], percent=True,
        ),
        "rate": _draw_curves(
            "Learning rate", "rate", history,
            [Line("rate", history.rate_curve(), False, bool(history.drops))], log=True,
        ),
        "towers": _draw_curves(
            "Specialization", "share, and area under the curve", history,
            [
                Line("told apart by color (AUC)", history.epoch_curve("specialization")),
                Line("color share, tower 1", history.epoch_curve("chroma_tower1")),
                Line("color share, tower 2", history.epoch_curve("chroma_tower2")),
            ], level=(CHANCE, "color share of noise"),
        ),
    }  # fmt: skip
    return {name: chart for name, chart in drawn.items() if chart}


def _draw_curves(
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

    words = "; ".join(_describe_line(line, factor, "%" if percent else "") for line, _ in told)
    drops = ", ".join(str(drop) for drop in history.drops)
    caption = f"{title} over the epochs" + (f"; the rate was divided after epoch {drops}" if drops else "")
    return Chart(
        render_svg(draw),
        f"{title} over the epochs: {words}." + (f" Rate drops after epoch {drops}." if drops else ""),
        caption,
    )


def _describe_line(line: Line, factor: float, unit: str) -> str:
    first, last = line.points[0][1], line.points[-1][1]
    lowest = min(value for _, value in line.points)
    ends = f"{line.name} from {factor * first:.3g}{unit} to {factor * last:.3g}{unit}"
    return ends + (f", lowest {factor * lowest:.3g}{unit}" if lowest < min(first, last) else "")


def render_svg(draw: Callable[[Axes], None], height: float = 3.5, margin: float = 1.0) -> str:
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


# Figure 2 of the paper, simplified: the towers, and arrows from what each layer sees.

TINTS = ("#dfeaf4", "#f7e8d8")  # of the towers
GRAY, LIGHT = "#55565c", "#f4f5f8"
TEXT, SMALL = 9.5, 8  # points
HEIGHT = 0.5  # of a box; a layer is 1
NARROWEST, WIDER = 0.135, 0.035  # half of a box's width, and what many units add, in widths of the drawing
MIDDLE, PLACES = 0.64, (0.46, 0.82)  # of what is not in towers, and of the two
Box = tuple[float, float]
"""The middle of a box: x, and the number of its layer, from 0 for the picture."""


def draw_network(recipe: Recipe, specs: Sequence[LayerSpec]) -> Chart:
    """The network (figure 2 of the paper), from the image down to the classes."""
    towers, side = recipe.towers, recipe.input_size

    def draw(axes: Axes) -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(len(specs) + 0.4, -0.4)
        axes.axis("off")
        above = _draw_boxes(axes, 0, (MIDDLE,), f"3 colors {side}×{side}", 2**13, colored=False)
        for number, spec in enumerate(specs, 1):
            last = number == len(specs)
            places = (MIDDLE,) if towers == 1 or last else PLACES
            words = f"{spec.maps:,} classes" if last else _describe_size(spec)
            boxes = _draw_boxes(axes, number, places, words, spec.maps, colored=not last)
            _draw_arrows(axes, above, boxes, spec.sees_both)
            _write_name(axes, number, recipe, spec)
            above = boxes

    caption = "From the picture to its class; arrows come from what a layer sees"
    return Chart(render_svg(draw, 6.0, 0), _describe_network(specs, towers, side), caption)


def _describe_network(specs: Sequence[LayerSpec], towers: int, side: int) -> str:
    """The same in words."""
    meeting = [spec.name for spec in specs if spec.sees_both]
    sees = f"; each layer sees its own tower, but {', '.join(meeting[:-1])} and {meeting[-1]} both" if meeting else ""
    kind, each = ("two towers side by side", " in each") if towers > 1 else ("one tower", "")
    sizes = ", ".join(f"{spec.name} {_describe_size(spec)}" for spec in specs[:-1])
    start = f"The network, {kind}: an image of {side} by {side} pixels"
    return f"{start}, then{each} {sizes}, and fc8 {specs[-1].maps:,} classes{sees}."


def _describe_size(spec: LayerSpec) -> str:
    return f"{spec.maps:,} maps {spec.side}×{spec.side}" if spec.is_conv else f"{spec.maps:,} units"


def _draw_boxes(
    axes: Axes, number: int, places: Sequence[float], words: str, units: int, colored: bool = True
) -> list[Box]:
    """Boxes of one layer side by side, wider for more units."""
    from matplotlib.patches import Rectangle

    half = NARROWEST + WIDER * min(1.0, units.bit_length() / 13)
    for tower, x in enumerate(places):
        face, edge = (TINTS[tower], INKS[tower]) if colored else (LIGHT, GRAY)
        corner, size = (x - half, number - HEIGHT / 2), (2 * half, HEIGHT)
        axes.add_patch(Rectangle(corner, *size, facecolor=face, edgecolor=edge, linewidth=1.2, zorder=2))
        axes.text(x, number, words, ha="center", va="center", fontsize=TEXT, zorder=3)
    return [(x, number) for x in places]


def _draw_arrows(axes: Axes, above: Sequence[Box], boxes: Sequence[Box], meets: bool) -> None:
    """From what a layer sees; dotted where that is the other tower."""
    for from_x, from_y in above:
        for x, y in boxes:
            crosses = len(above) == len(boxes) == 2 and from_x != x
            if crosses and not meets:
                continue
            start, end = (from_x, from_y + HEIGHT / 2), (x, y - HEIGHT / 2)
            arrow = {"arrowstyle": "-|>", "color": GRAY, "shrinkA": 0, "shrinkB": 0, "lw": 1.0}
            axes.annotate("", end, start, arrowprops=arrow | ({"linestyle": (0, (3, 2))} if crosses else {}))


def _write_name(axes: Axes, number: int, recipe: Recipe, spec: LayerSpec) -> None:
    """Name, kernel and following steps, left of the boxes."""
    short: dict[Step, str] = {"activation": recipe.activation, "within-norm": "norm"}
    steps = ", ".join(dict.fromkeys(short.get(step, step) for step in spec.then)) or "softmax"
    title = f"{spec.name}  {describe_kernel(spec)}".rstrip()
    axes.text(0, number - 0.03, title, va="bottom", fontsize=TEXT, fontweight="bold")
    axes.text(0, number + 0.03, steps, va="top", fontsize=SMALL, color=GRAY)
