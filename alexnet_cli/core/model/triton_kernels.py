"""The Triton kernels of the GPU path: response normalization (section 3.3), dropout (4.2), the update rule (5).

Each has a plain twin in PyTorch with the same result: `response_norm.normalize_plain`, `layers.dropout_plain`,
`optim.update`. `kernels.kernels_for` chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # not on every system; needed only on a GPU
    triton = None

BLOCK = 256  # values per program of 128 threads: at two bytes each, a warp reads one cache line
UPDATE_BLOCK = 1024  # the same for the update: each thread reads 16 bytes twice from each array

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
            x, out, x.numel(), inner, k, alpha, beta, size // 2, x.shape[1] // towers, relu, BLOCK
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
            x, grad, out, x.numel(), inner, k, alpha, beta, size // 2, x.shape[1] // towers, relu, BLOCK
        )
    return out


def _programs(x: Tensor) -> tuple[int]:
    """Number of programs for x's values; at least one, since a GPU cannot launch none for an empty batch."""
    return (max(1, -(-x.numel() // BLOCK)),)


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


# Dropout. Its gradient is the same function of the output's gradient, so backward draws the mask again.


@_jit
def _mix(h: tl.tensor) -> tl.tensor:
    """`layers._mix`, with unsigned integers."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@_jit
def _dropout_kernel(
    x: tl.tensor, state: tl.tensor, out: tl.tensor, count: tl.tensor, units: tl.tensor, first_unit: tl.tensor,
    p: tl.tensor, scale: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """Draw the mask as `layers.hash_uniform` does, and apply it."""
    here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    row, unit = (here // units).to(tl.uint32), (here % units + first_unit).to(tl.uint32)
    low, high = tl.load(state).to(tl.uint32), tl.load(state + 1).to(tl.uint32)
    first_row = tl.load(state + 2).to(tl.uint32)
    bits = _mix(_mix(row + first_row + low) ^ (unit * 0x9E3779B1 + high))
    keep = (bits & 0xFFFFFF).to(tl.float32) * (1 / 0x1000000) >= p
    values = tl.load(x + here, here < count, 0.0).to(tl.float32)
    result = values * keep.to(tl.float32) * scale  # not `where`, since the plain form keeps NaN
    tl.store(out + here, result.to(out.dtype.element_ty), here < count)


def _dropout(x: Tensor, state: Tensor, p: float, scale: float, first_unit: int) -> Tensor:
    """`layers.dropout_plain` without its gradient."""
    x = x.contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _dropout_kernel[_programs(x)](x, state, out, x.numel(), x.shape[1], first_unit, p, scale, BLOCK)
    return out


def _keep_state(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.settings = inputs[2:]


def _drop_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return fused_dropout(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


torch.library.define("alexnet::dropout", "(Tensor x, Tensor state, float p, float scale, int first_unit) -> Tensor")
torch.library.impl("alexnet::dropout", ("cpu", "cuda"), _dropout)
torch.library.register_fake("alexnet::dropout", lambda x, *_: x.new_empty(x.shape))
torch.library.register_autograd("alexnet::dropout", _drop_gradient, setup_context=_keep_state)


def fused_dropout(x: Tensor, state: Tensor, p: float, scale: float, first_unit: int) -> Tensor:
    """The same as `layers.dropout_plain`, to the bit."""
    out: Tensor = torch.ops.alexnet.dropout(x, state, p, scale, first_unit)
    return out


# The update of all parameters, in one launch. A table says where they lie, since autograd allocates new gradients at
# every step, or DDP puts them into its buckets: a flat buffer of our own would cost two more passes over them.


@_jit
def _pointer(entry: tl.tensor, alignment: tl.constexpr) -> tl.tensor:
    """The address in an entry of the table, a multiple of `alignment` bytes, as a pointer to float32."""
    return tl.multiple_of(tl.load(entry).to(tl.int64).to(tl.pointer_type(tl.float32)), alignment)


@_jit
def _update_kernel(
    table: tl.tensor, tensors: tl.tensor, momentum: tl.tensor,
    columns: tl.constexpr, most: tl.constexpr, alignment: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Each program updates a block of one of at most `most` tensors; `fused_update` explains the table."""
    program, index = tl.program_id(0), tl.arange(0, most)
    first_programs = tl.load(table + index * columns, index < tensors, float("inf"))
    row = table + (tl.sum((first_programs <= program).to(tl.int32)) - 1) * columns
    here = (program - tl.load(row).to(tl.int64)) * block + tl.arange(0, block)
    inside = here < tl.multiple_of(tl.load(row + 1).to(tl.int64), alignment // 4)
    weight, velocity = _pointer(row + 2, alignment) + here, _pointer(row + 3, alignment) + here
    gradient = _pointer(row + 4, alignment) + here
    rate, pull = tl.load(row + 5).to(tl.float32), tl.load(row + 6).to(tl.float32)
    w = tl.load(weight, inside, 0.0)
    v = tl.load(velocity, inside, 0.0) * momentum
    v = v - rate * tl.load(gradient, inside, 0.0)
    v = v - pull * w
    tl.store(velocity, v, inside)
    tl.store(weight, w + v, inside)


@torch.no_grad()
def fused_update(groups: Mapping[tuple[float, float], list[tuple[Tensor, Tensor, Tensor]]], momentum: float) -> None:
    """The paper's update, in place, in one launch and one pass; the twin of `optim.update`, which makes four passes.

    `groups` maps rate and decay to weights, velocities and gradients: float32, dense in memory and on one device; each
    velocity has the strides of its weight.

    The table has a row per weight: first program, number of values, addresses of weight, velocity and gradient, rate,
    decay times rate. It is float64, which holds integers below 2^53, and so addresses, exactly.
    """
    updates = [
        (w, v, g if g.stride() == w.stride() else torch.empty_like(w).copy_(g), rate, decay)
        for (rate, decay), tensors in groups.items()
        for w, v, g in tensors
    ]
    if not updates:
        return
    device = updates[0][0].device
    rows, programs = [], 0
    for w, v, g, rate, decay in updates:
        assert all((t.dtype, t.device) == (torch.float32, device) for t in (w, v, g)), "addresses have no type"
        rows.append((programs, w.numel(), w.data_ptr(), v.data_ptr(), g.data_ptr(), rate, decay * rate))
        programs += -(-w.numel() // UPDATE_BLOCK)
    # A thread can read four values at once if addresses and sizes allow it.
    alignment = 16 if all(row[1] % 4 == 0 and not any(address % 16 for address in row[2:5]) for row in rows) else 4
    table = torch.tensor(rows, dtype=torch.float64).to(device, non_blocking=True)
    with torch.cuda.device_of(table):
        _update_kernel[(programs,)](
            table, len(rows), momentum, len(rows[0]), triton.next_power_of_2(len(rows)), alignment, UPDATE_BLOCK
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
            fused_dropout(y.flatten(1), torch.zeros(3, dtype=torch.int32, device=device), 0.5, 1.0, 0).sum().item()
        weight, velocity, gradient = (torch.ones(3, device=device) for _ in range(3))
        fused_update({(0.01, 0.0005): [(weight, velocity, gradient)]}, 0.9)
        weight.sum().item()
    except Exception as error:  # errors of Triton, the C compiler and the driver share no other base class
        return (str(error) or type(error).__name__).partition("\n")[0]
    return ""
