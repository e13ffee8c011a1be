"""Test-time views of a picture (section 4.1): the center, or corners, center and their mirrors. No torch."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from alexnet_cli.recipe import SIDE

T = TypeVar("T", bound=np.generic)


def make_views(picture: npt.NDArray[np.uint8], side: int, count: int) -> npt.NDArray[np.uint8]:
    """uint8 256 x 256 x 3 -> count x 3 x side x side. 1: the center; 10: corners, center, their mirrors."""
    return _cut(np.ascontiguousarray(picture.transpose(2, 0, 1)), side, count)


def mean_correction(mean: npt.NDArray[np.float32], side: int, count: int) -> npt.NDArray[np.float32]:
    """float32 3 x 256 x 256 -> count x 3 x side x side: what to add if the recipe's mean is at the crop.

    Such a network was trained less the mean under the crop, mirrored with it; its graph subtracts the center.
    """
    parts = _cut(mean, side, count)
    return _cut(mean, side, 1) - parts


def _cut(planes: npt.NDArray[T], side: int, count: int) -> npt.NDArray[T]:
    edge, middle = SIDE - side, (SIDE - side) // 2
    corners = [(middle, middle)]
    if count == 10:
        corners = [(0, 0), (0, edge), (edge, 0), (edge, edge), (middle, middle)]
    plain = np.stack([planes[:, y : y + side, x : x + side] for y, x in corners])
    return plain if count == 1 else np.concatenate([plain, plain[..., ::-1]])
