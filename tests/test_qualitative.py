"""Section 6.1 in numbers: colour share, separation, chance, smoothness; and the pixels of the figure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from alexnet_cli.core import qualitative
from alexnet_cli.core.qualitative import Kernels, Vector


def noise(count: int, seed: int = 0) -> Kernels:
    return np.random.default_rng(seed).standard_normal((count, 3, 11, 11), dtype=np.float32)


def grey(count: int, seed: int = 0) -> Kernels:
    return np.repeat(noise(count, seed)[:, :1], 3, axis=1)


def opponent(count: int, seed: int = 0) -> Kernels:
    """Red against green and blue, in every pixel as much of one as of the others."""
    return grey(count, seed) * np.array([1.0, -0.5, -0.5], np.float32)[:, None, None]


def test_colour_share_of_grey_opponent_and_dead_kernels() -> None:
    assert qualitative.chroma_fraction(grey(5)) == pytest.approx(0, abs=1e-6)
    assert qualitative.chroma_fraction(opponent(5)) == pytest.approx(1, abs=1e-6)
    assert qualitative.chroma_fraction(np.zeros((2, 3, 11, 11), np.float32)).tolist() == [0, 0]


def test_colour_share_is_the_energy_outside_the_grey_axis_of_a_full_basis() -> None:
    axes = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
    kernels = noise(4)
    for kernel, share in zip(kernels, qualitative.chroma_fraction(kernels), strict=True):
        energy = [0.0, 0.0, 0.0]
        for y, x, axis in itertools.product(range(11), range(11), range(3)):
            energy[axis] += float(axes[axis] @ kernel[:, y, x]) ** 2
        assert share == pytest.approx((energy[1] + energy[2]) / sum(energy), rel=1e-6)


def test_random_kernels_have_two_thirds_colour_and_towers_that_chance_explains() -> None:
    means: list[float] = []
    p_values: list[float] = []
    for seed in range(20):
        found = qualitative.specialisation(qualitative.split(noise(96, seed), 2))
        assert found.auc is not None
        assert found.p_value is not None
        assert 0.5 <= found.auc < 0.7  # four deviations of the null: sqrt(97 / 12 / 48 / 48) = 0.06
        means += found.means
        p_values.append(found.p_value)
    assert np.mean(means) == pytest.approx(2 / 3, abs=0.005)
    assert 0.25 < np.mean(p_values) < 0.75


@pytest.mark.parametrize("colour_tower", [0, 1])
def test_a_planted_colour_tower_is_found(colour_tower: int) -> None:
    towers = [noise(48, 1) * 0.3 + grey(48, 2), noise(48, 3) * 0.3 + opponent(48, 4)]
    found = qualitative.specialisation(towers if colour_tower else towers[::-1])
    assert found.auc == 1.0
    assert found.p_value == pytest.approx(1 / 10_001)
    assert found.means[colour_tower] > 0.9 > 0.3 > found.means[1 - colour_tower]


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
    assert qualitative.separation(first, second) == pytest.approx(literal_auc(first, second))


def test_permutation_p_is_the_share_of_all_divisions_that_do_as_well() -> None:
    first, second = np.array([0.1, 0.5, 0.2]), np.array([0.3, 0.9, 0.8, 0.7])
    every = np.concatenate([first, second])
    reached = qualitative.separation(first, second)
    divisions = list(itertools.combinations(range(7), 3))
    as_good = 0
    for chosen in divisions:
        rest = [i for i in range(7) if i not in chosen]
        as_good += literal_auc(every[list(chosen)], every[rest]) >= reached - 1e-9
    assert qualitative.permutation_p(first, second) == pytest.approx(as_good / len(divisions), abs=0.02)
    assert qualitative.permutation_p(first, second) == qualitative.permutation_p(first, second)


def test_faint_kernels_are_counted_as_dead_and_left_out() -> None:
    towers = [grey(24, 1), opponent(24, 2)]
    towers[0][:3] = 1e-4 * opponent(3)
    towers[1][:2] = 0
    found = qualitative.specialisation(towers)
    assert found.dead == 5
    assert found.auc == 1.0


def test_one_tower_has_no_separation() -> None:
    found = qualitative.specialisation(qualitative.split(noise(48), 1))
    assert (found.auc, found.p_value, len(found.means)) == (None, None, 1)


def test_noise_is_called_undertrained_and_gratings_are_not() -> None:
    y, x = np.mgrid[:11, :11]
    waves = [np.sin(0.9 * (x * np.cos(turn) + y * np.sin(turn))) for turn in np.linspace(0, 3, 8)]
    gratings = np.repeat(np.array(waves, np.float32)[:, None], 3, axis=1)
    assert qualitative.smoothness(noise(96)) == pytest.approx(0, abs=0.03)
    assert qualitative.specialisation([noise(24), noise(24, 1)]).undertrained
    assert not qualitative.specialisation([gratings[:4], gratings[4:]]).undertrained


def test_grid_puts_every_weight_on_its_pixel_and_zero_on_mid_grey() -> None:
    kernels = np.zeros((5, 3, 11, 11), np.float32)
    kernels[3, 0, 10, 2], kernels[3, 2, 0, 0] = 2.0, -1.0
    page = qualitative.grid(kernels, 2.0, columns=3)
    assert page.shape == (2 * 12 + 1, 3 * 12 + 1, 3)
    assert page[5, 5].tolist() == [128, 128, 128]
    assert page[13 + 10, 1 + 2].tolist() == [255, 128, 128]  # kernel 3 opens the second row
    assert page[13, 1].tolist() == [128, 128, 64]
    assert (page[0] == 255).all()
    assert (page[:, 12] == 255).all()
    assert (page[13:24, 25:36] == 255).all()  # there is no sixth kernel
    assert np.count_nonzero((page == 128).all(axis=2)) == 5 * 121 - 2


def test_rows_are_those_of_figure_3() -> None:
    assert qualitative.columns_for(48) == 16  # three rows a tower
    assert qualitative.columns_for(96) == 16
    assert qualitative.columns_for(24) == 8
    assert qualitative.columns_for(12) == 6
    assert qualitative.columns_for(3) == 3


def test_figure_enlarges_without_mixing_neighbours() -> None:
    kernels = noise(12)
    pixels = qualitative.grid(kernels, qualitative.limit_of([kernels]), 6)
    image = np.asarray(qualitative.figure([("tower 1", pixels)], "title"))
    zoom = image.shape[1] // pixels.shape[1]
    assert image.shape[1] == zoom * pixels.shape[1] >= 700
    assert zoom >= 4
    top = 26  # below the caption
    assert (image[top + zoom // 2 :: zoom, zoom // 2 :: zoom][: len(pixels)] == pixels).all()
    assert (image[top : top + zoom * len(pixels) : zoom, ::zoom] == pixels).all()
    assert (image[:top] < 128).any()  # the caption is written
