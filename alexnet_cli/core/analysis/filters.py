"""Measure the first-layer filters of the two towers (section 6.1 of the paper). No torch.

The paper shows 96 filters and says that in every run one tower learns color-agnostic ones and the other
color-specific ones. This module measures the color share of each filter, how well it separates the towers (AUC), how
likely chance separates them as well (p-value), and which filters still look like their random initial values.
Filters are float32 N x 3 x 11 x 11, RGB.
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
DEAD = 0.1  # a filter with less than this share of the median norm is dead
NOISE = 0.3  # a filter with less smoothness is noise: white noise has 0, a grating over 0.8
NORMAL_95 = 1.96
SIGNIFICANT = 0.05  # a larger p-value is called chance
SPECTRUM = 64  # filters are zero-padded to this side, so spectra have steps of 1/64 cycle per pixel


@dataclass(frozen=True)
class Tower:
    """Measurements of a tower's filters: arrays with a value for each."""

    chroma: Vector  # color share: gray 0, noise 2/3, opponent colors 1
    norm: Vector
    smoothness: Vector  # correlation of neighboring weights: noise 0, smooth near 1
    frequency: Vector  # of the strongest wave, in cycles per pixel
    orientation: Vector  # of its stripes, in degrees from the rows, 0..180
    selectivity: Vector  # for that orientation: a blob 0, a grating near 1
    dead: Flags  # whether the norm is below DEAD

    @property
    def undertrained(self) -> Flags:
        """Filters that are not dead and still look like noise."""
        return ~self.dead & (self.smoothness < NOISE)

    def mean(self, values: Vector) -> float:
        """The mean of one of these arrays, weighted by the norm of each filter."""
        return float(np.average(values, weights=self.norm)) if self.norm.any() else 0.0


@dataclass(frozen=True)
class Specialization:
    """How the towers' filters differ in color. `auc`, `interval` and `p_value` are None without two towers."""

    towers: tuple[Tower, ...]
    auc: float | None  # probability that a filter of the color tower has more color than one of the other, 0.5..1
    interval: tuple[float, float] | None  # 95 % interval of the AUC; includes 0.5 unless the towers differ
    p_value: float | None  # share of random divisions into two towers with at least this separation
    smoothness: float  # of all filters together, -1..1

    @property
    def means(self) -> tuple[float, ...]:
        """The mean color share of each tower, weighted by the norm of each filter."""
        return tuple(tower.mean(tower.chroma) for tower in self.towers)

    @property
    def is_significant(self) -> bool:
        """Whether the towers differ in color by more than chance."""
        return self.p_value is not None and self.p_value <= SIGNIFICANT

    @property
    def dead(self) -> int:
        """Number of dead filters, which `auc` and `p_value` leave out."""
        return sum(int(tower.dead.sum()) for tower in self.towers)

    @property
    def noisy(self) -> int:
        """Number of filters that still look like noise."""
        return sum(int(tower.undertrained.sum()) for tower in self.towers)

    @property
    def undertrained(self) -> bool:
        """Whether all filters together still look like noise."""
        return self.smoothness < NOISE


def split_towers(weight: Kernels, towers: int) -> tuple[Kernels, ...]:
    """Split the weights of conv1 by tower; tower 1 comes first."""
    return tuple(np.split(weight, towers))


def measure_specialization(towers: Sequence[Kernels]) -> Specialization:
    """Measure the filters of one or two towers."""
    measured = tuple(_measure_tower(*tower) for tower in zip(towers, _find_dead(towers), strict=True))
    alive = measure_live_chroma(towers)
    auc = interval = p_value = None
    if len(alive) == 2 and all(len(chroma) for chroma in alive):
        auc, p_value = compute_auc(alive[0], alive[1]), compute_p_value(alive[0], alive[1])
        interval = compute_auc_interval(auc, len(alive[0]), len(alive[1]))
    return Specialization(measured, auc, interval, p_value, measure_smoothness(np.concatenate(towers)))


def summarize_epoch(weight: Kernels, towers: int) -> dict[str, float]:
    """The measurements of conv1 that `train` records after each epoch: AUC and mean color share of each tower."""
    parts = split_towers(weight, towers)
    summary, alive = {}, measure_live_chroma(parts)
    for number, kernels in enumerate(parts, 1):
        if kernels.any():
            weights = np.sqrt(_compute_energy(kernels))
            summary[f"chroma_tower{number}"] = float(np.average(measure_chroma(kernels), weights=weights))
    if towers == 2 and all(len(chroma) for chroma in alive):
        summary["specialization"] = compute_auc(alive[0], alive[1])
    return summary


def make_record(measured: Specialization) -> dict[str, Any]:
    """Make the record of the measurements for `--json`."""
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
    """The measurements of a tower, filter by filter."""
    columns = {
        "chroma": tower.chroma, "norm": tower.norm, "smoothness": tower.smoothness, "frequency": tower.frequency,
        "orientation": tower.orientation, "selectivity": tower.selectivity, "dead": tower.dead,
        "undertrained": tower.undertrained,
    }  # fmt: skip
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def measure_chroma(kernels: Kernels) -> Vector:
    """Return the color share of each filter, (N,): gray 0, random weights 2/3, opponent colors 1, all zeros 0.

    1 - sum_p (u . w_p)^2 / sum_p |w_p|^2 over the pixels p, with the gray axis u = (1, 1, 1) / sqrt(3).
    """
    energy = _compute_energy(kernels)
    gray = (kernels.astype(np.float64).sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    share: Vector = 1 - np.divide(gray, energy, out=np.ones_like(energy), where=energy > 0)
    return share.clip(0.0, 1.0)


def measure_live_chroma(towers: Sequence[Kernels]) -> list[Vector]:
    """Return the color share of each filter that is not dead, tower by tower."""
    dead = _find_dead(towers)
    return [measure_chroma(kernels)[~flags] for kernels, flags in zip(towers, dead, strict=True)]


def compute_auc(first: Vector, second: Vector) -> float:
    """Return the area under the ROC curve of two groups, the larger of both directions. Ties count half."""
    share = float(0.5 + 0.5 * np.sign(first[:, None] - second).mean())
    return max(share, 1 - share)


def compute_auc_interval(auc: float, first: int, second: int) -> tuple[float, float]:
    """Return the 95 % interval of an AUC for groups of `first` and `second` values (Newcombe 2006, method 5).

    It holds all areas within 1.96 of their own standard deviations of `auc`. At 0.5 that is the deviation of the
    Mann-Whitney statistic. Unlike other intervals it keeps a width if the groups are completely separate.
    """
    area = np.linspace(0, 1, 10_001)
    spread = area * (1 - area) / (first * second)
    spread *= 1 + ((first + second) / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
    inside = area[np.abs(auc - area) <= NORMAL_95 * np.sqrt(spread) + 1e-9]
    return float(inside.min(initial=auc)), float(inside.max(initial=auc))


def compute_p_value(first: Vector, second: Vector) -> float:
    """Return the share of random divisions into groups of these sizes that separate at least as well."""
    from scipy.stats import permutation_test, rankdata  # takes a second to import

    ranks = rankdata(np.concatenate([first, second]))
    middle = len(first) * (len(ranks) + 1) / 2

    def measure_distance(group: Vector, _other: Vector, axis: int) -> Vector:
        distance: Vector = np.abs(group.sum(axis=axis) - middle)
        return distance

    groups, generator = (ranks[: len(first)], ranks[len(first) :]), np.random.default_rng(0)
    test = permutation_test(
        groups, measure_distance, n_resamples=PERMUTATIONS, alternative="greater", random_state=generator
    )
    return float(test.pvalue)


def measure_smoothness(kernels: Kernels) -> float:
    """Return the correlation of adjacent weights, down and across, over all filters: noise 0, smooth near 1."""
    products, energies = _correlate_neighbors(kernels)
    product = products.sum()
    energy = sum(float(np.sqrt(a.sum() * b.sum())) for a, b in energies)
    return float(product) / energy if energy else 0.0


def measure_kernel_smoothness(kernels: Kernels) -> Vector:
    """Return the smoothness of each filter, (N,); 0 for a filter of zeros."""
    products, energies = _correlate_neighbors(kernels)
    energy = sum((np.sqrt(a * b) for a, b in energies), np.zeros(len(kernels)))
    result: Vector = np.divide(products, energy, out=np.zeros(len(kernels)), where=energy > 0)
    return result


def _correlate_neighbors(kernels: Kernels) -> tuple[Vector, list[tuple[Vector, Vector]]]:
    """Per filter: the sum of products of adjacent weights, and the energies of both, down and across."""
    w = kernels.astype(np.float64)
    pairs = [(w[..., 1:, :], w[..., :-1, :]), (w[..., :, 1:], w[..., :, :-1])]
    products = sum(((a * b).sum(axis=(1, 2, 3)) for a, b in pairs), np.zeros(len(w)))
    return products, [((a**2).sum(axis=(1, 2, 3)), (b**2).sum(axis=(1, 2, 3))) for a, b in pairs]


class Waves(NamedTuple):
    """Of each filter (N,): `frequency` in cycles per pixel, `orientation` in degrees, `selectivity` 0..1.

    Stripes along the rows have orientation 0, along the columns 90, from lower left to upper right 45.
    """

    frequency: Vector
    orientation: Vector
    selectivity: Vector


def compute_power(kernels: Kernels) -> Vector:
    """Return the energy of each wave, summed over colors: N x 3 x H x W -> N x 64 x 64; [0, 0] is the mean.

    The sum does not depend on the color axes: a red-green grating counts as much as a gray one.
    """
    spectrum = np.fft.fft2(kernels.astype(np.float64), s=(SPECTRUM, SPECTRUM))
    energy: Vector = (np.abs(spectrum) ** 2).sum(axis=1)
    return energy


def find_strongest_wave(kernels: Kernels) -> Waves:
    """Find the strongest wave of each filter, and how selective the filter is for one orientation.

    Selectivity is |sum P e^(2 i angle)| / sum P over all waves but the mean, which is 1 - the circular variance: 0 for
    a round blob, near 1 for a grating. A filter of zeros has 0 everywhere.
    """
    energy = compute_power(kernels)
    steps = np.fft.fftfreq(SPECTRUM)
    down, across = np.meshgrid(steps, steps, indexing="ij")
    peak = energy.reshape(len(kernels), -1).argmax(axis=1)
    frequency = np.hypot(down, across).ravel()[peak]
    orientation = np.degrees(np.arctan2(across, down)).ravel()[peak] % 180  # stripes are perpendicular to the wave
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
