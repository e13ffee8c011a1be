"""The prepared data set on disk: its format, finding it, opening it, verifying it (no torch).

dataset.json                          makes the set valid; everything but the pixels
train-000000.tar ... val-000000.tar   plain WebDataset shards: KEY.jpg (256x256) and KEY.cls (label)
train.index.npy  val.index.npy        one row a picture: random access into the mapped shards
mean.npy                              float32 3x256x256, RGB 0..255, mean picture of the training split
rejected.jsonl  damaged.jsonl         one line a refused file, or one decoded in part: split, path, reason
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName, parse_classes
from alexnet_cli.core.files import hash_file, read_file
from alexnet_cli.errors import DataError, VerificationError
from alexnet_cli.recipe import SIDE

SCHEMA = "alexnet.dataset/1"
SPLITS = ("train", "val")
RECORD = "dataset.json"
LARGEST_NUMBER = 1e6  # of a number about colors, which are 0..255
LARGEST_RECORD = 2**24  # bytes; that of 20,000 classes and a thousand shards has two or three million
MEAN = "mean.npy"
DUPLICATES = "duplicates.jsonl"
REJECTED = "rejected.jsonl"
DAMAGED = "damaged.jsonl"
ROOT = Path("prepared")  # where `alexnet prepare` puts data sets, under the current directory
LATEST = "latest"
PARTIAL = ".partial"  # what an unfinished preparation keeps between runs
NAMED = 10  # damaged files that a message names, at most
TAR_BLOCK = 512  # bytes; a member's header is the block before its data

ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4")])
"""A picture's place: number of its shard, offset and size of the JPEG in it (bytes), index of its class."""


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.npy"


class Split:
    """The pictures of one split by row number. Shards are mapped on first use; threads may share it."""

    def __init__(self, name: str, folder: Path, rows: npt.NDArray[np.void], files: tuple[str, ...]) -> None:
        self.name = name
        self.folder = folder
        self.rows = rows
        self.files = files
        self.labels: npt.NDArray[np.int64] = rows["label"].astype(np.int64)
        self._maps: dict[int, memoryview] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def jpeg(self, row: int) -> memoryview:
        """The JPEG bytes of a picture, a view into the mapped shard; DataError if it does not reach so far."""
        place = self.rows[row]
        shard, start = self._shard(int(place["shard"])), int(place["offset"])
        end = start + int(place["size"])
        if start < TAR_BLOCK or end > len(shard):
            raise _damaged(self.folder / index_name(self.name), f"row {row} lies outside of its shard")
        return shard[start:end]

    def key(self, row: int) -> str:
        """The picture's name in its shard: a number, then what the source called it."""
        place = self.rows[row]
        start = int(place["offset"]) - TAR_BLOCK
        name = bytes(self._shard(int(place["shard"]))[start : start + 100]).rstrip(b"\0").decode("ascii", "replace")
        return name.removesuffix(".jpg")

    def _shard(self, number: int) -> memoryview:
        if number not in self._maps:
            path = self.folder / self.files[number]
            try:
                with path.open("rb") as file:
                    self._maps[number] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:  # an empty file cannot be mapped
                raise _damaged(path, str(error)) from error
        return self._maps[number]


@dataclass(frozen=True)
class Dataset:
    """A valid prepared data set. `hash` is the sha256 of dataset.json, which holds all other sums."""

    path: Path
    name: str
    hash: str
    classes: tuple[ClassName, ...]
    mean_rgb: npt.NDArray[np.float32]
    """(3,), 0..255: mean color of the training pixels."""
    color_std: npt.NDArray[np.float32]
    """(3,), 0..255: standard deviations along the axes, ascending (the paper, section 4.1)."""
    color_axes: npt.NDArray[np.float32]
    """(3, 3): the principal axes of the training pixels as columns."""
    record: dict[str, Any]
    """dataset.json as it is."""

    def mean_image(self) -> npt.NDArray[np.float32]:
        """float32 3 x 256 x 256, RGB, 0..255: mean picture of the training split.

        Raises:
            DataError: the file is missing or damaged.
        """
        mean = _array(self.path / MEAN)
        if mean.shape != (3, SIDE, SIDE) or mean.dtype != np.float32:
            raise _damaged(self.path / MEAN, f"it holds {mean.dtype} {mean.shape}")
        return np.array(mean)

    def rejected(self) -> list[dict[str, str]]:
        """The refused files: split, path, reason."""
        return self._lines(REJECTED)

    def duplicates(self) -> list[list[dict[str, str]]]:
        """Groups of pictures whose files were equal byte for byte: split, path and class of each."""
        return self._lines(DUPLICATES)

    def _lines(self, name: str) -> list[Any]:
        try:
            return [json.loads(line) for line in (self.path / name).read_text().splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(self.path / name, str(error)) from error

    def split(self, name: str) -> Split:
        """The pictures of a split.

        Raises:
            DataError: there is no such split, or its index or a shard is missing or has another size.
        """
        if name not in self.record["splits"]:
            raise DataError(f"{self.path} has no split {name}", f"it has: {', '.join(self.record['splits'])}")
        entry = self.record["splits"][name]
        for shard in entry["shards"]:
            path = self.path / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "it is missing" if size is None else f"{size:,} bytes instead of {shard['bytes']:,}"
                raise _damaged(path, found)
        rows = _array(self.path / index_name(name))
        if rows.dtype != ROW or rows.shape != (entry["images"],):
            raise _damaged(self.path / index_name(name), f"{rows.dtype} {rows.shape} for {entry['images']:,} images")
        if len(rows) and (rows["shard"].max() >= len(entry["shards"]) or rows["label"].max() >= len(self.classes)):
            raise _damaged(self.path / index_name(name), "a row names a shard or a class that does not exist")
        return Split(name, self.path, rows, tuple(shard["file"] for shard in entry["shards"]))


def open_dataset(path: Path) -> Dataset:
    """Open a prepared data set; 1.28 million rows take milliseconds, pixels are touched on use only.

    Raises:
        DataError: it is missing, unfinished, damaged, or of a schema this version does not know.
    """
    try:
        data = read_file(path / RECORD)
    except (OSError, DataError) as error:
        raise DataError(f"{path} is not a prepared data set (no readable {RECORD})", _advice(path)) from error
    try:
        if len(data) > LARGEST_RECORD:
            raise ValueError(f"it has more than {LARGEST_RECORD:,} bytes")
        record = json.loads(data)
        if record["schema"] != SCHEMA:
            raise DataError(f"{path} has schema {record['schema']}, not {SCHEMA}", "prepare it again with this version")
        _check_record(record)
        return Dataset(
            path=path,
            name=record["name"],
            hash=hashlib.sha256(data).hexdigest(),
            classes=parse_classes([c["name"] for c in record["classes"]], [c.get("wnid") for c in record["classes"]]),
            mean_rgb=_numbers(record, "mean_rgb", 3),
            color_std=_numbers(record, "color_std", 3),
            color_axes=_numbers(record, "color_axes", 3, 3),
            record=record,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path / RECORD, f"{type(error).__name__} {error}") from error


def _check_record(record: dict[str, Any]) -> None:
    """Raise ValueError or KeyError where dataset.json is not made as ours are: its files lie in its own folder."""
    for name in list_checksums(record):
        if not isinstance(name, str) or name in {"", ".", ".."} or Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file in this folder")
    if not isinstance(record["image"], dict):
        raise ValueError("image is no mapping")
    for split in record["splits"].values():
        counts = [split["images"], *(shard["bytes"] for shard in split["shards"])]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{counts[0]!r} images in shards of {counts[1:4]} bytes")


def _numbers(record: dict[str, Any], key: str, *shape: int) -> npt.NDArray[np.float32]:
    """Float32 numbers of that shape. Raises ValueError or TypeError for anything else."""
    found = np.array(record[key], np.float64).reshape(shape)
    if not (np.abs(found) < LARGEST_NUMBER).all():
        raise ValueError(f"{key} is {record[key]!r}")
    return found.astype(np.float32)


def list_checksums(record: dict[str, Any]) -> dict[str, str]:
    """The recorded sha256 of every file of a data set but dataset.json, by file name."""
    shards = {s["file"]: s["sha256"] for split in record["splits"].values() for s in split["shards"]}
    others: dict[str, str] = record["files"]
    return shards | others


def verify_dataset(dataset: Dataset) -> Iterator[str]:
    """Read every file again and compare it with its recorded sum; yields the name of each file that is right.

    Raises:
        VerificationError: at the end, if files are missing or their bytes have changed; it names up to ten.
    """
    sums, damaged = list_checksums(dataset.record), []
    for name, expected in sums.items():
        try:
            found = hash_file(dataset.path / name)
        except OSError as error:
            damaged.append(f"{name} ({error.strerror})")
            continue
        if found == expected:
            yield name
        else:
            damaged.append(f"{name} (sha256 {found[:12]}, recorded {expected[:12]})")
    if damaged:
        more = f" and {len(damaged) - NAMED:,} more" if len(damaged) > NAMED else ""
        what = (
            f"{len(damaged):,} of {len(sums):,} files in {dataset.path} {'is' if len(damaged) == 1 else 'are'} damaged"
        )
        hint = "prepare the data set again with --overwrite"
        raise VerificationError(f"{what}: {', '.join(damaged[:NAMED])}{more}", hint)


def find_dataset(spec: str | None) -> Path:
    """The prepared directory that `--data` means: a directory, or a name under prepared/.

    Without `spec`: ALEXNET_DATA, else the only set under prepared/, else the one prepared/latest points to.

    Raises:
        DataError: there is no such data set.
    """
    spec = spec or os.environ.get("ALEXNET_DATA") or None
    known = list_datasets()
    if spec is not None:
        for path in (Path(spec), ROOT / spec):
            if (path / RECORD).is_file():
                return path
        listed = f"prepared here: {', '.join(known)}" if known and not Path(spec).is_dir() else _advice(Path(spec))
        raise DataError(f"no prepared data set {spec}", listed)
    if len(known) == 1:
        return ROOT / known[0]
    if (ROOT / LATEST / RECORD).is_file():
        return ROOT / Path(os.readlink(ROOT / LATEST)).name if (ROOT / LATEST).is_symlink() else ROOT / LATEST
    if known:
        raise DataError(f"several data sets under {ROOT}: {', '.join(known)}", f"choose one: --data {known[0]}")
    raise DataError(f"no prepared data set under {ROOT.absolute()}", "make one: alexnet prepare SOURCE")


def list_datasets() -> list[str]:
    """Of the data sets under prepared/."""
    if not ROOT.is_dir():
        return []
    found = (path for path in ROOT.iterdir() if not path.is_symlink() and (path / RECORD).is_file())
    return sorted(path.name for path in found)


def _array(path: Path) -> npt.NDArray[Any]:
    """A mapped .npy file: however much it says that it holds, only what is there can be read."""
    if not path.is_file():
        raise _damaged(path, "it is missing, or no file")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the reader of its header raises nearly anything
        raise _damaged(path, str(error)) from error


def _advice(path: Path) -> str:
    if (path / PARTIAL).is_dir():
        return "its preparation was interrupted: run the same `alexnet prepare` command again to finish it"
    if path.is_dir():
        return f"if it is a folder of pictures, prepare it first: alexnet prepare {path}"
    return "make one: alexnet prepare SOURCE"


def _damaged(path: Path, found: str) -> DataError:
    return DataError(f"{path} is damaged: {found}", "prepare the data set again with --overwrite")
