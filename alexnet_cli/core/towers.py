"""Where two towers meet (section 3.2): what this process holds of a layer, and the two verbs between processes.

A network is written once, with channel counts per tower times `held`. What crosses between towers does so through
`share` and `sum` alone; where both towers are held in one process there is nothing to send and both are identities.
The same two verbs carry a layer whose units are split over any number of processes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_cli.core.heartbeat import Heartbeat


@dataclass(frozen=True)
class Towers:
    """The towers this process holds: `held` of the network's `total`, from number `first` on; `group` holds them all.

    `traffic` counts the bytes that this process has sent, by the layer that they were for.
    """

    total: int
    held: int
    first: int = 0
    group: dist.ProcessGroup | None = None
    staged: bool = False
    """Whether tensors of a GPU go through the memory of the host, as gloo wants them."""
    heartbeat: Heartbeat | None = None
    traffic: Counter[str] = field(default_factory=Counter)

    def share(self, x: Tensor, layer: str) -> Tensor:
        """Every tower's channels side by side, tower 1 first: N x held*C x ... -> N x total*C x ..."""
        if self.group is None:
            return x
        shared: Tensor = _Share.apply(x, self, layer)
        return shared

    def sum(self, x: Tensor, layer: str) -> Tensor:
        """Add up what each tower contributes to the same values: N x K -> N x K, float32 where anything was sent."""
        if self.group is None:
            return x
        total: Tensor = _Sum.apply(x, self, layer)
        return total

    def own(self, whole: Tensor, dimension: int) -> Tensor:
        """This process's slice of a tensor of the whole network."""
        size = whole.shape[dimension] // self.total
        return whole.narrow(dimension, self.first * size, self.held * size)

    def whole(self, own: Tensor, dimension: int) -> Tensor | None:
        """The whole tensor, on the CPU, for the process that holds the first slice; None for the others."""
        own = own.detach().cpu().contiguous()
        if self.group is None:
            return own
        collects = self.first == 0
        parts = [torch.empty_like(own) for _ in range(self.total // self.held)] if collects else None
        dist.gather(own, parts, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return torch.cat(parts, dimension) if parts else None

    def gather(self, x: Tensor) -> Tensor:
        """Every process's tensor: shape -> processes x shape."""
        assert self.group is not None
        mine = _bits(x.contiguous().cpu() if self.staged else x.contiguous())
        every = mine.new_empty((self.group.size(), *mine.shape))
        dist.all_gather(list(every.unbind()), mine, group=self.group)
        return every.view(x.dtype).to(x.device)

    def scatter(self, parts: Tensor) -> Tensor:
        """From processes x shape, give each process its part, and add up what comes for this one: -> shape, float32."""
        assert self.group is not None
        mine = _bits(parts.contiguous().cpu() if self.staged else parts.contiguous())
        received = torch.empty_like(mine)
        dist.all_to_all_single(received, mine, group=self.group)
        return received.view(parts.dtype).to(parts.device).float().sum(0)

    def count(self, layer: str, sent: Tensor, times: float = 1) -> None:
        """Note that a tensor is sent `times` times."""
        if self.heartbeat:
            self.heartbeat.at(f"exchange for {layer}")
        self.traffic[layer] += round(sent.numel() * sent.element_size() * times)


def _bits(x: Tensor) -> Tensor:
    """The same as bytes where a transport may not know the type: what only travels is not computed with."""
    return x.view(torch.uint8) if x.dtype is torch.bfloat16 else x


class _Share(torch.autograd.Function):
    """All-gather; its backward sums the gradients of all and keeps the own slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, towers: Towers, layer: str) -> Tensor:
        ctx.towers, ctx.layer = towers, layer
        towers.count(layer, x, towers.total // towers.held - 1)
        every = towers.gather(x.movedim(1, -1))  # channels last: no copy where that is how they lie in memory
        return every.movedim(0, -2).flatten(-2).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks = ctx.towers.total // ctx.towers.held
        parts = gradient.movedim(1, -1).unflatten(-1, (ranks, -1)).movedim(-2, 0)
        ctx.towers.count(ctx.layer, parts[0], ranks - 1)
        return ctx.towers.scatter(parts).to(gradient.dtype).movedim(-1, 1), None, None


class _Sum(torch.autograd.Function):
    """All-reduce; its backward is the identity, since everyone goes on to the same loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, towers: Towers, layer: str) -> Tensor:
        ctx.dtype = x.dtype
        total = x.detach().float().cpu() if towers.staged else x.detach().float().clone()
        ranks = towers.total // towers.held
        towers.count(layer, total, 2 * (ranks - 1) / ranks)  # what a ring sends; two ranks exchange it once
        dist.all_reduce(total, group=towers.group)
        return total.to(x.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.to(ctx.dtype), None, None
