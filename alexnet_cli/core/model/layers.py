"""The layers around the convolutions: activation (3.1), response normalization (3.3), overlapping pooling (3.4),
dropout (4.2), fully connected layers without cross-talk (3.2).

Each maps N x C x H x W (dropout, fully connected layers: N x C) to the same kind; towers lie side by side in C, tower 1
first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli.core.model import response_norm
from alexnet_cli.core.model.architecture import POOL_STRIDE, NormSpec
from alexnet_cli.core.model.kernels import kernels_for
from alexnet_cli.recipe import Recipe


class TowerLinear(nn.Linear):
    """A fully connected layer without cross-talk: units see the inputs of their own tower, as in a grouped convolution.

    The weights are units x inputs of one tower; the units are those of the towers `numbers`, counted in the input.
    """

    def __init__(self, inputs: int, units: int, numbers: range) -> None:
        super().__init__(inputs, units)
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        """N x towers*inputs -> N x units."""
        outputs, units = [], self.out_features // len(self.numbers)
        for place, number in enumerate(self.numbers):  # not `chunk`, which torch.fx cannot trace
            own, rows = (
                x.narrow(-1, number * self.in_features, self.in_features),
                slice(place * units, (place + 1) * units),
            )
            outputs.append(functional.linear(own, self.weight[rows], self.bias[rows]))
        return torch.cat(outputs, -1)


class ResponseNorm(nn.Module):
    """Local response normalization (section 3.3).

    With `relu` (across maps only) it applies the ReLU before it as well, which saves a pass over memory.
    """

    def __init__(
        self,
        spec: NormSpec,
        *,
        relu: bool = False,
        function: Callable[..., Tensor] = response_norm.normalize_fast,
    ) -> None:
        """`function` computes it across maps: `normalize_fast`, or its twin `normalize_plain`."""
        super().__init__()
        self.spec, self.relu = spec, relu
        self.function = function  # an attribute, so that `torch.compile` can skip it

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape and dtype; computes in float32. May overwrite x."""
        kind, size, k, alpha, beta, groups = self.spec
        if kind == "within-map":
            return within_map(x, size, k, alpha, beta)
        return self.function(x, size, k, alpha, beta, groups, self.relu)


def within_map(x: Tensor, size: int, k: float, alpha: float, beta: float) -> Tensor:
    """Normalize by the squares in a size x size window of the same map (`rnorm` in the authors' code)."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))  # the squares overflow float16; float64 stays
    mean = functional.avg_pool2d(values.square(), size, 1, size // 2, count_include_pad=True)
    return (values * (k + alpha * size**2 * mean).pow(-beta)).to(x.dtype)


def make_activation(recipe: Recipe, *, inplace: bool = False) -> nn.Module:
    """The nonlinearity of layers 1 to 7 (section 3.1). With `inplace`, ReLU overwrites its input."""
    if recipe.activation == "relu":
        return nn.ReLU(inplace)
    return nn.Tanh() if recipe.activation == "tanh" else nn.Sigmoid()


def make_pooling(recipe: Recipe, *, ceil: bool) -> nn.MaxPool2d:
    """Max pooling, 3 x 3 at stride 2 (section 3.4). A window over the edge is clipped if `ceil`, else left out."""
    return nn.MaxPool2d(recipe.pool_size, POOL_STRIDE, ceil_mode=ceil)


class Dropout(nn.Module):
    """Dropout of layers 6 and 7 (section 4.2). In evaluation all units are used, times 1 - p (unscaled if inverted).

    A mask depends on the seed, the step, the index of the image in the whole batch and of the unit in the whole layer,
    so it is the same in every placement. `draw` sets the state of a step, a tensor that compiled code reads each time.
    """

    state: Tensor

    def __init__(self, recipe: Recipe, salt: int, first_unit: int = 0) -> None:
        super().__init__()
        self.p, self.inverted = recipe.dropout, recipe.dropout_inverted
        self.salt, self.first_unit = salt, first_unit
        # Each rank has its own state: DDP must not broadcast buffers.
        self.register_buffer("state", torch.zeros(3, dtype=torch.int32), persistent=False)

    def draw(self, seed: int, step: int, first_row: int = 0) -> None:
        """Set the masks of a step. `first_row` is the index of the first image in the whole batch."""
        # A hash, since with similar keys the masks of adjacent steps would be shifted copies of each other.
        digest = hashlib.blake2b(f"{seed} {step} {self.salt}".encode(), digest_size=8).digest()
        self.state.copy_(dropout_state(int.from_bytes(digest, "little"), first_row), non_blocking=True)

    def forward(self, x: Tensor) -> Tensor:
        """N x units -> N x units."""
        if self.p == 0:
            return x
        if not self.training:
            return x if self.inverted else x * (1 - self.p)
        kernels = kernels_for(x.device)
        function = kernels.fused_dropout if kernels else dropout_plain
        out: Tensor = function(x, self.state, self.p, 1 / (1 - self.p) if self.inverted else 1.0, self.first_unit)
        return out


def dropout_plain(x: Tensor, state: Tensor, p: float, scale: float, first_unit: int) -> Tensor:
    """Set x, rows x units, to zero with probability p, and multiply the rest by `scale`."""
    keep = hash_uniform(state, x.shape[0], x.shape[1], first_unit) >= p
    return x * keep if scale == 1 else x * keep * scale


def dropout_state(key: int, first_row: int) -> Tensor:
    """int32 of 3: low and high half of a 64-bit key, and the first row of the batch."""
    return torch.tensor([_int32(key), _int32(key >> 32), first_row], dtype=torch.int32)


def hash_uniform(state: Tensor, rows: int, units: int, first_unit: int) -> Tensor:
    """Uniform float32 in [0, 1), rows x units, from integer hashes, which are the same on every device."""
    low, high, first_row = state
    row = torch.arange(rows, device=state.device, dtype=torch.int32).unsqueeze(1) + first_row
    unit = torch.arange(first_unit, first_unit + units, device=state.device, dtype=torch.int32)
    bits = _mix(_mix(row + low) ^ (unit * _int32(0x9E3779B1) + high))
    return (bits & 0xFFFFFF).float() * 2.0**-24


def _mix(h: Tensor) -> Tensor:
    """A 32-bit integer hash (shift, multiply, shift, multiply, shift)."""
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
    h = (h ^ (h >> 15 & 0x1FFFF)) * _int32(0x846CA68B)
    return h ^ (h >> 16 & 0xFFFF)


def _int32(value: int) -> int:
    """The low 32 bits as a signed integer."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
