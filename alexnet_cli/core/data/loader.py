"""Batches of decoded pictures, ahead of need: order, this process's share, threaded decoding, position.

The order of an epoch is a permutation by (seed, epoch); a step's batch is a slice of it, and a rank's share a slice
of that. Threads decode straight into a ring of batch buffers, so nothing is copied and nothing is allocated anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor

from alexnet_cli.core.data.shards import Split
from alexnet_cli.core.devices import available_memory
from alexnet_cli.errors import DataError, MissingError
from alexnet_cli.recipe import SIDE

AHEAD = 3  # batches being decoded while one is used
IMAGE_BYTES = SIDE * SIDE * 3  # of a decoded image
SHARE = {"cuda": 0.5, "cpu": 0.25}  # of the free memory that "auto" takes at most; others need the rest

CacheMode = Literal["auto", "device", "none"]


@dataclass(frozen=True)
class Batch:
    """Uint8 B x 256 x 256 x 3 (valid until the next batch is taken), labels int64 B, and the rows they came from.

    The images are on the device of whoever made the batch; the labels are in ordinary memory.
    """

    images: Tensor
    labels: Tensor
    rows: npt.NDArray[np.int64]


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch (counted from 1) visits the rows; the same on every rank."""
    return np.random.default_rng((seed, epoch, 0x0DE)).permutation(rows)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Whole batches in an epoch (the rest waits for another permutation); one step if the set is smaller."""
    return max(1, rows // batch_size)


def training_batches(
    rows: int, batch_size: int, seed: int, epoch: int, first_step: int = 0, rank: int = 0, ranks: int = 1
) -> list[npt.NDArray[np.int64]]:
    """The rows of this rank's share of every batch of an epoch, from its `first_step` on (counted from 0)."""
    order = epoch_order(rows, seed, epoch)
    steps = range(first_step, steps_per_epoch(rows, batch_size))
    batches = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
    return [batch[rank * len(batch) // ranks : (rank + 1) * len(batch) // ranks] for batch in batches]


def all_batches(rows: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
    """Every row once, in order, the last batch being what is left."""
    return [np.arange(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


class Loader:
    """Decodes the batches it is asked for with `threads` threads; use it in a `with` block.

    For a CUDA device the buffers are pinned and the batches are copied over on a stream of their own, while the device
    computes and the host goes on; a buffer is written again only when its copy has arrived.
    """

    def __init__(self, split: Split, batch_size: int, threads: int, device: torch.device | None = None) -> None:
        self.split, self.threads = split, max(1, threads)
        self.device = device or torch.device("cpu")
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        shape, pinned = (batch_size, SIDE, SIDE, 3), self.device.type == "cuda"
        self.bus = torch.cuda.Stream(self.device) if pinned else None
        self.ring = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(AHEAD + 1)]
        self.copied: dict[int, torch.cuda.Event] = {}

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what they had begun is dropped."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, plan: Sequence[npt.NDArray[np.int64]]) -> Generator[Batch]:
        """Batches of the planned rows, in order.

        Raises:
            DataError: a picture of the data set is damaged; the message names it.
        """
        ahead: deque[tuple[npt.NDArray[np.int64], int, list[Future[None]]]] = deque()
        upcoming = iter(enumerate(plan))
        try:
            while True:
                while len(ahead) < AHEAD and (item := next(upcoming, None)) is not None:
                    ahead.append(self._start(item[1], item[0] % len(self.ring)))
                if not ahead:
                    return
                rows, place, tasks = ahead[0]
                for task in tasks:
                    task.result()
                ahead.popleft()
                yield Batch(self._on_device(place, len(rows)), torch.from_numpy(self.split.labels[rows]), rows)
        finally:
            started = [task for _, _, tasks in ahead for task in tasks if not task.cancel()]
            wait(started)  # or they would write into the buffers of whoever asks next

    def _start(self, rows: npt.NDArray[np.int64], place: int) -> tuple[npt.NDArray[np.int64], int, list[Future[None]]]:
        if place in self.copied:
            self.copied.pop(place).synchronize()
        pieces = np.array_split(np.arange(len(rows)), max(1, min(self.threads * 2, len(rows))))
        pixels = self.ring[place].numpy()
        return rows, place, [self.pool.submit(self._decode, rows, piece, pixels) for piece in pieces]

    def _on_device(self, place: int, images: int) -> Tensor:
        buffer = self.ring[place][:images]
        if self.bus is None:
            return buffer
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.bus):
            there = buffer.to(self.device, non_blocking=True)
        self.copied[place] = self.bus.record_event()
        computing.wait_event(self.copied[place])
        there.record_stream(computing)  # or its memory would be the next copy's before the computing has begun
        return there

    def _decode(self, rows: npt.NDArray[np.int64], piece: npt.NDArray[np.int64], pixels: npt.NDArray[np.uint8]) -> None:
        for place in piece:
            row = int(rows[place])
            try:
                decoded = simplejpeg.decode_jpeg(self.split.jpeg(row), "RGB", buffer=pixels[place])
                shape = decoded.shape
            except ValueError as error:
                raise self._damaged(row, str(error)) from error
            if shape != (SIDE, SIDE, 3):
                raise self._damaged(row, f"it measures {shape[1]}x{shape[0]}, not {SIDE}x{SIDE}")

    def _damaged(self, row: int, reason: str) -> DataError:
        return DataError(
            f"picture {self.split.key(row)} (row {row}) of split {self.split.name} cannot be decoded: {reason}",
            "the shard is damaged: prepare the data set again with --overwrite",
        )


class CachedLoader:
    """A loader that keeps the decoded images on its device (in memory, on a CPU): each is decoded once.

    It holds the very bytes that the loader decodes, so that nothing but the time changes.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader, self.split = loader, loader.split
        self.images = torch.empty((len(self.split), SIDE, SIDE, 3), dtype=torch.uint8, device=loader.device)
        self.held = np.zeros(len(self.split), bool)

    def batches(self, plan: Sequence[npt.NDArray[np.int64]]) -> Generator[Batch]:
        """Batches of the planned rows, in order; decodes those that it has not yet held.

        Raises:
            DataError: a picture of the data set is damaged; the message names it.
        """
        missing = [rows[~self.held[rows]] for rows in plan]
        with closing(self.loader.batches([rows for rows in missing if len(rows)])) as loaded:
            for rows, new in zip(plan, missing, strict=True):
                if len(new):
                    self.images[self._places(new)] = next(loaded).images
                    self.held[new] = True
                images = self.images.index_select(0, self._places(rows))  # on a CPU eight times as fast as images[...]
                yield Batch(images, torch.from_numpy(self.split.labels[rows]), rows)

    def _places(self, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self.images.device, non_blocking=True)


def cache_decoded(loader: Loader, where: CacheMode, processes: int = 1) -> Loader | CachedLoader:
    """The loader itself, or around it a cache on its device; so many `processes` have one in the same memory.

    Raises:
        MissingError: "device" was asked for and the decoded set does not fit.
    """
    needed, free = len(loader.split) * IMAGE_BYTES * processes, _free_bytes(loader.device)
    if where == "device" and free is not None and needed > free:
        raise MissingError(
            f"--cache device: {len(loader.split):,} decoded pictures take {needed / 1e9:.1f} GB"
            f"{f' in {processes} processes' if processes > 1 else ''}, free are {free / 1e9:.1f} GB",
            "--cache auto uses a cache only where it fits",
        )
    fits = free is not None and needed <= SHARE[loader.device.type] * free
    return CachedLoader(loader) if where == "device" or (where == "auto" and fits) else loader


def _free_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return available_memory()
    torch.cuda.empty_cache()  # what an earlier training has left to torch is free, too
    return torch.cuda.mem_get_info(device)[0]
