"""How layers are split over processes: by tower (section 3.2), or by units of layers 6 to 8 (hybrid).

The network is written once, with channel counts per tower times `held`. Towers exchange data only through `share` and
`sum`. Both are identities if one process holds both towers.

Hybrid parallelism ("one weird trick", Krizhevsky 2014): convolutions take most of the time and have few of the weights;
the fully connected layers are the reverse. Each process runs the convolutions on its own images, and its units of
layers 6 to 8 on the images of all processes. `HybridGather` gathers the images before these layers, and keeps the
logits of the process's own images after them.
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
    """The towers that this process holds: `held` of `total`, from number `start` on (counted from 0)."""

    total: int
    held: int
    start: int = 0
    group: dist.ProcessGroup | None = None
    """The processes that hold all towers together; None if this one holds them all."""
    staged: bool = False
    """Whether GPU tensors are copied to the host before they are sent, as gloo requires."""
    traffic: Counter[str] = field(default_factory=Counter)
    """Bytes that this process has sent, by layer."""

    @property
    def processes(self) -> int:
        """Number of processes that hold all towers together."""
        return self.total // self.held

    def share(self, x: Tensor, layer: str) -> Tensor:
        """Put the channels of all towers side by side, tower 1 first: N x held*C x ... -> N x total*C x ..."""
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
        """Return this process's slice of a tensor of the whole network."""
        size = whole.shape[dimension] // self.total
        return whole.narrow(dimension, self.start * size, self.held * size)

    def gather_whole(self, part: Tensor, dimension: int) -> Tensor | None:
        """Gather the slices of all processes: the whole tensor, on the CPU, if `start` is 0; None elsewhere."""
        part = part.detach().cpu().contiguous()
        if self.group is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self.processes)] if self.start == 0 else None
        dist.gather(part, parts, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return torch.cat(parts, dimension) if parts else None

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather the tensors of all processes: shape -> processes x shape."""
        assert self.group is not None
        sent = self._prepare(x)
        gathered = sent.new_empty((self.group.size(), *sent.shape))
        dist.all_gather(list(gathered.unbind()), sent, group=self.group)
        return gathered.view(x.dtype).to(x.device)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Send each process its part and sum the parts received: processes x shape -> shape, float32."""
        assert self.group is not None
        sent = self._prepare(parts)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.view(parts.dtype).to(parts.device).float().sum(0)

    def count_sent(self, layer: str, sent: Tensor, times: float = 1) -> None:
        """Count the bytes of a tensor that is sent `times` times."""
        self.traffic[layer] += round(sent.numel() * sent.element_size() * times)

    def _prepare(self, x: Tensor) -> Tensor:
        """Make a tensor contiguous to send it; bf16 becomes bytes, since not every version of gloo can send it."""
        x = x.contiguous().cpu() if self.staged else x.contiguous()
        return x.view(torch.uint8) if x.dtype is torch.bfloat16 else x


class _Share(torch.autograd.Function):
    """All-gather. The backward pass sums the gradients of all processes and keeps this one's slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, towers: TowerGroup, layer: str) -> Tensor:
        ctx.towers, ctx.layer = towers, layer
        towers.count_sent(layer, x, towers.processes - 1)
        gathered = towers.all_gather(x.movedim(1, -1))  # channels last: no copy if they are last in memory
        return gathered.movedim(0, -2).flatten(-2).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        towers: TowerGroup = ctx.towers
        parts = gradient.movedim(1, -1).unflatten(-1, (towers.processes, -1)).movedim(-2, 0)
        towers.count_sent(ctx.layer, parts[0], towers.processes - 1)
        return towers.reduce_scatter(parts).to(gradient.dtype).movedim(-1, 1), None, None


class _Sum(torch.autograd.Function):
    """All-reduce. The backward pass is the identity, since all processes compute the same loss from the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, towers: TowerGroup, layer: str) -> Tensor:
        ctx.dtype = x.dtype
        total = x.detach().float().cpu() if towers.staged else x.detach().float().clone()
        # A ring all-reduce sends this much; two ranks exchange the tensor once.
        towers.count_sent(layer, total, 2 * (towers.processes - 1) / towers.processes)
        dist.all_reduce(total, group=towers.group)
        return total.to(x.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.to(ctx.dtype), None, None


@dataclass(frozen=True)
class HybridGather:
    """Exchanges images around layers 6 to 8 among the processes of `columns`; does nothing if that is None."""

    columns: TowerGroup | None = None

    def batch_sizes(self, images: Tensor) -> list[int]:
        """How many images each process has. Sent from the CPU, so that no process waits for its GPU."""
        if self.columns is None:
            return []
        return [int(size) for size in self.columns.all_gather(torch.tensor([len(images)])).flatten()]

    def gather_images(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Gather the images of all processes, in batch order: N x C -> (sum of all N) x C."""
        if self.columns is None:
            return x
        gathered: Tensor = _GatherImages.apply(x, self.columns, sizes)
        return gathered

    def keep_own(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Keep the rows of x that belong to this process's images: (sum of all N) x C -> N x C."""
        if self.columns is None:
            return x
        kept: Tensor = _KeepOwn.apply(x, self.columns, sizes)
        return kept


class _GatherImages(torch.autograd.Function):
    """All-gather of images. The backward pass sums the gradients of all processes for this one's images."""

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
        return columns.reduce_scatter(parts).to(gradient.dtype)[: sizes[columns.start]], None, None


class _KeepOwn(torch.autograd.Function):
    """This process's images. The backward pass gathers the gradients of all images: every unit learns from all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: TowerGroup, sizes: list[int]) -> Tensor:
        ctx.columns, ctx.sizes = columns, sizes
        kept: Tensor = x.split(sizes)[columns.start].clone()
        return kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather_images(ctx.columns, gradient, ctx.sizes, "fc8 images"), None, None


def _gather_images(columns: TowerGroup, x: Tensor, sizes: list[int], layer: str) -> Tensor:
    """Gather the rows of all processes, which have `sizes` rows each; shorter ones are padded on the way."""
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: len(x)] = x
    columns.count_sent(layer, padded, len(sizes) - 1)
    gathered = columns.all_gather(padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
