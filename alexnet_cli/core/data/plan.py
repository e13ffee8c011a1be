"""What `alexnet prepare` is going to do: source, output, settings, what exists already, disk space.

No torch, so that `alexnet prepare --dry-run` and a second `alexnet prepare` start fast.
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
from alexnet_cli.core.data.folders import find_splits
from alexnet_cli.core.data.shards import (
    DAMAGED,
    DUPLICATES,
    LATEST,
    MEAN,
    PARTIAL,
    RECORD,
    REJECTED,
    ROOT,
    SINGLE_COLOR,
    SPLITS,
    index_name,
)
from alexnet_cli.core.data.sources import SourceDataset
from alexnet_cli.core.files import TEMPORARY_NAME, read_link, replace_link
from alexnet_cli.errors import DataError, StorageError, UsageError

QUALITY = 95  # of the JPEGs, as in Krizhevsky's own preparation
SHARD_IMAGES = 4096  # images per shard, about 130 MB: a crash costs seconds of work
IMAGE_OVERHEAD = 1536 + 512 + 20  # bytes: two tar headers with padding, the label's block, the index row
SIDECAR_BYTES = 1_000_000  # at most, of a sidecar and of the mean image
SAMPLE = 48  # images encoded to estimate the space
PLAN = "plan.json"
LOCK = ".lock"
CLEARING = {"clearing": True}  # a plan of this content means that an old data set is being deleted
SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{6}}\.tar")
DATASET_FILES = {
    RECORD, MEAN, REJECTED, DAMAGED, SINGLE_COLOR, DUPLICATES, PARTIAL, LOCK,
    *(index_name(split) for split in SPLITS),
}  # fmt: skip
OTHER_FOLDER = "name another folder with -o"

State = Literal["new", "unfinished", "finished"]


@dataclass(frozen=True)
class Plan:
    """A source, the output folder, and the settings that decide the bytes of the prepared data set."""

    source: SourceDataset
    output: Path
    quality: int = QUALITY
    shard_images: int = SHARD_IMAGES
    exif_rotate: bool = False

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that an existing output must share to be continued or to count as finished."""
        return {
            "fingerprint": self.source.fingerprint(),
            "quality": self.quality,
            "shard_images": self.shard_images,
            "exif_rotate": self.exif_rotate,
        }

    def state(self, overwrite: bool = False) -> State:
        """Whether the output is new (or will be replaced), unfinished or finished.

        Raises:
            UsageError: it holds something else, or is inside the source.
        """
        self._check_output()
        if not self.output.exists():
            return "new"
        if not self.output.is_dir():
            raise UsageError(f"{self.output} is a file", "name a folder with -o")
        _check_files(self.output)
        if overwrite or _read_settings(self.output / PARTIAL / PLAN) == CLEARING:
            return "new"
        if (self.output / RECORD).is_file():
            self._check_settings(self.output / RECORD, "holds another prepared data set")
            return "finished"
        if self.count_finished_shards():
            self._check_settings(self.output / PARTIAL / PLAN, "holds an unfinished data set of another preparation")
            return "unfinished"
        return "new"

    def _check_output(self) -> None:
        if self.output.absolute() == (ROOT / LATEST).absolute():
            raise UsageError(f"{self.output} is a link to another data set", OTHER_FOLDER)
        try:
            resolved = self.output.resolve()
        except (OSError, RuntimeError) as error:  # a link to itself
            raise UsageError(f"{self.output} cannot be written: {error}", OTHER_FOLDER) from error
        if any(resolved.is_relative_to(folder) for folder in self._source_folders()):
            raise UsageError(
                f"{self.output} is inside the source {self.source.path}, which is never written to", OTHER_FOLDER
            )

    def _source_folders(self) -> Iterator[Path]:
        """The source, and the targets of links in it, down to the class folders."""
        source = self.source.path
        yield source.resolve()
        splits = (folder for choices in find_splits(source).values() for folders in choices for folder in folders)
        for folder in (source, *(source / name for name in splits)):
            if folder.is_dir():
                yield from (entry.resolve() for entry in folder.iterdir() if entry.is_symlink() and entry.is_dir())

    def estimate_bytes(self) -> int:
        """Size of the output in bytes, estimated from a sample of the images."""
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
        count = sum(len(items) for items in self.source.splits.values())
        shards = sum(-(-len(items) // self.shard_images) for items in self.source.splits.values())
        mean_size = sum(sizes) / max(1, len(sizes))
        return int(count * (mean_size + IMAGE_OVERHEAD) + (shards + 1) * SIDECAR_BYTES)

    def free_bytes(self) -> int:
        """Bytes free on the disk of the output."""
        folder = self.output.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def check_space(self, needed: int) -> None:
        """Raise StorageError if the disk is too small for `needed` bytes, less those an interrupted run has written."""
        if needed - self.finished_bytes() > self.free_bytes():
            raise StorageError(
                f"{self.output} needs about {format_size(needed)}, but only {format_size(self.free_bytes())} are free",
                "choose a larger disk with -o, or a lower --quality",
            )

    def finished_bytes(self) -> int:
        """Size of the shards that an interrupted run finished."""
        return sum(file.stat().st_size for file in self._shards())

    def count_finished_shards(self) -> int:
        """Number of shards that an interrupted run finished."""
        return len(self._shards()) if (self.output / PARTIAL).is_dir() else 0

    def finalize(self) -> None:
        """Delete what was kept for resuming, and point prepared/latest to the data set if it is under prepared/."""
        shutil.rmtree(self.output / PARTIAL, ignore_errors=True)
        link = ROOT / LATEST
        with contextlib.suppress(OSError):  # a read-only folder: the data set is valid all the same
            for file in self.output.iterdir():
                if TEMPORARY_NAME.fullmatch(file.name):
                    file.unlink()
            if self.output.absolute().parent == ROOT.absolute() and (read_link(link) or not link.exists()):
                replace_link(link, self.output)

    def _shards(self) -> list[Path]:
        return [file for file in self.output.iterdir() if SHARD.fullmatch(file.name)] if self.output.is_dir() else []

    def _check_settings(self, record: Path, problem: str) -> None:
        existing = _read_settings(record)
        differences = [
            "other images or --val-fraction" if key == "fingerprint" else f"{key} {existing.get(key)}, not {value}"
            for key, value in self.settings.items()
            if existing.get(key) != value
        ]
        if differences:
            hint = "use --overwrite to replace it, or -o DIR for another place"
            raise UsageError(f"{self.output} {problem}: {', '.join(differences)}", hint)


def default_output(source: Path) -> Path:
    """prepared/NAME, where NAME is that of the source folder. UsageError for the root of the file system."""
    name = source.resolve().name
    if not name:
        raise UsageError(f"the data set cannot be named after {source}", "name a folder with -o")
    return ROOT / name


def _check_files(output: Path) -> None:
    """Raise UsageError for a folder with anything but a prepared data set of this program, finished or not."""
    partial = output / PARTIAL
    if not _read_settings(output / RECORD) and not _read_settings(partial / PLAN):
        others = [file for file in output.iterdir() if file.name not in (PARTIAL, LOCK)]
        if partial.is_dir():  # a killed run may have left an unfinished plan
            others += [file for file in partial.iterdir() if file.name == PLAN or _final_name(file) != PLAN]
        if others:
            raise UsageError(f"{output} is not empty and not a prepared data set", OTHER_FOLDER)
    names = sorted(file.name for file in output.iterdir() if not _belongs_to_dataset(_final_name(file)))
    if names:
        raise UsageError(f"{output} holds {names[0]}, which is no part of a prepared data set", OTHER_FOLDER)


def _belongs_to_dataset(name: str) -> bool:
    return name in DATASET_FILES or SHARD.fullmatch(name) is not None


def _final_name(file: Path) -> str:
    """The name of a file; of a temporary file that a killed run left, the name it was meant to get."""
    temporary = TEMPORARY_NAME.fullmatch(file.name)
    return temporary["name"] if temporary else file.name


def _read_settings(record: Path) -> dict[str, Any]:
    """The settings in a dataset.json or plan.json; empty if it is missing or not of this program."""
    try:
        content = json.loads(record.read_bytes())
        if record.name == RECORD:
            content = content["settings"] if str(content["schema"]).startswith("alexnet.dataset/") else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return content if isinstance(content, dict) and (content == CLEARING or "fingerprint" in content) else {}


def format_size(size: int) -> str:
    """A number of bytes as "1.2 MB", "12 MB" or "38.1 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"
