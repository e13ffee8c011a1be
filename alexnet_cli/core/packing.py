"""From a source to a prepared data set: pictures go through threads, and in order to shards.

The pictures of a split go to shards in one shuffled order that depends on nothing but their number, as
Krizhevsky shuffled once when he made his batches; a reader that takes a shard from front to back sees
mixed classes. Where a picture lands depends neither on the workers nor on the pictures refused before
it, so that the result is the same byte for byte however often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.assembly import Totals, assemble, settle
from alexnet_cli.core.chunk import Chunk, Packed, process
from alexnet_cli.core.listing import Pictures
from alexnet_cli.core.memory import Memory
from alexnet_cli.core.plan import CLEARING, LOCK, PLAN, Plan, megabytes
from alexnet_cli.core.shard_writer import Finished, ShardWriter, finished_shard, write_durably
from alexnet_cli.core.shards import PARTIAL, RECORD, SPLITS
from alexnet_cli.errors import DataError, StorageError

ORDER_SEED = 2012
CHUNK = 16  # pictures a thread takes at once
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)

OnCorrupt = Literal["skip", "fail"]


@dataclass(frozen=True)
class Progress:
    """Pictures of a split dealt with since the last one; an earlier run had finished the `kept` ones."""

    split: str
    images: int
    rejected: int
    kept: bool = False


def pack(plan: Plan, workers: int, on_corrupt: OnCorrupt = "skip", overwrite: bool = False) -> Generator[Progress]:
    """Prepare the data set, or what is missing of it; every Progress is a picture count further.

    Raises:
        UsageError: the output holds something else, or lies inside the source.
        DataError: another command works on it, or a picture is bad and `on_corrupt` is "fail".
        StorageError: the disk is full or cannot be written; what was finished stays.
    """
    plan.state(overwrite)  # before anything is made or removed
    with _storage(plan):
        plan.output.mkdir(parents=True, exist_ok=True)
        with _locked(plan.output):
            if plan.state(overwrite) == "new":
                _clear(plan.output)
            try:
                if plan.state() != "finished":
                    (plan.output / PARTIAL).mkdir(exist_ok=True)
                    write_durably(plan.output / PARTIAL / PLAN, [json.dumps(plan.settings).encode()])
                    with ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool:
                        totals = {}
                        for split in plan.source.splits:
                            totals[split] = Totals()
                            yield from _pack_split(plan, split, totals[split], pool, workers, on_corrupt)
                    assemble(plan, totals)
            finally:
                for rest in (plan.output / PARTIAL).glob("*.tar.tmp"):  # a signal may come before a writer has its name
                    rest.unlink(missing_ok=True)
            settle(plan.output)


def _pack_split(
    plan: Plan, split: str, totals: Totals, pool: ThreadPoolExecutor, workers: int, on_corrupt: OnCorrupt
) -> Iterator[Progress]:
    first = 0
    while (shard := finished_shard(plan.output, split, first)) is not None:
        _refuse(shard.rejected, on_corrupt)
        totals.add(shard)
        yield Progress(split, shard.entry["images"] + len(shard.rejected), len(shard.rejected), kept=True)
        first += 1

    memory = Memory()

    def work(chunk: Chunk) -> Packed:
        return process(chunk, plan, memory, measure=split == "train")

    writer: ShardWriter | None = None
    finishing: deque[Future[Finished]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="sync") as behind:  # a slow disk must not hold up the codec
        try:
            for chunk, packed in _in_order(pool, work, _chunks(plan, split, first), ahead=2 * workers + 2):
                writer = writer or ShardWriter(plan.output, split, chunk.shard)
                refused = _write(writer, split, chunk, packed)
                _refuse(refused, on_corrupt)
                if chunk.last:
                    if finishing:
                        totals.add(finishing.popleft().result())
                    finishing.append(behind.submit(writer.finish))
                    writer = None
                yield Progress(split, len(chunk.items), len(refused))
            while finishing:
                totals.add(finishing.popleft().result())
        finally:
            if writer is not None:
                writer.abandon()


def _chunks(plan: Plan, split: str, first: int) -> Iterator[Chunk]:
    """The pictures of a split in shuffled order, from shard `first` on."""
    items = plan.source.splits[split]
    order = _order(items, np.random.default_rng((ORDER_SEED, SPLITS.index(split))))
    for start in range(first * plan.shard_images, len(items), plan.shard_images):
        end = min(start + plan.shard_images, len(items))
        for place in range(start, end, CHUNK):
            places = range(place, min(place + CHUNK, end))
            rows = [int(order[p]) for p in places]
            chosen = [items[row] for row in rows]
            keys = [_key(p, item.name) for p, item in zip(places, chosen, strict=True)]
            yield Chunk(start // plan.shard_images, rows, keys, chosen, last=places.stop == end)


def _order(items: Pictures, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """A permutation of the rows; where blocks can only be read whole, of the blocks and within each."""
    order = generator.permutation(len(items))
    if items.blocks is None or not len(items):
        return order
    blocks = np.asarray(items.blocks)
    places = generator.permutation(int(blocks.max()) + 1)[blocks]
    return order[np.argsort(places[order], kind="stable")]


def _key(place: int, name: str) -> str:
    """A member name without dots: unique by its number, and still telling which file it was."""
    return f"{place:08d}_{re.sub('[^A-Za-z0-9_-]+', '_', PurePosixPath(name).stem)[:60]}"


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Chunk], Packed], chunks: Iterator[Chunk], ahead: int
) -> Iterator[tuple[Chunk, Packed]]:
    """Work on up to `ahead` chunks at once and give the results in their order."""
    running: deque[tuple[Chunk, Future[Packed]]] = deque()
    try:
        for chunk in chunks:
            running.append((chunk, pool.submit(work, chunk)))
            if len(running) > ahead:
                done, future = running.popleft()
                yield done, future.result()
        while running:
            done, future = running.popleft()
            yield done, future.result()
    finally:
        for _, future in running:
            future.cancel()


def _write(writer: ShardWriter, split: str, chunk: Chunk, packed: Packed) -> list[dict[str, str]]:
    refused = []
    for key, item, jpeg in zip(chunk.keys, chunk.items, packed.jpegs, strict=True):
        if isinstance(jpeg, str):
            refused.append({"split": split, "path": item.name, "reason": jpeg})
        else:
            writer.add(key, item.label, jpeg)
    writer.rejected += refused
    writer.damaged += [{"split": split, "path": path, "reason": reason} for path, reason in packed.damaged]
    writer.facts += packed.facts
    writer.sums.merge(packed.sums)
    return refused


def _refuse(rejected: list[dict[str, str]], on_corrupt: OnCorrupt) -> None:
    if rejected and on_corrupt == "fail":
        raise DataError(
            f"{rejected[0]['path']}: {rejected[0]['reason']}",
            "repair or remove it, or use --on-corrupt skip to leave such files out and list them",
        )


@contextlib.contextmanager
def _storage(plan: Plan) -> Iterator[None]:
    """A full or unwritable disk as an error for the user. Reading the source has its own handling."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        advice = "choose another place with -o, or see to its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space or choose another place; the same command then goes on where it stopped"
            advice = f"about {megabytes(plan.missing())} more needed: {advice}"
        raise StorageError(f"{plan.output} cannot be written: {error.strerror}", advice) from error


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the output for this process alone; the kernel lets go however the process ends."""
    path = output / LOCK
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                break  # otherwise the former holder has just removed the file that was locked
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(f"another command is preparing {output}", "wait until it is done") from None
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _clear(output: Path) -> None:
    """Remove a prepared data set, finished or not, and nothing else. Interrupted, the next run goes on with it."""
    partial = output / PARTIAL
    partial.mkdir(exist_ok=True)
    write_durably(partial / PLAN, [json.dumps(CLEARING).encode()])
    (output / RECORD).unlink(missing_ok=True)
    for file in (*output.iterdir(), *partial.iterdir()):
        if file.is_file() and file.name not in (LOCK, PLAN):
            file.unlink()
    shutil.rmtree(partial)
