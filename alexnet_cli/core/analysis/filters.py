"""Section 6.1: the kernels that the two towers learned, as numbers. No torch.

The paper shows 96 kernels and says that one tower grows color-agnostic and the other color-specific ones,
in every run. Here that is measured: the color share of each kernel, how well it tells the towers apart, how
likely chance does as well, and which kernels are learned at all and which still the noise they started from.
Kernels are float32 N x 3 x 11 x 11, RGB; everything else follows from such an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Kernels = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

PERMUTATIONS = 10_000
DEAD = 0.1  # a kernel with less than this share of the median norm has not learned anything
NOISE = 0.3  # smoothness below which a kernel counts as noise: white noise has 0, a grating over 0.8
NORMAL_95 = 1.96
SPECTRUM = 64  # kernels are padded to so many rows and columns: spectra have steps of 1/64 cycle a pixel


@dataclass(frozen=True)
class Tower:
    """Measurements of a tower's kernels, each an array of (kernels,)."""

    chroma: Vector  # color share: gray 0, chance 2/3, opponent colors 1
    norm: Vector
    smoothness: Vector  # correlation of neighboring weights: noise 0, smooth near 1
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
class Specialization:
    """How the towers' kernels differ in color; `auc`, its interval and `p_value` are None without two towers."""

    towers: tuple[Tower, ...]
    auc: float | None  # chance that a kernel of the color tower has more color than one of the other, 0.5..1
    interval: tuple[float, float] | None  # of 95 %: it holds 0.5 unless the towers differ
    p_value: float | None  # share of random divisions into two towers that separate as well
    smoothness: float  # of all kernels together, -1..1

    @property
    def means(self) -> tuple[float, ...]:
        """Per tower the mean color share, each kernel weighted by its norm."""
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


def split_towers(weight: Kernels, towers: int) -> tuple[Kernels, ...]:
    """conv1's weights, tower by tower: the first half of the kernels is tower 1."""
    return tuple(np.split(weight, towers))


def measure_specialization(towers: Sequence[Kernels], seed: int = 0) -> Specialization:
    """Measure the kernels of one or two towers."""
    dead = _find_dead(towers)
    measured = tuple(_measure_tower(kernels, faint) for kernels, faint in zip(towers, dead, strict=True))
    compared = [tower.chroma[~tower.dead] for tower in measured]
    auc = chance = p_value = None
    if len(compared) == 2 and all(len(c) for c in compared):
        auc, p_value = compute_auc(compared[0], compared[1]), compute_p_value(compared[0], compared[1], seed)
        chance = compute_auc_interval(auc, len(compared[0]), len(compared[1]))
    return Specialization(measured, auc, chance, p_value, measure_smoothness(np.concatenate(towers)))


def summarize_epoch(weight: Kernels, towers: int) -> dict[str, float]:
    """What `train` records of conv1 after each epoch: the area under the curve, and each tower's mean color share."""
    parts = split_towers(weight, towers)
    chroma, dead = [measure_chroma(kernels) for kernels in parts], _find_dead(parts)
    summary = {
        f"chroma_tower{i + 1}": float(np.average(c, weights=np.sqrt(_compute_energy(kernels))))
        for i, (c, kernels) in enumerate(zip(chroma, parts, strict=True))
        if kernels.any()
    }
    compared = [c[~faint] for c, faint in zip(chroma, dead, strict=True)]
    if towers == 2 and all(len(c) for c in compared):
        summary["specialization"] = compute_auc(compared[0], compared[1])
    return summary


def make_record(measured: Specialization) -> dict[str, Any]:
    """The measurements for `--json`."""
    towers = {f"tower{i + 1}": tower for i, tower in enumerate(measured.towers)}
    return {
        "chroma_fraction": dict(zip(towers, measured.means, strict=True)),
        "auc": measured.auc, "auc_interval": measured.interval, "p_value": measured.p_value,
        "smoothness": measured.smoothness, "undertrained": measured.undertrained, "dead": measured.dead,
        "towers": {
            name: {
                "frequency": tower.mean(tower.frequency), "selectivity": tower.mean(tower.selectivity),
                "dead": int(tower.dead.sum()), "undertrained": int(tower.undertrained.sum()),
            }
            for name, tower in towers.items()
        },
        "kernel_chroma": {name: tower.chroma.tolist() for name, tower in towers.items()},
        "kernel_statistics": {name: _list_kernels(tower) for name, tower in towers.items()},
    }  # fmt: skip


def _list_kernels(tower: Tower) -> list[dict[str, Any]]:
    """The measurements of each kernel of a tower."""
    columns = {
        "chroma": tower.chroma, "norm": tower.norm, "smoothness": tower.smoothness, "frequency": tower.frequency,
        "orientation": tower.orientation, "selectivity": tower.selectivity, "dead": tower.dead,
        "undertrained": tower.undertrained,
    }  # fmt: skip
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def measure_chroma(kernels: Kernels) -> Vector:
    """(N,) share of each kernel's energy that is color: gray 0, independent random weights 2/3, opponent 1.

    1 - sum_p (u . w_p)^2 / sum_p |w_p|^2 with u = (1, 1, 1) / sqrt(3), the gray axis of an orthonormal basis.
    A kernel of zeros has no color: 0.
    """
    energy = _compute_energy(kernels)
    gray = (kernels.astype(np.float64).sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    share: Vector = 1 - np.divide(gray, energy, out=np.ones_like(energy), where=energy > 0)
    return share.clip(0.0, 1.0)


def compute_auc(first: Vector, second: Vector) -> float:
    """Area under the ROC curve of two groups, the larger of both directions; ties count half."""
    share = float(0.5 + 0.5 * np.sign(first[:, None] - second).mean())
    return max(share, 1 - share)


def compute_auc_interval(auc: float, first: int, second: int) -> tuple[float, float]:
    """The 95 % interval of an area under the curve of two groups of so many (Newcombe 2006, method 5).

    All areas that lie within 1.96 of their own standard deviations from the one that was found. At 0.5 that deviation
    is the Mann-Whitney statistic's; unlike others, the interval does not vanish where the groups are apart.
    """
    area = np.linspace(0, 1, 10_001)
    spread = area * (1 - area) / (first * second)
    spread *= 1 + ((first + second) / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
    inside = area[np.abs(auc - area) <= NORMAL_95 * np.sqrt(spread) + 1e-9]
    return float(inside.min(initial=auc)), float(inside.max(initial=auc))


def compute_p_value(first: Vector, second: Vector, seed: int = 0) -> float:
    """Share of random divisions of all kernels into two such groups that separate at least as well."""
    from scipy.stats import permutation_test, rankdata  # takes about a second

    ranks = rankdata(np.concatenate([first, second]))
    middle = len(first) * (len(ranks) + 1) / 2

    def measure_distance(group: Vector, _other: Vector, axis: int) -> Vector:
        distance: Vector = np.abs(group.sum(axis=axis) - middle)
        return distance

    groups, generator = (ranks[: len(first)], ranks[len(first) :]), np.random.default_rng(seed)
    test = permutation_test(
        groups, measure_distance, n_resamples=PERMUTATIONS, alternative="greater", random_state=generator
    )
    return float(test.pvalue)


def measure_smoothness(kernels: Kernels) -> float:
    """Correlation of weights one step apart, down and across, over all kernels: noise 0, smooth near 1."""
    products, energies = _correlate_neighbors(kernels)
    product = products.sum()
    energy = sum(float(np.sqrt(a.sum() * b.sum())) for a, b in energies)
    return float(product) / energy if energy else 0.0


def measure_kernel_smoothness(kernels: Kernels) -> Vector:
    """(N,) the smoothness of each kernel by itself; 0 for a kernel of zeros."""
    products, energies = _correlate_neighbors(kernels)
    energy = sum((np.sqrt(a * b) for a, b in energies), np.zeros(len(kernels)))
    result: Vector = np.divide(products, energy, out=np.zeros(len(kernels)), where=energy > 0)
    return result


def _correlate_neighbors(kernels: Kernels) -> tuple[Vector, list[tuple[Vector, Vector]]]:
    """Per kernel: the sum of the products of neighbors, and down and across the energies of both."""
    w = kernels.astype(np.float64)
    pairs = [(w[..., 1:, :], w[..., :-1, :]), (w[..., :, 1:], w[..., :, :-1])]
    products = sum(((a * b).sum(axis=(1, 2, 3)) for a, b in pairs), np.zeros(len(w)))
    return products, [((a**2).sum(axis=(1, 2, 3)), (b**2).sum(axis=(1, 2, 3))) for a, b in pairs]


class Waves(NamedTuple):
    """Per kernel (N,): `frequency` in cycles a pixel, `orientation` in degrees (0 along the rows, 90 along the
    columns, 45 from lower left to upper right), `selectivity` 0..1.
    """

    frequency: Vector
    orientation: Vector
    selectivity: Vector


def compute_power(kernels: Kernels) -> Vector:
    """N x 3 x H x W -> N x 64 x 64: the energy of each wave, over all colors; [0, 0] is the mean.

    The sum over the colors does not change when colors are rotated: a red-green grating counts as much as a gray one.
    """
    spectrum = np.fft.fft2(kernels.astype(np.float64), s=(SPECTRUM, SPECTRUM))
    energy: Vector = (np.abs(spectrum) ** 2).sum(axis=1)
    return energy


def find_strongest_wave(kernels: Kernels) -> Waves:
    """Frequency and orientation where the spectrum is highest, and how much of it agrees with one orientation.

    Selectivity is |sum P e^(2 i angle)| / sum P over all waves but the mean, one less the circular variance: 0 for a
    round blob, near 1 for a grating. A kernel of zeros has 0 everywhere.
    """
    energy = compute_power(kernels)
    steps = np.fft.fftfreq(SPECTRUM)
    down, across = np.meshgrid(steps, steps, indexing="ij")
    peak = energy.reshape(len(kernels), -1).argmax(axis=1)
    frequency = np.hypot(down, across).ravel()[peak]
    orientation = np.degrees(np.arctan2(across, down)).ravel()[peak] % 180  # stripes run across their wave
    energy[:, 0, 0] = 0
    total = energy.sum(axis=(1, 2))
    resultant = np.abs((energy * np.exp(2j * np.arctan2(down, across))).sum(axis=(1, 2)))
    selectivity = np.divide(resultant, total, out=np.zeros(len(kernels)), where=total > 0)
    return Waves(frequency, orientation, selectivity)


def _measure_tower(kernels: Kernels, dead: Flags) -> Tower:
    waves = find_strongest_wave(kernels)
    return Tower(
        measure_chroma(kernels), np.sqrt(_compute_energy(kernels)), measure_kernel_smoothness(kernels),
        waves.frequency, waves.orientation, waves.selectivity, dead,
    )  # fmt: skip


def _find_dead(towers: Sequence[Kernels]) -> list[Flags]:
    norms = [np.sqrt(_compute_energy(kernels)) for kernels in towers]
    least = DEAD * float(np.median(np.concatenate(norms)))
    return [(norm < least) | (norm == 0) for norm in norms]


def _compute_energy(kernels: Kernels) -> Vector:
    energy: Vector = (kernels.astype(np.float64) ** 2).sum(axis=(1, 2, 3))
    return energy
