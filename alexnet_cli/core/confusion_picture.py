"""The confusion matrix as a picture that can be read from two classes to a thousand. No torch.

Rows are true classes, columns what the network saw; a cell is the share of its row, blue if right, red if a mistake.
Its darkness grows with the root of the share, or a mistake of one in a hundred could not be seen.
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
SIDE = 1600  # pixels that the cells may take, as far as they are at least MIN_CELL
MIN_CELL, MAX_CELL = 2, 34
TEXT, GAP = 12, 6  # height of letters, space around; pixels
MIN_WIDTH = 500  # pixels of the whole, for the legend
LETTERS = 26  # of a name
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


def draw_confusion_matrix(confusion: Counts, names: Sequence[str], title: str) -> Image.Image:
    """The picture of `confusion[true, seen]`. Classes that neither have images nor were seen are left out."""
    rows, columns = np.flatnonzero(confusion.sum(1)), np.flatnonzero(confusion.sum(1) + confusion.sum(0))
    cell = max(MIN_CELL if len(columns) <= SIDE else 1, min(MAX_CELL, SIDE // len(columns)))
    font = load_font(TEXT, "".join(names))
    every = -(-(TEXT + 2) // cell)  # so that labels do not touch
    labels = [_shorten_name(names[i], i if every > 1 else None) for i in range(len(names))]
    margin = GAP * 2 + max(int(font.getlength(labels[i])) for i in columns)
    top = margin + 3 * (TEXT + GAP)
    width = max(margin + cell * len(columns) + GAP, int(font.getlength(title)) + 2 * GAP, MIN_WIDTH)
    page = Image.new("RGB", (width, top + cell * len(rows) + GAP + 2 * (TEXT + GAP)), PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((GAP, GAP), title, INK, font)
    pen.text((GAP, GAP + TEXT + GAP), "rows: true class · columns: what the network saw", INK, font)
    cells = _color_cells(confusion[np.ix_(rows, columns)], rows[:, None] == columns)
    size = (cell * len(columns), cell * len(rows))
    page.paste(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST), (margin, top))
    for place in range(0, len(rows), every):
        pen.text((margin - GAP, top + cell * place + cell // 2), labels[rows[place]], INK, font, anchor="rm")
    for place in range(0, len(columns), every):
        _write_upright(page, labels[columns[place]], margin + cell * place + cell // 2, top - GAP, font)
    if cell >= MIN_CELL * 4:
        _draw_grid(pen, margin, top, cell, len(rows), len(columns))
    if cell == MAX_CELL:
        _write_counts(pen, confusion[np.ix_(rows, columns)], margin, top, cell, font)
    _draw_legend(pen, GAP, top + cell * len(rows) + GAP, font)
    return page


def _color_cells(counts: Counts, right: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    share = np.sqrt(counts / counts.sum(1, keepdims=True))[:, :, None]
    dark = np.where(right[:, :, None], RIGHT, WRONG)
    colours: npt.NDArray[np.uint8] = np.rint(255 + share * (dark - 255)).astype(np.uint8)
    return colours


def _shorten_name(name: str, index: int | None) -> str:
    """A name cut to length; its number before it where not every class has its label."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    short = plain if len(plain) <= LETTERS else plain[: LETTERS - 1] + "…"
    return short if index is None else f"{index} {short}"


def _write_upright(page: Image.Image, text: str, middle: int, bottom: int, font: Font) -> None:
    """Write from the bottom to the top, centred on `middle`."""
    line = Image.new("RGB", (int(font.getlength(text)) + 2, TEXT + 4), PAGE)
    ImageDraw.Draw(line).text((0, (TEXT + 4) // 2), text, INK, font, anchor="lm")
    turned = line.rotate(90, expand=True)
    page.paste(turned, (middle - turned.width // 2, bottom - turned.height))


def _draw_grid(pen: ImageDraw.ImageDraw, left: int, top: int, cell: int, rows: int, columns: int) -> None:
    for i in range(rows + 1):
        pen.line((left, top + cell * i, left + cell * columns, top + cell * i), GRID)
    for i in range(columns + 1):
        pen.line((left + cell * i, top, left + cell * i, top + cell * rows), GRID)


def _write_counts(pen: ImageDraw.ImageDraw, counts: Counts, left: int, top: int, cell: int, font: Font) -> None:
    for (row, column), count in np.ndenumerate(counts):
        if count and font.getlength(f"{count}") <= cell:
            dark = count / counts[row].sum() > 0.3
            place = (left + cell * column + cell // 2, top + cell * row + cell // 2)
            pen.text(place, f"{count}", PAGE if dark else INK, font, anchor="mm")


def _draw_legend(pen: ImageDraw.ImageDraw, left: int, top: int, font: Font) -> None:
    """What each darkness means."""
    for line, (dark, word) in enumerate(((RIGHT, "right"), (WRONG, "wrong"))):
        place, height = left, top + line * (TEXT + GAP)
        for share in SHARES:
            colour = tuple(np.rint(255 + np.sqrt(share) * (dark - 255)).astype(int).tolist())
            pen.rectangle((place, height, place + TEXT, height + TEXT), fill=colour, outline=GRID)
            pen.text((place + TEXT + 3, height), f"{share:.0%}", INK, font)
            place += TEXT + 3 + 40
        pen.text((place, height), f"of the row's images, {word}", INK, font)
