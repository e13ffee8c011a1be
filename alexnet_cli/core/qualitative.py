"""Section 6.1: the kernels that the two towers learned, as a picture and as numbers. No torch.

The paper shows 96 kernels and says that one tower grows colour-agnostic and the other colour-specific ones,
in every run. Here that is measured: the colour share of each kernel, how well it tells the towers apart, how
likely chance does as well, and whether the kernels are learned at all or still the noise they started from.
Kernels are float32 N x 3 x 11 x 11, RGB; everything else follows from such an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

Kernels = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float64]

PERMUTATIONS = 10_000
DEAD = 0.1  # a kernel with less than this share of the median norm has not learned anything
NOISE = 0.3  # smoothness below which kernels count as noise: white noise has 0, a grating over 0.8
ZERO = 128  # grey level of a weight of zero
PAGE, INK = 255, 32


@dataclass(frozen=True)
class Specialisation:
    """How the towers' kernels differ in colour; `auc` and `p_value` are None without two towers."""

    chroma: tuple[Vector, ...]  # per tower: colour share of each kernel
    means: tuple[float, ...]  # per tower: their mean, each kernel weighted by its norm
    auc: float | None  # chance that a kernel of the colour tower has more colour than one of the other, 0.5..1
    p_value: float | None  # share of random divisions into two towers that separate as well
    smoothness: float  # correlation of neighbouring weights, -1..1
    dead: int  # kernels too faint to count; auc and p_value leave them out

    @property
    def undertrained(self) -> bool:
        """Whether the kernels look like the noise that they started from."""
        return self.smoothness < NOISE


def split(weight: Kernels, towers: int) -> tuple[Kernels, ...]:
    """conv1's weights, tower by tower: the first half of the kernels is tower 1."""
    return tuple(np.split(weight, towers))


def specialisation(towers: Sequence[Kernels], seed: int = 0) -> Specialisation:
    """Measure the kernels of one or two towers."""
    norms = [np.sqrt(_energy(kernels)) for kernels in towers]
    least = DEAD * float(np.median(np.concatenate(norms)))
    alive = [(norm >= least) & (norm > 0) for norm in norms]
    chroma = tuple(chroma_fraction(kernels) for kernels in towers)
    means = tuple(_mean(c, norm) for c, norm in zip(chroma, norms, strict=True))
    compared = [c[keep] for c, keep in zip(chroma, alive, strict=True)]
    auc = p_value = None
    if len(compared) == 2 and all(len(c) for c in compared):
        auc, p_value = separation(compared[0], compared[1]), permutation_p(compared[0], compared[1], seed)
    dead = sum(int((~keep).sum()) for keep in alive)
    return Specialisation(chroma, means, auc, p_value, smoothness(np.concatenate(towers)), dead)


def chroma_fraction(kernels: Kernels) -> Vector:
    """(N,) share of each kernel's energy that is colour: grey 0, independent random weights 2/3, opponent 1.

    1 - sum_p (u . w_p)^2 / sum_p |w_p|^2 with u = (1, 1, 1) / sqrt(3), the grey axis of an orthonormal basis.
    A kernel of zeros has no colour: 0.
    """
    energy = _energy(kernels)
    grey = (kernels.astype(np.float64).sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    share: Vector = 1 - np.divide(grey, energy, out=np.ones_like(energy), where=energy > 0)
    return share.clip(0.0, 1.0)


def separation(first: Vector, second: Vector) -> float:
    """Area under the ROC curve of two groups, the larger of both directions; ties count half."""
    wins = _ranks(np.concatenate([first, second]))[: len(first)].sum() - len(first) * (len(first) + 1) / 2
    share = float(wins / (len(first) * len(second)))
    return max(share, 1 - share)


def permutation_p(first: Vector, second: Vector, seed: int = 0) -> float:
    """Share of random divisions of all kernels into two such groups that separate at least as well."""
    ranks = _ranks(np.concatenate([first, second]))
    middle = len(first) * (len(ranks) + 1) / 2
    rows = np.broadcast_to(ranks, (PERMUTATIONS, len(ranks)))
    shuffled = np.random.default_rng(seed).permuted(rows, axis=1)
    distance = np.abs(shuffled[:, : len(first)].sum(axis=1) - middle)
    as_good = distance >= abs(ranks[: len(first)].sum() - middle) - 1e-9
    return float((1 + as_good.sum()) / (1 + PERMUTATIONS))


def smoothness(kernels: Kernels) -> float:
    """Correlation of weights one step apart, down and across, over all kernels: noise 0, smooth near 1."""
    w = kernels.astype(np.float64)
    pairs = [(w[..., 1:, :], w[..., :-1, :]), (w[..., :, 1:], w[..., :, :-1])]
    product = sum(float((a * b).sum()) for a, b in pairs)
    energy = sum(float(np.sqrt((a**2).sum() * (b**2).sum())) for a, b in pairs)
    return product / energy if energy else 0.0


def _mean(values: Vector, weights: Vector) -> float:
    return float(np.average(values, weights=weights)) if weights.any() else 0.0


def _energy(kernels: Kernels) -> Vector:
    energy: Vector = (kernels.astype(np.float64) ** 2).sum(axis=(1, 2, 3))
    return energy


def _ranks(values: Vector) -> Vector:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Vector = (last - (counts - 1) / 2)[inverse]
    return ranks


def columns_for(kernels: int) -> int:
    """Kernels in a row: three rows as in figure 3 of the paper, 6 to 16 kernels wide."""
    return min(kernels, 16, max(6, -(-kernels // 3)))


def grid(kernels: Kernels, limit: float, columns: int) -> Pixels:
    """uint8 RGB, a pixel per weight: tiles in rows, a pixel of page between and around them.

    Zero is mid-grey and +-`limit` are white and black, so that tiles of one limit can be compared.
    """
    count, _, height, width = kernels.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), PAGE, np.uint8)
    levels = np.rint(ZERO + 127 * kernels / limit) if limit else np.full_like(kernels, ZERO)
    tiles = levels.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, tile in enumerate(tiles):
        y, x = (number // columns) * (height + 1) + 1, (number % columns) * (width + 1) + 1
        page[y : y + height, x : x + width] = tile
    return page


def limit_of(towers: Sequence[Kernels]) -> float:
    """The largest weight of the network's kernels: one scale for all, so that faint kernels look faint."""
    return max(float(np.abs(kernels).max()) for kernels in towers)


def figure(panels: Sequence[tuple[str, Pixels]], title: str) -> Image.Image:
    """The grids below each other, each with its caption, enlarged to about 800 pixels without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(4, round(800 / max(pixels.shape[1] for _, pixels in panels)))
    line = 26
    width = zoom * max(pixels.shape[1] for _, pixels in panels)
    height = 2 * line + sum(zoom * pixels.shape[0] + line for _, pixels in panels)
    page = Image.new("RGB", (width, height), (PAGE, PAGE, PAGE))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)

    def write(top: int, text: str) -> None:
        draw.text((zoom, top + 4), text, fill=(INK, INK, INK), font=font)

    top = 0
    for caption, pixels in panels:
        write(top, caption)
        tiles = Image.fromarray(pixels)
        tiles = tiles.resize((tiles.width * zoom, tiles.height * zoom), Image.Resampling.NEAREST)
        page.paste(tiles, (0, top + line))
        top += line + zoom * pixels.shape[0]
    write(top + line // 2, title)
    return page
