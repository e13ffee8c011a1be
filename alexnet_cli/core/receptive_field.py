"""What a unit can see (section 3.5): the pixels of the 256 x 256 picture that reach it in the centre view. No torch.

Padding is no picture, so a field ends at the border of the map that it is padded in, and at that of the crop.
"""

from __future__ import annotations

from typing import NamedTuple

from alexnet_cli.core.architecture import KERNELS
from alexnet_cli.recipe import SIDE, Recipe


class Window(NamedTuple):
    """A step along one axis: `size` and `stride` of its window, padding `before`, `inputs` that it runs over."""

    size: int
    stride: int
    before: int
    inputs: int


def windows(recipe: Recipe, layer: str) -> list[Window]:
    """What stands between the crop and the convolution of a layer (layers 6 and 7: the last pooling), in order."""
    found: list[Window] = []
    positions: int = recipe.input_size
    narrow = recipe.pool_size == 2  # then conv2 and conv5 pad one less (section 3.4's comparison)
    edge = 3 if recipe.input_size == 224 and recipe.edge_padding else 0
    pads = {"conv1": 0, "conv2": 2 - narrow, "conv3": 1, "conv4": 1, "conv5": 1 - narrow}
    orders = {"conv1": recipe.stage1_order, "conv2": recipe.stage2_order, "conv5": "pool"}
    for name, kernel in KERNELS.items():
        stride = 4 if name == "conv1" else 1
        found.append(Window(kernel, stride, pads[name], positions))
        if name == layer:
            return found
        positions = (positions + 2 * pads[name] + (edge if name == "conv1" else 0) - kernel) // stride + 1
        for step in orders.get(name, "").split("-"):
            if step == "pool":
                found.append(Window(recipe.pool_size, 2, 0, positions))
                positions = -(-(positions - recipe.pool_size) // 2) + 1  # the last may hang over the edge
            elif step == "norm":
                sides = [recipe.lrn_size] if recipe.lrn == "within-map" else []
                sides += [5] if name == "conv2" and recipe.within_norm_2 else []
                found += [Window(side, 1, side // 2, positions) for side in sides]
    return [*found, Window(positions, 1, 0, positions)]  # a unit of layer 6 sees the whole of the last maps


def extent(recipe: Recipe, layer: str, place: int, clipped: bool = True) -> tuple[int, int]:
    """First pixel and the one after the last, along one axis of the 256 x 256 picture, that reach a place of a map.

    Layers 6 and 7 have no maps: `place` is 0. Not `clipped`, it is as large as that of every other place.
    """
    first, end = place, place + 1
    for window in reversed(windows(recipe, layer)):
        first, end = first * window.stride - window.before, (end - 1) * window.stride - window.before + window.size
        if clipped:
            first, end = max(0, first), min(window.inputs, end)
    corner = (SIDE - recipe.input_size) // 2
    return corner + first, corner + end
