"""Fonts, pages, contact sheets (rows of small images with text), matplotlib's settings, saving figures. No torch."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from alexnet_cli.errors import storage_errors

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAGE, INK, FAINT = (255, 255, 255), (32, 32, 32), (95, 95, 95)
BAR, TRACK = (36, 92, 150), (228, 232, 238)
SIDE, GAP, LINE, LETTERS = 128, 6, 20, 13  # pixels: side of an image, space between images, line and letter height
MIN_WIDTH = 480  # pixels
DEJAVU = "mpl-data/fonts/ttf/DejaVuSans.ttf"  # in matplotlib
MISSING_GLYPH = "\uffff"  # no font has it, so a font draws it as it draws every letter it lacks


def load_font(size: int, text: str) -> Font:
    """Return a font of `size` pixels that has the letters of `text`, if one is installed.

    Pillow's default font has ASCII letters only. The font in matplotlib adds accents, Greek and Cyrillic.
    """
    default, path = _default_font(size), _dejavu_path()
    return default if path is None or _has_glyphs(default, text) else ImageFont.truetype(path, size)


@cache
def _default_font(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _dejavu_path() -> Path | None:
    matplotlib = importlib.util.find_spec("matplotlib")  # does not import it
    path = Path(matplotlib.origin).parent / DEJAVU if matplotlib and matplotlib.origin else None
    return path if path and path.is_file() else None


def _has_glyphs(font: Font, text: str) -> bool:
    missing = bytes(font.getmask(MISSING_GLYPH))
    return all(bytes(font.getmask(c)) != missing for c in set(text) if c.isprintable() and not c.isascii())


@contextmanager
def use_own_style(style: Mapping[Any, Any]) -> Iterator[None]:
    """Let matplotlib draw with its default settings and `style` inside, whatever settings and backend the user has.

    Draw a `matplotlib.figure.Figure`; pyplot would need a backend.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs about the user's settings and home folder
    settings = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    users = {name: os.environ[name] for name in settings if name in os.environ}
    try:  # the import fails for a settings file in UTF-16, or the backend of a notebook that has another matplotlib
        os.environ |= settings
        import matplotlib
    finally:
        for name in settings:
            del os.environ[name]
        os.environ |= users
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


def fit_text(text: str, width: int, font: Font) -> str:
    """Return the text cut to `width` pixels, with question marks for unprintable characters."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    if font.getlength(plain) <= width:
        return plain
    letters = bisect_right(range(len(plain)), width, key=lambda n: int(font.getlength(plain[:n] + "…"))) - 1
    return plain[: max(0, letters)] + "…"


class Page:
    """An image to write on. Text that does not fit is cut."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.pen = image, ImageDraw.Draw(image)

    def text(
        self, left: int, top: int, text: str, size: int, width: int, ink: tuple[int, int, int] = INK, anchor: str = "la"
    ) -> None:
        """Write a line of letters of `size` pixels, at most `width` pixels long."""
        font = load_font(size, text)
        self.pen.text((left, top), fit_text(text, width, font), ink, font, anchor=anchor)

    def bar(self, left: int, top: int, width: int, name: str, share: float, color: tuple[int, int, int] = BAR) -> None:
        """Draw a name, a share in percent, and a bar below them: 41 pixels high."""
        self.text(left, top, name, 19, width - 60)
        self.text(left + width, top, f"{100 * share:.0f} %", 19, 60, anchor="ra")
        self.pen.rectangle((left, top + 27, left + width - 1, top + 40), TRACK)
        if length := round(width * share):
            self.pen.rectangle((left, top + 27, left + length - 1, top + 40), color)


class Tile(NamedTuple):
    """A square image, uint8 S x S x 3, with the text below it."""

    pixels: npt.NDArray[np.uint8]
    text: str = ""


class Row(NamedTuple):
    """Tiles with a caption above. With `is_first_apart`, a gap separates the first tile from the others."""

    caption: str
    tiles: Sequence[Tile]
    is_first_apart: bool = False


def draw_sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """Draw the rows below each other, many of them in several columns, and the title below them.

    Small images are enlarged without smoothing.
    """
    row_width = max([MIN_WIDTH, *(_tile_left(row, len(row.tiles)) for row in rows)])
    row_height = SIDE + 2 * LINE + GAP
    columns = max(1, round(math.sqrt(len(rows) * row_height / row_width)))  # about as wide as high
    lines = -(-len(rows) // columns)
    width, height = columns * row_width, lines * row_height + LINE + GAP
    page = Image.new("RGB", (width, height), PAGE)
    texts = [title, *(row.caption for row in rows), *(tile.text for row in rows for tile in row.tiles)]
    draw, font = ImageDraw.Draw(page), load_font(LETTERS, "".join(texts))
    for index, row in enumerate(rows):
        start, top = index // lines * row_width, index % lines * row_height
        draw.text((start + GAP, top + 3), fit_text(row.caption, row_width - 2 * GAP, font), INK, font)
        for number, tile in enumerate(row.tiles):
            left = start + _tile_left(row, number)
            page.paste(_scale_tile(tile.pixels), (left, top + LINE))
            draw.text((left, top + LINE + SIDE + 2), fit_text(tile.text, SIDE, font), INK, font)
    draw.text((GAP, height - LINE - GAP + 3), fit_text(title, width - 2 * GAP, font), INK, font)
    return page


def _tile_left(row: Row, number: int) -> int:
    """Left edge of a tile. The number after the last tile gives the end of the row."""
    return GAP + number * (SIDE + GAP) + (4 * GAP if row.is_first_apart and number else 0)


def _scale_tile(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    resampling = Image.Resampling.NEAREST if len(pixels) < SIDE else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((SIDE, SIDE), resampling)


def save_figure(figure: Image.Image | str | bytes, path: Path) -> None:
    """Write a figure as PNG, as SVG if it is text, or bytes as they are. Creates the folder.

    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(figure, str):
            path.write_text(figure, encoding="utf-8")
        elif isinstance(figure, bytes):
            path.write_bytes(figure)
        else:
            figure.save(path, "PNG")
