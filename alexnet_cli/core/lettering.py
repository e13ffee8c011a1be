"""A font for what is written on pictures. No torch."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
OTHER = "mpl-data/fonts/ttf/DejaVuSans.ttf"
NO_LETTER = "\uffff"  # of any font: what it draws for this, it draws for all that it lacks


def font(size: int, text: str) -> Font:
    """One `size` pixels high that has the letters of `text`, as far as one is at hand.

    Pillow's own has those of English alone; matplotlib, where it is installed, brings accents, Greek and Cyrillic.
    """
    own, path = _own(size), _other()
    return own if path is None or _has(own, text) else ImageFont.truetype(path, size)


@cache
def _own(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _other() -> Path | None:
    found = importlib.util.find_spec("matplotlib")  # which this does not import
    path = Path(found.origin).parent / OTHER if found and found.origin else None
    return path if path and path.is_file() else None


def _has(letters: Font, text: str) -> bool:
    none = bytes(letters.getmask(NO_LETTER))
    return all(bytes(letters.getmask(c)) != none for c in set(text) if c.isprintable() and not c.isascii())
