"""Draw first-layer filters as in figure 3 of the paper: tiles with captions, as pixels or as SVG. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.analysis.filters import Kernels

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
Limits = npt.NDArray[np.float32]
Panels = Sequence[tuple[str, Pixels]]
"""Captions and grids."""

ZERO = 128  # gray level of a weight of zero
PAGE, INK = 255, 32
WIDTH, LINE, LETTERS = 800, 26, 15  # pixels: approximate width of the figure, line height, letter height


def count_columns(kernels: int) -> int:
    """Number of filters in a row: 6 to 16, for three rows as in figure 3 of the paper."""
    return min(kernels, 16, max(6, -(-kernels // 3)))


def shared_limits(towers: Sequence[Kernels]) -> list[Limits]:
    """The largest weight of all filters, repeated for each: one scale for all, so that faint filters look faint."""
    limit = max(float(np.abs(kernels).max()) for kernels in towers)
    return [np.full(len(kernels), limit, np.float32) for kernels in towers]


def kernel_limits(towers: Sequence[Kernels]) -> list[Limits]:
    """The largest weight of each filter: a scale for each, so that faint filters can be seen."""
    return [np.abs(kernels).max(axis=(1, 2, 3)) for kernels in towers]


def draw_grid(kernels: Kernels, limits: Limits, columns: int) -> Pixels:
    """Draw filters as tiles, uint8 RGB, one pixel per weight, with margins of one pixel.

    Zero is mid-gray; +`limits` and -`limits`, one per filter, are white and black.
    """
    count, _, height, width = kernels.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), PAGE, np.uint8)
    limit = np.where(limits > 0, limits, 1)[:, None, None, None]  # a filter of zeros is gray
    tiles = np.rint(ZERO + 127 * kernels / limit).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, tile in enumerate(tiles):
        y, x = (number // columns) * (height + 1) + 1, (number % columns) * (width + 1) + 1
        page[y : y + height, x : x + width] = tile
    return page


def draw_figure(panels: Panels, title: str, wanted_width: int = WIDTH) -> Image.Image:
    """Draw the grids below each other with captions, enlarged to about `wanted_width` pixels without smoothing."""
    from PIL import Image, ImageDraw

    from alexnet_cli.core.drawing import load_font

    zoom, width, height = _measure_layout(panels, wanted_width)
    page = Image.new("RGB", (width, height), (PAGE, PAGE, PAGE))
    draw, font = ImageDraw.Draw(page), load_font(LETTERS, "".join([title, *(caption for caption, _ in panels)]))

    def write(top: int, text: str) -> None:
        draw.text((zoom, top + 4), text, fill=(INK, INK, INK), font=font)

    top = 0
    for caption, pixels in panels:
        write(top, caption)
        tiles = Image.fromarray(pixels)
        tiles = tiles.resize((tiles.width * zoom, tiles.height * zoom), Image.Resampling.NEAREST)
        page.paste(tiles, (0, top + LINE))
        top += LINE + zoom * pixels.shape[0]
    write(top + LINE // 2, title)
    return page


def draw_svg(panels: Panels, title: str) -> str:
    """Draw the same figure as SVG: a square for each weight, captions as text."""
    zoom, width, height = _measure_layout(panels)
    ink = f'fill="#{INK:02x}{INK:02x}{INK:02x}" font-family="sans-serif" font-size="{LETTERS}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    top = 0
    for caption, pixels in panels:
        parts.append(f'<text x="{zoom}" y="{top + LINE - 8}" {ink}>{escape(caption)}</text>')
        parts.append(f'<g transform="translate(0 {top + LINE}) scale({zoom})" shape-rendering="crispEdges">')
        parts += _draw_squares(pixels)
        parts.append("</g>")
        top += LINE + zoom * pixels.shape[0]
    parts.append(f'<text x="{zoom}" y="{top + LINE // 2 + LINE - 8}" {ink}>{escape(title)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _draw_squares(pixels: Pixels) -> list[str]:
    """A path of unit squares for each color except the background."""
    squares: dict[tuple[int, ...], list[str]] = {}
    for y, row in enumerate(pixels.tolist()):
        for x, color in enumerate(row):
            squares.setdefault(tuple(color), []).append(f"M{x} {y}h1v1h-1z")
    squares.pop((PAGE, PAGE, PAGE), None)
    return [f'<path fill="#{r:02x}{g:02x}{b:02x}" d="{"".join(d)}"/>' for (r, g, b), d in squares.items()]


def _measure_layout(panels: Panels, wanted_width: int = WIDTH) -> tuple[int, int, int]:
    """Zoom, width and height of the figure: a line above each grid, two lines below the last."""
    widest = max(pixels.shape[1] for _, pixels in panels)
    zoom = max(4, round(wanted_width / widest))
    return zoom, zoom * widest, 2 * LINE + sum(zoom * pixels.shape[0] + LINE for _, pixels in panels)
