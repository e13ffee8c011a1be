"""Local response normalization (section 3.3) across adjacent maps: the definition, and a fast form.

    y_i = x_i / (k + alpha * S_i) ** beta,   S_i = sum of x_j ** 2 over the `size` maps around i, inside its tower

PyTorch's operator takes longer than all convolutions together. The fast form has its own backward pass, which keeps
only the input, and works on a block of images at a time so that intermediate results stay in the cache. With
channels-last memory the sum over maps is a sum of shifted rows; zeros between towers separate the sums. On a GPU it is
a Triton kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alexnet_cli.core.model.kernels import kernels_for

CPU_BLOCK = 1_000_000  # values per block: smaller blocks cost more calls, larger ones do not fit the cache


def normalize_plain(
    x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool = False
) -> Tensor:
    """The definition, the twin of `normalize_fast`: (N x) C x H x W -> the same shape and dtype; after ReLU if `relu`.

    Differentiable to any order, and every tool that traces or transforms PyTorch code understands it. Multiplying by
    the square root of alpha before squaring keeps float16 finite.
    """
    x = torch.relu(x) if relu else x
    squares = (x * math.sqrt(alpha)).square().unflatten(-3, (towers, -1))
    padded = functional.pad(squares, (0, 0, 0, 0, size // 2, size // 2))
    maps = squares.shape[-3]
    total = padded.narrow(-3, 0, maps)
    for first in range(1, size):  # not `unfold`, whose gradient is slow, with a warning, under `torch.func.vmap`
        total = total + padded.narrow(-3, first, maps)
    return x * (k + total.flatten(-4, -3)).pow(-beta)


def normalize_fast(
    x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool = False
) -> Tensor:
    """Equal to `normalize_plain` in values and gradients, but faster. May overwrite x if `relu`."""
    if not len(x):
        return x
    kernels = kernels_for(x.device)
    function = kernels.fused_response_norm if kernels else _AcrossMaps.apply
    out: Tensor = function(x, size, k, alpha, beta, towers, relu)
    return out


class _Workspace:
    """Float32 buffers for a block of images: pixels x towers x maps, and a row in which windows are summed.

    In the row, zeros separate the towers, so that most additions run over it from end to end.
    """

    def __init__(self, x: Tensor, images: int, size: int, k: float, towers: int) -> None:
        pixels, maps = images * x.shape[2] * x.shape[3], x.shape[1] // towers
        self.half, self.maps, self.shape = size // 2, maps, (pixels, towers, maps)
        self.padded = (pixels, towers, maps + size - 1)
        self.row = x.new_zeros(math.prod(self.padded), dtype=torch.float32)
        self.pairs, self.total = torch.empty_like(self.row), torch.empty_like(self.row)
        self.sums, self.scale, self.x, self.grad = (x.new_empty(self.shape, dtype=torch.float32) for _ in range(4))
        self.k = x.new_full((), k, dtype=torch.float32)

    @property
    def inner(self) -> Tensor:
        """The part of `row` between its zeros: the input of `window_sums`."""
        return self.row.view(self.padded)[..., self.half : self.half + self.maps]

    def window_sums(self) -> Tensor:
        """Sums over `size` adjacent maps of `inner`. Pairs are added first: three additions for five maps."""
        if self.half == 0:
            return self.sums.copy_(self.inner)
        total, end = self.pairs, len(self.row) - 1
        torch.add(self.row[:-1], self.row[1:], out=total[:end])
        for first in range(2, 2 * self.half, 2):
            torch.add(total[: end - first], self.pairs[first:end], out=self.total[: end - first])
            total = self.total
        before, last = total.view(self.padded)[..., : self.maps], self.row.view(self.padded)[..., 2 * self.half :]
        return torch.add(before, last, out=self.sums)

    def denominators(self, x: Tensor, alpha: float) -> Tensor:
        """k + alpha * S of a block of images."""
        torch.mul(x, x, out=self.inner)
        return torch.add(self.k, self.window_sums(), alpha=alpha, out=self.sums)

    def powers(self, base: Tensor, beta: float) -> Tensor:
        """base ** -beta; for the paper's 0.75 by two square roots, four times as fast as pow."""
        if beta == 0.75:
            return torch.rsqrt(torch.rsqrt(base, out=self.scale), out=self.scale).div_(base)
        return torch.pow(base, -beta, out=self.scale)

    def load(self, block: Tensor, into: Tensor) -> Tensor:
        """The block as float32; copied into `into` only if it has another dtype."""
        block = block.view(self.shape)
        return block if block.dtype == torch.float32 else into.copy_(block)


def _blocks(x: Tensor, images: int) -> tuple[Tensor, ...]:
    """N x C x H x W as blocks of images with the maps innermost; views if x is channels-last."""
    blocks: tuple[Tensor, ...] = x.permute(0, 2, 3, 1).contiguous().split(images)
    return blocks


def _images_at_once(x: Tensor) -> int:
    """Images per block: on a CPU the largest divisor of the batch that fits the cache, elsewhere the whole batch."""
    n = x.shape[0]
    if x.device.type != "cpu":
        return n
    fitting = max(1, CPU_BLOCK * n // max(1, x.numel()))
    return next(images for images in range(min(n, fitting), 0, -1) if n % images == 0)


class _AcrossMaps(torch.autograd.Function):
    """ReLU in place if `relu`, then normalization, with one backward through both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool) -> Tensor:
        x = torch.relu_(x) if relu else x
        images = _images_at_once(x)
        work = _Workspace(x, images, size, k, towers)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        for block, y in zip(_blocks(x, images), out.permute(0, 2, 3, 1).split(images), strict=True):
            values = work.load(block, work.x)
            scale = work.powers(work.denominators(values, alpha), beta)
            torch.mul(values, scale, out=y.view(work.shape))
        ctx.save_for_backward(x)
        ctx.settings, ctx.relu = (size, k, alpha, beta, towers), relu
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dx = g * D^-beta - 2 alpha beta x * window_sums(g * x * D^(-beta - 1))."""
        (x,), (size, k, alpha, beta, towers) = ctx.saved_tensors, ctx.settings
        images = _images_at_once(x)
        work = _Workspace(x, images, size, k, towers)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        parts = (_blocks(x, images), _blocks(grads[0], images), out.permute(0, 2, 3, 1).split(images))
        for block, grad_block, dx in zip(*parts, strict=True):
            values, grad = work.load(block, work.x), work.load(grad_block, work.grad)
            base = work.denominators(values, alpha)
            direct = work.powers(base, beta).mul_(grad)
            torch.div(direct, base, out=base)
            torch.mul(base, values, out=work.inner)
            if ctx.relu:
                direct = torch.ops.aten.threshold_backward.grad_input(direct, values, 0, grad_input=direct)
            torch.addcmul(direct, values, work.window_sums(), value=-2 * alpha * beta, out=dx.view(work.shape))
        return out, None, None, None, None, None, None
