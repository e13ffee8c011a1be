"""Kernels in a terminal of 16 million colours, two pixels in a character."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from alexnet_cli.core.filter_picture import Limits, Pixels
    from alexnet_cli.core.qualitative import Kernels


def shows_colour() -> bool:
    """Whether stdout is a terminal that shows 16 million colours and may."""
    from rich.console import Console

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and Console().color_system == "truecolor"


def half_blocks(kernels: Kernels, limits: Limits) -> Text:
    """As many kernels in a row as the terminal has room for, at most those of the figure."""
    from alexnet_cli.core.filter_picture import columns_for, grid

    room = (shutil.get_terminal_size().columns - 1) // (int(kernels.shape[-1]) + 1)
    return blocks(grid(kernels, limits, max(1, min(columns_for(len(kernels)), room))))


def blocks(pixels: Pixels) -> Text:
    """Two pixels in a character: the upper one is the ink of U+2580, the lower one its ground."""
    from rich.style import Style
    from rich.text import Text

    rows = [[f"#{r:02x}{g:02x}{b:02x}" for r, g, b in row] for row in pixels.tolist()]
    if len(rows) % 2:
        rows.append(rows[0])  # the page around the tiles
    text = Text(no_wrap=True)
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for ink, ground in zip(upper, lower, strict=True):
            text.append("▀", Style(color=ink, bgcolor=ground))
        text.append("\n")
    return text
