"""Figure 3 of the paper: kernels as tiles, all on one scale, with captions, as pixels or as SVG. No torch."""

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
"""Captions, and the grids that belong to them."""

ZERO = 128  # gray level of a weight of zero
PAGE, INK = 255, 32
WIDTH, LINE, LETTERS = 800, 26, 15  # pixels: of the picture, about; from caption to grid; of a letter's height


def count_columns(kernels: int) -> int:
    """Kernels in a row: three rows as in figure 3 of the paper, 6 to 16 kernels wide."""
    return min(kernels, 16, max(6, -(-kernels // 3)))


def shared_limits(towers: Sequence[Kernels]) -> list[Limits]:
    """The largest weight of all kernels, for each: one scale, so that faint kernels look faint."""
    limit = max(float(np.abs(kernels).max()) for kernels in towers)
    return [np.full(len(kernels), limit, np.float32) for kernels in towers]


def kernel_limits(towers: Sequence[Kernels]) -> list[Limits]:
    """The largest weight of each kernel: a scale of its own, so that faint ones can be looked at."""
    return [np.abs(kernels).max(axis=(1, 2, 3)) for kernels in towers]


def draw_grid(kernels: Kernels, limits: Limits, columns: int) -> Pixels:
    """uint8 RGB, a pixel per weight: tiles in rows, a pixel of page between and around them.

    Zero is mid-gray, and +-`limits` (kernels,) are white and black.
    """
    count, _, height, width = kernels.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), PAGE, np.uint8)
    limit = np.where(limits > 0, limits, 1)[:, None, None, None]  # nothing but zeros is gray on any scale
    tiles = np.rint(ZERO + 127 * kernels / limit).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, tile in enumerate(tiles):
        y, x = (number // columns) * (height + 1) + 1, (number % columns) * (width + 1) + 1
        page[y : y + height, x : x + width] = tile
    return page


def draw_figure(panels: Panels, title: str) -> Image.Image:
    """The grids below each other, each with its caption, enlarged to about 800 pixels without smoothing."""
    from PIL import Image, ImageDraw

    from alexnet_cli.core.drawing import load_font

    zoom, width, height = _measure_layout(panels)
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
    """The same as a drawing that can be enlarged at will: a square for each weight, captions as text."""
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
    """A path for each color, of unit squares; the page is there already."""
    places: dict[tuple[int, ...], list[str]] = {}
    for y, row in enumerate(pixels.tolist()):
        for x, color in enumerate(row):
            places.setdefault(tuple(color), []).append(f"M{x} {y}h1v1h-1z")
    places.pop((PAGE, PAGE, PAGE), None)
    return [f'<path fill="#{r:02x}{g:02x}{b:02x}" d="{"".join(d)}"/>' for (r, g, b), d in places.items()]


def _measure_layout(panels: Panels) -> tuple[int, int, int]:
    """How much is enlarged, and the size of the whole: a line above each grid, two below the last."""
    zoom = max(4, round(WIDTH / max(pixels.shape[1] for _, pixels in panels)))
    width = zoom * max(pixels.shape[1] for _, pixels in panels)
    return zoom, width, 2 * LINE + sum(zoom * pixels.shape[0] + LINE for _, pixels in panels)
