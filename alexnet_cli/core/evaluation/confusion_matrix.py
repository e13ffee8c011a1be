"""Draw the confusion matrix so that it can be read with two classes or a thousand. Imports no torch.

Rows are true classes, columns predicted ones. A cell is the share of its row, blue if right, red if a mistake.
Its darkness grows with the square root of the share, so that a mistake of one in a hundred is visible.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from alexnet_cli.core.drawing import Font, load_font

Counts = npt.NDArray[np.int64]

PAGE, INK, GRID = (255, 255, 255), (40, 40, 40), (225, 225, 225)
RIGHT, WRONG = np.array((8, 48, 107)), np.array((165, 15, 21))  # the darkest blue and red of ColorBrewer's scales
SIDE = 1600  # pixels that all cells together may take, unless cells would be smaller than SMALLEST
SMALLEST, LARGEST = 2, 34  # pixels of a cell
TEXT, GAP = 12, 6  # pixels: height of letters, space around them
NARROWEST = 500  # pixels, width of the legend
LONGEST_NAME = 26  # letters
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


def draw_confusion_matrix(confusion: Counts, names: Sequence[str], title: str) -> Image.Image:
    """Draw `confusion[true, predicted]`. Classes without images that were never predicted are left out."""
    rows, columns = np.flatnonzero(confusion.sum(1)), np.flatnonzero(confusion.sum(1) + confusion.sum(0))
    cell = max(SMALLEST if len(columns) <= SIDE else 1, min(LARGEST, SIDE // len(columns)))
    font = load_font(TEXT, "".join(names))
    every = -(-(TEXT + 2) // cell)  # so that labels do not touch
    labels = [_format_label(names[i], i if every > 1 else None) for i in range(len(names))]
    margin = GAP * 2 + max(int(font.getlength(labels[i])) for i in columns)
    top = margin + 3 * (TEXT + GAP)
    width = max(margin + cell * len(columns) + GAP, int(font.getlength(title)) + 2 * GAP, NARROWEST)
    page = Image.new("RGB", (width, top + cell * len(rows) + GAP + 2 * (TEXT + GAP)), PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((GAP, GAP), title, INK, font)
    pen.text((GAP, GAP + TEXT + GAP), "rows: true class · columns: predicted class", INK, font)
    cells = _color_cells(confusion[np.ix_(rows, columns)], rows[:, None] == columns)
    size = (cell * len(columns), cell * len(rows))
    page.paste(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST), (margin, top))
    for place in range(0, len(rows), every):
        pen.text((margin - GAP, top + cell * place + cell // 2), labels[rows[place]], INK, font, anchor="rm")
    for place in range(0, len(columns), every):
        _draw_upright(page, labels[columns[place]], margin + cell * place + cell // 2, top - GAP, font)
    if cell >= SMALLEST * 4:
        _draw_lines(pen, margin, top, cell, len(rows), len(columns))
    if cell == LARGEST:
        _draw_numbers(pen, confusion[np.ix_(rows, columns)], margin, top, cell, font)
    _draw_legend(pen, GAP, top + cell * len(rows) + GAP, font)
    return page


def _color_cells(counts: Counts, right: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    share = np.sqrt(counts / counts.sum(1, keepdims=True))[:, :, None]
    dark = np.where(right[:, :, None], RIGHT, WRONG)
    colors: npt.NDArray[np.uint8] = np.rint(255 + share * (dark - 255)).astype(np.uint8)
    return colors


def _format_label(name: str, index: int | None) -> str:
    """Return a name cut to length, with its number if not every class gets a label."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    short = plain if len(plain) <= LONGEST_NAME else plain[: LONGEST_NAME - 1] + "…"
    return short if index is None else f"{index} {short}"


def _draw_upright(page: Image.Image, text: str, middle: int, bottom: int, font: Font) -> None:
    """Write from the bottom to the top, centered on `middle`."""
    line = Image.new("RGB", (int(font.getlength(text)) + 2, TEXT + 4), PAGE)
    ImageDraw.Draw(line).text((0, (TEXT + 4) // 2), text, INK, font, anchor="lm")
    turned = line.rotate(90, expand=True)
    page.paste(turned, (middle - turned.width // 2, bottom - turned.height))


def _draw_lines(pen: ImageDraw.ImageDraw, left: int, top: int, cell: int, rows: int, columns: int) -> None:
    for i in range(rows + 1):
        pen.line((left, top + cell * i, left + cell * columns, top + cell * i), GRID)
    for i in range(columns + 1):
        pen.line((left + cell * i, top, left + cell * i, top + cell * rows), GRID)


def _draw_numbers(pen: ImageDraw.ImageDraw, counts: Counts, left: int, top: int, cell: int, font: Font) -> None:
    for (row, column), count in np.ndenumerate(counts):
        if count and font.getlength(f"{count}") <= cell:
            dark = count / counts[row].sum() > 0.3
            place = (left + cell * column + cell // 2, top + cell * row + cell // 2)
            pen.text(place, f"{count}", PAGE if dark else INK, font, anchor="mm")


def _draw_legend(pen: ImageDraw.ImageDraw, left: int, top: int, font: Font) -> None:
    """Draw the shares that the colors stand for."""
    for line, (dark, word) in enumerate(((RIGHT, "right"), (WRONG, "wrong"))):
        place, height = left, top + line * (TEXT + GAP)
        for share in SHARES:
            color = tuple(np.rint(255 + np.sqrt(share) * (dark - 255)).astype(int).tolist())
            pen.rectangle((place, height, place + TEXT, height + TEXT), fill=color, outline=GRID)
            pen.text((place + TEXT + 3, height), f"{share:.0%}", INK, font)
            place += TEXT + 3 + 40
        pen.text((place, height), f"of the row's images, {word}", INK, font)
