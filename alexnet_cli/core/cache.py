"""The decoded training set kept on the device (the memory, on a CPU): from the second epoch on nothing is decoded.

It holds the very bytes that the loader decodes, so that nothing but the time changes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from alexnet_cli.core.devices import free_memory
from alexnet_cli.core.loader import Batch, Loader
from alexnet_cli.errors import MissingError
from alexnet_cli.recipe import SIDE

Where = Literal["auto", "device", "none"]
BYTES = SIDE * SIDE * 3  # of a decoded picture
SHARE = {"cuda": 0.5, "cpu": 0.25}  # of the free memory that "auto" takes at most; others need the rest


class Cache:
    """A loader that remembers: the same batches in the same order, each picture decoded once."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.split = loader, loader.split
        self.images = torch.empty((len(self.split), SIDE, SIDE, 3), dtype=torch.uint8, device=loader.device)
        self.held = np.zeros(len(self.split), bool)

    def batches(self, plan: Sequence[npt.NDArray[np.int64]]) -> Generator[Batch]:
        """Batches of the planned rows, in order; decodes those that it has not yet held.

        Raises:
            DataError: a picture of the data set is damaged; the message names it.
        """
        lacking = [rows[~self.held[rows]] for rows in plan]
        with closing(self.loader.batches([rows for rows in lacking if len(rows)])) as loaded:
            for rows, new in zip(plan, lacking, strict=True):
                if len(new):
                    self.images[self._places(new)] = next(loaded).images
                    self.held[new] = True
                images = self.images.index_select(0, self._places(rows))  # on a CPU eight times as fast as images[...]
                yield Batch(images, torch.from_numpy(self.split.labels[rows]), rows)

    def _places(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(rows).to(self.images.device, non_blocking=True)


def remembering(loader: Loader, where: Where, processes: int = 1) -> Loader | Cache:
    """The loader itself, or around it a cache on its device; so many `processes` have one in the same memory.

    Raises:
        MissingError: "device" was asked for and the decoded set does not fit.
    """
    needed, free = len(loader.split) * BYTES * processes, _free(loader.device)
    if where == "device" and free is not None and needed > free:
        raise MissingError(
            f"--cache device: {len(loader.split):,} decoded pictures take {needed / 1e9:.1f} GB"
            f"{f' in {processes} processes' if processes > 1 else ''}, free are {free / 1e9:.1f} GB",
            "--cache auto uses a cache only where it fits",
        )
    fits = free is not None and needed <= SHARE[loader.device.type] * free
    return Cache(loader) if where == "device" or (where == "auto" and fits) else loader


def _free(device: torch.device) -> int | None:
    if device.type != "cuda":
        return free_memory()
    torch.cuda.empty_cache()  # what an earlier training has left to torch is free, too
    return torch.cuda.mem_get_info(device)[0]
