"""A page of small pictures in rows, with a line above each row and one below each picture. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from alexnet_cli.core import lettering
from alexnet_cli.core.lettering import Font

PAGE, INK = (255, 255, 255), (32, 32, 32)
SIDE, GAP, LINE, LETTERS = 128, 6, 20, 13  # pixels: of a picture, between two, of a line, of a letter
NARROWEST = 480  # pixels, for the lines


class Tile(NamedTuple):
    """A square picture, uint8 S x S x 3, and what to write below it."""

    pixels: npt.NDArray[np.uint8]
    text: str = ""


class Row(NamedTuple):
    """Tiles with a line above; with `apart`, the first one stands apart from the others: they belong to it."""

    caption: str
    tiles: Sequence[Tile]
    apart: bool = False


def sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """The rows below each other, the title last. Small pictures are enlarged without smoothing."""
    width = max([NARROWEST, *(_left(row, len(row.tiles)) for row in rows)])
    height = len(rows) * (SIDE + 2 * LINE + GAP) + LINE + GAP
    page = Image.new("RGB", (width, height), PAGE)
    written = [title, *(text for row in rows for text in (row.caption, *(tile.text for tile in row.tiles)))]
    draw, font = ImageDraw.Draw(page), lettering.font(LETTERS, "".join(written))
    top = 0
    for row in rows:
        draw.text((GAP, top + 3), fitting(row.caption, width - 2 * GAP, font), INK, font)
        for number, tile in enumerate(row.tiles):
            left = _left(row, number)
            page.paste(_scaled(tile.pixels), (left, top + LINE))
            draw.text((left, top + LINE + SIDE + 2), fitting(tile.text, SIDE, font), INK, font)
        top += SIDE + 2 * LINE + GAP
    draw.text((GAP, top + 3), fitting(title, width - 2 * GAP, font), INK, font)
    return page


def _left(row: Row, number: int) -> int:
    """Where a tile begins; for the number after the last, where the row ends."""
    return GAP + number * (SIDE + GAP) + (4 * GAP if row.apart and number else 0)


def _scaled(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    how = Image.Resampling.NEAREST if len(pixels) < SIDE else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((SIDE, SIDE), how)


def fitting(text: str, width: int, font: Font) -> str:
    """The text, cut to so many pixels; a question mark for what cannot be shown."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    if font.getlength(plain) <= width:
        return plain
    letters = bisect_right(range(len(plain)), width, key=lambda n: int(font.getlength(plain[:n] + "…"))) - 1
    return plain[: max(0, letters)] + "…"
