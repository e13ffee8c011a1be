"""Test-time views of an image (section 4.1 of the paper): the center, or ten views. No torch: `predict` uses it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from alexnet_cli.recipe import SIDE

T = TypeVar("T", bound=np.generic)


def view_offsets(side: int, count: int) -> list[tuple[int, int]]:
    """Top and left of each view of `side` pixels, without mirrors: the center, or for 10 views corners and center."""
    edge = SIDE - side
    center = (edge // 2, edge // 2)
    return [center] if count == 1 else [(0, 0), (0, edge), (edge, 0), (edge, edge), center]


def make_views(image: npt.NDArray[np.uint8], side: int, count: int) -> npt.NDArray[np.uint8]:
    """Cut 1 view (the center) or 10 (corners, center, their mirrors): 256 x 256 x 3 -> count x 3 x side x side."""
    return cut_views(np.ascontiguousarray(image.transpose(2, 0, 1)), side, count)


def mean_correction(mean: npt.NDArray[np.float32], side: int, count: int) -> npt.NDArray[np.float32]:
    """What to add to views if the recipe subtracts the mean at the crop: 3 x 256 x 256 -> count x 3 x side x side.

    The exported graph always subtracts the center of the mean image.
    """
    return cut_views(mean, side, 1) - cut_views(mean, side, count)


def cut_views(planes: npt.NDArray[T], side: int, count: int) -> npt.NDArray[T]:
    """Cut 1 view or 10 out of planes: 3 x 256 x 256 -> count x 3 x side x side."""
    views = np.stack([planes[:, y : y + side, x : x + side] for y, x in view_offsets(side, count)])
    return views if count == 1 else np.concatenate([views, views[..., ::-1]])
