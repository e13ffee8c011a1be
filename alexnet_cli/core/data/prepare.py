"""Packs a source into a prepared data set: threads decode and resize, shards are written in order, dataset.json last.

The images of a split are shuffled once, as Krizhevsky did for his batches, in an order that depends only on their
number. The place of an image depends neither on the number of workers nor on images left out before it. So the result
is the same byte for byte, however often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_cli import __version__
from alexnet_cli.core.data import fast_images, images
from alexnet_cli.core.data.images import ImageArray, PixelBudget, map_ahead
from alexnet_cli.core.data.plan import CLEARING, LOCK, PLAN, Plan, format_size
from alexnet_cli.core.data.samples import ImageList, SourceImage
from alexnet_cli.core.data.shard_writer import (
    FinishedShard,
    ShardWriter,
    encode_npy,
    encode_npy_header,
    read_finished_shard,
)
from alexnet_cli.core.data.shards import (
    DAMAGED,
    DUPLICATES,
    MEAN,
    PARTIAL,
    RECORD,
    REJECTED,
    ROW,
    SCHEMA,
    SINGLE_COLOR,
    SPLITS,
    index_name,
)
from alexnet_cli.core.data.statistics import (
    ImageFact,
    PixelSums,
    SourceStats,
    duplicate_summary,
    find_duplicates,
    make_image_fact,
)
from alexnet_cli.core.files import lock_file, write_chunks
from alexnet_cli.errors import DataError, PartialError, StorageError
from alexnet_cli.recipe import SIDE

ORDER_SEED = 2012
CHUNK = 16  # images that a thread processes at once
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)

OnCorrupt = Literal["skip", "fail"]


@dataclass(frozen=True)
class Progress:
    """Images of a split processed since the last Progress; with `kept`, an earlier run had finished them."""

    split: str
    images: int
    rejected: int
    kept: bool = False


class Chunk(NamedTuple):
    """Images for one thread, with their shard, rows and keys; `last` if the shard ends with them."""

    shard: int
    rows: list[int]
    keys: list[str]
    images: list[SourceImage]
    last: bool


class PackedChunk(NamedTuple):
    """A processed chunk."""

    images: list[tuple[str, int, bytes]]
    """Key, label and JPEG of each packed image."""
    facts: list[ImageFact]
    """Of the same images."""
    rejected: list[dict[str, str]]
    damaged: list[dict[str, str]]
    sums: PixelSums


@dataclass
class SplitTotals:
    """Totals over the finished shards of a split. Their rows and facts stay in the sidecars."""

    per_class: npt.NDArray[np.int64]
    """Number of packed images of each class."""
    stats: SourceStats
    """Of all splits together."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    sums: PixelSums = field(default_factory=PixelSums)
    rejected: list[dict[str, str]] = field(default_factory=list)
    damaged: list[dict[str, str]] = field(default_factory=list)
    single_color: list[int] = field(default_factory=list)
    """Rows in the source of images of a single color."""

    def add(self, shard: FinishedShard) -> None:
        """Add the next shard."""
        self.shards.append(shard.entry)
        self.per_class += np.bincount(shard.rows["label"], minlength=len(self.per_class))
        self.stats.add(shard.facts)
        self.sums.merge(shard.sums)
        self.rejected += shard.rejected
        self.damaged += shard.damaged
        self.single_color += shard.facts["row"][shard.facts["single_color"]].tolist()

    @property
    def images(self) -> int:
        """Number of packed images."""
        return sum(shard["images"] for shard in self.shards)


def pack(plan: Plan, workers: int, on_corrupt: OnCorrupt = "skip", overwrite: bool = False) -> Generator[Progress]:
    """Prepare the data set, or what is missing of it. Yields the progress.

    Raises:
        UsageError: the output holds something else, or is inside the source.
        DataError: another command is preparing it, or no image of a split can be decoded.
        PartialError: an image is bad and `on_corrupt` is "fail".
        StorageError: the disk is full or cannot be written; finished shards are kept.
    """
    plan.state(overwrite)  # raises before anything is created or deleted
    with _storage_errors(plan):
        plan.output.mkdir(parents=True, exist_ok=True)
        with lock_file(plan.output / LOCK, f"another command is preparing {plan.output}"):
            if plan.state(overwrite) == "new":
                _clear(plan.output)
            if plan.state() != "finished":
                yield from _pack_missing(plan, workers, on_corrupt)
            plan.finalize()


def _pack_missing(plan: Plan, workers: int, on_corrupt: OnCorrupt) -> Iterator[Progress]:
    partial = plan.output / PARTIAL
    partial.mkdir(exist_ok=True)
    write_chunks(partial / PLAN, [json.dumps(plan.settings).encode()])
    stats, classes = SourceStats(), len(plan.source.classes)
    totals = {split: SplitTotals(np.zeros(classes, np.int64), stats) for split in plan.source.splits}
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool:
            for split in totals:
                yield from _pack_split(plan, split, totals[split], pool, workers, on_corrupt)
        _write_dataset(plan, totals, stats)
    finally:
        for leftover in partial.glob("*.tar.tmp"):  # of a writer that a signal stopped in its constructor
            leftover.unlink(missing_ok=True)


def _pack_split(
    plan: Plan, split: str, totals: SplitTotals, pool: ThreadPoolExecutor, workers: int, on_corrupt: OnCorrupt
) -> Iterator[Progress]:
    first = 0
    while (shard := read_finished_shard(plan.output, split, first)) is not None:
        check_rejected(shard.rejected, on_corrupt)
        totals.add(shard)
        yield Progress(split, shard.entry["images"] + len(shard.rejected), len(shard.rejected), kept=True)
        first += 1

    budget = PixelBudget()

    def work(chunk: Chunk) -> PackedChunk:
        return _pack_chunk(chunk, split, plan, budget)

    writer: ShardWriter | None = None
    unfinished: Future[FinishedShard] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="sync") as finisher:  # a slow disk must not stop the decoding
        try:
            for chunk, packed in map_ahead(pool, work, _chunks(plan, split, first), 2 * workers + 2):
                writer = writer or ShardWriter(plan.output, split, chunk.shard)
                _write_chunk(writer, packed)
                check_rejected(packed.rejected, on_corrupt)
                if chunk.last:
                    if unfinished:
                        totals.add(unfinished.result())
                    unfinished = finisher.submit(writer.finish)
                    writer = None
                yield Progress(split, len(chunk.images), len(packed.rejected))
            if unfinished:
                totals.add(unfinished.result())
        finally:
            if writer is not None:
                writer.abandon()


def _chunks(plan: Plan, split: str, first: int) -> Iterator[Chunk]:
    """The images of a split in shuffled order, from shard `first` on."""
    items = plan.source.splits[split]
    order = shuffled_rows(items, np.random.default_rng((ORDER_SEED, SPLITS.index(split))))
    for start in range(first * plan.shard_images, len(items), plan.shard_images):
        end = min(start + plan.shard_images, len(items))
        for first_position in range(start, end, CHUNK):
            positions = range(first_position, min(first_position + CHUNK, end))
            rows = [int(order[position]) for position in positions]
            chosen = [items[row] for row in rows]
            keys = [_make_key(position, image.name) for position, image in zip(positions, chosen, strict=True)]
            yield Chunk(start // plan.shard_images, rows, keys, chosen, last=positions.stop == end)


def shuffled_rows(items: ImageList, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """A permutation of the rows. Where blocks can only be read whole: of the blocks, and of the rows within each."""
    order = generator.permutation(len(items))
    if items.blocks is None or not len(items):
        return order
    blocks = np.asarray(items.blocks)
    block_positions = generator.permutation(int(blocks.max()) + 1)[blocks]
    return order[np.argsort(block_positions[order], kind="stable")]


def _make_key(position: int, name: str) -> str:
    """A unique member name without dots: a number and the name of the source file."""
    return f"{position:08d}_{re.sub('[^A-Za-z0-9_-]+', '_', PurePosixPath(name).stem)[:60]}"


def _pack_chunk(chunk: Chunk, split: str, plan: Plan, budget: PixelBudget) -> PackedChunk:
    """Read, decode, resize and encode the images of a chunk. Sums the pixels of training images."""
    packed = PackedChunk([], [], [], [], PixelSums())
    pixels = []
    for row, key, image in zip(chunk.rows, chunk.keys, chunk.images, strict=True):
        try:
            rgb, fact, damage = _read_image(row, image, plan, budget)
        except (DataError, OSError) as error:
            reason = error.what if isinstance(error, DataError) else f"it cannot be read: {error.strerror or error}"
            packed.rejected.append({"split": split, "path": image.name, "reason": reason})
            continue
        packed.images.append((key, image.label, fast_images.encode(rgb, plan.quality)))
        packed.facts.append(fact)
        if damage:
            packed.damaged.append({"split": split, "path": image.name, "reason": damage})
        pixels.append(rgb)
    if split == "train":
        packed.sums.add(pixels)
    return packed


def _read_image(row: int, image: SourceImage, plan: Plan, budget: PixelBudget) -> tuple[ImageArray, ImageFact, str]:
    """Read one image: uint8 256 x 256 x 3, its fact, and its damage. Frees the full-size pixels."""
    data = image.read()
    height, width = fast_images.read_size(data)
    with budget.reserve(height * width):
        rgb, damage = fast_images.decode_with_damage(data)
        if plan.exif_rotate:
            rgb = images.apply_orientation(rgb, data)
        packed = fast_images.resize_and_crop(rgb)
        return packed, make_image_fact(row, rgb, packed, data, images.read_orientation(data)), damage


def _write_chunk(writer: ShardWriter, packed: PackedChunk) -> None:
    """Append a chunk to its shard."""
    for key, label, jpeg in packed.images:
        writer.add(key, label, jpeg)
    writer.facts += packed.facts
    writer.rejected += packed.rejected
    writer.damaged += packed.damaged
    writer.sums.merge(packed.sums)


def check_rejected(rejected: Sequence[Mapping[str, str]], on_corrupt: OnCorrupt) -> None:
    """Raise PartialError for the first image that was left out, if `on_corrupt` is "fail"."""
    if rejected and on_corrupt == "fail":
        raise PartialError(
            f"{rejected[0]['path']}: {rejected[0]['reason']}",
            "repair or remove it, or use --on-corrupt skip to leave such files out and list them",
        )


def _write_dataset(plan: Plan, totals: Mapping[str, SplitTotals], stats: SourceStats) -> None:
    """Write everything but the shards. Afterwards the data set is valid.

    Raises:
        DataError: no image of a split could be decoded.
    """
    _check_decoded(plan, totals)
    rejected = [line for split in totals.values() for line in split.rejected]
    damaged = [line for split in totals.values() for line in split.damaged]
    single_color = [
        {"split": name, "path": plan.source.splits[name].name(row)}
        for name, split in totals.items()
        for row in split.single_color
    ]
    checksums = {}
    for name, split in totals.items():
        rows = (shard.rows.tobytes() for shard in _read_shards(plan, name, split))
        chunks = chain([encode_npy_header(ROW, split.images)], rows)
        checksums[index_name(name)] = write_chunks(plan.output / index_name(name), chunks)
    duplicates = _find_duplicates(plan, totals, stats)
    for file, data in {
        MEAN: encode_npy(totals["train"].sums.mean_image()),
        DUPLICATES: _json_lines(duplicates),
        REJECTED: _json_lines(rejected),
        DAMAGED: _json_lines(damaged),
        SINGLE_COLOR: _json_lines(single_color),
    }.items():
        checksums[file] = write_chunks(plan.output / file, [data])
    record = {
        "schema": SCHEMA,
        "name": plan.source.path.resolve().name,
        "layout": plan.source.layout,
        "classes": _class_entries(plan, totals),
        "splits": {name: _split_entry(split) for name, split in totals.items()},
        "image": {"size": SIDE, "jpeg_quality": plan.quality, "exif_rotate": plan.exif_rotate},
        "source_sizes": stats.sizes(),
        "duplicates": duplicate_summary(duplicates),
        **totals["train"].sums.to_record(),
        "rejected": len(rejected),
        "damaged": len(damaged),
        "turned": stats.turned,
        "single_color": len(single_color),
        "files": checksums,
        "source": str(plan.source.path.resolve()),
        "settings": plan.settings,
        "version": __version__,
    }
    write_chunks(plan.output / RECORD, [(json.dumps(record, indent=1) + "\n").encode()])


def _check_decoded(plan: Plan, totals: Mapping[str, SplitTotals]) -> None:
    for name, split in totals.items():
        if split.rejected and not split.images:
            kind, reason = {"train": "training", "val": "validation"}[name], split.rejected[0]["reason"]
            raise DataError(
                f"none of the {len(split.rejected):,} {kind} images of {plan.source.path} can be decoded: {reason}",
                "check that they are images",
            )


def _read_shards(plan: Plan, split: str, totals: SplitTotals) -> Iterator[FinishedShard]:
    """Read the finished shards of a split, one by one."""
    for number, entry in enumerate(totals.shards):
        shard = read_finished_shard(plan.output, split, number)
        if shard is None:
            raise DataError(f"{plan.output / entry['file']} has disappeared", "run the same command again")
        yield shard


def _find_duplicates(plan: Plan, totals: Mapping[str, SplitTotals], stats: SourceStats) -> list[list[dict[str, str]]]:
    def describe(split: str, row: int) -> dict[str, str]:
        items = plan.source.splits[split]
        return {"path": items.name(row), "class": plan.source.classes[items.labels[row]].name}

    facts = {name: (shard.facts for shard in _read_shards(plan, name, split)) for name, split in totals.items()}
    return list(find_duplicates(stats.repeated_heads(), facts, describe))


def _json_lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _class_entries(plan: Plan, totals: Mapping[str, SplitTotals]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for label, (name, wnid) in enumerate(plan.source.classes):
        counts = {split: int(total.per_class[label]) for split, total in totals.items()}
        entries.append({"name": name} | ({"wnid": wnid} if wnid else {}) | {"images": counts})
    return entries


def _split_entry(totals: SplitTotals) -> dict[str, Any]:
    counts = totals.per_class
    return {
        "images": totals.images,
        "images_per_class": {"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())},
        "shards": totals.shards,
    }


@contextlib.contextmanager
def _storage_errors(plan: Plan) -> Iterator[None]:
    """Turn errors of a full or unwritable disk into StorageError. Errors of the source are handled elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            missing = format_size(max(0, plan.estimate_bytes() - plan.finished_bytes()))
            hint = f"free about {missing}; the same command then continues where it stopped"
        elif error.errno in NOT_WRITABLE:
            hint = "choose another folder with -o, or check its permissions"
        else:
            raise
        raise StorageError(f"{plan.output} cannot be written: {error.strerror}", hint) from error


def _clear(output: Path) -> None:
    """Delete a prepared data set, finished or not, and nothing else. If interrupted, the next run continues."""
    partial = output / PARTIAL
    partial.mkdir(exist_ok=True)
    write_chunks(partial / PLAN, [json.dumps(CLEARING).encode()])
    (output / RECORD).unlink(missing_ok=True)
    for file in (*output.iterdir(), *partial.iterdir()):
        if file.is_file() and file.name not in (LOCK, PLAN):
            file.unlink()
    shutil.rmtree(partial)
