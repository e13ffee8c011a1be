"""Local response normalisation (section 3.3) across adjacent maps: the plain definition and the fast one.

    y_i = x_i / (k + alpha * S_i) ** beta,   S_i = sum of x_j ** 2 over the `size` maps around i, inside its tower

The stock operator costs more than all convolutions together. The fast one differentiates by hand, keeps nothing
but its input for the way back, and works on one image at a time so that everything between stays in the cache.
Channels-last, the sum over maps is a sum of shifted rows; zeros between the towers keep their edges apart.
On a GPU it is a kernel of its own.
"""

from __future__ import annotations

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
        from alexnet_cli.core import response_norm_gpu

        # What is compiled is not tried first: torch.compile needs all that the kernel needs.
        if torch.compiler.is_compiling() or not response_norm_gpu.why_not(x.device.index):
            return response_norm_gpu.fused(x, size, k, alpha, beta, towers, relu)
    x = torch.relu_(x) if relu else x
    out: Tensor = _AcrossMaps.apply(x, size, k, alpha, beta, towers)
    return out


class _Scratch:
    """Float32 work space for a block of images: pixels x towers x maps, and the same with zeros at tower edges."""

    def __init__(self, x: Tensor, images: int, size: int, towers: int) -> None:
        pixels, maps = images * x.shape[2] * x.shape[3], x.shape[1] // towers
        self.size, self.maps = size, maps
        self.shape = (pixels, towers, maps)
        self.padded = x.new_zeros(pixels, towers, maps + size - 1, dtype=torch.float32)
        self.pairs = x.new_empty(pixels, towers, maps + size - 2, dtype=torch.float32)
        self.sums, self.scale, self.x, self.grad = (x.new_empty(self.shape, dtype=torch.float32) for _ in range(4))

    @property
    def inner(self) -> Tensor:
        """The part of `padded` between its zeros: write here what `window_sums` is to add up."""
        return self.padded[..., self.size // 2 : self.size // 2 + self.maps]

    def window_sums(self, out: Tensor) -> Tensor:
        """Sums over `size` adjacent maps. Pairs are added first: three additions for five maps."""
        half = self.size // 2
        if half == 0:
            return out.copy_(self.padded)
        torch.add(self.padded[..., :-1], self.padded[..., 1:], out=self.pairs)
        out.copy_(self.pairs[..., : self.maps]) if half == 1 else torch.add(
            self.pairs[..., : self.maps], self.pairs[..., 2 : 2 + self.maps], out=out
        )
        for i in range(2, half):
            out.add_(self.pairs[..., 2 * i : 2 * i + self.maps])
        return out.add_(self.padded[..., self.size - 1 :])

    def denominators(self, x: Tensor, k: float, alpha: float) -> Tensor:
        """k + alpha * S of a block."""
        torch.mul(x, x, out=self.inner)
        return self.window_sums(self.sums).mul_(alpha).add_(k)

    def powers(self, base: Tensor, beta: float) -> Tensor:
        """Base ** -beta; for the paper's 0.75 by two square roots, four times as fast as pow."""
        if beta == 0.75:
            torch.rsqrt(base, out=self.scale)
            return self.scale.mul_(self.scale.sqrt())
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
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int) -> Tensor:
        images = _images_at_once(x)
        work = _Scratch(x, images, size, towers)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        for block, y in zip(_blocks(x, images), out.permute(0, 2, 3, 1).split(images), strict=True):
            values = work.load(block, work.x)
            scale = work.powers(work.denominators(values, k, alpha), beta)
            torch.mul(values, scale, out=y.view(work.shape))
        ctx.save_for_backward(x)
        ctx.settings = (size, k, alpha, beta, towers)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dx = g * D^-beta - 2 alpha beta x * window_sums(g * x * D^(-beta - 1))."""
        (x,), (size, k, alpha, beta, towers) = ctx.saved_tensors, ctx.settings
        images = _images_at_once(x)
        work = _Scratch(x, images, size, towers)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        parts = (_blocks(x, images), _blocks(grads[0], images), out.permute(0, 2, 3, 1).split(images))
        for block, grad_block, dx in zip(*parts, strict=True):
            values, grad = work.load(block, work.x), work.load(grad_block, work.grad)
            base = work.denominators(values, k, alpha)
            direct = work.powers(base, beta).mul_(grad)
            torch.div(direct, base, out=base)
            torch.mul(base, values, out=work.inner)
            indirect = work.window_sums(work.sums).mul_(values)
            torch.add(direct, indirect, alpha=-2 * alpha * beta, out=dx.view(work.shape))
        return out, None, None, None, None, None
