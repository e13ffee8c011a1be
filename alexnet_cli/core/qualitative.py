"""Section 6.1: the kernels that the two towers learned, as numbers. No torch.

The paper shows 96 kernels and says that one tower grows colour-agnostic and the other colour-specific ones,
in every run. Here that is measured: the colour share of each kernel, how well it tells the towers apart, how
likely chance does as well, and which kernels are learned at all and which still the noise they started from.
Kernels are float32 N x 3 x 11 x 11, RGB; everything else follows from such an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import spectra

Kernels = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

PERMUTATIONS = 10_000
DEAD = 0.1  # a kernel with less than this share of the median norm has not learned anything
NOISE = 0.3  # smoothness below which a kernel counts as noise: white noise has 0, a grating over 0.8
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Tower:
    """What is measured of a tower's kernels, each an array of (kernels,)."""

    chroma: Vector  # colour share: grey 0, chance 2/3, opponent colours 1
    norm: Vector
    smoothness: Vector  # correlation of neighbouring weights: noise 0, smooth near 1
    frequency: Vector  # of the strongest wave, cycles a pixel
    orientation: Vector  # in which its stripes run, degrees from the rows, 0..180
    selectivity: Vector  # for that orientation: a blob 0, a grating near 1
    dead: Flags  # too faint to count

    @property
    def undertrained(self) -> Flags:
        """Kernels that are not dead and look like the noise that they started from."""
        return ~self.dead & (self.smoothness < NOISE)

    def mean(self, values: Vector) -> float:
        """The mean of one of these arrays, each kernel weighted by its norm."""
        return float(np.average(values, weights=self.norm)) if self.norm.any() else 0.0


@dataclass(frozen=True)
class Specialisation:
    """How the towers' kernels differ in colour; `auc`, its interval and `p_value` are None without two towers."""

    towers: tuple[Tower, ...]
    auc: float | None  # chance that a kernel of the colour tower has more colour than one of the other, 0.5..1
    interval: tuple[float, float] | None  # of 95 %: it holds 0.5 unless the towers differ
    p_value: float | None  # share of random divisions into two towers that separate as well
    smoothness: float  # of all kernels together, -1..1

    @property
    def means(self) -> tuple[float, ...]:
        """Per tower the mean colour share, each kernel weighted by its norm."""
        return tuple(tower.mean(tower.chroma) for tower in self.towers)

    @property
    def dead(self) -> int:
        """Kernels too faint to count; auc and p_value leave them out."""
        return sum(int(tower.dead.sum()) for tower in self.towers)

    @property
    def noisy(self) -> int:
        """Kernels that look like the noise that they started from."""
        return sum(int(tower.undertrained.sum()) for tower in self.towers)

    @property
    def undertrained(self) -> bool:
        """Whether the kernels, all in all, look like that."""
        return self.smoothness < NOISE


def split(weight: Kernels, towers: int) -> tuple[Kernels, ...]:
    """conv1's weights, tower by tower: the first half of the kernels is tower 1."""
    return tuple(np.split(weight, towers))


def specialisation(towers: Sequence[Kernels], seed: int = 0) -> Specialisation:
    """Measure the kernels of one or two towers."""
    dead = _dead(towers)
    measured = tuple(_measure(kernels, faint) for kernels, faint in zip(towers, dead, strict=True))
    compared = [tower.chroma[~tower.dead] for tower in measured]
    auc = chance = p_value = None
    if len(compared) == 2 and all(len(c) for c in compared):
        auc, p_value = separation(compared[0], compared[1]), permutation_p(compared[0], compared[1], seed)
        chance = auc_interval(auc, len(compared[0]), len(compared[1]))
    return Specialisation(measured, auc, chance, p_value, smoothness(np.concatenate(towers)))


def index(weight: Kernels, towers: int) -> dict[str, float]:
    """What training tells of conv1 after each epoch: the area under the curve, and each tower's mean colour share."""
    parts = split(weight, towers)
    chroma, dead = [chroma_fraction(kernels) for kernels in parts], _dead(parts)
    found = {
        f"chroma_tower{i + 1}": float(np.average(c, weights=np.sqrt(_energy(kernels))))
        for i, (c, kernels) in enumerate(zip(chroma, parts, strict=True))
        if kernels.any()
    }
    compared = [c[~faint] for c, faint in zip(chroma, dead, strict=True)]
    if towers == 2 and all(len(c) for c in compared):
        found["specialisation"] = separation(compared[0], compared[1])
    return found


def numbers(found: Specialisation) -> dict[str, Any]:
    """All that is measured, for programs."""
    towers = {f"tower{i + 1}": tower for i, tower in enumerate(found.towers)}
    return {
        "chroma_fraction": dict(zip(towers, found.means, strict=True)),
        "auc": found.auc, "auc_interval": found.interval, "p_value": found.p_value,
        "smoothness": found.smoothness, "undertrained": found.undertrained, "dead": found.dead,
        "towers": {
            name: {
                "frequency": tower.mean(tower.frequency), "selectivity": tower.mean(tower.selectivity),
                "dead": int(tower.dead.sum()), "undertrained": int(tower.undertrained.sum()),
            }
            for name, tower in towers.items()
        },
        "kernel_chroma": {name: tower.chroma.tolist() for name, tower in towers.items()},
        "kernel_statistics": {name: _each(tower) for name, tower in towers.items()},
    }  # fmt: skip


def _each(tower: Tower) -> list[dict[str, Any]]:
    """What is measured of every kernel of a tower."""
    columns = {
        "chroma": tower.chroma, "norm": tower.norm, "smoothness": tower.smoothness, "frequency": tower.frequency,
        "orientation": tower.orientation, "selectivity": tower.selectivity, "dead": tower.dead,
        "undertrained": tower.undertrained,
    }  # fmt: skip
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


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


def auc_interval(auc: float, first: int, second: int) -> tuple[float, float]:
    """The 95 % interval of an area under the curve of two groups of so many (Newcombe 2006, method 5).

    All areas that lie within 1.96 of their own standard deviations from the one that was found. At 0.5 that deviation
    is the Mann-Whitney statistic's; unlike others, the interval does not vanish where the groups are apart.
    """
    area = np.linspace(0, 1, 10_001)
    spread = area * (1 - area) / (first * second)
    spread *= 1 + ((first + second) / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
    inside = area[np.abs(auc - area) <= NORMAL_95 * np.sqrt(spread) + 1e-9]
    return float(inside.min(initial=auc)), float(inside.max(initial=auc))


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
    products, energies = _neighbours(kernels)
    product = products.sum()
    energy = sum(float(np.sqrt(a.sum() * b.sum())) for a, b in energies)
    return float(product) / energy if energy else 0.0


def kernel_smoothness(kernels: Kernels) -> Vector:
    """(N,) the same of each kernel by itself; 0 for a kernel of zeros."""
    products, energies = _neighbours(kernels)
    energy = sum((np.sqrt(a * b) for a, b in energies), np.zeros(len(kernels)))
    result: Vector = np.divide(products, energy, out=np.zeros(len(kernels)), where=energy > 0)
    return result


def _neighbours(kernels: Kernels) -> tuple[Vector, list[tuple[Vector, Vector]]]:
    """Per kernel: the sum of the products of neighbours, and down and across the energies of both."""
    w = kernels.astype(np.float64)
    pairs = [(w[..., 1:, :], w[..., :-1, :]), (w[..., :, 1:], w[..., :, :-1])]
    products = sum(((a * b).sum(axis=(1, 2, 3)) for a, b in pairs), np.zeros(len(w)))
    return products, [((a**2).sum(axis=(1, 2, 3)), (b**2).sum(axis=(1, 2, 3))) for a, b in pairs]


def _measure(kernels: Kernels, dead: Flags) -> Tower:
    waves = spectra.strongest_wave(kernels)
    return Tower(
        chroma_fraction(kernels), np.sqrt(_energy(kernels)), kernel_smoothness(kernels),
        waves.frequency, waves.orientation, waves.selectivity, dead,
    )  # fmt: skip


def _dead(towers: Sequence[Kernels]) -> list[Flags]:
    norms = [np.sqrt(_energy(kernels)) for kernels in towers]
    least = DEAD * float(np.median(np.concatenate(norms)))
    return [(norm < least) | (norm == 0) for norm in norms]


def _energy(kernels: Kernels) -> Vector:
    energy: Vector = (kernels.astype(np.float64) ** 2).sum(axis=(1, 2, 3))
    return energy


def _ranks(values: Vector) -> Vector:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Vector = (last - (counts - 1) / 2)[inverse]
    return ranks
