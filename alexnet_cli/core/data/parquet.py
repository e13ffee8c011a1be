"""Hugging Face data sets as parquet shards: columns `image` (struct of `bytes` and `path`) and `label`.

A picture can only be got by reading the whole row group it lies in, about a hundred others. Rows are
therefore best read group by group (`ImageList.blocks`), and the groups in use are kept for a while.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from alexnet_cli.core.data.samples import DetectedLayout, ImageList, Names
from alexnet_cli.errors import DataError, MissingError

SPLITS = {"train": ("train",), "val": ("validation", "valid", "val")}
FOLDERS = ("", "data")
KEPT = 1 << 28  # bytes of row groups kept in memory; one is about 11 MB in ImageNet's shards
WNID = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?![0-9])")
DAMAGED = "download it again"


class Rows(ImageList):
    """Pictures that are rows of parquet files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: Names = Names()
        self.labels: array[int] = array("q")
        self.blocks: array[int] = array("I")
        self._groups: list[tuple[str, int, int]] = []  # of each block: file, row group in it, its first row
        self._bytes: dict[str, int] = {}  # of each file
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, file: str) -> Any:
        """Append the rows of a file; returns its schema."""
        self._bytes[file] = (self.root / file).stat().st_size
        with _opened(self.root / file) as parquet:
            schema = parquet.schema_arrow
            _check_columns(schema, self.root / file)
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=["image.path", "label"])
                paths = table.column("image").combine_chunks().field("path").to_pylist()
                first = len(self.names)
                stems = (
                    f"{row - first:04}_{PurePosixPath(path or 'image').name}" for row, path in enumerate(paths, first)
                )
                self.names.extend(f"{file}/{group:04}/{stem}" for stem in stems)
                self.labels.extend(-1 if label is None else label for label in table.column("label").to_pylist())
                self.blocks.extend([len(self._groups)] * len(paths))
                self._groups.append((file, group, first))
        return schema

    def reader(self, row: int) -> Callable[[], bytes]:
        """Reads the row group, unless it is at hand."""
        block = self.blocks[row]
        return functools.partial(self._read, block, row - self._groups[block][2])

    def size(self, row: int) -> int:
        """Of the file that the row is in."""
        return self._bytes[self._groups[self.blocks[row]][0]]

    def _read(self, block: int, row: int) -> bytes:
        with self._lock:
            if block not in self._kept:
                file, group, _ = self._groups[block]
                with _opened(self.root / file) as parquet:
                    table = parquet.read_row_group(group, columns=["image.bytes"])
                self._kept[block] = table.column("image").combine_chunks().field("bytes")
                while len(self._kept) > 2 and sum(group.nbytes for group in self._kept.values()) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(block)
            column = self._kept[block]
        data: bytes | None = column[row].as_py()
        if data is None:
            raise DataError("the row has no bytes", "")
        return data


def huggingface(path: Path) -> DetectedLayout | None:
    """train-*.parquet and validation-*.parquet, in the folder or its data/."""
    found = next((files for folder in FOLDERS if (files := _files(path, folder))["train"]), None)
    if found is None:
        return None
    train, val = Rows(path), Rows(path)
    schemas = [train.add(file) for file in found["train"]]
    for file in found["val"]:
        val.add(file)
    names = _class_names(schemas[0])
    count = len(names) or max(train.labels, default=-1) + 1
    for pictures in (train, val):
        _check_labels(pictures, count)
    if count < 2:
        raise DataError(f"{path} has fewer than two classes", "pictures of one class teach nothing")
    notes = [f"left out, having no labels to train on: {len(found['test'])} test-*.parquet"] if found["test"] else []
    if not names:
        notes.append("the files do not say what the classes are called; they are numbered")
    words = names or [str(label) for label in range(count)]
    keys = _wnids(train, count) or words
    return DetectedLayout(
        f"Hugging Face parquet: {len(found['train'])} train and {len(found['val'])} validation files",
        keys,
        dict(zip(keys, words, strict=True)) if len(set(keys)) == count else {},
        train,
        val if found["val"] else None,
        tuple(notes),
    )


def _files(path: Path, folder: str) -> dict[str, list[str]]:
    names = sorted(file.name for file in (path / folder).glob("*.parquet"))
    inside = f"{folder}/" if folder else ""
    starts = {**SPLITS, "test": ("test",)}
    return {
        split: [inside + name for name in names if re.match(rf"({'|'.join(words)})(-.*)?\.parquet$", name)]
        for split, words in starts.items()
    }


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A parquet file, closed at the end.

    Raises:
        MissingError: pyarrow is not installed.
        DataError: the file cannot be read or is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        hint = "pip install 'alexnet-cli[parquet]'"
        raise MissingError(
            f"{file} is a parquet file, and pyarrow, which reads them, is not installed", hint
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
            yield parquet
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is damaged or truncated: {error}", DAMAGED) from error


def _check_columns(schema: Any, file: Path) -> None:
    try:
        image = schema.field("image").type
        right = {image.field(i).name for i in range(image.num_fields)} >= {"bytes", "path"}
        right = right and str(schema.field("label").type).removeprefix("u") in ("int8", "int16", "int32", "int64")
    except KeyError:
        right = False
    if not right:
        columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
        raise DataError(f"{file} has no columns image (bytes, path) and label, but {columns}", "rename them")


def _check_labels(pictures: Rows, count: int) -> None:
    for row, label in enumerate(pictures.labels):
        if not 0 <= label < count:
            raise DataError(f"{pictures.names[row]} has label {label}, not one of {count} classes", DAMAGED)


def _class_names(schema: Any) -> list[str]:
    """Names of the ClassLabel in the features that the `datasets` library leaves in the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _wnids(pictures: Rows, count: int) -> Sequence[str]:
    """The wnid of each class, where the pictures' names have it and agree."""
    found: dict[int, str] = {}
    for name, label in zip(pictures.names, pictures.labels, strict=True):
        wnid = WNID.search(PurePosixPath(name).name.replace("_", " "))
        if not wnid or found.setdefault(label, wnid[0]) != wnid[0]:
            return []
    complete = len(found) == len(set(found.values())) == count
    return [found[label] for label in range(count)] if complete else []
