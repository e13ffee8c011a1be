"""Kernels as waves (section 6.1): how fine their strongest stripes are, how they run, what else there is. No torch.

The power spectrum of a kernel is the sum of those of its three colours, which no rotation of the colours changes:
a red-green grating counts as much as a grey one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

SIZE = 64  # a kernel is padded to so many rows and columns: the spectrum is read in steps of 1/64 cycle a pixel


class Waves(NamedTuple):
    """Of each kernel (N,): `frequency` in cycles a pixel, `orientation` in degrees (0 along the rows, 90 along the
    columns, 45 from lower left to upper right), `selectivity` 0..1.
    """

    frequency: Vector
    orientation: Vector
    selectivity: Vector


def power(kernels: npt.NDArray[np.float32]) -> Vector:
    """N x 3 x H x W -> N x 64 x 64: the energy of each wave, over all colours; [0, 0] is the mean."""
    spectrum = np.fft.fft2(kernels.astype(np.float64), s=(SIZE, SIZE))
    energy: Vector = (np.abs(spectrum) ** 2).sum(axis=1)
    return energy


def strongest_wave(kernels: npt.NDArray[np.float32]) -> Waves:
    """Frequency and orientation where the spectrum is highest, and how much of it agrees with one orientation.

    Selectivity is |sum P e^(2 i angle)| / sum P over all waves but the mean, one less the circular variance: 0 for a
    round blob, near 1 for a grating. A kernel of zeros has 0 everywhere.
    """
    energy = power(kernels)
    steps = np.fft.fftfreq(SIZE)
    down, across = np.meshgrid(steps, steps, indexing="ij")
    peak = energy.reshape(len(kernels), -1).argmax(axis=1)
    frequency = np.hypot(down, across).ravel()[peak]
    orientation = np.degrees(np.arctan2(across, down)).ravel()[peak] % 180  # stripes run across their wave
    energy[:, 0, 0] = 0
    total = energy.sum(axis=(1, 2))
    resultant = np.abs((energy * np.exp(2j * np.arctan2(down, across))).sum(axis=(1, 2)))
    selectivity = np.divide(resultant, total, out=np.zeros(len(kernels)), where=total > 0)
    return Waves(frequency, orientation, selectivity)
