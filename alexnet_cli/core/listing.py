"""Pictures that are files in folders: walked in sorted order, named relative to the source, read on demand.

Links are followed, since many people build a smaller data set out of them, but never round in a circle;
a link to nowhere is listed and refused when it is read. Names that begin with a dot are skipped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from alexnet_cli.errors import DataError

SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pnm",
    )
)


class Item(NamedTuple):
    """A picture of a source: index of its class, name in the source, how to get its bytes (OSError)."""

    label: int
    name: str
    read: Callable[[], bytes]


class Files(Sequence[Item]):
    """Pictures that are files under `root`. Holds their names and labels only, however many there are."""

    def __init__(self, root: Path, names: list[str], labels: list[int]) -> None:
        self.root, self.names, self.labels = root, names, labels

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Item | Files:
        """One picture, or a range of them."""
        if isinstance(index, slice):
            return Files(self.root, self.names[index], self.labels[index])
        name = self.names[index]
        return Item(self.labels[index], name, functools.partial(_read, self.root / name))

    def chosen(self, rows: Sequence[int]) -> Files:
        """The pictures of these rows."""
        return Files(self.root, [self.names[row] for row in rows], [self.labels[row] for row in rows])


def class_folders(path: Path) -> tuple[list[str], list[str]]:
    """Folders directly under `path`, sorted as torchvision does: those with a picture inside, the rest.

    Raises:
        DataError: a folder cannot be listed.
    """
    folders = sorted(entry.name for entry in _entries(path) if entry.is_dir())
    filled = [name for name in folders if any(is_picture(file) for file in _walk(path / name))]
    return filled, sorted(set(folders) - set(filled))


def listing(root: Path, folders: Sequence[str]) -> tuple[Files, int]:
    """The pictures under each folder, the folder's place being the label, and how many other files lie there.

    Raises:
        DataError: a folder cannot be listed.
    """
    names: list[str] = []
    labels: list[int] = []
    others = 0
    for label, folder in enumerate(folders):
        files = sorted(_walk(root / folder))
        pictures = [f"{folder}/{file}" for file in files if is_picture(file)]
        others += len(files) - len(pictures)
        names += pictures
        labels += [label] * len(pictures)
    return Files(root, names, labels), others


def is_picture(file: str) -> bool:
    """Whether a file is a picture by its name."""
    return os.path.splitext(file)[1].lower() in SUFFIXES


def _walk(folder: Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of all files below a folder, relative to it."""
    entries = _entries(folder)
    above = above | {_identity(folder)}
    for entry in entries:
        if not entry.is_dir():
            yield inside + entry.name
        elif not entry.is_symlink() or _identity(folder / entry.name) not in above:
            yield from _walk(folder / entry.name, f"{inside}{entry.name}/", above)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}", "check its permissions") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _read(path: Path) -> bytes:
    return path.read_bytes()
