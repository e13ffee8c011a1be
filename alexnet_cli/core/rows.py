"""Whose images a process computes on: its own, or in the fully connected layers of a hybrid network everyone's.

"One weird trick" (Krizhevsky 2014): convolutions take most of the time and few of the weights, fully connected layers
the reverse. So each process runs the convolutions on images of its own, and its share of the units of layers 6 to 8 on
the images of all: between them the images are gathered, after them each process keeps the logits of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alexnet_cli.core.towers import Towers


@dataclass(frozen=True)
class Rows:
    """The images of every process of `columns`, or only the own ones if that is None."""

    columns: Towers | None = None

    def gather(self, x: Tensor) -> Tensor:
        """N x C -> (sum of everyone's N) x C, in the order of the processes, which is that of the batch."""
        if self.columns is None:
            return x
        gathered: Tensor = _Gather.apply(x, self.columns, self._sizes(x))
        return gathered

    def own(self, x: Tensor, like: Tensor) -> Tensor:
        """The rows that are this process's, as many as `like` has."""
        if self.columns is None:
            return x
        kept: Tensor = _Own.apply(x, self.columns, self._sizes(like))
        return kept

    def _sizes(self, x: Tensor) -> list[int]:
        """How many images each process has; the last batch need not divide. Told in memory: no GPU is waited for."""
        assert self.columns is not None
        return [int(n) for n in self.columns.gather(torch.tensor([len(x)])).flatten()]


class _Gather(torch.autograd.Function):
    """Rows of all; backward each process gets the sum of what all say of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Towers, sizes: list[int]) -> Tensor:
        ctx.columns, ctx.sizes = columns, sizes
        return _rows_of_all(columns, x, sizes, "fc6 images")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        columns, sizes = ctx.columns, ctx.sizes
        parts = gradient.new_zeros((len(sizes), max(sizes), *gradient.shape[1:]))
        for part, rows in zip(parts, gradient.split(sizes), strict=True):
            part[: len(rows)] = rows
        columns.count("fc6 images", parts[0], len(sizes) - 1)
        return columns.scatter(parts).to(gradient.dtype)[: sizes[columns.first]], None, None


class _Own(torch.autograd.Function):
    """The own rows; backward everyone's, since each process's units learn from all images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Towers, sizes: list[int]) -> Tensor:
        ctx.columns, ctx.sizes = columns, sizes
        kept: Tensor = x.split(sizes)[columns.first].clone()
        return kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _rows_of_all(ctx.columns, gradient, ctx.sizes, "fc8 images"), None, None


def _rows_of_all(columns: Towers, x: Tensor, sizes: list[int], layer: str) -> Tensor:
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: len(x)] = x
    columns.count(layer, padded, len(sizes) - 1)
    every = columns.gather(padded)
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])
