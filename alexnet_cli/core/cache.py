"""The decoded training set kept on the device: from the second epoch on nothing is decoded.

It holds the very bytes that the loader decodes, so that nothing but the time changes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from alexnet_cli.core.loader import Batch, Loader
from alexnet_cli.errors import MissingError
from alexnet_cli.recipe import SIDE

Where = Literal["auto", "device", "none"]
BYTES = SIDE * SIDE * 3  # of a decoded picture
SHARE = 0.5  # of the free memory that "auto" takes at most; a step of training needs the rest


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
                yield Batch(self.images[self._places(rows)], torch.from_numpy(self.split.labels[rows]), rows)

    def _places(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(rows).to(self.images.device, non_blocking=True)


def remembering(loader: Loader, where: Where) -> Loader | Cache:
    """The loader itself, or around it a cache on its device; on a CPU the device is the memory, and "auto" means none.

    Raises:
        MissingError: "device" was asked for and the decoded set does not fit.
    """
    needed, free = len(loader.split) * BYTES, _free(loader.device)
    if where == "device" and needed > free:
        raise MissingError(
            f"--cache device: {len(loader.split):,} decoded pictures take {needed / 1e9:.1f} GB, free are "
            f"{free / 1e9:.1f} GB",
            "--cache auto uses a cache only where it fits",
        )
    fits = loader.device.type == "cuda" and needed <= SHARE * free
    return Cache(loader) if where == "device" or (where == "auto" and fits) else loader


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 2**63 - 1  # unknown; the user asked for it
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 2**63 - 1)
