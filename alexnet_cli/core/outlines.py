"""Vectors in outline: a few numbers of each that tell how near two of them can be at all. No torch.

The outline of x is where it lies along some axes at right angles, and how far from these it lies: its coordinates p and
the length of x - p. Two vectors are never nearer than their outlines, since the parts along the axes differ by |p - p'|
and the parts across by no less than the difference of their lengths. The axes are the first principal ones of a sample
(uncentred), in which the activations of a trained network have nearly all of their length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

AXES = 64
SAMPLE = 512  # vectors that the axes are of
PIECE = 2**20  # values turned into float64 at once
ROUNDING = 48  # times 2^-24 and both lengths: what the products of two outlines may be off, see `of`

Vectors = npt.NDArray[np.float16]
Axes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outlines:
    """The axes, units x d, and the outlines of N vectors, float32 N x (d + 1)."""

    axes: Axes
    rows: npt.NDArray[np.float32]

    @property
    def whole(self) -> bool:
        """Whether they bound anything: the axes are at right angles, and every outline is of numbers."""
        square = self.axes.T @ self.axes
        return bool(np.abs(square - np.eye(len(square))).max(initial=0) < 1e-9 and np.isfinite(self.rows).all())


def principal(vectors: Vectors) -> Axes:
    """The axes along which a sample spread evenly over the vectors is longest, at most AXES of them."""
    chosen = np.unique(np.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors))).round().astype(np.int64))
    sample = vectors[chosen].astype(np.float64)
    _, shares = np.linalg.eigh(sample @ sample.T)  # smaller than the matrix of the units, with the same axes in the end
    axes, _ = np.linalg.qr(sample.T @ shares[:, : -min(AXES, vectors.shape[1]) - 1 : -1])
    return axes


def of(vectors: Vectors, axes: Axes) -> npt.NDArray[np.float32]:
    """The outlines of N vectors, N x units.

    Computed in float64. The length across, a difference of squares, is off by at most the root of 2^-53 n |x|^2, which
    is 23 units in the last place of |x| as a float32 for n up to 16,384; with its rounding an outline is off by 24.
    """
    found = np.empty((len(vectors), axes.shape[1] + 1), np.float32)
    size = max(1, PIECE // max(1, vectors.shape[1]))
    for start in range(0, len(vectors), size):
        exact = vectors[start : start + size].astype(np.float64)
        along = exact @ axes
        across = np.maximum((exact**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        found[start : start + size] = np.concatenate([along, np.sqrt(across)[:, None]], axis=1)
    return found
