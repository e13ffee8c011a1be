"""Figure 3 as pixels and as SVG: every weight in its place, on the right scale."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

from alexnet_cli.core.analysis import filter_picture
from alexnet_cli.core.analysis.filters import Kernels


def noise(count: int, seed: int = 0) -> Kernels:
    return np.random.default_rng(seed).standard_normal((count, 3, 11, 11), dtype=np.float32)


def test_grid_puts_every_weight_on_its_pixel_and_zero_on_mid_gray() -> None:
    kernels = np.zeros((5, 3, 11, 11), np.float32)
    kernels[3, 0, 10, 2], kernels[3, 2, 0, 0] = 2.0, -1.0
    page = filter_picture.draw_grid(kernels, np.full(5, 2, np.float32), columns=3)
    assert page.shape == (2 * 12 + 1, 3 * 12 + 1, 3)
    assert page[5, 5].tolist() == [128, 128, 128]
    assert page[13 + 10, 1 + 2].tolist() == [255, 128, 128]  # kernel 3 opens the second row
    assert page[13, 1].tolist() == [128, 128, 64]
    assert (page[0] == 255).all()
    assert (page[:, 12] == 255).all()
    assert (page[13:24, 25:36] == 255).all()  # there is no sixth kernel
    assert np.count_nonzero((page == 128).all(axis=2)) == 5 * 121 - 2


def test_rows_are_those_of_figure_3() -> None:
    assert filter_picture.count_columns(48) == 16  # three rows a tower
    assert filter_picture.count_columns(96) == 16
    assert filter_picture.count_columns(24) == 8
    assert filter_picture.count_columns(12) == 6
    assert filter_picture.count_columns(3) == 3


def test_figure_enlarges_without_mixing_neighbors() -> None:
    kernels = noise(12)
    pixels = filter_picture.draw_grid(kernels, filter_picture.shared_limits([kernels])[0], 6)
    image = np.asarray(filter_picture.draw_figure([("tower 1", pixels)], "title"))
    zoom = image.shape[1] // pixels.shape[1]
    assert image.shape[1] == zoom * pixels.shape[1] >= 700
    assert zoom >= 4
    top = 26  # below the caption
    assert (image[top + zoom // 2 :: zoom, zoom // 2 :: zoom][: len(pixels)] == pixels).all()
    assert (image[top : top + zoom * len(pixels) : zoom, ::zoom] == pixels).all()
    assert (image[:top] < 128).any()  # the caption is written


def test_the_joint_scale_is_the_largest_weight_of_both_towers_and_the_other_one_s_own() -> None:
    towers = [noise(4), 0.01 * noise(3, 1)]
    largest = np.abs(towers[0]).max()
    assert [limits.tolist() for limits in filter_picture.shared_limits(towers)] == [[largest] * 4, [largest] * 3]
    faint = filter_picture.draw_grid(towers[1], filter_picture.shared_limits(towers)[1], 3)[1:12, 1:12]
    own = filter_picture.draw_grid(towers[1], filter_picture.kernel_limits(towers)[1], 3)
    assert np.abs(faint.astype(int) - 128).max() <= 2
    for tile in (own[1:12, 1:12], own[1:12, 13:24], own[1:12, 25:36]):
        assert tile.max() == 255 or tile.min() == 1


def test_a_kernel_of_zeros_is_mid_gray_on_its_own_scale() -> None:
    kernels = np.zeros((1, 3, 11, 11), np.float32)
    assert (filter_picture.draw_grid(kernels, filter_picture.kernel_limits([kernels])[0], 1)[1:12, 1:12] == 128).all()


def test_svg_has_a_square_of_the_right_color_for_every_weight() -> None:
    kernels = noise(7, 5)
    pixels = filter_picture.draw_grid(kernels, filter_picture.shared_limits([kernels])[0], 4)
    root = ElementTree.fromstring(filter_picture.draw_svg([("tower <1> & more", pixels)], "conv1, run x"))
    space = "{http://www.w3.org/2000/svg}"
    assert [text.text for text in root.iter(f"{space}text")] == ["tower <1> & more", "conv1, run x"]
    drawn = np.full_like(pixels, 255)
    squares = 0
    for path in root.iter(f"{space}path"):
        color = [int(path.attrib["fill"][i : i + 2], 16) for i in (1, 3, 5)]
        for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path.attrib["d"]):
            drawn[int(y), int(x)] = color
            squares += 1
    assert (drawn == pixels).all()
    assert squares == (pixels != 255).any(axis=2).sum() > 800
