"""95 % confidence intervals: of a share, and of the difference of two shares measured on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def wilson_interval(error: float, images: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share measured on so many images; it stays within 0 and 1."""
    middle = (error + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(error * (1 - error) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class PairedCounts:
    """How many of the same images two networks get right: both of them, only the first, only the second."""

    images: int
    both: int
    only_first: int
    only_second: int

    @classmethod
    def from_right(cls, first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> PairedCounts:
        """Count the images by whether each network is right, N and N."""
        return cls(len(first), int((first & second).sum()), int((first & ~second).sum()), int((second & ~first).sum()))

    @property
    def accuracies(self) -> tuple[float, float]:
        """The share of the images that each network gets right."""
        return (self.both + self.only_first) / self.images, (self.both + self.only_second) / self.images

    @property
    def errors(self) -> tuple[float, float]:
        """The share of the images that each network gets wrong."""
        first, second = self.accuracies
        return 1 - first, 1 - second

    @property
    def difference(self) -> float:
        """The error of the second network minus that of the first."""
        return (self.only_first - self.only_second) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference, by Agresti and Min (2005): not of width 0 if no answer differs."""
        images, different = self.images + 2, self.only_first + self.only_second + 1
        difference = (self.only_first - self.only_second) / images
        half = 1.96 * math.sqrt(different / images - difference**2) / math.sqrt(images)
        return max(-1.0, difference - half), min(1.0, difference + half)


def format_points(share: float | None, interval: tuple[float, float] | None) -> str:
    """Format a difference of shares in points, with its interval: "+2.9 (+1.9 to +3.9)"."""
    if share is None or interval is None:
        return ""
    low, high = interval
    return f"{100 * share:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
