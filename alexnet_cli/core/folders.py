"""Folders of pictures: which hold some, which files are pictures by their names, and what the others are.

Links to folders are followed, since many people build a smaller data set out of them, but never round in a
circle; a link to nowhere is listed and refused when it is read. Names that begin with a dot are skipped.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from alexnet_cli.core.listing import Files
from alexnet_cli.errors import DataError

READ = "JPEG, PNG, WebP, GIF, BMP, TIFF and PPM"
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"
}  # fmt: skip
UNREAD = {
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"
}  # fmt: skip
"""Suffixes of pictures in formats that are not read."""
SHOWN = 5  # suffixes in a message


def class_folders(path: Path) -> tuple[list[str], list[str]]:
    """Folders directly under `path`, sorted as torchvision does: those with a picture inside, the rest.

    Raises:
        DataError: a folder cannot be listed.
    """
    folders = sorted(entry.name for entry in _entries(path) if _is_folder(entry))
    filled = [name for name in folders if any(is_picture(file) for file in walk(path / name, path))]
    return filled, sorted(set(folders) - set(filled))


def listing(root: Path, folders: Sequence[str]) -> tuple[Files, Counter[str]]:
    """The pictures under each folder, the folder's place being the label, and how many other files, by suffix.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = Files(root)
    others: Counter[str] = Counter()
    for label, folder in enumerate(folders):
        files = sorted(walk(root / folder, root))
        pictures = [f"{folder}/{file}" for file in files if is_picture(file)]
        others.update(suffix(file) for file in files if not is_picture(file))
        found.names.extend(pictures)
        found.labels.extend([label] * len(pictures))
    return found, others


def left_out(where: str, empty: Sequence[str], others: Counter[str]) -> tuple[str, ...]:
    """Notes on what is not taken: classes without pictures, files that are none."""
    notes = []
    if empty:
        listed = ", ".join(f"{where}{name}" for name in empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"left out, holding no pictures: {listed}")
    if others:
        notes.append(f"left out, being no pictures by their names: {by_suffix(others)}")
    if pictures := unread(others):
        notes.append(f"in a format that is not read: {by_suffix(pictures)}; convert them to JPEG")
    return tuple(notes)


def unread(others: Counter[str]) -> Counter[str]:
    """Those that are pictures all the same, in formats that are not read."""
    return Counter({ending: count for ending, count in others.items() if ending.lower() in UNREAD})


def by_suffix(others: Counter[str]) -> str:
    """`.HEIC 24, .txt 1`, the most frequent first."""
    told = [f"{ending} {count:,}" for ending, count in sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))]
    return ", ".join(told[:SHOWN]) + (", ..." if len(told) > SHOWN else "")


def suffix(file: str) -> str:
    """How a file's name ends, as it is spelled; `others` where that is no suffix."""
    ending = os.path.splitext(file)[1]
    return ending if re.fullmatch(r"\.\w{1,12}", ending, re.ASCII) else "others"


def loose(root: Path, *folders: str) -> tuple[str, ...]:
    """A note on pictures that lie directly in folders which should hold folders of classes."""
    notes = []
    for folder in folders:
        entries = _entries(root / folder) if (root / folder).is_dir() else []
        count = sum(is_picture(entry.name) and not _is_folder(entry) for entry in entries)
        if count:
            notes.append(f"left out, lying in no class's folder: {count:,} pictures directly in {root / folder}")
    return tuple(notes)


def is_picture(file: str) -> bool:
    """Whether a file is a picture by its name."""
    return os.path.splitext(file)[1].lower() in SUFFIXES


def walk(folder: Path, root: Path, refused: list[str] | None = None) -> Iterator[str]:
    """Paths of all files below a folder, relative to it; what cannot be listed is an error, or goes to `refused`."""
    seen = {_identity(root), *(_identity(above) for above in folder.parents if above.is_relative_to(root))}
    seen.add(_identity(folder))
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        folders = []
        for entry in sorted(_entries(folder / inside, refused), key=lambda entry: entry.name):
            if not _is_folder(entry):
                yield inside + entry.name
                continue
            if entry.is_symlink():
                if (identity := _identity(folder / inside / entry.name)) in seen:  # no folder is entered twice
                    continue
                seen.add(identity)
            folders.append(f"{inside}{entry.name}/")
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link to itself is neither, and fails when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _entries(folder: Path, refused: list[str] | None = None) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        if refused is None:
            raise DataError(f"{folder} cannot be listed: {error.strerror}", "check its permissions") from error
        refused.append(str(folder))
        return []


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
