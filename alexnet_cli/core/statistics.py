"""What is measured of the training pixels on the way: mean picture, mean colour, colour axes (section 4.1).

Everything is summed in integers (or in float64 below 2^53), so the sums are exact and the same in
whatever order and on however many threads the pictures come.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SIDE = 256
DIGITS = 9  # decimals written to dataset.json


def _no_pixels() -> npt.NDArray[np.int64]:
    return np.zeros((SIDE, SIDE, 3), np.int64)


def _no_products() -> npt.NDArray[np.int64]:
    return np.zeros((3, 3), np.int64)


@dataclass
class PixelSums:
    """Exact sums over pictures: how many, their pixels one by one, and the products of their channels."""

    images: int = 0
    pixels: npt.NDArray[np.int64] = field(default_factory=_no_pixels)
    """256 x 256 x 3: sum of the pictures."""
    products: npt.NDArray[np.int64] = field(default_factory=_no_products)
    """3 x 3: sum over all pixels of (r, g, b) times (r, g, b)."""

    def add(self, batch: npt.NDArray[np.uint8]) -> None:
        """Count pictures, uint8 N x 256 x 256 x 3."""
        self.images += len(batch)
        self.pixels += batch.sum(0, dtype=np.uint32)
        for rgb in batch:
            planes = rgb.transpose(2, 0, 1).astype(np.float64, order="C").reshape(3, -1)
            for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)):
                # einsum, not BLAS, which would start threads of its own beside ours
                self.products[i, j] += int(np.einsum("a,a->", planes[i], planes[j]))
        self.products[[1, 2, 2], [0, 0, 1]] = self.products[[0, 0, 1], [1, 2, 2]]

    def merge(self, other: PixelSums) -> None:
        """Add the sums of other pictures."""
        self.images += other.images
        self.pixels += other.pixels
        self.products += other.products

    def mean_image(self) -> npt.NDArray[np.float32]:
        """float32 3 x 256 x 256, RGB, 0..255."""
        mean = self.pixels / self.images
        return np.ascontiguousarray(mean.transpose(2, 0, 1), dtype=np.float32)

    def mean_rgb(self) -> npt.NDArray[np.float64]:
        """(3,), 0..255."""
        mean: npt.NDArray[np.float64] = self.pixels.sum((0, 1)) / (self.images * SIDE * SIDE)
        return mean

    def colour_axes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Standard deviations (3,) along the principal axes, ascending, 0..255; the axes (3, 3) as columns.

        An axis has no sign of its own; each is turned so that its largest component is positive.
        """
        count = self.images * SIDE * SIDE
        mean = self.mean_rgb()
        variances, axes = np.linalg.eigh(self.products / count - np.outer(mean, mean))
        largest = np.abs(axes).round(6).argmax(0)  # rounded: a tie must not be decided by the last bit
        axes = axes * np.sign(axes[largest, range(3)])
        return np.sqrt(np.maximum(variances, 0.0)), axes

    def record(self) -> dict[str, object]:
        """The colour entries of dataset.json."""
        deviations, axes = self.colour_axes()
        return {
            "mean_rgb": self.mean_rgb().round(DIGITS).tolist(),
            "colour_std": deviations.round(DIGITS).tolist(),
            "colour_axes": axes.round(DIGITS).tolist(),
        }
