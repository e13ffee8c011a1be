"""How layers are split over processes: two towers (section 3.2), or the units of layers 6 to 8 (hybrid).

The network is written once, with channel counts per tower times `held`. Towers exchange data through `share` and `sum`
alone; both are identities where one process holds both towers.

Hybrid parallelism ("one weird trick", Krizhevsky 2014): convolutions take most of the time and few of the weights, the
fully connected layers the reverse. Each process runs the convolutions on its own images, and its share of the units of
layers 6 to 8 on the images of all processes. `HybridGather` gathers the images before these layers and keeps the
logits of the own images after them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TowerGroup:
    """The towers this process holds: `held` of the network's `total`, from number `first` on.

    `group` has the processes that hold the others; `traffic` counts the bytes that this process has sent, by layer.
    """

    total: int
    held: int
    first: int = 0
    group: dist.ProcessGroup | None = None
    staged: bool = False
    """Whether GPU tensors are copied to the host to be sent: gloo needs that."""
    traffic: Counter[str] = field(default_factory=Counter)

    def share(self, x: Tensor, layer: str) -> Tensor:
        """Every tower's channels side by side, tower 1 first: N x held*C x ... -> N x total*C x ..."""
        if self.group is None:
            return x
        shared: Tensor = _Share.apply(x, self, layer)
        return shared

    def sum(self, x: Tensor, layer: str) -> Tensor:
        """Sum over towers: N x K -> N x K; float32 if anything was sent."""
        if self.group is None:
            return x
        total: Tensor = _Sum.apply(x, self, layer)
        return total

    def slice_own(self, whole: Tensor, dimension: int) -> Tensor:
        """This process's slice of a tensor of the whole network."""
        size = whole.shape[dimension] // self.total
        return whole.narrow(dimension, self.first * size, self.held * size)

    def gather_whole(self, own: Tensor, dimension: int) -> Tensor | None:
        """Gather all slices: the whole tensor, on the CPU, in the process with the first slice; None in the others."""
        own = own.detach().cpu().contiguous()
        if self.group is None:
            return own
        collects = self.first == 0
        parts = [torch.empty_like(own) for _ in range(self.total // self.held)] if collects else None
        dist.gather(own, parts, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return torch.cat(parts, dimension) if parts else None

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather the tensor of every process: shape -> processes x shape."""
        assert self.group is not None
        mine = _bits(x.contiguous().cpu() if self.staged else x.contiguous())
        every = mine.new_empty((self.group.size(), *mine.shape))
        dist.all_gather(list(every.unbind()), mine, group=self.group)
        return every.view(x.dtype).to(x.device)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Send each process its part and sum the parts received: processes x shape -> shape, float32."""
        assert self.group is not None
        mine = _bits(parts.contiguous().cpu() if self.staged else parts.contiguous())
        received = torch.empty_like(mine)
        dist.all_to_all_single(received, mine, group=self.group)
        return received.view(parts.dtype).to(parts.device).float().sum(0)

    def count_sent(self, layer: str, sent: Tensor, times: float = 1) -> None:
        """Count the bytes of a tensor that is sent `times` times."""
        self.traffic[layer] += round(sent.numel() * sent.element_size() * times)


def _bits(x: Tensor) -> Tensor:
    """A view as bytes of bf16, which not every version of gloo can send."""
    return x.view(torch.uint8) if x.dtype is torch.bfloat16 else x


class _Share(torch.autograd.Function):
    """All-gather; its backward sums the gradients of all processes and keeps the own slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, towers: TowerGroup, layer: str) -> Tensor:
        ctx.towers, ctx.layer = towers, layer
        towers.count_sent(layer, x, towers.total // towers.held - 1)
        every = towers.all_gather(x.movedim(1, -1))  # channels last: no copy where that is how they lie in memory
        return every.movedim(0, -2).flatten(-2).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks = ctx.towers.total // ctx.towers.held
        parts = gradient.movedim(1, -1).unflatten(-1, (ranks, -1)).movedim(-2, 0)
        ctx.towers.count_sent(ctx.layer, parts[0], ranks - 1)
        return ctx.towers.reduce_scatter(parts).to(gradient.dtype).movedim(-1, 1), None, None


class _Sum(torch.autograd.Function):
    """All-reduce; its backward is the identity, since all processes compute the same loss from the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, towers: TowerGroup, layer: str) -> Tensor:
        ctx.dtype = x.dtype
        total = x.detach().float().cpu() if towers.staged else x.detach().float().clone()
        ranks = towers.total // towers.held
        towers.count_sent(layer, total, 2 * (ranks - 1) / ranks)  # what a ring sends; two ranks exchange it once
        dist.all_reduce(total, group=towers.group)
        return total.to(x.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.to(ctx.dtype), None, None


@dataclass(frozen=True)
class HybridGather:
    """Exchanges images around layers 6 to 8 among the processes of `columns`; does nothing if that is None."""

    columns: TowerGroup | None = None

    def gather_images(self, x: Tensor) -> Tensor:
        """Gather the images of all processes, in batch order: N x C -> (sum of all N) x C."""
        if self.columns is None:
            return x
        gathered: Tensor = _GatherImages.apply(x, self.columns, self._sizes(x))
        return gathered

    def keep_own(self, x: Tensor, like: Tensor) -> Tensor:
        """Keep the rows of this process's images, as many as `like` has."""
        if self.columns is None:
            return x
        kept: Tensor = _KeepOwn.apply(x, self.columns, self._sizes(like))
        return kept

    def _sizes(self, x: Tensor) -> list[int]:
        """How many images each process has. Sent from the CPU, so that no process waits for its GPU."""
        assert self.columns is not None
        return [int(n) for n in self.columns.all_gather(torch.tensor([len(x)])).flatten()]


class _GatherImages(torch.autograd.Function):
    """All-gather of images; its backward sums the gradients of all processes for the own images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: TowerGroup, sizes: list[int]) -> Tensor:
        ctx.columns, ctx.sizes = columns, sizes
        return _gather_images(columns, x, sizes, "fc6 images")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        columns, sizes = ctx.columns, ctx.sizes
        parts = gradient.new_zeros((len(sizes), max(sizes), *gradient.shape[1:]))
        for part, rows in zip(parts, gradient.split(sizes), strict=True):
            part[: len(rows)] = rows
        columns.count_sent("fc6 images", parts[0], len(sizes) - 1)
        return columns.reduce_scatter(parts).to(gradient.dtype)[: sizes[columns.first]], None, None


class _KeepOwn(torch.autograd.Function):
    """The own images; its backward gathers the gradients of all images, from which each process's units learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: TowerGroup, sizes: list[int]) -> Tensor:
        ctx.columns, ctx.sizes = columns, sizes
        kept: Tensor = x.split(sizes)[columns.first].clone()
        return kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather_images(ctx.columns, gradient, ctx.sizes, "fc8 images"), None, None


def _gather_images(columns: TowerGroup, x: Tensor, sizes: list[int], layer: str) -> Tensor:
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: len(x)] = x
    columns.count_sent(layer, padded, len(sizes) - 1)
    every = columns.all_gather(padded)
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])
