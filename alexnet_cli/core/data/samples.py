"""Pictures of a source as long lists of names and places.

A list holds names and numbers in compact arrays, not an object a picture: 14 million fit in memory.
"""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from alexnet_cli.core.files import read_file


class SourceImage(NamedTuple):
    """A picture of a source: index of its class, name in the source, how to get its bytes (OSError, DataError)."""

    label: int
    name: str
    read: Callable[[], bytes]


class Names(Sequence[str]):
    """Names, one after the other in one string of bytes. Any bytes can be in them but none are lost."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("Q")
        self.extend(names)

    def extend(self, names: Iterable[str]) -> None:
        """Add names at the end."""
        for name in names:
            self._text += name.encode(errors="surrogateescape")
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        """One name, or a copy of a range of them."""
        if isinstance(index, slice):
            return Names(self[row] for row in range(len(self))[index])
        row = range(len(self))[index]
        start = self._ends[row - 1] if row else 0
        return self._text[start : self._ends[row]].decode(errors="surrogateescape")


class ImageList(Sequence[SourceImage]):
    """Pictures by row: names, labels, and how to read one. What they are read from is up to the subclass."""

    names: Sequence[str]
    labels: Sequence[int]
    blocks: Sequence[int] | None = None
    """Number of the block that each row lies in, where blocks can only be read whole: then best in one go."""

    @abstractmethod
    def reader(self, row: int) -> Callable[[], bytes]:
        """How to get the bytes of the picture in a row."""

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> SourceImage: ...
    @overload
    def __getitem__(self, index: slice) -> ImageList: ...
    def __getitem__(self, index: int | slice) -> SourceImage | ImageList:
        """One picture, or a range of them."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = range(len(self))[index]
        return SourceImage(self.labels[row], self.names[row], self.reader(row))

    @abstractmethod
    def size(self, row: int) -> int:
        """Bytes of what the picture in a row is read from; -1 if it is not there."""

    def select(self, rows: Sequence[int]) -> ImageList:
        """The images of these rows."""
        return _Selected(self, rows, array("I", (self.labels[row] for row in rows)))

    def relabel(self, labels: Sequence[int]) -> ImageList:
        """The same images with other labels."""
        return _Selected(self, range(len(self)), labels)


class _Selected(ImageList):
    """Some images of a list, which is kept and not copied."""

    def __init__(self, base: ImageList, rows: Sequence[int], labels: Sequence[int]) -> None:
        self.base, self.rows, self.labels = base, rows, labels
        self.names = _View(base.names, rows)
        if base.blocks is not None:
            self.blocks = array("I", (base.blocks[row] for row in rows))

    def reader(self, row: int) -> Callable[[], bytes]:
        return self.base.reader(self.rows[row])

    def size(self, row: int) -> int:
        return self.base.size(self.rows[row])


class _View(Sequence[str]):
    def __init__(self, names: Sequence[str], rows: Sequence[int]) -> None:
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> _View: ...
    def __getitem__(self, index: int | slice) -> str | _View:
        return _View(self._names, self._rows[index]) if isinstance(index, slice) else self._names[self._rows[index]]


class Files(ImageList):
    """Pictures that are files under `root`."""

    def __init__(self, root: Path, names: Iterable[str] = (), labels: Iterable[int] = ()) -> None:
        self.root = root
        self.names: Names = Names(names)
        self.labels: array[int] = array("I", labels)

    def reader(self, row: int) -> Callable[[], bytes]:
        """Reads the file."""
        return functools.partial(read_file, self.root / self.names[row])

    def size(self, row: int) -> int:
        """Of the file."""
        try:
            return os.stat(f"{self.root}/{self.names[row]}").st_size
        except OSError:
            return -1


class DetectedLayout(NamedTuple):
    """What a reader found: classes by key (a folder's name, a wnid) in label order, their words, pictures."""

    layout: str
    keys: Sequence[str]
    words: Mapping[str, str]
    """Names of the classes by key, `tabby, tabby cat`, where the source has them."""
    train: ImageList
    val: ImageList | None
    notes: tuple[str, ...]
