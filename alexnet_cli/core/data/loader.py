"""Data loading: the order of an epoch, the share of a rank, and batches decoded ahead by threads.

The order of an epoch is a permutation that depends on the seed and the epoch. A step's batch is a slice of it, and a
rank's share is a slice of the batch. Threads decode into a ring of batch buffers, without copies or allocations.
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
MAX_CACHE_SHARE = {"cuda": 0.5, "cpu": 0.25}  # of the free memory, for --cache auto

CacheMode = Literal["auto", "device", "none"]


@dataclass(frozen=True)
class Batch:
    """A batch of B images of the data set."""

    images: Tensor
    """uint8 B x 256 x 256 x 3 on the loader's device; valid until the next batch is taken."""
    labels: Tensor
    """int64 B, in main memory."""
    rows: npt.NDArray[np.int64]
    """The rows of the images in their split."""


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch (counted from 1) visits the rows. It is the same on every rank."""
    return np.random.default_rng((seed, epoch, 0x0DE)).permutation(rows)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Number of whole batches in an epoch; 1 if the data set is smaller than a batch."""
    return max(1, rows // batch_size)


def training_batches(
    rows: int, batch_size: int, seed: int, epoch: int, first_step: int = 0, rank: int = 0, ranks: int = 1
) -> list[npt.NDArray[np.int64]]:
    """The rows of this rank's share of each batch of an epoch, from `first_step` (counted from 0) on."""
    order = epoch_order(rows, seed, epoch)
    steps = range(first_step, steps_per_epoch(rows, batch_size))
    batches = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
    return [batch[rank * len(batch) // ranks : (rank + 1) * len(batch) // ranks] for batch in batches]


def all_batches(rows: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
    """The rows of each batch when every row comes once, in order; the last batch may be smaller."""
    return [np.arange(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


class Loader:
    """Decodes batches with `threads` threads. Use it in a `with` block.

    For a CUDA device the buffers are pinned, and batches are copied on a separate stream while the device computes. A
    buffer is reused only when its copy is complete.
    """

    def __init__(self, split: Split, batch_size: int, threads: int, device: torch.device | None = None) -> None:
        self.split = split
        self.threads = max(1, threads)
        self.device = device or torch.device("cpu")
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        is_cuda = self.device.type == "cuda"
        shape = (batch_size, SIDE, SIDE, 3)
        self.copy_stream = torch.cuda.Stream(self.device) if is_cuda else None
        self.buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(AHEAD + 1)]
        self.copies: dict[int, torch.cuda.Event] = {}
        """By buffer: the event that ends its last copy to the device."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads and drop their unfinished work."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, plan: Sequence[npt.NDArray[np.int64]]) -> Generator[Batch]:
        """Yield the batches of the planned rows, in order.

        Raises:
            DataError: an image of the data set is damaged; the message names it.
        """
        ahead: deque[tuple[npt.NDArray[np.int64], int, list[Future[None]]]] = deque()
        upcoming = iter(enumerate(plan))
        try:
            while True:
                while len(ahead) < AHEAD and (item := next(upcoming, None)) is not None:
                    number, rows = item
                    ahead.append(self._start_decoding(rows, number % len(self.buffers)))
                if not ahead:
                    return
                rows, buffer, tasks = ahead[0]
                for task in tasks:
                    task.result()
                ahead.popleft()
                yield Batch(self._copy_to_device(buffer, len(rows)), torch.from_numpy(self.split.labels[rows]), rows)
        finally:
            started = [task for _, _, tasks in ahead for task in tasks if not task.cancel()]
            wait(started)  # or they would write into buffers of the next call

    def _start_decoding(
        self, rows: npt.NDArray[np.int64], buffer: int
    ) -> tuple[npt.NDArray[np.int64], int, list[Future[None]]]:
        if buffer in self.copies:
            self.copies.pop(buffer).synchronize()
        parts = np.array_split(np.arange(len(rows)), max(1, min(self.threads * 2, len(rows))))
        pixels = self.buffers[buffer].numpy()
        return rows, buffer, [self.pool.submit(self._decode, rows, part, pixels) for part in parts]

    def _copy_to_device(self, buffer: int, images: int) -> Tensor:
        pixels = self.buffers[buffer][:images]
        if self.copy_stream is None:
            return pixels
        compute_stream = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copy_stream):
            copy = pixels.to(self.device, non_blocking=True)
        self.copies[buffer] = self.copy_stream.record_event()
        compute_stream.wait_event(self.copies[buffer])
        copy.record_stream(compute_stream)  # or the next copy could get this memory while it is in use
        return copy

    def _decode(self, rows: npt.NDArray[np.int64], part: npt.NDArray[np.int64], pixels: npt.NDArray[np.uint8]) -> None:
        """Decode a part of a batch (positions in it) into a buffer."""
        for position in part:
            row = int(rows[position])
            try:
                shape = simplejpeg.decode_jpeg(self.split.jpeg(row), "RGB", buffer=pixels[position]).shape
            except ValueError as error:
                raise self._damaged(row, str(error)) from error
            if shape != (SIDE, SIDE, 3):
                raise self._damaged(row, f"its size is {shape[1]}x{shape[0]}, not {SIDE}x{SIDE}")

    def _damaged(self, row: int, reason: str) -> DataError:
        return DataError(
            f"image {self.split.key(row)} (row {row}) of split {self.split.name} cannot be decoded: {reason}",
            "the shard is damaged: prepare the data set again with --overwrite",
        )


class CachedLoader:
    """A loader that decodes each image once and keeps it on its device, or in main memory for a CPU.

    The batches are the same, byte for byte.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader, self.split = loader, loader.split
        self.images = torch.empty((len(self.split), SIDE, SIDE, 3), dtype=torch.uint8, device=loader.device)
        self.is_cached = np.zeros(len(self.split), bool)

    def batches(self, plan: Sequence[npt.NDArray[np.int64]]) -> Generator[Batch]:
        """Yield the batches of the planned rows, in order. Decodes the images that are not cached.

        Raises:
            DataError: an image of the data set is damaged; the message names it.
        """
        missing = [rows[~self.is_cached[rows]] for rows in plan]
        with closing(self.loader.batches([rows for rows in missing if len(rows)])) as loaded:
            for rows, new in zip(plan, missing, strict=True):
                if len(new):
                    self.images[self._to_index(new)] = next(loaded).images
                    self.is_cached[new] = True
                images = self.images.index_select(0, self._to_index(rows))  # on a CPU 8 times as fast as images[...]
                yield Batch(images, torch.from_numpy(self.split.labels[rows]), rows)

    def _to_index(self, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self.images.device, non_blocking=True)


def cache_decoded(loader: Loader, where: CacheMode, processes: int = 1) -> Loader | CachedLoader:
    """Add a cache to the loader if `where` asks for it or it fits; `processes` share the memory.

    Raises:
        MissingError: `where` is "device" and the decoded images do not fit.
    """
    needed, free = len(loader.split) * IMAGE_BYTES * processes, _free_bytes(loader.device)
    if where == "device" and free is not None and needed > free:
        raise MissingError(
            f"--cache device: {len(loader.split):,} decoded images take {needed / 1e9:.1f} GB"
            f"{f' in {processes} processes' if processes > 1 else ''}, but only {free / 1e9:.1f} GB are free",
            "use --cache auto, which caches only what fits",
        )
    fits = free is not None and needed <= MAX_CACHE_SHARE[loader.device.type] * free
    return CachedLoader(loader) if where == "device" or (where == "auto" and fits) else loader


def _free_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return available_memory()
    torch.cuda.empty_cache()  # memory that torch keeps from an earlier training is free, too
    return torch.cuda.mem_get_info(device)[0]
