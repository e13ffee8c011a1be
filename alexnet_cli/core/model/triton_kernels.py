"""The Triton kernels of the GPU path: response normalization (section 3.3) and the update rule (section 5).

Each has a plain twin in PyTorch with the same result: `response_norm.normalize_plain` and `optim.update`.
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
except ImportError:  # not on every system; needed only on a GPU
    triton = None

NORM_BLOCK = 256  # values per program of 128 threads: at two bytes each, a warp reads one cache line
UPDATE_BLOCK = 1024  # values per program of 128 threads: each thread reads 16 bytes twice from each array

_jit: Callable[[Any], Any] = triton.jit if triton else lambda function: function


# Response normalization. Each lane computes one value and reads the maps around it, which neighboring lanes read too:
# each value comes from memory once, then from the cache. Values are taken in memory order, in which the next map is
# `inner` values further: 1 if channels-last, height x width if contiguous. Any number of maps works. The backward pass
# keeps only x and computes the denominators again.


@_jit
def _here(inner: tl.tensor, maps: tl.constexpr, block: tl.constexpr) -> Any:
    """Memory offsets of a program's values, and the index of the map within its tower that each belongs to."""
    here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return here, (here // inner % maps).to(tl.int32)


@_jit
def _near(
    x: tl.tensor, here: tl.tensor, map_: tl.tensor, count: tl.tensor, inner: tl.tensor,
    shift: tl.constexpr, maps: tl.constexpr, relu: tl.constexpr,
) -> Any:  # fmt: skip
    """Load the values `shift` maps further as float32, after ReLU if `relu`; zeros beyond the edge of the tower."""
    inside = (here < count) & (map_ + shift >= 0) & (map_ + shift < maps)
    values = tl.load(x + here + shift * inner, inside, 0.0).to(tl.float32)
    if relu:
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return values


@_jit
def _powers(base: tl.tensor, beta: tl.constexpr) -> Any:
    """Base ** -beta and base ** (-beta - 1); for the paper's 0.75 by two square roots."""
    if beta == 0.75:
        root = tl.rsqrt(base)
        power = root * tl.sqrt(root)
        return power, power * root * root
    else:  # noqa: RET505 - Triton needs the `else` to compile both returns
        log = tl.log2(base)
        return tl.exp2(-beta * log), tl.exp2(-(beta + 1) * log)


@_jit
def _norm_forward_kernel(
    x: tl.tensor, out: tl.tensor, count: tl.tensor, inner: tl.tensor, k: tl.tensor, alpha: tl.tensor,
    beta: tl.constexpr, half: tl.constexpr, maps: tl.constexpr, relu: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    here, map_ = _here(inner, maps, block)
    total = tl.zeros([block], tl.float32)
    for shift in tl.static_range(-half, half + 1):
        near = _near(x, here, map_, count, inner, shift, maps, relu)
        total += near * near
    power, _ = _powers(k + alpha * total, beta)
    result = _near(x, here, map_, count, inner, 0, maps, relu) * power
    tl.store(out + here, result.to(out.dtype.element_ty), here < count)


@_jit
def _norm_backward_kernel(
    x: tl.tensor, grad: tl.tensor, out: tl.tensor, count: tl.tensor, inner: tl.tensor, k: tl.tensor, alpha: tl.tensor,
    beta: tl.constexpr, half: tl.constexpr, maps: tl.constexpr, relu: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """dL/dx = g * D^-beta - 2 alpha beta x * sum over the window of g * x * D^(-beta - 1).

    The compiler merges repeated loads.
    """
    here, map_ = _here(inner, maps, block)
    direct, indirect = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    for center in tl.static_range(-half, half + 1):
        total = tl.zeros([block], tl.float32)
        for shift in tl.static_range(center - half, center + half + 1):
            near = _near(x, here, map_, count, inner, shift, maps, relu)
            total += near * near
        power, next_power = _powers(k + alpha * total, beta)
        g = _near(grad, here, map_, count, inner, center, maps, False)
        indirect += g * next_power * _near(x, here, map_, count, inner, center, maps, relu)
        if center == 0:
            direct = g * power
    values = _near(x, here, map_, count, inner, 0, maps, relu)
    result = direct - 2 * alpha * beta * values * indirect
    if relu:
        result = tl.where(values == 0, 0.0, result)
    tl.store(out + here, result.to(out.dtype.element_ty), here < count)


def response_norm_forward(x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool) -> Tensor:
    """`response_norm.normalize_plain` without its gradient: N x C x H x W in and out, in x's memory format."""
    x, inner = _in_order(x)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _norm_forward_kernel[_programs(x)](
            x, out, x.numel(), inner, k, alpha, beta, size // 2, x.shape[1] // towers, relu, NORM_BLOCK
        )
    return out


def response_norm_backward(
    x: Tensor, grad: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool
) -> Tensor:
    """The gradient of x, in x's memory format; `grad` is the gradient of the output, in any format."""
    x, inner = _in_order(x)
    grad = grad.contiguous(memory_format=torch.channels_last if inner == 1 else torch.contiguous_format)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _norm_backward_kernel[_programs(x)](
            x, grad, out, x.numel(), inner, k, alpha, beta, size // 2, x.shape[1] // towers, relu, NORM_BLOCK
        )
    return out


def _programs(x: Tensor) -> tuple[int]:
    """Number of programs for x's values; at least one, since a GPU cannot launch none for an empty batch."""
    return (max(1, -(-x.numel() // NORM_BLOCK)),)


def _in_order(x: Tensor) -> tuple[Tensor, int]:
    """Return x dense in memory, and the distance between adjacent maps in values."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, 1
    return x.contiguous(), x.shape[2] * x.shape[3]


def _like_x(x: Tensor, *_: object) -> Tensor:
    """A tensor like the output, without values, for torch.compile."""
    return torch.empty_like(_in_order(x)[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.settings = inputs[1:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.alexnet.response_norm_backward(*ctx.saved_tensors, grad, *ctx.settings)
    return dx, *(None for _ in ctx.settings)


# Registered with torch, so that torch.compile treats each as one operator.
_SETTINGS = "int size, float k, float alpha, float beta, int towers, bool relu"
for _name, _inputs, _function in (
    ("alexnet::response_norm", "Tensor x", response_norm_forward),
    ("alexnet::response_norm_backward", "Tensor x, Tensor grad", response_norm_backward),
):
    torch.library.define(_name, f"({_inputs}, {_SETTINGS}) -> Tensor")
    torch.library.impl(_name, ("cpu", "cuda"), _function)  # cpu: for tests with Triton's interpreter
    torch.library.register_fake(_name, _like_x)
torch.library.register_autograd("alexnet::response_norm", _differentiate, setup_context=_keep)


def fused_response_norm(
    x: Tensor, size: int, k: float, alpha: float, beta: float, towers: int, relu: bool = False
) -> Tensor:
    """The same as `response_norm.normalize_plain`, in values and gradients, in x's memory format."""
    out: Tensor = torch.ops.alexnet.response_norm(x, size, k, alpha, beta, towers, relu)
    return out


@_jit
def _update_kernel(
    weight: tl.tensor, velocity: tl.tensor, gradient: tl.tensor, count: tl.tensor,
    momentum: tl.tensor, rate: tl.tensor, pull: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """`pull` is the weight decay times the learning rate."""
    here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = here < count
    w = tl.load(weight + here, inside, 0.0)
    v = tl.load(velocity + here, inside, 0.0) * momentum
    v = v - rate * tl.load(gradient + here, inside, 0.0)
    v = v - pull * w
    tl.store(velocity + here, v, inside)
    tl.store(weight + here, w + v, inside)


@torch.no_grad()
def fused_update(
    weights: list[Tensor],
    velocity: list[Tensor],
    gradients: list[Tensor],
    momentum: float,
    rate: float,
    decay: float,
) -> None:
    """The paper's update, in place and in one pass; the twin of `optim.update`.

    Tensors are float32 and dense in memory; each velocity has the strides of its weight. The plain form makes four
    passes over weights, velocity and gradient.
    """
    for w, v, g in zip(weights, velocity, gradients, strict=True):
        if g.stride() != w.stride():
            g = torch.empty_like(w).copy_(g)
        with torch.cuda.device_of(w):
            _update_kernel[(-(-w.numel() // UPDATE_BLOCK),)](
                w, v, g, w.numel(), momentum, rate, decay * rate, UPDATE_BLOCK
            )


@functools.cache
def unavailable_reason(index: int) -> str:
    """Why the kernels cannot run on this GPU (no Triton, no C compiler, too old), or "". Tries once per process."""
    if triton is None:
        return "Triton is not installed"
    device = torch.device("cuda", index)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(1, 8, 2, 2, device=device, dtype=dtype)
            y = response_norm_forward(x, 5, 1.0, 1.0, 0.75, 2, True)
            response_norm_backward(x, y, 5, 1.0, 1.0, 0.75, 2, True).sum().item()
        weight, velocity, gradient = ([torch.ones(3, device=device)] for _ in range(3))
        fused_update(weight, velocity, gradient, 0.9, 0.01, 0.0005)
        weight[0].sum().item()
    except Exception as error:  # errors of Triton, the C compiler and the driver share no other base class
        return (str(error) or type(error).__name__).partition("\n")[0]
    return ""
