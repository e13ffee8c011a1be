"""Figure 2 of the paper made simple: the towers, and arrows from what each layer sees. Needs the extra `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alexnet_cli.core.report_charts import INKS, Chart, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alexnet_cli.core.anatomy import Layer

TINTS = ("#dfeaf4", "#f7e8d8")  # of the towers
GREY, LIGHT = "#55565c", "#f4f5f8"
SHORT = {"normalisation": "norm", "pooling": "pool", "dropout": "dropout"}  # the table beside it says the rest
TEXT, SMALL = 9.5, 8  # points
HEIGHT = 0.5  # of a box; a layer is 1
NARROWEST, WIDER = 0.135, 0.035  # half of a box's width, and what many units add, in widths of the drawing
MIDDLE, PLACES = 0.64, (0.46, 0.82)  # of what is not in towers, and of the two
Box = tuple[float, float]
"""The middle of a box: x, and the number of its layer, from 0 for the picture."""


def draw(layers: Sequence[Layer], towers: int, side: int) -> Chart:
    """The network, from the picture of `side` pixels down to the classes."""

    def drawn(axes: Axes) -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(len(layers) + 0.4, -0.4)
        axes.axis("off")
        above = _boxes(axes, 0, (MIDDLE,), f"3 colours {side}×{side}", 2**13, coloured=False)
        for number, layer in enumerate(layers, 1):
            last = number == len(layers)
            places = (MIDDLE,) if towers == 1 or last else PLACES
            words = f"{layer.units:,} classes" if last else _size(layer)
            boxes = _boxes(axes, number, places, words, layer.units, coloured=not last)
            _lines(axes, above, boxes, layer.meets)
            _name(axes, number, layer)
            above = boxes

    caption = "From the picture to its class; arrows come from what a layer sees"
    return Chart(svg(drawn, 6.0, 0), _told(layers, towers, side), caption)


def _told(layers: Sequence[Layer], towers: int, side: int) -> str:
    """The same in words."""
    meeting = [layer.name for layer in layers if layer.meets]
    sees = f"; each layer sees its own tower, but {', '.join(meeting[:-1])} and {meeting[-1]} both" if meeting else ""
    kind, each = ("two towers side by side", " in each") if towers > 1 else ("one tower", "")
    sizes = ", ".join(f"{layer.name} {_size(layer)}" for layer in layers[:-1])
    start = f"The network, {kind}: a picture of {side} by {side} pixels"
    return f"{start}, then{each} {sizes}, and fc8 {layers[-1].units:,} classes{sees}."


def _size(layer: Layer) -> str:
    return f"{layer.units:,} maps {layer.side}×{layer.side}" if layer.side else f"{layer.units:,} units"


def _boxes(
    axes: Axes, number: int, places: Sequence[float], words: str, units: int, coloured: bool = True
) -> list[Box]:
    """Boxes of one layer side by side, wider for more units."""
    from matplotlib.patches import Rectangle

    half = NARROWEST + WIDER * min(1.0, units.bit_length() / 13)
    for tower, x in enumerate(places):
        face, edge = (TINTS[tower], INKS[tower]) if coloured else (LIGHT, GREY)
        corner, size = (x - half, number - HEIGHT / 2), (2 * half, HEIGHT)
        axes.add_patch(Rectangle(corner, *size, facecolor=face, edgecolor=edge, linewidth=1.2, zorder=2))
        axes.text(x, number, words, ha="center", va="center", fontsize=TEXT, zorder=3)
    return [(x, number) for x in places]


def _lines(axes: Axes, above: Sequence[Box], boxes: Sequence[Box], meets: bool) -> None:
    """From what a layer sees; dotted where that is the other tower."""
    for from_x, from_y in above:
        for x, y in boxes:
            crosses = len(above) == len(boxes) == 2 and from_x != x
            if crosses and not meets:
                continue
            start, end = (from_x, from_y + HEIGHT / 2), (x, y - HEIGHT / 2)
            arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0, "lw": 1.0}
            axes.annotate("", end, start, arrowprops=arrow | ({"linestyle": (0, (3, 2))} if crosses else {}))


def _name(axes: Axes, number: int, layer: Layer) -> None:
    """Name, kernel, and what follows, left of the boxes."""
    kernel = f"  {layer.kernel}×{layer.kernel}" if layer.kernel else ""
    stride = f" / {layer.stride}" if layer.stride and layer.stride > 1 else ""
    told = ", ".join(dict.fromkeys(SHORT.get(word.split()[0], word) for word in layer.then)) or "softmax"
    axes.text(0, number - 0.03, f"{layer.name}{kernel}{stride}", va="bottom", fontsize=TEXT, fontweight="bold")
    axes.text(0, number + 0.03, told, va="top", fontsize=SMALL, color=GREY)
