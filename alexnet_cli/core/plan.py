"""What a preparation will do: source, output, settings, what is there already, the space it needs.

No torch, so that `alexnet prepare --dry-run` and a second `alexnet prepare` answer at once.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from alexnet_cli.core import images
from alexnet_cli.core.shards import LATEST, PARTIAL, RECORD, ROOT
from alexnet_cli.core.sources import Source
from alexnet_cli.errors import DataError, StorageError, UsageError

QUALITY = 95  # of the JPEGs, as Krizhevsky's own preparation wrote
SHARD_IMAGES = 4096  # pictures a shard, about 130 MB: lost work after a crash is seconds
SAMPLE = 48  # pictures looked at to estimate the space
PLAN = "plan.json"
LOCK = ".lock"

State = Literal["new", "unfinished", "finished"]


@dataclass(frozen=True)
class Plan:
    """A source, the folder its prepared form goes to, and the settings that decide its bytes."""

    source: Source
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
        if overwrite:
            check_foreign(self.output)
            return "new"
        if (self.output / RECORD).is_file():
            self._same(self.output / RECORD, "holds another prepared data set")
            return "finished"
        if (self.output / PARTIAL / PLAN).is_file():
            self._same(self.output / PARTIAL / PLAN, "holds an unfinished data set of another source or settings")
            return "unfinished"
        check_foreign(self.output)
        return "new"

    def _check_output(self) -> None:
        if self.output.is_symlink() or self.output.absolute() == (ROOT / LATEST).absolute():
            raise UsageError(f"{self.output} is a pointer to another data set", "name a folder of its own with -o")
        if self.output.resolve().is_relative_to(self.source.path.resolve()):
            raise UsageError(
                f"{self.output} lies inside the source {self.source.path}, which is never written to",
                "name another place with -o",
            )

    def estimate(self) -> int:
        """Bytes that the output will need, from a sample of the pictures packed in memory."""
        sizes = []
        for items in self.source.splits.values():
            for row in range(0, len(items), len(items) // SAMPLE + 1):
                try:
                    rgb = images.to_256(images.decode(items[row].read()))
                except (DataError, OSError):
                    continue
                buffer = io.BytesIO()
                Image.fromarray(rgb).save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
                sizes.append(buffer.tell())
        total = sum(len(items) for items in self.source.splits.values())
        beside = 1536 + 512 + 20  # two tar headers with padding, the label's block, the index row
        return int(total * (sum(sizes) / max(1, len(sizes)) + beside))

    def free(self) -> int:
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
        if needed - self._done() > self.free():
            raise StorageError(
                f"about {megabytes(needed)} needed in {self.output}, but {megabytes(self.free())} free",
                "name a larger disk with -o, or a lower --quality",
            )

    def missing(self) -> int:
        """Bytes that are still to be written, about."""
        return max(0, self.estimate() - self._done())

    def _done(self) -> int:
        return sum(file.stat().st_size for file in self.output.glob("*.tar")) if self.output.is_dir() else 0

    def _same(self, record: Path, what: str) -> None:
        try:
            found = json.loads(record.read_bytes())
            settings = found["settings"] if record.name == RECORD else found
        except (OSError, ValueError, KeyError, TypeError):
            settings = None
        if settings != self.settings:
            raise UsageError(f"{self.output} {what}", "--overwrite replaces it; -o DIR puts this one elsewhere")


def default_output(source: Path) -> Path:
    """prepared/NAME, NAME being that of the source folder.

    Raises:
        UsageError: it has none, being the root of the file system.
    """
    name = source.resolve().name
    if not name:
        raise UsageError(f"{source} has no name to call the data set by", "say where to put it: -o DIR")
    return ROOT / name


def check_foreign(output: Path) -> None:
    """Refuse a folder that is neither empty nor a prepared data set, finished or not.

    Raises:
        UsageError: it holds somebody's files.
    """
    ours = (output / RECORD).is_file() or (output / PARTIAL).is_dir()
    if not ours and any(entry.name != LOCK for entry in output.iterdir()):
        raise UsageError(f"{output} is not empty and not a prepared data set", "name another folder with -o")


def megabytes(size: int) -> str:
    """A size for people: "12 MB", "38.1 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"
