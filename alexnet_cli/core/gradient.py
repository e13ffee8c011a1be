"""The gradient of a step (section 5), of the whole batch at once or in pieces that a small device can hold.

Pieces change no number but by rounding: each image has the view and the dropout mask of its place in the whole batch,
and the losses of the pieces are weighted to the mean over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from alexnet_cli.core.augment import Draws, Pixels
from alexnet_cli.core.loader import Batch
from alexnet_cli.core.network import Network
from alexnet_cli.core.placement import Placement
from alexnet_cli.errors import MissingError, is_out_of_memory


@dataclass(frozen=True)
class Sums:
    """Of a batch, still on the device: the mean loss, and how many top-1 and top-5 mistakes."""

    loss: Tensor
    errors: Tensor
    top5_errors: Tensor


@dataclass
class Gradient:
    """Computes gradients, `piece` images at a time; a GPU whose memory is too small for that gets half as many."""

    network: Network
    forward: Callable[[Tensor], Tensor]
    """The network, its compiled form, or one of its replicas."""
    pixels: Pixels
    placement: Placement
    piece: int
    images: int
    """In a whole batch, over all ranks."""

    def compute(self, batch: Batch, draws: Draws, step: int, epoch: int) -> Sums:
        """Leave the gradient of the whole batch's mean loss in the parameters; `batch` is this rank's share of it.

        Raises:
            MissingError: the device cannot hold even one image.
        """
        while (sums := self._attempt(batch, draws, step, epoch)) is None:  # the failed one's memory is free by now
            if self.placement.ranks.size > 1:
                raise MissingError(
                    f"the memory of {self.placement.name} is too small for {self.piece} images at a time",
                    f"--micro-batch {max(1, self.piece // 2)} computes the same in pieces",
                )
            if self.piece == 1:
                raise MissingError(
                    f"the memory of {self.placement.name} is too small for this network, one image at a time",
                    "--gpus none trains on the CPU, --set width=0.5 half as wide a network",
                )
            self.piece = (min(self.piece, len(batch.rows)) + 1) // 2
            torch.cuda.empty_cache()
        return sums

    def _attempt(self, batch: Batch, draws: Draws, step: int, epoch: int) -> Sums | None:
        """The same, or None where the memory did not suffice."""
        total: list[Tensor] = []
        self.network.zero_grad()
        try:
            for first in range(0, len(batch.rows), self.piece):
                with self._exchanging(first + self.piece >= len(batch.rows)):
                    sums = self._add(batch, slice(first, first + self.piece), draws, step, epoch)
                total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        except RuntimeError as error:
            if not self._too_small(error):
                raise
            return None
        return Sums(*total)

    def _too_small(self, error: RuntimeError) -> bool:
        """Whether a GPU's memory has ended; cuBLAS and cuDNN, which need some too, say so each in its way."""
        on_gpu = self.placement.device.type == "cuda"
        return isinstance(error, torch.OutOfMemoryError) or (on_gpu and is_out_of_memory(error))

    def _exchanging(self, last: bool) -> AbstractContextManager[object]:
        """Replicas add up their gradients once, after the last piece."""
        waits = not last and isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if waits else nullcontext()  # type: ignore[attr-defined]

    def _add(self, batch: Batch, part: slice, draws: Draws, step: int, epoch: int) -> list[Tensor]:
        """Add a piece's gradient to what is there. Returns its share of the mean loss, and its mistakes."""
        self.network.draw_dropout(step, self.placement.ranks.share(self.images).start + part.start)
        labels = batch.labels[part].to(self.placement.device, non_blocking=True)
        views = self.pixels.train(batch.images[part], batch.rows[part], draws, epoch)
        with self.placement.arithmetic():
            logits = self.forward(views)
        smoothing = self.network.recipe.label_smoothing
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        loss = loss * (len(labels) / self.images)
        loss.backward()
        top = logits.detach().topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        return [loss.detach(), (~top[:, 0]).sum(), (~top.any(1)).sum()]
