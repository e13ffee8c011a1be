"""Local response normalisation (section 3.3) across adjacent maps: the plain definition and the fast one.

    y_i = x_i / (k + alpha * S_i) ** beta,   S_i = sum of x_j ** 2 over the `size` maps around i, inside its tower

The stock operator costs more than all convolutions together. The fast one differentiates by hand, keeps nothing
but its input for the way back, and works on one image at a time so that everything between stays in the cache.
Channels-last, the sum over maps is a sum of shifted rows; zeros between the towers keep their edges apart.
On a GPU it is a kernel of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CPU_BLOCK = 1_000_000  # values worked on at once: fewer would be called for too often, more would leave the caches


def plain(x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool = False) -> Tensor:
    """The definition, for tests and for devices without a better way: N x C x H x W in and out, any dtype.

    With `relu`, x is rectified first (section 3.1).
    """
    x = torch.relu(x) if relu else x
    n, c, h, w = x.shape
    squares = x.float().square().reshape(n * towers, 1, c // towers, h, w)
    padded = torch.nn.functional.pad(squares, (0, 0, 0, 0, size // 2, size // 2))
    total = sum(padded[:, :, i : i + c // towers] for i in range(size))
    assert isinstance(total, Tensor)
    scale = (k + alpha * total).pow(-beta).reshape(n, c, h, w)
    return (x.float() * scale).to(x.dtype)


def fast(x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool = False) -> Tensor:
    """The same as `plain`, in values and gradients; fastest when x is channels-last. `relu` may overwrite x."""
    if not len(x):
        return x
    if x.device.type == "cuda":
        from alexnet_cli.core import triton_kernels

        # What is compiled is not tried first: torch.compile needs all that the kernel needs.
        if torch.compiler.is_compiling() or not triton_kernels.unavailable_reason(x.device.index):
            return triton_kernels.fused_response_norm(x, size, k, alpha, beta, towers, relu)
    out: Tensor = _AcrossMaps.apply(x, size, k, alpha, beta, towers, relu)
    return out


class _Scratch:
    """Float32 work space for a block of images: pixels x towers x maps, and rows in which maps are added up.

    In a row the towers lie between zeros, and all but the last addition run over it from end to end.
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
        """The part of `row` between its zeros: write here what `window_sums` is to add up."""
        return self.row.view(self.padded)[..., self.half : self.half + self.maps]

    def window_sums(self) -> Tensor:
        """Sums over `size` adjacent maps. Pairs are added first: three additions for five maps."""
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
        """k + alpha * S of a block."""
        torch.mul(x, x, out=self.inner)
        return torch.add(self.k, self.window_sums(), alpha=alpha, out=self.sums)

    def powers(self, base: Tensor, beta: float) -> Tensor:
        """Base ** -beta; for the paper's 0.75 by two roots, four times as fast as pow."""
        if beta == 0.75:
            return torch.rsqrt(torch.rsqrt(base, out=self.scale), out=self.scale).div_(base)
        return torch.pow(base, -beta, out=self.scale)

    def load(self, block: Tensor, into: Tensor) -> Tensor:
        """The block as float32, copied only if it has to be converted."""
        block = block.view(self.shape)
        return block if block.dtype == torch.float32 else into.copy_(block)


def _blocks(x: Tensor, images: int) -> tuple[Tensor, ...]:
    """N x C x H x W as blocks of images with the maps innermost; a view if x is channels-last."""
    blocks: tuple[Tensor, ...] = x.permute(0, 2, 3, 1).contiguous().split(images)
    return blocks


def _images_at_once(x: Tensor) -> int:
    """On a CPU the largest share of the batch that fits the cache and divides it evenly; elsewhere all of it."""
    n = x.shape[0]
    if x.device.type != "cpu":
        return n
    fitting = max(1, CPU_BLOCK * n // max(1, x.numel()))
    return next(images for images in range(min(n, fitting), 0, -1) if n % images == 0)


class _AcrossMaps(torch.autograd.Function):
    """Rectifies x in place first if `relu`, and goes back through both at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool) -> Tensor:
        x = torch.relu_(x) if relu else x
        images = _images_at_once(x)
        work = _Scratch(x, images, size, k, towers)
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
        work = _Scratch(x, images, size, k, towers)
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
