"""Finished shards to a valid data set: index, mean picture, list of refused files and, last, dataset.json."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli import __version__
from alexnet_cli.core import census
from alexnet_cli.core.census import Census
from alexnet_cli.core.plan import Plan
from alexnet_cli.core.shard_writer import Finished, finished_shard, npy, npy_header, write_durably
from alexnet_cli.core.shards import (
    DAMAGED,
    DUPLICATES,
    LATEST,
    MEAN,
    PARTIAL,
    RECORD,
    REJECTED,
    ROOT,
    ROW,
    SCHEMA,
    index_name,
)
from alexnet_cli.core.statistics import PixelSums
from alexnet_cli.errors import AlexNetError, DataError
from alexnet_cli.recipe import SIDE


@dataclass
class Totals:
    """What the finished shards of a split add up to. Their rows and facts stay in the sidecars."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    sums: PixelSums = field(default_factory=PixelSums)
    rejected: list[dict[str, str]] = field(default_factory=list)
    damaged: list[dict[str, str]] = field(default_factory=list)

    def add(self, shard: Finished) -> None:
        """Count the next shard."""
        self.shards.append(shard.entry)
        self.sums.merge(shard.sums)
        self.rejected += shard.rejected
        self.damaged += shard.damaged


def assemble(plan: Plan, totals: Mapping[str, Totals]) -> None:
    """Write everything but the shards; the data set is valid once this returns.

    Raises:
        DataError: no training picture could be decoded.
    """
    _check_counts(plan, totals)
    rejected = [line for split in totals.values() for line in split.rejected]
    damaged = [line for split in totals.values() for line in split.damaged]
    labels = {name: np.zeros(len(plan.source.classes), np.int64) for name in totals}
    seen = Census()
    sums = {}
    for name, split in totals.items():
        sums[index_name(name)] = write_durably(plan.output / index_name(name), _index(plan, name, split, labels, seen))
    facts = {name: (shard.facts for shard in _again(plan, name, split)) for name, split in totals.items()}
    equal = list(census.duplicates(seen.repeated(), facts, lambda split, row: _told(plan, split, row)))
    for file, data in {
        MEAN: npy(totals["train"].sums.mean_image()),
        DUPLICATES: _lines(equal),
        REJECTED: _lines(rejected),
        DAMAGED: _lines(damaged),
    }.items():
        sums[file] = write_durably(plan.output / file, [data])
    record = {
        "schema": SCHEMA,
        "name": plan.source.path.resolve().name,
        "layout": plan.source.layout,
        "classes": _classes(plan, labels),
        "splits": {name: _split(totals[name], labels[name]) for name in totals},
        "image": {"size": SIDE, "jpeg_quality": plan.quality, "exif_rotate": plan.exif_rotate},
        "source_sizes": seen.sizes(),
        "duplicates": census.counted(equal),
        **totals["train"].sums.record(),
        "rejected": len(rejected),
        "damaged": len(damaged),
        "turned": seen.turned,
        "files": sums,
        "source": str(plan.source.path.resolve()),
        "settings": plan.settings,
        "version": __version__,
    }
    write_durably(plan.output / RECORD, [(json.dumps(record, indent=1) + "\n").encode()])


def _told(plan: Plan, split: str, row: int) -> dict[str, str]:
    items = plan.source.splits[split]
    return {"path": items.names[row], "class": plan.source.classes[items.labels[row]].name}


def _again(plan: Plan, split: str, totals: Totals) -> Iterator[Finished]:
    """The finished shards of a split, read back one by one."""
    for number, entry in enumerate(totals.shards):
        shard = finished_shard(plan.output, split, number)
        if shard is None:
            raise DataError(f"{plan.output / entry['file']} has vanished", "run the same command again")
        yield shard


def _index(
    plan: Plan, split: str, totals: Totals, labels: Mapping[str, npt.NDArray[np.int64]], seen: Census
) -> Iterator[bytes]:
    """The bytes of a split's index, an .npy file of all rows; labels and facts are counted on the way."""
    yield npy_header(ROW, sum(shard["images"] for shard in totals.shards))
    for shard in _again(plan, split, totals):
        labels[split][:] += np.bincount(shard.rows["label"], minlength=len(labels[split]))
        seen.add(shard.facts)
        yield shard.rows.tobytes()


def _lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def settle(output: Path) -> None:
    """Once the set is valid: drop what was kept for resuming; let prepared/latest name it, if it lies there."""
    shutil.rmtree(output / PARTIAL, ignore_errors=True)
    link = ROOT / LATEST
    if output.absolute().parent != ROOT.absolute() or (link.exists() and not link.is_symlink()):
        return
    temporary = ROOT / f".{LATEST}.{os.getpid()}"
    with contextlib.suppress(OSError):  # a read-only place: the set is valid all the same
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(output.name, target_is_directory=True)
        temporary.replace(link)


def _check_counts(plan: Plan, totals: Mapping[str, Totals]) -> None:
    for name, items in plan.source.splits.items():
        packed = sum(shard["images"] for shard in totals[name].shards)
        if packed + len(totals[name].rejected) != len(items):
            raise AlexNetError(f"{name}: {packed} packed and {len(totals[name].rejected)} refused of {len(items)}")
    if not totals["train"].sums.images:
        raise DataError(f"not one training picture of {plan.source.path} can be decoded", "is it a picture folder?")


def _classes(plan: Plan, labels: Mapping[str, npt.NDArray[np.int64]]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for label, (name, wnid) in enumerate(plan.source.classes):
        counts = {split: int(found[label]) for split, found in labels.items()}
        entries.append({"name": name} | ({"wnid": wnid} if wnid else {}) | {"images": counts})
    return entries


def _split(totals: Totals, per_class: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "images": sum(shard["images"] for shard in totals.shards),
        "images_per_class": {
            "min": int(per_class.min()),
            "median": float(np.median(per_class)),
            "max": int(per_class.max()),
        },
        "shards": totals.shards,
    }
