"""95 % confidence intervals: of a share, and of the difference of two shares measured on the same images."""

from __future__ import annotations

import math


def wilson_interval(error: float, images: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share measured on so many images; it stays within 0 and 1."""
    middle = (error + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(error * (1 - error) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_interval(only_first: int, only_second: int, images: int) -> tuple[float, float]:
    """95 % interval of how much more often a first network is right than a second, on the same images.

    `only_first` and `only_second` count the images that only one classifies correctly. The interval is that of Agresti
    and Min (2005): not of width 0 if no answer differs.
    """
    images, different = images + 2, only_first + only_second + 1
    difference = (only_first - only_second) / images
    half = 1.96 * math.sqrt(different / images - difference**2) / math.sqrt(images)
    return max(-1.0, difference - half), min(1.0, difference + half)


def format_points(share: float | None, interval: tuple[float, float] | None) -> str:
    """Format a difference of shares in points, with its interval: "+2.9 (+1.9 to +3.9)"."""
    if share is None or interval is None:
        return ""
    low, high = interval
    return f"{100 * share:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
