"""Charts of the report as SVG: curves of a training, and the network. No torch.

Drawing needs matplotlib (the extra `charts`), which only functions import.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_cli.core.drawing import use_own_style
from alexnet_cli.core.model.architecture import describe_kernel
from alexnet_cli.core.report.history import Curve, History, describe_drops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alexnet_cli.core.model.architecture import LayerSpec, Step
    from alexnet_cli.recipe import Recipe

INSTALL_HINT = "pip install 'alexnet-cli[charts]'"
CHANCE = 2 / 3  # color share of independent random weights
AUC_NOTE = " An AUC of 0.5 is chance; at 1, every filter of one tower has more color than every one of the other."
FEW_POINTS = 30  # with at most this many points, a curve has markers
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller and sharper
    "svg.hashsalt": "alexnet",  # the same ids in every drawing
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.facecolor": "none",  # the page's color, light or dark
    "axes.facecolor": "none",
}
INKS = ("#0b5394", "#b45f06", "#38761d")  # each at least 4.5 : 1 on white
DROP_COLOR = "#555555"
LINES = ("solid", "dashed", "dashdot")  # for readers who cannot tell the colors apart


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


class Chart(NamedTuple):
    """A drawing, its text alternative, the one thing to see in it, and the rest of its caption."""

    svg: str
    alt: str
    point: str
    caption: str


class Line(NamedTuple):
    """A curve with its name."""

    name: str
    points: Curve
    has_markers: bool = True
    is_stepped: bool = False
    """Whether a value holds since the point before, as a scheduled learning rate does."""


def draw_charts(history: History, few_classes: bool = False) -> dict[str, Chart]:
    """Draw `loss`, `errors`, `rate` and `towers`, if they have data. With few classes the top-5 error is left out."""
    errors = [
        Line("training top-1", history.step_curve("top1_error"), has_markers=False),
        Line("validation top-1", history.epoch_curve("top1_error")),
    ]
    if not few_classes:
        errors.append(Line("validation top-5", history.epoch_curve("top5_error")))
    loss = [
        Line("training", history.step_curve("loss"), has_markers=False),
        Line("validation", history.epoch_curve("loss")),
    ]
    rate = [Line("learning rate", history.rate_curve(), has_markers=False, is_stepped=bool(history.drops))]
    towers = [
        Line("AUC", history.epoch_curve("specialization")),
        Line("color share, tower 1", history.epoch_curve("chroma_tower1")),
        Line("color share, tower 2", history.epoch_curve("chroma_tower2")),
    ]
    loss_point = _describe_lowest("Validation loss", loss[1].points, ".3f")
    error_point = _describe_lowest("Validation error (center view)", errors[1].points, ".1%")
    rate_point = _describe_rate(rate[0].points, history.drops)
    drops = history.drops
    drawn = {
        "loss": _draw_curves(loss_point, "Loss", "nats per image", loss, ".3f", drops),
        "errors": _draw_curves(error_point, "Error", "% of images", errors, ".1%", drops),
        "rate": _draw_curves(rate_point, "Learning rate", "", rate, ".3g", drops, is_log=True),
        "towers": _draw_curves(
            _describe_separation(towers), "Specialization of the towers", "AUC, color share", towers, ".2f", drops,
            level=(CHANCE, "color share of noise"), note=AUC_NOTE if towers[0].points else "",
        ),
    }  # fmt: skip
    return {name: chart for name, chart in drawn.items() if chart}


def draw_comparison(names: Sequence[str], histories: Sequence[History]) -> list[Chart]:
    """Draw the validation errors, training losses, learning rates and AUCs of several trainings, if they have any."""

    def trace(read_curve: Callable[[History], Curve], has_markers: bool = False) -> list[Line]:
        return [Line(name, read_curve(history), has_markers) for name, history in zip(names, histories, strict=True)]

    errors = trace(lambda history: history.epoch_curve("top1_error"), has_markers=True)
    losses = trace(lambda history: history.step_curve("loss"))
    rates = trace(History.rate_curve)
    auc = trace(lambda history: history.epoch_curve("specialization"), has_markers=True)
    error_point = _compare_lines("Lowest validation error", errors, min, ".1%")
    loss_point = _compare_lines("Lowest training loss", losses, min, ".3f")
    rate_point = _compare_lines("Highest learning rate", rates, max, ".3g")
    auc_point = _compare_lines("AUC at the end", auc, lambda values: values[-1], ".2f")
    drawn = (
        _draw_curves(error_point, "Validation error", "% of images", errors, ".1%"),
        _draw_curves(loss_point, "Training loss", "nats per image", losses, ".3f"),
        _draw_curves(rate_point, "Learning rate", "", rates, ".3g", is_log=True),
        _draw_curves(auc_point, "Color separates the towers", "AUC", auc, ".2f", level=(0.5, "chance")),
    )
    return [chart for chart in drawn if chart]


def _compare_lines(what: str, lines: Sequence[Line], choose: Callable[[list[float]], float], form: str) -> str:
    """For example "Lowest validation error: 26.8% in one, 30.1% in two."."""
    chosen = [(line.name, choose([value for _, value in line.points])) for line in lines if line.points]
    return f"{what}: {', '.join(f'{value:{form}} in {name}' for name, value in chosen)}."


def _describe_lowest(what: str, points: Curve, form: str) -> str:
    """Say when a curve over the epochs was lowest: "Validation error stopped falling at epoch 12: 26.8%."."""
    if not points:
        return "No epoch has been validated yet."
    epoch, lowest = min(points, key=lambda point: point[1])
    value = format(lowest, form)
    if len(points) == 1:
        return f"{what} is {value} after epoch {epoch:g}."
    if epoch == points[-1][0]:
        return f"{what} is at its lowest after epoch {epoch:g}: {value}."
    if epoch == points[0][0]:
        return f"{what} never fell below that of epoch {epoch:g}: {value}."
    return f"{what} stopped falling at epoch {epoch:g}: {value}."


def _describe_rate(points: Curve, drops: Sequence[int]) -> str:
    if not points:
        return ""
    first, last = points[0][1], points[-1][1]
    epoch, peak = max(points, key=lambda point: point[1])
    if drops:
        return f"The learning rate drops after {describe_drops(drops)}, from {peak:.3g} to {last:.3g}."
    if peak in (first, last):
        return f"The learning rate {_describe_line(Line('', points), '.3g')}."
    return f"The learning rate peaks at {peak:.3g} in epoch {math.ceil(epoch)}, then falls to {last:.3g}."


def _describe_separation(towers: Sequence[Line]) -> str:
    """Say how far the towers' colors have come apart, from their AUC, or else their color shares."""
    auc, *shares = (line.points for line in towers)
    if auc:
        return (
            f"After epoch {auc[-1][0]:g}, a filter of the more colorful tower has more color than one of the other "
            f"in {auc[-1][1]:.0%} of all pairs (chance: 50%)."
        )
    return f"The last color shares are {' and '.join(f'{points[-1][1]:.2f}' for points in shares if points)}."


def _draw_curves(
    point: str,
    title: str,
    unit: str,
    lines: Sequence[Line],
    form: str,
    drops: Sequence[int] = (),
    level: tuple[float, str] | None = None,
    is_log: bool = False,
    note: str = "",
) -> Chart | None:
    """The lines over the epochs, with the drops of the learning rate; None if there is nothing to draw.

    `form` is the format of values in the caption, as in the tables; `level` is a value to mark, and its name.
    `note` ends the caption.
    """
    shown = [line for line in lines if line.points]
    if not shown or (is_log and max(len(line.points) for line in shown) == 1):
        return None
    factor = 100 if form.endswith("%") else 1

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for line, color, style in zip(lines, INKS, LINES, strict=False):
            if not line.points:
                continue
            has_markers = len(line.points) == 1 or (line.has_markers and len(line.points) <= FEW_POINTS)
            epochs, values = [epoch for epoch, _ in line.points], [factor * value for _, value in line.points]
            axes.plot(
                epochs, values, color=color, linestyle=style, marker="o" if has_markers else None, ms=4,
                ds="steps-pre" if line.is_stepped else "default", label=line.name.replace("$", r"\$"),
            )  # fmt: skip
        for number, drop in enumerate(drops):
            axes.axvline(drop, color=DROP_COLOR, linestyle="dotted", label=None if number else "learning rate drops")
        if level:
            axes.axhline(level[0], color=DROP_COLOR, linewidth=0.8, label=level[1])
        if is_log and min(value for line in shown for _, value in line.points) > 0:
            axes.set_yscale("log")
        elif not level:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_ylabel(unit)
        if len(shown) > 1 or drops:
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.46, -0.17), ncols=2)

    texts = [(f"{line.name} " if len(shown) > 1 else "") + _describe_line(line, form) for line in shown]
    caption = f"{title}: {'; '.join(texts)}." + (
        f" Dotted: the learning rate drops after {describe_drops(drops)}." if drops else ""
    )
    caption += note
    return Chart(render_svg(draw), f"{title} over the epochs", point, caption)


def _describe_line(line: Line, form: str) -> str:
    """For example "falls from 2.301 to 0.612, lowest 0.510"."""
    first, last = line.points[0][1], line.points[-1][1]
    lowest = min(value for _, value in line.points)
    start, end = format(first, form), format(last, form)
    if start == end:
        text = f"{'stays at' if len(line.points) > 1 else 'is'} {end}"
    else:
        text = f"{'falls' if last < first else 'rises'} from {start} to {end}"
    return text + (f", lowest {lowest:{form}}" if f"{lowest:{form}}" not in (start, end) else "")


def render_svg(draw: Callable[[Axes], None], height: float = 3.5, margin: float = 1.0) -> str:
    """Render a drawing of `height` inches; `margin` scales the space for axis labels. Same input, same bytes."""
    with use_own_style(STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.8, height))
        left, bottom, rest = 0.14 * margin, 0.29 * margin, 0.03 * margin
        figure.subplots_adjust(left=left, right=1 - rest, top=1 - rest, bottom=bottom)  # a layout engine draws it twice
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


# Figure 2 of the paper, simplified: a box per tower and layer, arrows from the layers it reads.

TINTS = ("#dfeaf4", "#f7e8d8")  # of the towers
GRAY, LIGHT = "#55565c", "#f4f5f8"
TEXT, SMALL = 9.5, 8  # points
HEIGHT = 0.5  # of a box, in layers
HALF_WIDTH, EXTRA_WIDTH = 0.135, 0.035  # half of a box's width and what many units add, in widths of the drawing
CENTER, TOWER_CENTERS = 0.64, (0.46, 0.82)  # x of boxes without towers, and of the two towers
Box = tuple[float, float]
"""Center of a box: x, and the number of its layer, where 0 is the image."""


def draw_network(recipe: Recipe, specs: Sequence[LayerSpec]) -> Chart:
    """Draw the network as in figure 2 of the paper, from the image at the top to the classes."""
    towers, side = recipe.towers, recipe.input_size

    def draw(axes: Axes) -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(len(specs) + 0.4, -0.4)
        axes.axis("off")
        above = _draw_boxes(axes, 0, (CENTER,), f"3 colors {side}×{side}", 2**13, colored=False)
        for number, spec in enumerate(specs, 1):
            last = number == len(specs)
            centers = (CENTER,) if towers == 1 or last else TOWER_CENTERS
            words = f"{spec.maps:,} classes" if last else _describe_size(spec)
            boxes = _draw_boxes(axes, number, centers, words, spec.maps, colored=not last)
            _draw_arrows(axes, above, boxes, spec.sees_both)
            _write_name(axes, number, recipe, spec)
            above = boxes

    if towers > 1:
        point = f"The towers meet in {join_names([spec.name for spec in specs if spec.sees_both])}."
        dashed = "Dashed arrows: these layers also read the other tower. " if recipe.cross_talk else ""
        caption = f"{dashed}Every other layer reads its own."
    else:
        point, caption = "The network has a single tower.", "Every layer reads the whole layer above."
    return Chart(render_svg(draw, 6.0, 0), _describe_network(specs, towers, side), point, caption)


def join_names(names: Sequence[str]) -> str:
    """Return "conv3, fc6 and fc8", or a single name as it is."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _describe_network(specs: Sequence[LayerSpec], towers: int, side: int) -> str:
    """The drawing in words."""
    shared = [spec.name for spec in specs if spec.sees_both]
    sees = f"; each layer reads its own tower, and the towers meet in {join_names(shared)}" if shared else ""
    kind, each = ("two towers side by side", " in each") if towers > 1 else ("one tower", "")
    sizes = ", ".join(f"{spec.name} {_describe_size(spec)}" for spec in specs[:-1])
    start = f"The network, {kind}: an image of {side} by {side} pixels"
    return f"{start}, then{each} {sizes}, and fc8 {specs[-1].maps:,} classes{sees}."


def _describe_size(spec: LayerSpec) -> str:
    return f"{spec.maps:,} maps {spec.side}×{spec.side}" if spec.is_conv else f"{spec.maps:,} units"


def _draw_boxes(
    axes: Axes, number: int, centers: Sequence[float], words: str, units: int, colored: bool = True
) -> list[Box]:
    """Draw the boxes of one layer side by side, wider for more units."""
    from matplotlib.patches import Rectangle

    half = HALF_WIDTH + EXTRA_WIDTH * min(1.0, units.bit_length() / 13)
    for tower, x in enumerate(centers):
        face, edge = (TINTS[tower], INKS[tower]) if colored else (LIGHT, GRAY)
        corner, size = (x - half, number - HEIGHT / 2), (2 * half, HEIGHT)
        axes.add_patch(Rectangle(corner, *size, facecolor=face, edgecolor=edge, linewidth=1.2, zorder=2))
        axes.text(x, number, words, ha="center", va="center", fontsize=TEXT, zorder=3)
    return [(x, number) for x in centers]


def _draw_arrows(axes: Axes, above: Sequence[Box], boxes: Sequence[Box], sees_both: bool) -> None:
    """Draw arrows from the boxes that a layer reads, dotted from the other tower."""
    for from_x, from_y in above:
        for x, y in boxes:
            crosses = len(above) == len(boxes) == 2 and from_x != x
            if crosses and not sees_both:
                continue
            start, end = (from_x, from_y + HEIGHT / 2), (x, y - HEIGHT / 2)
            arrow = {"arrowstyle": "-|>", "color": GRAY, "shrinkA": 0, "shrinkB": 0, "lw": 1.0}
            axes.annotate("", end, start, arrowprops=arrow | ({"linestyle": (0, (3, 2))} if crosses else {}))


def _write_name(axes: Axes, number: int, recipe: Recipe, spec: LayerSpec) -> None:
    """Write name, kernel and following steps left of the boxes."""
    short: dict[Step, str] = {"activation": recipe.activation, "within-norm": "norm"}
    steps = ", ".join(dict.fromkeys(short.get(step, step) for step in spec.then)) or "softmax"
    title = f"{spec.name}  {describe_kernel(spec)}".rstrip()
    axes.text(0, number - 0.03, title, va="bottom", fontsize=TEXT, fontweight="bold")
    axes.text(0, number + 0.03, steps, va="top", fontsize=SMALL, color=GRAY)
