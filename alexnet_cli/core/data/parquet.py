"""Hugging Face data sets as parquet shards: columns `image` (struct of `bytes` and `path`) and `label`. No torch.

Reading one image means reading its whole row group, about a hundred images. Rows are therefore best read group by group
(`ImageList.blocks`), and recent groups are kept in memory.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from alexnet_cli.core.data.folders import SPLIT_WORDS
from alexnet_cli.core.data.samples import DetectedLayout, ImageList, NameList, make_numbered_layout
from alexnet_cli.errors import DataError, MissingError

FOLDERS = ("", "data")
DAMAGED_HINT = "download it again"
CACHE_BYTES = 1 << 28  # of row groups kept in memory; one is about 11 MB in ImageNet's shards


class ParquetImages(ImageList):
    """Images that are rows of parquet files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.labels: array[int] = array("q")
        self.blocks: array[int] = array("I")
        self._names = NameList()
        self._groups: list[tuple[str, int, int]] = []  # for each block: file, row group in it, its first row
        self._file_bytes: dict[str, int] = {}
        self._cache: OrderedDict[int, Any] = OrderedDict()  # block -> column of bytes
        self._lock = threading.Lock()

    def add(self, file: str) -> Any:
        """Append the rows of a file. Returns its schema."""
        self._file_bytes[file] = (self.root / file).stat().st_size
        with _open_parquet(self.root / file) as parquet:
            schema = parquet.schema_arrow
            _check_columns(schema, self.root / file)
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=["image.path", "label"])
                paths = table.column("image").combine_chunks().field("path").to_pylist()
                for row, path in enumerate(paths):
                    stem = PurePosixPath(path or "image").name
                    self._names.append(f"{file}/{group:04}/{row:04}_{stem}")
                self._groups.append((file, group, len(self.labels)))
                self.labels.extend(-1 if label is None else label for label in table.column("label").to_pylist())
                self.blocks.extend([len(self._groups) - 1] * len(paths))
        return schema

    def name(self, row: int) -> str:
        """Return file, row group, row in it, and the file name that the row has."""
        return self._names[row]

    def size(self, row: int) -> int:
        """Return the size of the file that has the row."""
        return self._file_bytes[self._groups[self.blocks[row]][0]]

    def read(self, row: int) -> bytes:
        """Return the row's bytes; reads the row group unless it is in memory."""
        block = self.blocks[row]
        file, group, first_row = self._groups[block]
        with self._lock:
            if block not in self._cache:
                with _open_parquet(self.root / file) as parquet:
                    table = parquet.read_row_group(group, columns=["image.bytes"])
                self._cache[block] = table.column("image").combine_chunks().field("bytes")
                while len(self._cache) > 2 and sum(column.nbytes for column in self._cache.values()) > CACHE_BYTES:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(block)
            column = self._cache[block]
        data: bytes | None = column[row - first_row].as_py()
        if data is None:
            raise DataError("the row has no bytes")
        return data


def detect_parquet(path: Path) -> DetectedLayout | None:
    """train-*.parquet and validation-*.parquet, in the folder or its data/."""
    files = next((files for folder in FOLDERS if (files := _list_files(path, folder))["train"]), None)
    if files is None:
        return None
    train, val = ParquetImages(path), ParquetImages(path)
    schemas = [train.add(file) for file in files["train"]]
    for file in files["val"]:
        val.add(file)
    notes = _describe_test(path, files["test"], bool(files["val"]))
    if others := files["others"]:
        notes.append(f"left out (not one of these splits): {', '.join(others[:3])}{', ...' * (len(others) > 3)}")
    layout = f"Hugging Face parquet: {len(files['train'])} train and {len(files['val'])} validation files"
    names = _read_class_names(schemas[0])
    return make_numbered_layout(path, layout, names, train, val if files["val"] else None, notes)


def _describe_test(path: Path, files: Sequence[str], has_val: bool) -> list[str]:
    """Return a note on the test split, which is not used; it could be if it has labels."""
    if not files:
        return []
    labeled = 0
    for file in files:
        try:
            with _open_parquet(path / file) as parquet:
                if "label" in parquet.schema_arrow.names:
                    labels = parquet.read(columns=["label"]).column("label").to_pylist()
                    labeled += sum(label is not None and label >= 0 for label in labels)
        except DataError:  # such as a pointer of Git LFS
            return [f"left out (cannot be read): {file}"]
    if not labeled:
        return ["left out (no labels): test-*.parquet"]
    reason = (
        "validation uses validation-*.parquet" if has_val else "rename it to validation-*.parquet to validate on it"
    )
    return [f"test-*.parquet ({labeled:,} images) is not used; {reason}"]


def _list_files(path: Path, folder: str) -> dict[str, list[str]]:
    """Return the parquet files in a folder by split, relative to `path`; those of none are `others`."""
    names = sorted(file.name for file in (path / folder).glob("*.parquet"))
    prefix = f"{folder}/" if folder else ""
    files: dict[str, list[str]] = {}
    for split, words in SPLIT_WORDS.items():
        by_word = (
            [prefix + name for name in names if re.match(rf"{word}(-.*)?\.parquet$", name, re.I)] for word in words
        )
        files[split] = next(filter(None, by_word), [])
    used = {file for group in files.values() for file in group}
    return files | {"others": [prefix + name for name in names if prefix + name not in used]}


@contextlib.contextmanager
def _open_parquet(file: Path) -> Iterator[Any]:
    """Open a parquet file; it is closed at the end.

    Raises:
        MissingError: pyarrow is not installed.
        DataError: the file cannot be read or is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingError(
            f"{file} needs pyarrow, which is not installed", "pip install 'alexnet-cli[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
            yield parquet
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is damaged or truncated: {error}", DAMAGED_HINT) from error


def _check_columns(schema: Any, file: Path) -> None:
    """Raise DataError unless there are an image and an integer label."""
    try:
        image = schema.field("image").type
        is_right = {image.field(i).name for i in range(image.num_fields)} >= {"bytes", "path"}
        is_right = is_right and str(schema.field("label").type).removeprefix("u") in ("int8", "int16", "int32", "int64")
    except KeyError:
        is_right = False
    if not is_right:
        columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
        what = f"{file} needs columns image (bytes, path) and label, but has {columns}"
        raise DataError(what, "rename the columns")


def _read_class_names(schema: Any) -> list[str]:
    """Return the class names that the `datasets` library leaves in the schema; none if there are none."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []
