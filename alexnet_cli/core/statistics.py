"""What is measured of the training pixels on the way: mean picture, mean colour, colour axes (section 4.1).

The pixels are those before they become JPEG; over a set the two differ by far less than a grey level on average.
Everything is summed in integers (or in floats that hold them exactly), so the sums are exact and the same in
whatever order and on however many threads the pictures come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alexnet_cli.recipe import SIDE

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

    def add(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Count up to 257 pictures, each uint8 256 x 256 x 3."""
        self.images += len(pictures)
        pixels = np.zeros((SIDE, SIDE, 3), np.uint16)  # 257 times 255 is the most it holds
        for rgb in pictures:
            pixels += rgb
            # A row is r g b r g b ...: times itself, and times itself one and two to the left, gives every pair of
            # channels without taking them apart. A column's 256 products stay below 2^24, exact in float32; and
            # einsum is no BLAS, which would start threads of its own beside ours.
            rows = rgb.reshape(SIDE, -1).astype(np.float32)
            for shift in range(3):
                columns = np.einsum("ij,ij->j", rows[:, : rows.shape[1] - shift], rows[:, shift:])
                for channel in range(3 - shift):
                    self.products[channel, channel + shift] += int(columns[channel::3].sum(dtype=np.float64))
        self.pixels += pixels
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
