"""Frequency, orientation and selectivity: of gratings that are known, and against a sum over every pixel."""

from __future__ import annotations

import cmath
import itertools

import numpy as np
import numpy.typing as npt
import pytest

from alexnet_cli.core import spectra


def grating(
    frequency: float, degrees: float, colour: tuple[float, float, float] = (1, 1, 1)
) -> npt.NDArray[np.float32]:
    """Stripes that run at so many degrees from the rows, anticlockwise, under a soft window."""
    down, across = np.mgrid[-5:6, -5:6].astype(float)
    turn = np.radians(degrees)
    phase = 2 * np.pi * frequency * (down * np.cos(turn) + across * np.sin(turn))
    pattern = np.sin(phase) * np.exp(-(down**2 + across**2) / 18)
    coloured: npt.NDArray[np.float32] = np.array(colour, np.float32)[:, None, None] * pattern.astype(np.float32)
    return coloured


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 135])
@pytest.mark.parametrize("frequency", [0.15, 0.25])
def test_gratings_are_recognised_whatever_their_colour(frequency: float, degrees: float) -> None:
    kernels = np.stack([grating(frequency, degrees), grating(frequency, degrees, (1, -1, 0))])
    found = spectra.strongest_wave(kernels)
    assert found.frequency == pytest.approx([frequency] * 2, abs=0.02)
    assert np.abs((found.orientation - degrees + 90) % 180 - 90).max() < 5
    assert (found.selectivity > 0.8).all()


def test_a_grating_along_the_columns_has_columns_that_are_constant() -> None:
    kernel = np.broadcast_to(np.sin(1.2 * np.arange(11, dtype=np.float32)), (1, 3, 11, 11))
    assert (kernel[0, 0] == kernel[0, 0, :1]).all()  # every row is the same: its stripes run down
    assert spectra.strongest_wave(kernel).orientation == pytest.approx([90])


def test_blobs_noise_and_nothing_have_no_orientation() -> None:
    y, x = np.mgrid[-5:6, -5:6]
    blob = np.broadcast_to(np.exp(-(x**2 + y**2) / 8), (1, 3, 11, 11)).astype(np.float32)
    found = spectra.strongest_wave(np.concatenate([blob, np.zeros_like(blob)]))
    assert found.frequency.tolist() == [0, 0]
    assert found.selectivity == pytest.approx([0, 0], abs=1e-3)
    noise = np.random.default_rng(0).standard_normal((96, 3, 11, 11), dtype=np.float32)
    assert spectra.strongest_wave(noise).selectivity.mean() < 0.15


def test_power_is_the_sum_over_every_pixel() -> None:
    kernel = np.random.default_rng(1).standard_normal((1, 3, 4, 5)).astype(np.float32)
    energy = spectra.power(kernel)[0]
    for down, across in ((0, 0), (3, 0), (1, 60), (32, 17)):
        total = 0.0
        for colour in range(3):
            wave = 0j
            for y, x in itertools.product(range(4), range(5)):
                wave += float(kernel[0, colour, y, x]) * cmath.exp(-2j * cmath.pi * (down * y + across * x) / 64)
            total += abs(wave) ** 2
        assert energy[down, across] == pytest.approx(total, rel=1e-6)


def test_orientation_and_power_do_not_change_when_colours_are_rotated() -> None:
    axes, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))
    kernels = np.random.default_rng(3).standard_normal((4, 3, 11, 11)).astype(np.float32)
    turned = np.einsum("cd,ndyx->ncyx", axes, kernels).astype(np.float32)
    assert spectra.power(turned) == pytest.approx(spectra.power(kernels), rel=1e-4, abs=1e-3)
