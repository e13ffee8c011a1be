"""What a preparation will do: source, output, settings, what is there already, the space it needs.

No torch, so that `alexnet prepare --dry-run` and a second `alexnet prepare` answer at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from alexnet_cli.core.data import images
from alexnet_cli.core.data.shards import (
    DAMAGED,
    DUPLICATES,
    LATEST,
    MEAN,
    PARTIAL,
    RECORD,
    REJECTED,
    ROOT,
    SPLITS,
    index_name,
)
from alexnet_cli.core.data.sources import SourceDataset
from alexnet_cli.core.files import TEMPORARY, replace_link
from alexnet_cli.errors import DataError, StorageError, UsageError

QUALITY = 95  # of the JPEGs, as Krizhevsky's own preparation wrote
SHARD_IMAGES = 4096  # pictures a shard, about 130 MB: lost work after a crash is seconds
SIDECAR = 1_000_000  # bytes beside each shard while it is needed, and of the mean picture; somewhat less
SAMPLE = 48  # pictures looked at to estimate the space
PLAN = "plan.json"
LOCK = ".lock"
CLEARING = {"clearing": True}  # a plan that says: what is here is being removed
BEGUN = (PARTIAL, LOCK)  # what a preparation makes before its plan
SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{6}}\.tar")
FILES = (RECORD, MEAN, REJECTED, DAMAGED, DUPLICATES, *(index_name(split) for split in SPLITS))
OURS = {*FILES, PARTIAL, LOCK}
REPLACE = "--overwrite replaces it; -o DIR puts this one elsewhere"

State = Literal["new", "unfinished", "finished"]


@dataclass(frozen=True)
class Plan:
    """A source, the folder its prepared form goes to, and the settings that decide its bytes."""

    source: SourceDataset
    output: Path
    quality: int = QUALITY
    shard_images: int = SHARD_IMAGES
    exif_rotate: bool = False

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What must be the same for an output to be continued or to count as done."""
        return {
            "fingerprint": self.source.fingerprint(),
            "quality": self.quality,
            "shard_images": self.shard_images,
            "exif_rotate": self.exif_rotate,
        }

    def state(self, overwrite: bool = False) -> State:
        """What is at the output: nothing (that will stay), part of this preparation, or all of it.

        Raises:
            UsageError: something else is there, or the output lies inside the source.
        """
        self._check_output()
        if not self.output.exists():
            return "new"
        if not self.output.is_dir():
            raise UsageError(f"{self.output} is a file", "name a folder with -o")
        _check_files(self.output)
        if overwrite or _settings(self.output / PARTIAL / PLAN) == CLEARING:
            return "new"
        if (self.output / RECORD).is_file():
            self._check_settings(self.output / RECORD, "holds another prepared data set")
            return "finished"
        if self.shards_kept():
            self._check_settings(self.output / PARTIAL / PLAN, "holds an unfinished data set of another preparation")
            return "unfinished"
        return "new"

    def _check_output(self) -> None:
        if self.output.absolute() == (ROOT / LATEST).absolute():
            raise UsageError(f"{self.output} is a pointer to another data set", "name a folder of its own with -o")
        try:
            place = self.output.resolve()
        except (OSError, RuntimeError) as error:  # a link that leads round in a circle
            raise UsageError(f"{self.output} is no place to write to: {error}", "name another with -o") from error
        if any(place.is_relative_to(folder) for folder in self._source_folders()):
            raise UsageError(
                f"{self.output} lies inside the source {self.source.path}, which is never written to",
                "name another place with -o",
            )

    def _source_folders(self) -> Iterator[Path]:
        """The source, and where links in it lead, down to the folders of classes."""
        source = self.source.path
        yield source.resolve()
        for folder in (source, source / "train", source / "val"):
            if folder.is_dir():
                yield from (entry.resolve() for entry in folder.iterdir() if entry.is_symlink() and entry.is_dir())

    def bytes_needed(self) -> int:
        """Bytes that the output will need, from a sample of the pictures packed in memory."""
        sizes = []
        for items in self.source.splits.values():
            for row in range(0, len(items), len(items) // SAMPLE + 1):
                try:
                    rgb = images.resize_and_crop(images.decode(items[row].read()))
                except (DataError, OSError):
                    continue
                buffer = io.BytesIO()
                Image.fromarray(rgb).save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
                sizes.append(buffer.tell())
        total = sum(len(items) for items in self.source.splits.values())
        beside = 1536 + 512 + 20  # two tar headers with padding, the label's block, the index row
        shards = sum(-(-len(items) // self.shard_images) for items in self.source.splits.values())
        return int(total * (sum(sizes) / max(1, len(sizes)) + beside) + (shards + 1) * SIDECAR)

    def bytes_free(self) -> int:
        """Bytes free where the output will be."""
        there = self.output.absolute()
        while not there.exists():
            there = there.parent
        return shutil.disk_usage(there).free

    def check_space(self, needed: int) -> None:
        """Refuse early when the disk is too small; what an interrupted run left counts as done.

        Raises:
            StorageError: it is.
        """
        if needed - self._bytes_done() > self.bytes_free():
            raise StorageError(
                f"about {format_size(needed)} needed in {self.output}, but {format_size(self.bytes_free())} free",
                "name a larger disk with -o, or a lower --quality",
            )

    def bytes_missing(self) -> int:
        """Bytes that are still to be written, about."""
        return max(0, self.bytes_needed() - self._bytes_done())

    def shards_kept(self) -> int:
        """How many shards an interrupted run has left finished."""
        return len(self._shards()) if (self.output / PARTIAL).is_dir() else 0

    def finalize(self) -> None:
        """Once the set is valid: drop what was kept for resuming; let prepared/latest name it, if it lies there."""
        shutil.rmtree(self.output / PARTIAL, ignore_errors=True)
        link = ROOT / LATEST
        with contextlib.suppress(OSError):  # a read-only place: the set is valid all the same
            for file in self.output.iterdir():
                if TEMPORARY.fullmatch(file.name):
                    file.unlink()
            if self.output.absolute().parent == ROOT.absolute() and (link.is_symlink() or not link.exists()):
                replace_link(link, self.output)

    def _shards(self) -> list[Path]:
        return [file for file in self.output.iterdir() if SHARD.fullmatch(file.name)] if self.output.is_dir() else []

    def _bytes_done(self) -> int:
        return sum(file.stat().st_size for file in self._shards())

    def _check_settings(self, record: Path, what: str) -> None:
        there = _settings(record)
        told = [
            "other pictures or classes" if key == "fingerprint" else f"{key} {there.get(key)}, not {value}"
            for key, value in self.settings.items()
            if there.get(key) != value
        ]
        if told:
            raise UsageError(f"{self.output} {what}: {', '.join(told)}", REPLACE)


def default_output(source: Path) -> Path:
    """prepared/NAME, NAME being that of the source folder.

    Raises:
        UsageError: it has none, being the root of the file system.
    """
    name = source.resolve().name
    if not name:
        raise UsageError(f"{source} has no name to call the data set by", "say where to put it: -o DIR")
    return ROOT / name


def _check_files(output: Path) -> None:
    """Refuse a folder that holds anything but a prepared data set, finished or not, that this program wrote.

    Raises:
        UsageError: it holds somebody's files.
    """
    begun = output / PARTIAL
    empty = not begun.is_dir() or all(file.name != PLAN and _final_name(file) == PLAN for file in begun.iterdir())
    mine = _settings(output / RECORD) or _settings(begun / PLAN) or empty
    if not mine or (empty and not _settings(output / RECORD) and any(e.name not in BEGUN for e in output.iterdir())):
        raise UsageError(f"{output} is not empty and not a prepared data set", "name another folder with -o")
    foreign = sorted(
        file.name for file in output.iterdir() if _final_name(file) not in OURS and not SHARD.fullmatch(file.name)
    )
    if foreign:
        raise UsageError(
            f"{output} holds {foreign[0]}, which is no part of a prepared data set", "name another folder with -o"
        )


def _final_name(file: Path) -> str:
    """The name of a file, or the one that a temporary file was to take when the program was killed."""
    temporary = TEMPORARY.fullmatch(file.name)
    return temporary["name"] if temporary else file.name


def _settings(record: Path) -> dict[str, Any]:
    """What a data set was made with, by its dataset.json or its plan; nothing if it is not of this program."""
    try:
        found = json.loads(record.read_bytes())
        if record.name == RECORD:
            found = found["settings"] if str(found["schema"]).startswith("alexnet.dataset/") else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) and (found == CLEARING or "fingerprint" in found) else {}


def format_size(size: int) -> str:
    """A size for people: "12 MB", "38.1 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"
