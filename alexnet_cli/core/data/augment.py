"""From decoded pictures to the network's input, on the device and a batch at a time (sections 2 and 4.1).

Training takes a random crop, perhaps mirrored, and shifts its color along the principal axes of RGB; testing takes
the center, or ten views: four corners and center and their mirrors. What is drawn for a picture depends on the seed,
the epoch and the picture's row in the data set, never on who loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alexnet_cli.recipe import SIDE, Recipe


@dataclass(frozen=True)
class AugmentParams:
    """The random draws of one epoch, by row: offsets N x 2 (down, right), flips N, color N x 3 (standard normal)."""

    offsets: npt.NDArray[np.int64]
    flips: npt.NDArray[np.bool_]
    color: npt.NDArray[np.float32]

    @classmethod
    def draw(cls, rows: int, recipe: Recipe, epoch: int, order: npt.NDArray[np.int64] | None = None) -> AugmentParams:
        """Draw for every row of the training set; `epoch` counts from 1. What the recipe switches off is neutral.

        `order` is the order of the epoch, in which `crop_group` rows, one after the other, share crop and reflection.
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


class Augment:
    """Turns uint8 N x 256 x 256 x 3 into the network's N x 3 x S x S (channels-last memory), computed in float32."""

    def __init__(
        self,
        recipe: Recipe,
        mean_image: npt.NDArray[np.float32],
        color_std: npt.NDArray[np.float32] | None,
        color_axes: npt.NDArray[np.float32] | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`mean_image` 3 x 256 x 256; `color_axes` 3 x 3, axes in columns, with deviations `color_std`, 0..255.

        `dtype` of the views: where layer 1 computes in bfloat16, it would convert them, a whole batch in memory.
        """
        self.recipe, self.device, self.size, self.dtype = recipe, device, recipe.input_size, dtype
        mean = torch.from_numpy(np.ascontiguousarray(mean_image.transpose(1, 2, 0)))
        if recipe.mean == "rgb":
            mean = mean.mean((0, 1)).expand(SIDE, SIDE, 3)
        self.mean = mean.contiguous().to(device)
        low = (SIDE - self.size) // 2
        self.center = low
        self.mean_at_crop = recipe.mean == "image-at-crop"
        self.central_mean = self.mean[low : low + self.size, low : low + self.size].contiguous()
        axes = color_axes * color_std if color_axes is not None and color_std is not None else np.zeros((3, 3))
        self.axes = np.asarray(axes, dtype=np.float32)

    def training_views(self, images: Tensor, rows: npt.NDArray[np.int64], draws: AugmentParams, epoch: int) -> Tensor:
        """The views of a training batch, `rows` saying which row each image is."""
        shift = self._shift(draws.color[rows], epoch)
        return self._views(images, draws.offsets[rows], draws.flips[rows], shift)

    def center_view(self, images: Tensor) -> Tensor:
        """The center of every image."""
        n = len(images)
        return self._views(images, np.full((n, 2), self.center), np.zeros(n, bool), None)

    def ten_views(self, images: Tensor) -> Iterator[Tensor]:
        """Ten batches: top left, top right, bottom left, bottom right, center; then their mirrors (section 4.1)."""
        n, edge = len(images), SIDE - self.size
        images = images.to(self.device)  # once, not for every view
        for flip in (False, True):
            for corner in ((0, 0), (0, edge), (edge, 0), (edge, edge), (self.center, self.center)):
                yield self._views(images, np.full((n, 2), corner), np.full(n, flip), None)

    def _shift(self, normals: npt.NDArray[np.float32], epoch: int) -> npt.NDArray[np.float32] | None:
        """N x 3: what section 4.1 adds to every pixel, sum over axes of deviation times a draw from N(0, 0.1)."""
        recipe = self.recipe
        if recipe.color_shift == 0 or (recipe.color_shift_epochs and epoch > recipe.color_shift_epochs):
            return None
        shift: npt.NDArray[np.float32] = np.float32(recipe.color_shift) * (normals @ self.axes.T)
        return shift

    def _views(
        self,
        images: Tensor,
        offsets: npt.NDArray[np.int64],
        flips: npt.NDArray[np.bool_],
        shift: npt.NDArray[np.float32] | None,
    ) -> Tensor:
        images = images.to(self.device)  # waits, since the loader fills this buffer again before long
        make = self.crop_in_loop if self.device.type == "cpu" else self.crop_by_index
        return make(images, offsets, flips, shift).permute(0, 3, 1, 2)

    def crop_by_index(
        self,
        images: Tensor,
        offsets: npt.NDArray[np.int64],
        flips: npt.NDArray[np.bool_],
        shift: npt.NDArray[np.float32] | None,
    ) -> Tensor:
        """Views as one gather of pixels: uint8 N x 256 x 256 x 3 -> N x S x S x 3; `shift` is N x 3.

        What crosses the bus is a few bytes an image: of more than 64 kB the host would wait for the device.
        """
        device = images.device
        start = torch.from_numpy(offsets).to(device, non_blocking=True)
        mirrored = torch.from_numpy(flips).to(device, non_blocking=True)
        step = torch.arange(self.size, device=device)
        down = start[:, 0, None] + step
        right = start[:, 1, None] + torch.where(mirrored[:, None], self.size - 1 - step, step)
        pixel = down[:, :, None] * SIDE + right[:, None, :]  # one index: a GPU writes out each that it is given
        mean = self.mean.flatten(0, 1)[pixel] if self.mean_at_crop else self.central_mean
        pixel += torch.arange(len(images), device=device)[:, None, None] * SIDE**2
        out = images.flatten(0, 2)[pixel].float()
        rows = None
        if shift is not None:
            rows = torch.from_numpy(shift).to(device, non_blocking=True).repeat(1, self.size)[:, None, :]
        return self._normalize(out, mean, rows).to(self.dtype)

    def crop_in_loop(
        self,
        images: Tensor,
        offsets: npt.NDArray[np.int64],
        flips: npt.NDArray[np.bool_],
        shift: npt.NDArray[np.float32] | None,
    ) -> Tensor:
        """The same, image by image: on a CPU a strided copy beats a gather, and the rest is done in the cache."""
        out = torch.empty(len(images), self.size, self.size, 3, dtype=self.dtype)
        view = torch.empty(self.size, self.size, 3)
        rows = None if shift is None else torch.from_numpy(np.tile(shift, self.size))
        for i, (top, left) in enumerate(offsets.tolist()):
            window = (slice(top, top + self.size), slice(left, left + self.size))
            crop, mean = images[i][window], self.mean[window] if self.mean_at_crop else self.central_mean
            if flips[i]:
                crop, mean = crop.flip(1), mean.flip(1) if self.mean_at_crop else mean
            view.copy_(crop)
            out[i].copy_(self._normalize(view, mean, None if rows is None else rows[i]))
        return out

    def _normalize(self, out: Tensor, mean: Tensor, shift: Tensor | None) -> Tensor:
        """In place: less the mean, plus the color shift, over the divisor.

        `shift` is written out along a row of pixels: adding three numbers at a time is slow on a CPU.
        """
        out -= mean
        divisor = self.recipe.input_divisor
        if shift is not None:
            out.flatten(-2).add_(shift)
            divisor *= self.recipe.color_shift_divide
        if divisor != 1:
            out /= divisor
        return out
