"""Images of a data set that is not prepared yet, as long lists: names, labels and how to read each image. No torch.

Names and numbers are kept in compact arrays, not as one object per image: 14 million images fit in memory.
"""

from __future__ import annotations

import functools
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from alexnet_cli.core.data.classes import WNID, find_ilsvrc_wnids
from alexnet_cli.core.files import read_file
from alexnet_cli.errors import DataError

WNID_IN_NAME = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?![0-9])")


class SourceImage(NamedTuple):
    """One image: its label, its name in the source, and a function that reads its bytes (OSError, DataError)."""

    label: int
    name: str
    read: Callable[[], bytes]


class NameList:
    """Names, stored end to end in one byte string. They may contain any bytes."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("Q", [0])

    def append(self, name: str) -> None:
        """Add a name."""
        self._text += name.encode(errors="surrogateescape")
        self._ends.append(len(self._text))

    def __getitem__(self, row: int) -> str:
        return self._text[self._ends[row] : self._ends[row + 1]].decode(errors="surrogateescape")


class ImageList(ABC):
    """Images by row. A subclass knows where they are stored."""

    labels: Sequence[int]
    blocks: Sequence[int] | None = None
    """For each row the number of its block, where the source can only be read block by block (parquet)."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Return the image's name in the source."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """Return the image's bytes. Raises OSError or DataError."""

    @abstractmethod
    def size(self, row: int) -> int:
        """Return the number of bytes the image is stored in; -1 if it is missing."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> SourceImage:
        return SourceImage(self.labels[row], self.name(row), functools.partial(self.read, row))

    def __iter__(self) -> Iterator[SourceImage]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: Sequence[int]) -> ImageList:
        """Return the images of these rows."""
        return _Selection(self, rows, array("I", (self.labels[row] for row in rows)))

    def relabel(self, labels: Sequence[int]) -> ImageList:
        """Return the same images with other labels."""
        return _Selection(self, range(len(self)), labels)


class _Selection(ImageList):
    """Some images of another list, which is not copied."""

    def __init__(self, base: ImageList, rows: Sequence[int], labels: Sequence[int]) -> None:
        self.base = base
        self.rows = rows
        self.labels = labels
        if base.blocks is not None:
            self.blocks = array("I", (base.blocks[row] for row in rows))

    def name(self, row: int) -> str:
        return self.base.name(self.rows[row])

    def read(self, row: int) -> bytes:
        return self.base.read(self.rows[row])

    def size(self, row: int) -> int:
        return self.base.size(self.rows[row])


class ImageFiles(ImageList):
    """Images that are files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.labels: array[int] = array("I")
        self._names = NameList()

    def add(self, name: str, label: int) -> None:
        """Append a file, by its path relative to `root`."""
        self._names.append(name)
        self.labels.append(label)

    def name(self, row: int) -> str:
        """Return the path relative to `root`."""
        return self._names[row]

    def read(self, row: int) -> bytes:
        """Return the file's content."""
        return read_file(self.root / self.name(row))

    def size(self, row: int) -> int:
        """Return the file's size."""
        try:
            return os.stat(f"{self.root}/{self.name(row)}").st_size
        except OSError:
            return -1


class DetectedLayout(NamedTuple):
    """A data set whose layout is recognized: the layout's name, the classes in label order, the images."""

    layout: str
    keys: Sequence[str]
    """Key of each class: its wnid or the name of its folder."""
    train: ImageList
    val: ImageList | None = None
    notes: tuple[str, ...] = ()
    words: Mapping[str, str] = {}
    """Names of classes by key, such as "tabby, tabby cat", where the source has them."""
    warnings: tuple[str, ...] = ()
    """Of classes that are probably splits."""


def make_numbered_layout(
    path: Path,
    layout: str,
    names: Sequence[str],
    train: ImageList,
    val: ImageList | None,
    notes: Sequence[str] = (),
) -> DetectedLayout:
    """Return the layout of a source whose labels are numbers, with `names` in their order if the source has names.

    A class's key is its wnid, if the names of images or classes have it, otherwise its name.

    Raises:
        DataError: there are fewer than two classes, or a label is not one of them.
    """
    count = len(names) or max(train.labels, default=-1) + 1
    for images in [train] + ([val] if val else []):
        for row, label in enumerate(images.labels):
            if not 0 <= label < count:
                what = f"{images.name(row)} has label {label}, but there are {count} classes"
                raise DataError(what, "complete the class names or the training split, or download it again")
    if count < 2:
        raise DataError(f"{path} has fewer than two classes", "a network needs at least two")
    words = names or [str(label) for label in range(count)]
    keys = _find_wnids(train, count) or find_ilsvrc_wnids(words) or words
    if not names and keys == words:
        notes = (*notes, "the files have no class names; classes are numbered")
    words_by_key = {key: name for key, name in zip(keys, words, strict=True) if names and not WNID.fullmatch(name)}
    return DetectedLayout(layout, keys, train, val, tuple(notes), words_by_key)


def _find_wnids(images: ImageList, count: int) -> Sequence[str]:
    """Return the wnid of each class if the images' names have it and agree, else nothing."""
    wnid_of: dict[int, str] = {}
    for image in images:
        match = WNID_IN_NAME.search(PurePosixPath(image.name).name.replace("_", " "))
        if not match or wnid_of.setdefault(image.label, match[0]) != match[0]:
            return []
    is_complete = len(wnid_of) == len(set(wnid_of.values())) == count
    return [wnid_of[label] for label in range(count)] if is_complete else []
