"""The update rule (section 5) on a GPU: one kernel for each parameter, the twin of `optim.update`.

The rule by itself is four passes over weights, velocity and gradient; here each value is read and written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # some systems have none, and without a GPU nobody needs it
    triton = None

BLOCK = 1024  # values to a program of 128 threads: two reads of 16 bytes from each array by every thread

_jit: Callable[[Any], Any] = triton.jit if triton else lambda function: function


@_jit
def _kernel(
    weight: tl.tensor, velocity: tl.tensor, gradient: tl.tensor, count: tl.tensor,
    momentum: tl.tensor, rate: tl.tensor, pull: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """`pull` is what the decay takes off a weight in one step."""
    here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = here < count
    w = tl.load(weight + here, inside, 0.0)
    v = tl.load(velocity + here, inside, 0.0) * momentum
    v = v - rate * tl.load(gradient + here, inside, 0.0)
    v = v - pull * w
    tl.store(velocity + here, v, inside)
    tl.store(weight + here, w + v, inside)


@torch.no_grad()
def fused(
    weights: list[Tensor],
    velocity: list[Tensor],
    gradients: list[Tensor],
    momentum: float,
    rate: float,
    decay: float,
) -> None:
    """`optim.update`, in place: float32 tensors of any shape that lie densely in memory, velocity as its weight."""
    for w, v, g in zip(weights, velocity, gradients, strict=True):
        if g.stride() != w.stride():
            g = torch.empty_like(w).copy_(g)
        with torch.cuda.device_of(w):
            _kernel[(-(-w.numel() // BLOCK),)](w, v, g, w.numel(), momentum, rate, decay * rate, BLOCK)


@functools.cache
def why_not(index: int) -> str:
    """Why the kernel cannot run on this GPU (no Triton, no C compiler, too old), or "" if it can: it is tried."""
    if triton is None:
        return "Triton is not installed"
    try:
        weight, velocity, gradient = ([torch.ones(3, device=torch.device("cuda", index))] for _ in range(3))
        fused(weight, velocity, gradient, 0.9, 0.01, 0.0005)
        weight[0].sum().item()
    except Exception as error:  # Triton's, the C compiler's and the driver's have no other base in common
        return (str(error) or type(error).__name__).partition("\n")[0]
    return ""
