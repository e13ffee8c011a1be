"""Section 6.1 in numbers: color share, separation, chance, smoothness; and the pixels of the figure."""

from __future__ import annotations

import cmath
import itertools

import numpy as np
import numpy.typing as npt
import pytest

from alexnet_cli.core.analysis import filters
from alexnet_cli.core.analysis.filters import Kernels, Vector


def noise(count: int, seed: int = 0) -> Kernels:
    return np.random.default_rng(seed).standard_normal((count, 3, 11, 11), dtype=np.float32)


def gray(count: int, seed: int = 0) -> Kernels:
    return np.repeat(noise(count, seed)[:, :1], 3, axis=1)


def opponent(count: int, seed: int = 0) -> Kernels:
    """Red against green and blue, in every pixel as much of one as of the others."""
    return gray(count, seed) * np.array([1.0, -0.5, -0.5], np.float32)[:, None, None]


def test_color_share_of_gray_opponent_and_dead_kernels() -> None:
    assert filters.measure_chroma(gray(5)) == pytest.approx(0, abs=1e-6)
    assert filters.measure_chroma(opponent(5)) == pytest.approx(1, abs=1e-6)
    assert filters.measure_chroma(np.zeros((2, 3, 11, 11), np.float32)).tolist() == [0, 0]


def test_color_share_is_the_energy_outside_the_gray_axis_of_a_full_basis() -> None:
    axes = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
    kernels = noise(4)
    for kernel, share in zip(kernels, filters.measure_chroma(kernels), strict=True):
        energy = [0.0, 0.0, 0.0]
        for y, x, axis in itertools.product(range(11), range(11), range(3)):
            energy[axis] += float(axes[axis] @ kernel[:, y, x]) ** 2
        assert share == pytest.approx((energy[1] + energy[2]) / sum(energy), rel=1e-6)


def test_random_kernels_have_two_thirds_color_and_towers_that_chance_explains() -> None:
    means: list[float] = []
    p_values: list[float] = []
    for seed in range(20):
        found = filters.measure_specialization(filters.split_towers(noise(96, seed), 2))
        assert found.auc is not None
        assert found.p_value is not None
        assert 0.5 <= found.auc < 0.7  # four deviations of the null: sqrt(97 / 12 / 48 / 48) = 0.06
        means += found.means
        p_values.append(found.p_value)
    assert np.mean(means) == pytest.approx(2 / 3, abs=0.005)
    assert 0.25 < np.mean(p_values) < 0.75


@pytest.mark.parametrize("color_tower", [0, 1])
def test_a_planted_color_tower_is_found(color_tower: int) -> None:
    towers = [noise(48, 1) * 0.3 + gray(48, 2), noise(48, 3) * 0.3 + opponent(48, 4)]
    found = filters.measure_specialization(towers if color_tower else towers[::-1])
    assert found.auc == 1.0
    assert found.p_value == pytest.approx(1 / 10_001)
    assert found.means[color_tower] > 0.9 > 0.3 > found.means[1 - color_tower]


def literal_auc(first: Vector, second: Vector) -> float:
    wins = 0.0
    for a in first:
        for b in second:
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
    share = wins / (len(first) * len(second))
    return max(share, 1 - share)


@pytest.mark.parametrize("seed", range(4))
def test_separation_equals_a_count_of_all_pairs_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 6, 13) / 5, rng.integers(1, 8, 9) / 5
    assert filters.compute_auc(first, second) == pytest.approx(literal_auc(first, second))


def test_permutation_p_is_the_share_of_all_divisions_that_do_as_well() -> None:
    first, second = np.array([0.1, 0.5, 0.2]), np.array([0.3, 0.9, 0.8, 0.7])
    every = np.concatenate([first, second])
    reached = filters.compute_auc(first, second)
    divisions = list(itertools.combinations(range(7), 3))
    as_good = 0
    for chosen in divisions:
        rest = [i for i in range(7) if i not in chosen]
        as_good += literal_auc(every[list(chosen)], every[rest]) >= reached - 1e-9
    assert filters.compute_p_value(first, second) == pytest.approx(as_good / len(divisions), abs=0.02)
    assert filters.compute_p_value(first, second) == filters.compute_p_value(first, second)


def test_faint_kernels_are_counted_as_dead_and_left_out() -> None:
    towers = [gray(24, 1), opponent(24, 2)]
    towers[0][:3] = 1e-4 * opponent(3)
    towers[1][:2] = 0
    found = filters.measure_specialization(towers)
    assert found.dead == 5
    assert found.auc == 1.0


def test_one_tower_has_no_separation() -> None:
    found = filters.measure_specialization(filters.split_towers(noise(48), 1))
    assert (found.auc, found.p_value, len(found.means)) == (None, None, 1)


def test_noise_is_called_undertrained_and_gratings_are_not() -> None:
    y, x = np.mgrid[:11, :11]
    waves = [np.sin(0.9 * (x * np.cos(turn) + y * np.sin(turn))) for turn in np.linspace(0, 3, 8)]
    gratings = np.repeat(np.array(waves, np.float32)[:, None], 3, axis=1)
    assert filters.measure_smoothness(noise(96)) == pytest.approx(0, abs=0.03)
    assert filters.measure_specialization([noise(24), noise(24, 1)]).undertrained
    assert not filters.measure_specialization([gratings[:4], gratings[4:]]).undertrained


def test_separation_and_its_chance_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(5)
    first, second = rng.normal(0.3, 0.2, 48), rng.normal(0.4, 0.2, 46)
    known = stats.mannwhitneyu(first, second)
    share = known.statistic / (48 * 46)
    assert filters.compute_auc(first, second) == pytest.approx(max(share, 1 - share))
    assert filters.compute_p_value(first, second) == pytest.approx(known.pvalue, abs=0.01)


@pytest.mark.parametrize(("first", "second"), [(48, 48), (12, 12), (40, 47)])
def test_the_interval_holds_a_half_exactly_where_the_mann_whitney_test_sees_no_difference(
    first: int, second: int
) -> None:
    edge = 0.5 + 1.96 * np.sqrt((first + second + 1) / (12 * first * second))  # the variance of its statistic
    assert filters.compute_auc_interval(edge - 0.001, first, second)[0] < 0.5
    assert filters.compute_auc_interval(edge + 0.001, first, second)[0] > 0.5
    low, high = filters.compute_auc_interval(1.0, first, second)
    assert 0.8 < low < 1.0 == high  # groups apart: the interval still has a width


def test_nineteen_random_networks_of_twenty_have_a_half_in_their_interval() -> None:
    inside = 0
    for seed in range(100):
        chroma = [filters.measure_chroma(kernels) for kernels in filters.split_towers(noise(96, 100 + seed), 2)]
        low, high = filters.compute_auc_interval(filters.compute_auc(chroma[0], chroma[1]), 48, 48)
        inside += low <= 0.5 <= high
    assert 88 <= inside <= 100  # 95 expected, deviation 2.2


def test_means_weigh_kernels_by_their_norm() -> None:
    kernels = np.concatenate([3 * gray(1) / np.linalg.norm(gray(1)), opponent(1, 2) / np.linalg.norm(opponent(1, 2))])
    found = filters.measure_specialization([kernels.astype(np.float32)])
    assert found.means[0] == pytest.approx(0.25, abs=1e-5)  # 3 parts without color, one with nothing else
    assert found.towers[0].norm == pytest.approx([3, 1], rel=1e-5)


def test_each_kernel_s_smoothness_is_that_of_the_whole_if_it_were_alone() -> None:
    kernels = np.concatenate([noise(3), np.cumsum(noise(3, 1), axis=-1), np.zeros((1, 3, 11, 11), np.float32)])
    alone = [filters.measure_smoothness(kernel[None]) for kernel in kernels]
    assert filters.measure_kernel_smoothness(kernels) == pytest.approx(alone)
    assert alone[-1] == 0


def test_noise_between_learned_kernels_is_flagged_kernel_by_kernel() -> None:
    smooth = np.cumsum(np.cumsum(noise(20, 3), axis=-1), axis=-2)
    smooth /= np.linalg.norm(smooth.reshape(20, -1), axis=1)[:, None, None, None]
    towers = [smooth[:10].copy(), smooth[10:].copy()]
    towers[0][[2, 7]] = noise(2, 9) / 19
    towers[1][4] = 0
    found = filters.measure_specialization(towers)
    assert np.flatnonzero(found.towers[0].undertrained).tolist() == [2, 7]
    assert np.flatnonzero(found.towers[1].dead).tolist() == [4]
    assert not found.towers[1].undertrained.any()
    assert (found.noisy, found.dead, found.undertrained) == (2, 1, False)


@pytest.mark.parametrize("towers", [1, 2])
def test_the_index_of_an_epoch_is_that_of_the_whole_measurement(towers: int) -> None:
    weight = np.concatenate([noise(24, 1) * 0.3 + gray(24, 2), noise(24, 3)])
    weight[5] = 0
    found, told = (
        filters.measure_specialization(filters.split_towers(weight, towers)),
        filters.summarize_epoch(weight, towers),
    )
    assert told.get("specialization") == found.auc
    assert [told[f"chroma_tower{i + 1}"] for i in range(towers)] == pytest.approx(list(found.means))
    assert len(told) == (3 if towers == 2 else 1)


def grating(frequency: float, degrees: float, color: tuple[float, float, float] = (1, 1, 1)) -> npt.NDArray[np.float32]:
    """Stripes that run at so many degrees from the rows, anticlockwise, under a soft window."""
    down, across = np.mgrid[-5:6, -5:6].astype(float)
    turn = np.radians(degrees)
    phase = 2 * np.pi * frequency * (down * np.cos(turn) + across * np.sin(turn))
    pattern = np.sin(phase) * np.exp(-(down**2 + across**2) / 18)
    colored: npt.NDArray[np.float32] = np.array(color, np.float32)[:, None, None] * pattern.astype(np.float32)
    return colored


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 135])
@pytest.mark.parametrize("frequency", [0.15, 0.25])
def test_gratings_are_recognized_whatever_their_color(frequency: float, degrees: float) -> None:
    kernels = np.stack([grating(frequency, degrees), grating(frequency, degrees, (1, -1, 0))])
    found = filters.find_strongest_wave(kernels)
    assert found.frequency == pytest.approx([frequency] * 2, abs=0.02)
    assert np.abs((found.orientation - degrees + 90) % 180 - 90).max() < 5
    assert (found.selectivity > 0.8).all()


def test_a_grating_along_the_columns_has_columns_that_are_constant() -> None:
    kernel = np.broadcast_to(np.sin(1.2 * np.arange(11, dtype=np.float32)), (1, 3, 11, 11))
    assert (kernel[0, 0] == kernel[0, 0, :1]).all()  # every row is the same: its stripes run down
    assert filters.find_strongest_wave(kernel).orientation == pytest.approx([90])


def test_blobs_noise_and_nothing_have_no_orientation() -> None:
    y, x = np.mgrid[-5:6, -5:6]
    blob = np.broadcast_to(np.exp(-(x**2 + y**2) / 8), (1, 3, 11, 11)).astype(np.float32)
    found = filters.find_strongest_wave(np.concatenate([blob, np.zeros_like(blob)]))
    assert found.frequency.tolist() == [0, 0]
    assert found.selectivity == pytest.approx([0, 0], abs=1e-3)
    noise = np.random.default_rng(0).standard_normal((96, 3, 11, 11), dtype=np.float32)
    assert filters.find_strongest_wave(noise).selectivity.mean() < 0.15


def test_power_is_the_sum_over_every_pixel() -> None:
    kernel = np.random.default_rng(1).standard_normal((1, 3, 4, 5)).astype(np.float32)
    energy = filters.compute_power(kernel)[0]
    for down, across in ((0, 0), (3, 0), (1, 60), (32, 17)):
        total = 0.0
        for color in range(3):
            wave = 0j
            for y, x in itertools.product(range(4), range(5)):
                wave += float(kernel[0, color, y, x]) * cmath.exp(-2j * cmath.pi * (down * y + across * x) / 64)
            total += abs(wave) ** 2
        assert energy[down, across] == pytest.approx(total, rel=1e-6)


def test_orientation_and_power_do_not_change_when_colors_are_rotated() -> None:
    axes, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))
    kernels = np.random.default_rng(3).standard_normal((4, 3, 11, 11)).astype(np.float32)
    turned = np.einsum("cd,ndyx->ncyx", axes, kernels).astype(np.float32)
    assert filters.compute_power(turned) == pytest.approx(filters.compute_power(kernels), rel=1e-4, abs=1e-3)
