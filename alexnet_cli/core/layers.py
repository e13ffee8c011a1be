"""The layers without weights: activation (3.1), response normalisation (3.3), overlapping pooling (3.4), dropout (4.2).

Each maps N x C x H x W (dropout N x C) to the same kind; towers lie side by side in C, tower 1 first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli.core import response_norm
from alexnet_cli.recipe import Recipe

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,  # in place: the input is a convolution's output, which nobody else needs
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

# Net #145 normalised once more within each map of stage 2: layer "cnorm2" of its configuration.
WITHIN_SIZE, WITHIN_ALPHA, WITHIN_BETA = 5, 1e-3, 0.75


class ResponseNorm(nn.Module):
    """Local response normalisation (section 3.3) as the recipe says, inside each of `towers` towers.

    With `relu` it does the work of an activation before it too; only across maps.
    """

    def __init__(self, recipe: Recipe, towers: int, *, relu: bool = False) -> None:
        super().__init__()
        self.function, self.relu = response_norm.fast, relu
        self.kind, self.size, self.k, self.beta = recipe.lrn, recipe.lrn_size, recipe.lrn_k, recipe.lrn_beta
        self.towers = 1 if recipe.lrn_joint else towers
        # Alpha is meant for inputs in 0..255: activations shrink with the input, their squares twice.
        self.alpha = recipe.lrn_alpha * recipe.input_divisor**2
        if recipe.lrn_alpha_divided:
            self.alpha /= self.size if self.kind == "across-maps" else self.size**2

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape and dtype; float32 inside whatever the dtype. May reuse x's memory."""
        if self.kind == "none":
            return x
        if self.kind == "within-map":
            return within_map(x, self.size, self.k, self.alpha, self.beta)
        return self.function(x, self.size, self.k, self.alpha, self.beta, self.towers, self.relu)


def within_map(x: Tensor, size: int, k: float, alpha: float, beta: float) -> Tensor:
    """Normalise by the squares in the size x size window around a pixel of the same map (the code's `rnorm`)."""
    values = x.float()
    mean = functional.avg_pool2d(values.square(), size, 1, size // 2, count_include_pad=True)
    return (values * (k + alpha * size**2 * mean).pow(-beta)).to(x.dtype)


class WithinMapNorm(nn.Module):
    """The extra normalisation of net #145 in stage 2; not in the paper's text."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.alpha = WITHIN_ALPHA * recipe.input_divisor**2 / WITHIN_SIZE**2

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape and dtype."""
        return within_map(x, WITHIN_SIZE, 1.0, self.alpha, WITHIN_BETA)


class Activation(nn.Module):
    """The nonlinearity of layers 1 to 7 (section 3.1)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.function = ACTIVATIONS[recipe.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape; may reuse x's memory."""
        return self.function(x)


class OverlappingPooling(nn.MaxPool2d):
    """Max pooling, 3 x 3 at stride 2 (section 3.4); windows over the edge are clipped, as in the authors' code."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.pool_size, stride=2, ceil_mode=True)


class Dropout(nn.Module):
    """Drop units of layers 6 and 7 (section 4.2); at test time use all, times 1 - p (or nothing, if inverted).

    Whether a unit is dropped depends on the step, the image's place in the whole batch and the unit's place in the
    whole layer, and on nothing else: not on devices, their number or their order. `draw` says where we are; it is
    kept in a tensor, which compiled code and captured graphs read anew at every step.
    """

    words: Tensor

    def __init__(self, recipe: Recipe, salt: int, first_unit: int = 0) -> None:
        super().__init__()
        self.p, self.inverted, self.salt, self.first_unit = (
            recipe.dropout,
            recipe.dropout_inverted,
            salt,
            first_unit,
        )
        # Each process of several has its own: whoever copies the network to others must leave buffers out.
        self.register_buffer("words", torch.zeros(3, dtype=torch.int32), persistent=False)

    def draw(self, seed: int, step: int, first_row: int = 0) -> None:
        """Take the masks of this step, for a batch whose first image is `first_row` of the whole."""
        # Keys of neighbouring steps must have nothing in common, or their masks are each other's, shifted.
        digest = hashlib.blake2b(f"{seed} {step} {self.salt}".encode(), digest_size=8).digest()
        self.words.copy_(words(int.from_bytes(digest, "little"), first_row), non_blocking=True)

    def forward(self, x: Tensor) -> Tensor:
        """N x units -> N x units."""
        if self.p == 0:
            return x
        if not self.training:
            return x if self.inverted else x * (1 - self.p)
        keep = hashed(self.words, x.shape[0], x.shape[1], self.first_unit) >= self.p
        return x * keep * (1 / (1 - self.p)) if self.inverted else x * keep


def words(key: int, first_row: int) -> Tensor:
    """Where `hashed` starts, in three 32-bit words: low and high half of a key, and the number of the first row."""
    return torch.tensor([_int32(key), _int32(key >> 32), first_row], dtype=torch.int32)


def hashed(start: Tensor, rows: int, units: int, first_unit: int) -> Tensor:
    """Float32 rows x units, uniform in [0, 1), from integers alone, so that every device finds the same numbers."""
    low, high, first_row = start
    row = torch.arange(rows, device=start.device, dtype=torch.int32).unsqueeze(1) + first_row
    unit = torch.arange(first_unit, first_unit + units, device=start.device, dtype=torch.int32)
    bits = _mix(_mix(row + low) ^ (unit * _int32(0x9E3779B1) + high))
    return (bits & 0xFFFFFF).float() * 2.0**-24


def _mix(h: Tensor) -> Tensor:
    """A 32-bit integer hash (shift, multiply, shift, multiply, shift): every input bit reaches every output bit."""
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
    h = (h ^ (h >> 15 & 0x1FFFF)) * _int32(0x846CA68B)
    return h ^ (h >> 16 & 0xFFFF)


def _int32(value: int) -> int:
    """The low 32 bits as a signed integer."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
