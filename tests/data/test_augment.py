"""Section 4.1 against a slow per-image version in numpy: crops, mirrors, color shift, means, ten views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_cli.core.data.augment import Augment, AugmentParams
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, Recipe

CPU = torch.device("cpu")
RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (6, 256, 256, 3), dtype=np.uint8)
MEAN = RNG.uniform(90, 140, (3, 256, 256)).astype(np.float32)
STD = np.array([19.7, 37.1, 121.8], np.float32)
AXES = np.linalg.qr(RNG.normal(size=(3, 3)))[0].astype(np.float32)
ROWS = np.array([3, 0, 11, 7, 2, 9])


def pixels(recipe: Recipe) -> Augment:
    return Augment(recipe, MEAN, STD, AXES, CPU)


def expected_views(recipe: Recipe, draws: AugmentParams, epoch: int) -> npt.NDArray[np.float64]:
    """What section 4.1 says, an image at a time, in float64."""
    size, low, out = recipe.input_size, (256 - recipe.input_size) // 2, []
    for image, row in zip(IMAGES, ROWS, strict=True):
        top, left = draws.offsets[row]
        view = image[top : top + size, left : left + size].astype(np.float64).transpose(2, 0, 1)
        if recipe.mean == "image-at-crop":
            view = view - MEAN[:, top : top + size, left : left + size]
        if draws.flips[row]:
            view = view[:, :, ::-1]
        if recipe.mean == "image":
            view = view - MEAN[:, low : low + size, low : low + size]
        if recipe.mean == "rgb":
            view = view - MEAN.astype(np.float64).mean((1, 2))[:, None, None]
        if recipe.color_shift and not (recipe.color_shift_epochs and epoch > recipe.color_shift_epochs):
            alphas = recipe.color_shift * draws.color[row].astype(np.float64)
            shift = sum(alphas[i] * STD[i] * AXES[:, i].astype(np.float64) for i in range(3))
            view = (view + np.asarray(shift)[:, None, None]) / recipe.color_shift_divide
        out.append(view / recipe.input_divisor)
    return np.stack(out)


@pytest.mark.parametrize(
    ("recipe", "epoch"),
    [(PAPER, 1), (KRIZHEVSKY, 67), (KRIZHEVSKY, 68), (CAFFE, 1), (replace(PAPER, mean="rgb", input_divisor=64.0), 3),
     (replace(PAPER, crops=False, flips=False, color_shift=0.0), 1)],
)  # fmt: skip
@pytest.mark.parametrize("by_index", [False, True])
def test_training_views(recipe: Recipe, epoch: int, by_index: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_index:  # what a GPU does
        monkeypatch.setattr(Augment, "crop_in_loop", Augment.crop_by_index)
    draws = AugmentParams.draw(12, recipe, epoch)
    views = pixels(recipe).training_views(torch.from_numpy(IMAGES), ROWS, draws, epoch)
    assert views.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(views.numpy(), expected_views(recipe, draws, epoch), atol=2e-4)


@pytest.mark.parametrize("way", ["crop_in_loop", "crop_by_index"])
def test_views_in_bf16_are_rounded_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what layer 1 would make of them itself."""
    monkeypatch.setattr(Augment, "crop_in_loop", getattr(Augment, way))
    draws, images = AugmentParams.draw(12, PAPER, 1), torch.from_numpy(IMAGES)
    halves = Augment(PAPER, MEAN, STD, AXES, CPU, torch.bfloat16)
    for found, right in (
        (halves.training_views(images, ROWS, draws, 1), pixels(PAPER).training_views(images, ROWS, draws, 1)),
        (halves.center_view(images), pixels(PAPER).center_view(images)),
    ):
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, right.bfloat16(), rtol=0, atol=0)


def test_what_crosses_to_a_gpu_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 64 kB the host goes on at once. The tensors have a device and no values."""
    crossed: list[int] = []
    from_numpy, second = torch.from_numpy, torch.device("cuda", 1)

    def noted(array: npt.NDArray[Any]) -> torch.Tensor:
        crossed.append(array.nbytes)
        return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", noted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        maker = Augment(replace(PAPER, mean="image-at-crop"), MEAN, STD, AXES, second)
        crossed.clear()
        images = torch.empty(1024, 256, 256, 3, dtype=torch.uint8, device=second)
        views = maker.training_views(images, np.arange(1024), AugmentParams.draw(1024, PAPER, 1), 1)
    assert (views.shape, views.device, views.dtype) == ((1024, 3, 224, 224), second, torch.float32)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert len(crossed) == 3
    assert max(crossed) <= 64 * 1024


def test_draws_belong_to_the_row_and_the_epoch() -> None:
    draws = AugmentParams.draw(4000, PAPER, 1)
    again, later = AugmentParams.draw(4000, PAPER, 1), AugmentParams.draw(4000, PAPER, 2)
    np.testing.assert_array_equal(draws.offsets, again.offsets)
    assert (draws.offsets != later.offsets).any()
    assert set(draws.offsets.flatten().tolist()) == set(range(33))  # 33 x 33 places
    assert draws.flips.mean() == pytest.approx(0.5, abs=0.04)
    assert draws.color.std() == pytest.approx(1, abs=0.03)
    assert set(AugmentParams.draw(4000, CAFFE, 1).offsets.flatten().tolist()) == set(range(30))


def test_all_places_are_equally_likely_and_nothing_depends_on_anything() -> None:
    rows = 33 * 33 * 100
    draws = AugmentParams.draw(rows, PAPER, 1)
    counts = np.bincount(draws.offsets[:, 0] * 33 + draws.offsets[:, 1], minlength=33 * 33)
    assert len(counts) == 33 * 33
    chi2 = float(((counts - 100) ** 2 / 100).sum())  # 1088 degrees of freedom: deviation sqrt(2 x 1088) = 47
    assert abs(chi2 - 1088) < 5 * 47
    columns = [*draws.offsets.T, draws.flips, *draws.color.T, np.roll(draws.offsets[:, 0], 1)]
    correlations = np.corrcoef(np.stack([c.astype(np.float64) for c in columns]))
    assert np.abs(correlations - np.eye(len(columns))).max() < 5 / np.sqrt(rows)


def test_a_picture_s_view_does_not_depend_on_its_batch() -> None:
    draws = AugmentParams.draw(12, PAPER, 2)
    together = pixels(PAPER).training_views(torch.from_numpy(IMAGES), ROWS, draws, 2)
    for order in ([3, 1], [5, 4, 0, 2]):  # two ranks, in other orders
        part = pixels(PAPER).training_views(torch.from_numpy(IMAGES[order]), ROWS[order], draws, 2)
        assert torch.equal(part, together[order])


def test_the_color_shift_has_the_deviations_of_the_paper() -> None:
    draws = AugmentParams.draw(100_000, PAPER, 1)
    shift = pixels(PAPER)._compute_color_shift(draws.color, 1)
    assert shift is not None
    expected = AXES @ np.diag((0.1 * STD) ** 2) @ AXES.T  # covariance of sum over axes of N(0, 0.1) x deviation
    np.testing.assert_allclose(np.cov(shift.T), expected, atol=0.02 * float(expected.max()))


def test_ten_views_are_four_corners_the_center_and_their_mirrors() -> None:
    views = list(pixels(PAPER).ten_views(torch.from_numpy(IMAGES)))
    mean = MEAN[:, 16:240, 16:240]
    corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    for view, (top, left) in zip(views[:5], corners, strict=True):
        expected = IMAGES[:, top : top + 224, left : left + 224].transpose(0, 3, 1, 2) - mean
        np.testing.assert_allclose(view.numpy(), expected, atol=1e-3)
    for view, mirrored, (top, left) in zip(views[:5], views[5:], corners, strict=True):
        raw = IMAGES[:, top : top + 224, left : left + 224, :][:, :, ::-1].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(mirrored.numpy(), raw - mean, atol=1e-3)
        assert not torch.equal(view, mirrored)
    torch.testing.assert_close(views[4], pixels(PAPER).center_view(torch.from_numpy(IMAGES)))


def test_crops_are_shared_by_images_one_after_the_other() -> None:
    """Net #145 drew one crop and reflection for 32 images in a row; colors stayed each image's own."""
    order = np.random.default_rng(1).permutation(100)
    draws = AugmentParams.draw(100, KRIZHEVSKY, 1, order)
    offsets, flips, color = draws.offsets[order], draws.flips[order], draws.color[order]
    for first in range(0, 100, 32):
        group = slice(first, first + 32)
        assert (offsets[group] == offsets[first]).all()
        assert (flips[group] == flips[first]).all()
        assert len(np.unique(color[group, 0])) == len(color[group])
    assert len(np.unique(offsets[::32], axis=0)) > 1
    assert len(np.unique(AugmentParams.draw(100, PAPER, 1, order).offsets, axis=0)) > 50
