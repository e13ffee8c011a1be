"""The prepared data set on disk: its format, finding it, opening it, verifying it. No torch.

dataset.json                          everything but the pixels; written last, it makes the data set valid
train-000000.tar ... val-000000.tar   plain WebDataset shards: KEY.jpg (256x256) and KEY.cls (label)
train.index.npy  val.index.npy        one row per image, for random access into the memory-mapped shards
mean.npy                              float32 3x256x256, RGB 0..255: mean image of the training split
rejected.jsonl  damaged.jsonl         one line per file left out, or decoded in part: split, path, reason
single_color.jsonl                    one line per image of a single color, or nearly so: split, path
duplicates.jsonl                      one line per group of equal files: split, path and class of each
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName, parse_classes
from alexnet_cli.core.files import follow_text_links, hash_file, map_file, read_file, read_link
from alexnet_cli.errors import DataError, VerificationError
from alexnet_cli.recipe import SIDE

SCHEMA = "alexnet.dataset/1"
SPLITS = ("train", "val")
RECORD = "dataset.json"
MAX_COLOR = 1e6  # of the numbers in mean_rgb, color_std and color_axes; real ones are below 256
MAX_RECORD_BYTES = 2**24  # 20,000 classes and a thousand shards need two or three million
MEAN = "mean.npy"
DUPLICATES = "duplicates.jsonl"
REJECTED = "rejected.jsonl"
DAMAGED = "damaged.jsonl"
SINGLE_COLOR = "single_color.jsonl"
PREPARE_AGAIN = "prepare the data set again with --overwrite"
ROOT = Path("prepared")  # where `alexnet prepare` puts data sets, under the current directory
LATEST = "latest"
PARTIAL = ".partial"  # folder of an unfinished preparation
MAX_NAMED = 10  # damaged files named in a message
TAR_BLOCK = 512  # bytes; a member's header is the block before its data

ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4")])
"""A row of an index: number of the shard, offset and size of the JPEG in it (bytes), label."""


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.npy"


class Split:
    """The images of one split, by row. Shards are memory-mapped on first use. Safe to share between threads."""

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
        """The JPEG bytes of an image, a view into the mapped shard. DataError if they lie outside of the shard."""
        entry = self.rows[row]
        shard = self._shard(int(entry["shard"]))
        start = int(entry["offset"])
        end = start + int(entry["size"])
        if start < TAR_BLOCK or end > len(shard):
            raise _damaged(self.folder / index_name(self.name), f"row {row} lies outside of its shard")
        return shard[start:end]

    def key(self, row: int) -> str:
        """The name of an image in its shard: a number and the name of the source file."""
        entry = self.rows[row]
        start = int(entry["offset"]) - TAR_BLOCK
        name = bytes(self._shard(int(entry["shard"]))[start : start + 100]).rstrip(b"\0").decode("ascii", "replace")
        return name.removesuffix(".jpg")

    def spread_rows(self, count: int) -> npt.NDArray[np.int64]:
        """At most `count` row numbers, spread evenly from the first row to the last."""
        return np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)

    def _shard(self, number: int) -> memoryview:
        if number not in self._maps:
            path = self.folder / self.files[number]
            try:
                self._maps[number] = map_file(path)
            except (OSError, ValueError) as error:  # an empty file cannot be mapped
                raise _damaged(path, str(error)) from error
        return self._maps[number]


@dataclass(frozen=True)
class Dataset:
    """A valid prepared data set. `hash` is the SHA-256 of dataset.json, which holds all other checksums."""

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
    """The content of dataset.json."""

    def __repr__(self) -> str:
        splits = ", ".join(f"{name} {split['images']:,}" for name, split in self.record["splits"].items())
        return f"<Dataset {self.path}: {len(self.classes):,} classes, {splits}>"

    def mean_image(self) -> npt.NDArray[np.float32]:
        """float32 3 x 256 x 256, RGB, 0..255: mean image of the training split.

        Raises:
            DataError: the file is missing or damaged.
        """
        mean = _read_array(self.path / MEAN)
        if mean.shape != (3, SIDE, SIDE) or mean.dtype != np.float32:
            raise _damaged(self.path / MEAN, f"it holds {mean.dtype} {mean.shape}")
        return np.array(mean)

    def rejected(self) -> list[dict[str, str]]:
        """The files left out: split, path, reason."""
        return self._read_lines(REJECTED)

    def single_color(self) -> list[dict[str, str]]:
        """The images of a single color, or nearly so: split, path."""
        return self._read_lines(SINGLE_COLOR)

    def duplicates(self) -> list[list[dict[str, str]]]:
        """Groups of images whose files were equal byte for byte: split, path and class of each."""
        return self._read_lines(DUPLICATES)

    def _read_lines(self, name: str) -> list[Any]:
        try:
            return [json.loads(line) for line in (self.path / name).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(self.path / name, str(error)) from error

    def split(self, name: str) -> Split:
        """Open a split.

        Raises:
            DataError: there is no such split, or its index or a shard is missing or damaged.
        """
        if name not in self.record["splits"]:
            raise DataError(f"{self.path} has no split {name}", f"it has: {', '.join(self.record['splits'])}")
        entry = self.record["splits"][name]
        for shard in entry["shards"]:
            path = self.path / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                problem = "it is missing" if size is None else f"{size:,} bytes instead of {shard['bytes']:,}"
                raise _damaged(path, problem)
        rows = _read_array(self.path / index_name(name))
        if rows.dtype != ROW or rows.shape != (entry["images"],):
            raise _damaged(self.path / index_name(name), f"{rows.dtype} {rows.shape} for {entry['images']:,} images")
        if len(rows) and (rows["shard"].max() >= len(entry["shards"]) or rows["label"].max() >= len(self.classes)):
            raise _damaged(self.path / index_name(name), "a row names a shard or a class that does not exist")
        return Split(name, self.path, rows, tuple(shard["file"] for shard in entry["shards"]))

    def nonempty_split(self, name: str) -> Split:
        """Open a split. Raises DataError as `split` does, and if it has no images."""
        if not len(split := self.split(name)):
            raise DataError(f"{self.path}: split {name} has no images", "prepare it again with --val-fraction 0.1")
        return split


def open_dataset(path: Path) -> Dataset:
    """Open a prepared data set. Reads no pixels: 1.28 million images take milliseconds.

    Raises:
        DataError: it is missing, unfinished, damaged, or of an unknown schema.
    """
    try:
        data = read_file(path / RECORD, MAX_RECORD_BYTES)
    except OSError as error:
        raise DataError(f"{path} is not a prepared data set (no readable {RECORD})", _suggest_fix(path)) from error
    except DataError as error:
        raise _damaged(path / RECORD, error.what) from error
    try:
        record = json.loads(data)
        if record["schema"] != SCHEMA:
            raise DataError(f"{path} has schema {record['schema']}, not {SCHEMA}", "prepare it again with this version")
        _check_record(record)
        for key in ("std", "axes"):  # version 0.1.0 used the British spelling
            record.setdefault(f"color_{key}", record.get(f"colour_{key}"))
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
    """Raise ValueError or KeyError for a dataset.json that names files of other folders, or has wrong counts."""
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
    """The float32 numbers of an entry, in that shape. Raises ValueError or TypeError for anything else."""
    values = np.array(record[key], np.float64).reshape(shape)
    if not (np.abs(values) < MAX_COLOR).all():
        raise ValueError(f"{key} is {record[key]!r}")
    return values.astype(np.float32)


def list_checksums(record: dict[str, Any]) -> dict[str, str]:
    """The recorded SHA-256 of every file of a data set except dataset.json, by file name."""
    shards = {s["file"]: s["sha256"] for split in record["splits"].values() for s in split["shards"]}
    others: dict[str, str] = record["files"]
    return shards | others


def verify_dataset(dataset: Dataset) -> Iterator[str]:
    """Compare every file with its recorded checksum. Yields the names of the intact files.

    Raises:
        VerificationError: at the end, if files are missing or have changed; it names up to ten.
    """
    checksums = list_checksums(dataset.record)
    damaged = []
    for name, expected in checksums.items():
        try:
            actual = hash_file(dataset.path / name)
        except OSError as error:
            damaged.append(f"{name} ({error.strerror})")
            continue
        if actual == expected:
            yield name
        else:
            damaged.append(f"{name} (sha256 {actual[:12]}, recorded {expected[:12]})")
    if damaged:
        more = f" and {len(damaged) - MAX_NAMED:,} more" if len(damaged) > MAX_NAMED else ""
        are = "is" if len(damaged) == 1 else "are"
        what = f"{len(damaged):,} of {len(checksums):,} files in {dataset.path} {are} damaged"
        raise VerificationError(f"{what}: {', '.join(damaged[:MAX_NAMED])}{more}", PREPARE_AGAIN)


def find_dataset(spec: str | None) -> Path:
    """The folder of the data set that `--data` names: a folder, or a name under prepared/.

    Without `spec`: ALEXNET_DATA, else the only data set under prepared/, else the target of prepared/latest.

    Raises:
        DataError: there is no such data set.
    """
    spec = spec or os.environ.get("ALEXNET_DATA") or None
    known = list_datasets()
    if spec is not None:
        for path in map(follow_text_links, (Path(spec), ROOT / spec)):
            if (path / RECORD).is_file():
                return path
        is_known_place = Path(spec).is_dir() or not known
        hint = _suggest_fix(Path(spec)) if is_known_place else f"prepared data sets: {', '.join(known)}"
        raise DataError(f"no prepared data set {spec}", hint)
    if len(known) == 1:
        return ROOT / known[0]
    latest = read_link(ROOT / LATEST) or ROOT / LATEST
    if (latest / RECORD).is_file():
        return latest
    if known:
        raise DataError(f"several data sets under {ROOT}: {', '.join(known)}", f"choose one: --data {known[0]}")
    raise DataError(f"no prepared data set under {ROOT.absolute()}", "make one with alexnet prepare SOURCE")


def list_datasets(root: Path = ROOT) -> list[str]:
    """Names of the data sets under prepared/, sorted."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if not path.is_symlink() and (path / RECORD).is_file())


def _read_array(path: Path) -> npt.NDArray[Any]:
    """Read an .npy file. DataError if it claims more than it holds."""
    if not path.is_file():
        raise _damaged(path, "it is missing or not a file")
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
        return array
    except Exception as error:  # numpy raises nearly anything for a damaged header
        raise _damaged(path, str(error)) from error


def _suggest_fix(path: Path) -> str:
    if (path / PARTIAL).is_dir():
        return "the preparation was interrupted: run the same `alexnet prepare` command again to finish it"
    if path.is_dir():
        return f"if it is a folder of images, prepare it first: alexnet prepare {path}"
    return "make one with alexnet prepare SOURCE"


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} is damaged: {problem}", PREPARE_AGAIN)
