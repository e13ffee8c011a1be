"""Text on figures is readable in more than English."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from alexnet_cli.core import drawing
from alexnet_cli.core.drawing import Row, Tile, draw_sheet
from alexnet_cli.core.evaluation import confusion_matrix


def drawn(size: int, letter: str) -> bytes:
    return bytes(drawing.load_font(size, letter).getmask(letter))


@pytest.mark.parametrize("letter", "éüßñøčŁΩЖ…×")
def test_letters_are_not_all_one_box(letter: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra `charts` brings the font")
    assert drawn(13, letter) != bytes(drawing.load_font(13, letter).getmask(drawing.MISSING_GLYPH))


def test_english_is_written_in_pillows_own_font_and_without_matplotlib_all_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawing.load_font(12, "tabby cat, 12.3 · …") is drawing._default_font(12)
    monkeypatch.setattr(drawing, "_dejavu_path", lambda: None)
    assert drawing.load_font(12, "Bär") is drawing._default_font(12)


def test_pictures_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra `charts` brings the font")
    tiles = [Tile(np.zeros((8, 8, 3), np.uint8), "Bär")]
    pages = [
        confusion_matrix.draw_confusion_matrix(np.eye(2, dtype=np.int64), ["ß", "Ж"], "t"),
        draw_sheet([Row("x", tiles)], "t"),
    ]
    monkeypatch.setattr(drawing, "_dejavu_path", lambda: None)
    boxes = [
        confusion_matrix.draw_confusion_matrix(np.eye(2, dtype=np.int64), ["ß", "Ж"], "t"),
        draw_sheet([Row("x", tiles)], "t"),
    ]
    assert all(page.tobytes() != box.tobytes() for page, box in zip(pages, boxes, strict=True))


def test_many_rows_lie_in_columns() -> None:
    """So that a sheet is not a strip: three tiles a row, rows in order down the columns."""
    tiles = [Tile(np.full((8, 8, 3), value, np.uint8)) for value in range(0, 240, 20)]
    sheet = np.asarray(draw_sheet([Row("", [tile] * 3) for tile in tiles], ""))
    assert sheet.shape[0] < 1.5 * sheet.shape[1] < 2.5 * sheet.shape[0]
    middle = sheet.shape[1] // 2
    values = [[row[x] for row in sheet[:, :, 0]] for x in (40, middle + 40)]
    seen = [value for column in values for value, _ in itertools.groupby(column) if value < 240 and value % 20 == 0]
    assert seen == [tile.pixels[0, 0, 0] for tile in tiles]
