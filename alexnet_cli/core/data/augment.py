"""From decoded images to the network's input, batch by batch on the device (sections 2 and 4.1 of the paper).

Training: a random crop, mirrored with probability 0.5, its color shifted along the principal axes of RGB. Testing: the
center, or ten views (four corners, center, and their mirrors). The random draws of an image depend on the seed, the
epoch and the image's row, not on the process that loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alexnet_cli.core.data.views import view_offsets
from alexnet_cli.recipe import SIDE, Recipe


@dataclass(frozen=True)
class AugmentParams:
    """The random draws of one epoch, by row of the training set."""

    offsets: npt.NDArray[np.int64]
    """N x 2: top and left of the crop."""
    flips: npt.NDArray[np.bool_]
    color: npt.NDArray[np.float32]
    """N x 3, standard normal."""

    @classmethod
    def draw(cls, rows: int, recipe: Recipe, epoch: int, order: npt.NDArray[np.int64] | None = None) -> AugmentParams:
        """Draw for every row of the training set. `epoch` counts from 1. The recipe can switch off crops and flips.

        `order` is the order of the epoch: each `crop_group` successive rows share offset and flip.
        """
        generator = np.random.default_rng((recipe.seed, epoch, 0xA06))
        offsets = generator.integers(0, SIDE - recipe.input_size + 1, (rows, 2))
        flips = generator.random(rows) < 0.5
        color = generator.standard_normal((rows, 3), dtype=np.float32)
        if recipe.crop_group > 1 and order is not None:
            leaders = order[np.arange(rows) // recipe.crop_group * recipe.crop_group]
            offsets[order], flips[order] = offsets[leaders], flips[leaders]
        if not recipe.crops:
            offsets = np.full_like(offsets, (SIDE - recipe.input_size) // 2)
        if not recipe.flips:
            flips = np.zeros_like(flips)
        return cls(offsets, flips, color)


class ViewParams(NamedTuple):
    """How the views of N images are cut out."""

    offsets: npt.NDArray[np.int64]
    """N x 2: top and left of the crop."""
    flips: npt.NDArray[np.bool_]
    shift: npt.NDArray[np.float32] | None = None
    """N x 3: what is added to each pixel."""


class Augment:
    """Turns uint8 N x 256 x 256 x 3 into the network's input, N x 3 x S x S in channels-last memory.

    Computes in float32.
    """

    def __init__(
        self,
        recipe: Recipe,
        mean_image: npt.NDArray[np.float32],
        color_std: npt.NDArray[np.float32] | None,
        color_axes: npt.NDArray[np.float32] | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`mean_image` is 3 x 256 x 256, `color_axes` 3 x 3 (axes in columns), `color_std` (3,) in 0..255.

        `dtype` is that of the result: bfloat16 saves memory if the first layer would convert the batch anyway.
        """
        self.recipe = recipe
        self.device = device
        self.size = recipe.input_size
        self.dtype = dtype
        mean = torch.from_numpy(np.ascontiguousarray(mean_image.transpose(1, 2, 0)))
        if recipe.mean == "rgb":
            mean = mean.mean((0, 1)).expand(SIDE, SIDE, 3)
        self.mean = mean.contiguous().to(device)
        self.center = (SIDE - self.size) // 2
        self.mean_at_crop = recipe.mean == "image-at-crop"
        middle = slice(self.center, self.center + self.size)
        self.central_mean = self.mean[middle, middle].contiguous()
        axes = color_axes * color_std if color_axes is not None and color_std is not None else np.zeros((3, 3))
        self.scaled_axes = np.asarray(axes, dtype=np.float32)

    def training_views(self, images: Tensor, rows: npt.NDArray[np.int64], draws: AugmentParams, epoch: int) -> Tensor:
        """Random views of a training batch; `rows` are the rows of the images."""
        shift = self._compute_color_shift(draws.color[rows], epoch)
        return self._make_views(images, ViewParams(draws.offsets[rows], draws.flips[rows], shift))

    def center_view(self, images: Tensor) -> Tensor:
        """The center of each image."""
        n = len(images)
        return self._make_views(images, ViewParams(np.full((n, 2), self.center), np.zeros(n, bool)))

    def ten_views(self, images: Tensor) -> Iterator[Tensor]:
        """Ten batches: top left, top right, bottom left, bottom right, center, then their mirrors (section 4.1)."""
        n = len(images)
        images = images.to(self.device)  # once, not for every view
        for flip in (False, True):
            for offset in view_offsets(self.size, 10):
                yield self._make_views(images, ViewParams(np.full((n, 2), offset), np.full(n, flip)))

    def _compute_color_shift(self, normals: npt.NDArray[np.float32], epoch: int) -> npt.NDArray[np.float32] | None:
        """N x 3: what section 4.1 adds to each pixel, the sum over the axes of std times a draw from N(0, 0.1)."""
        recipe = self.recipe
        if recipe.color_shift == 0 or (recipe.color_shift_epochs and epoch > recipe.color_shift_epochs):
            return None
        shift: npt.NDArray[np.float32] = np.float32(recipe.color_shift) * (normals @ self.scaled_axes.T)
        return shift

    def _make_views(self, images: Tensor, views: ViewParams) -> Tensor:
        images = images.to(self.device)  # not asynchronous: the loader reuses this buffer
        crop = self.crop_in_loop if self.device.type == "cpu" else self.crop_by_index
        return crop(images, views).permute(0, 3, 1, 2)

    def crop_by_index(self, images: Tensor, views: ViewParams) -> Tensor:
        """Make views with one gather of pixels: uint8 N x 256 x 256 x 3 -> N x S x S x 3.

        Copies only a few bytes per image to the device: beyond 64 kB the host would wait for it.
        """
        device = images.device
        starts = torch.from_numpy(views.offsets).to(device, non_blocking=True)
        mirrored = torch.from_numpy(views.flips).to(device, non_blocking=True)
        step = torch.arange(self.size, device=device)
        y = starts[:, 0, None] + step
        x = starts[:, 1, None] + torch.where(mirrored[:, None], self.size - 1 - step, step)
        pixel = y[:, :, None] * SIDE + x[:, None, :]  # one flat index: a GPU would materialize each of two
        mean = self.mean.flatten(0, 1)[pixel] if self.mean_at_crop else self.central_mean
        pixel += torch.arange(len(images), device=device)[:, None, None] * SIDE**2
        out = images.flatten(0, 2)[pixel].float()
        rows = None
        if views.shift is not None:
            rows = torch.from_numpy(views.shift).to(device, non_blocking=True).repeat(1, self.size)[:, None, :]
        return self._normalize(out, mean, rows).to(self.dtype)

    def crop_in_loop(self, images: Tensor, views: ViewParams) -> Tensor:
        """Make the same views image by image: on a CPU, strided copies are faster than a gather."""
        out = torch.empty(len(images), self.size, self.size, 3, dtype=self.dtype)
        view = torch.empty(self.size, self.size, 3)
        rows = None if views.shift is None else torch.from_numpy(np.tile(views.shift, self.size))
        for i, (top, left) in enumerate(views.offsets.tolist()):
            window = (slice(top, top + self.size), slice(left, left + self.size))
            crop, mean = images[i][window], self.mean[window] if self.mean_at_crop else self.central_mean
            if views.flips[i]:
                crop, mean = crop.flip(1), mean.flip(1) if self.mean_at_crop else mean
            view.copy_(crop)
            out[i].copy_(self._normalize(view, mean, None if rows is None else rows[i]))
        return out

    def _normalize(self, out: Tensor, mean: Tensor, shift: Tensor | None) -> Tensor:
        """Subtract the mean, add the color shift and divide, in place.

        `shift` is repeated along a row of pixels: adding three numbers at a time is slow on a CPU.
        """
        out -= mean
        divisor = self.recipe.input_divisor
        if shift is not None:
            out.flatten(-2).add_(shift)
            divisor *= self.recipe.color_shift_divide
        if divisor != 1:
            out /= divisor
        return out
