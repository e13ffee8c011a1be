"""A picture on its way through the network, drawn to be projected: maps of both towers, and the answers. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from alexnet_cli.core import lettering
from alexnet_cli.core.activations import Activation, Course
from alexnet_cli.core.contact_sheet import INK, PAGE, fitting
from alexnet_cli.core.predict import Label

Grey = npt.NDArray[np.uint8]

WIDTH, MARGIN, LEFT = 1600, 24, 300  # pixels: of the page, around it, of the column with picture and answers
GUTTER, GAP = 32, 4  # between columns, between maps
COLUMNS, ROWS = 16, 2  # maps in a row, of all towers together; rows of them
TILE = 70  # side of a map
NUMBER, HEAD, STRIP = 19, 34, 68  # heights: of a map's number, of a layer's heading, of a strip of units
LARGE, NORMAL, SMALL = 26, 19, 16  # heights of letters
FAINT, BAR, TRACK = (95, 95, 95), (36, 92, 150), (228, 232, 238)
TOP = MARGIN + 64  # where the columns begin


def draw(found: Course, towers: Sequence[int], name: str, caption: Sequence[str]) -> Image.Image:
    """RGB, 1600 pixels wide: left the picture and its answers as figure 4 has them, right the layers from the top.

    `towers` are those to show, from 0; `caption` are lines about the network.
    """
    blocks = [HEAD + (_rows(part, towers) * (TILE + NUMBER) if part.maps else STRIP) for part in found.layers]
    height = max(TOP + HEAD + sum(blocks) + MARGIN, 940)
    page = _Page(Image.new("RGB", (WIDTH, height), PAGE))
    page.text(MARGIN, MARGIN - 4, f"{name} on its way through the network", LARGE, WIDTH - 2 * MARGIN)
    page.text(MARGIN, MARGIN + 32, " · ".join(caption), NORMAL, WIDTH - 2 * MARGIN, FAINT)
    _left(page, found)
    left, width = MARGIN + LEFT + GUTTER, WIDTH - 2 * MARGIN - LEFT - GUTTER
    each = (width - GUTTER * (len(towers) - 1)) // len(towers)
    top = TOP + HEAD
    for number, tower in enumerate(towers):
        heading = f"tower {tower + 1} of {found.layers[0].towers}"
        page.text(left + number * (each + GUTTER), TOP, heading, LARGE, each)
    for part, block in zip(found.layers, blocks, strict=True):
        _heading(page, part, left, top, width)
        for number, tower in enumerate(towers):
            place = (left + number * (each + GUTTER), top + HEAD)
            if part.maps:
                _maps(page, part, tower, place, COLUMNS // len(towers))
            else:
                page.image.paste(_strip(part, tower, each), place)
        top += block
    return page.image


def grey(part: Activation) -> Grey:
    """The values of a layer as greys, 0 to 255, all on one scale: white is the layer's strongest answer.

    Black is none; where units can answer below rest (tanh, sigmoid), that is mid-grey. A grey goes with the root of
    an answer, or a single strong unit would leave all others in the dark.
    """
    answer = part.values - part.rest
    share = np.sign(answer) * np.sqrt(np.abs(answer) / (np.abs(answer).max() or 1))
    greys: Grey = np.rint(255 * (share + 1) / 2 if part.lowest < part.rest else 255 * share).astype(np.uint8)
    return greys


class _Page:
    """An image to write on; text is cut where it would not fit."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.pen = image, ImageDraw.Draw(image)

    def text(
        self, left: int, top: int, text: str, size: int, width: int, ink: tuple[int, int, int] = INK, anchor: str = "la"
    ) -> None:
        font = lettering.font(size, text)
        self.pen.text((left, top), fitting(text, width, font), ink, font, anchor=anchor)


def _left(page: _Page, found: Course) -> None:
    """The picture, its answers below it as in figure 4 of the paper, and how to read the rest."""
    side = len(found.seen)
    picture = Image.fromarray(found.seen).resize((LEFT, LEFT), Image.Resampling.LANCZOS)
    page.image.paste(picture, (MARGIN, TOP))
    page.text(MARGIN, TOP + LEFT + 6, f"what the network sees, {side} x {side}", SMALL, LEFT, FAINT)
    top = TOP + LEFT + 44
    for label in found.top:
        _answer(page, label, top)
        top += 52
    for line in _legend(found.layers[0]):
        page.text(MARGIN, top + 8, line, NORMAL - 2, LEFT, FAINT)
        top += 25


def _legend(part: Activation) -> tuple[str, ...]:
    """How to read the maps, in lines that fit the column."""
    nothing = "mid-grey none." if part.lowest < part.rest else "black none at all."
    return (
        "A square is a map: where in the",
        "picture a unit answers, and how",
        "strongly, right after the nonlinearity.",
        "The strongest maps come first, the",
        "unit's number below each. In fc6 and",
        "fc7 every unit is a small square.",
        "",
        "A layer has one scale: white is its",
        f"highest answer, {nothing}",
        "Greys go with the root of an answer.",
    )


def _answer(page: _Page, label: Label, top: int) -> None:
    """A class with its probability, and a bar."""
    right = MARGIN + LEFT
    page.text(MARGIN, top, label.label, NORMAL, LEFT - 60)
    page.text(right, top, f"{100 * label.probability:.0f} %", NORMAL, 60, anchor="ra")
    page.pen.rectangle((MARGIN, top + 27, right - 1, top + 40), TRACK)
    if length := round(LEFT * label.probability):
        page.pen.rectangle((MARGIN, top + 27, MARGIN + length - 1, top + 40), BAR)


def _heading(page: _Page, part: Activation, left: int, top: int, width: int) -> None:
    """Name and size of a layer."""
    count = len(part.values)
    size = f"{count:,} maps of {part.values.shape[1]} x {part.values.shape[2]}" if part.maps else f"{count:,} units"
    told = f"{size} · {100 * part.active():.0f} % of units active · highest {float(part.peaks().max()):.3g}"
    page.text(left, top + 6, part.layer, LARGE - 4, 80)
    page.text(left + 80, top + 9, told, NORMAL - 2, width - 80, FAINT)


def _rows(part: Activation, towers: Sequence[int]) -> int:
    """Rows of maps that a layer fills."""
    return min(ROWS, -(-len(part.units(towers[0])) // (COLUMNS // len(towers))))


def _maps(page: _Page, part: Activation, tower: int, place: tuple[int, int], columns: int) -> None:
    """The strongest maps of a tower, below each the number of its unit."""
    greys = grey(part)
    for i, unit in enumerate(part.strongest(tower)[: columns * ROWS]):
        left = place[0] + i % columns * (TILE + GAP)
        top = place[1] + i // columns * (TILE + NUMBER)
        page.pen.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=TRACK)
        page.image.paste(_enlarged(greys[unit]), (left, top))
        page.text(left + TILE // 2, top + TILE + 1, str(unit), SMALL - 1, TILE, FAINT, anchor="ma")


def _enlarged(pixels: Grey) -> Image.Image:
    """A map as a square of TILE pixels, its own pixels all of one size: first more than enough, then averaged."""
    height, width = pixels.shape
    times = -(-TILE // height)
    large = Image.fromarray(pixels).resize((width * times, height * times), Image.Resampling.NEAREST)
    return large.resize((TILE, TILE), Image.Resampling.BOX)


def _strip(part: Activation, tower: int, width: int) -> Image.Image:
    """All units of a tower in their order, a square each, as large as the strip allows."""
    units = part.units(tower)
    values = grey(part)[units.start : units.stop]
    cell = next(c for c in range(24, 0, -1) if -(-len(values) // (width // c)) * c <= STRIP - 8 or c == 1)
    columns = min(len(values), width // cell)
    rows = -(-len(values) // columns)
    cells = np.full(rows * columns, PAGE[0], np.uint8)
    cells[: len(values)] = values
    return Image.fromarray(cells.reshape(rows, columns)).resize((columns * cell, rows * cell), Image.Resampling.NEAREST)
