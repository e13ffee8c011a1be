"""Folders that stand for classes: which there are, the pictures in them, and what is not taken from them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alexnet_cli.core.listing import Files, entries, is_folder, is_picture, walk
from alexnet_cli.errors import DataError

UNREAD = (".heic", ".heif", ".avif")  # pictures, but none that are decoded
NEITHER = "put the pictures of each class into a folder of its own, at least two classes"

Others = Counter[str]
"""Files that are no pictures by their names, by suffix."""


def class_folders(path: Path) -> tuple[list[str], list[str]]:
    """Folders directly under `path`, sorted as torchvision does: those with a picture inside, the rest.

    Raises:
        DataError: a folder cannot be listed.
    """
    folders = sorted(entry.name for entry in entries(path) if is_folder(entry))
    filled = [name for name in folders if any(is_picture(file) for file in walk(path / name, path))]
    return filled, sorted(set(folders) - set(filled))


def listing(root: Path, folders: Sequence[str]) -> tuple[Files, Others]:
    """The pictures under each folder, the folder's place being the label, and what other files lie there.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = Files(root)
    others: Others = Counter()
    for label, folder in enumerate(folders):
        files = sorted(walk(root / folder, root))
        pictures = [f"{folder}/{file}" for file in files if is_picture(file)]
        others.update(suffix(file) for file in files if not is_picture(file))
        found.names.extend(pictures)
        found.labels.extend([label] * len(pictures))
    return found, others


def left_out(where: str, empty: Sequence[str], others: Others) -> tuple[str, ...]:
    """Notes on what is not taken: classes without pictures, files that are none."""
    notes = []
    if empty:
        listed = ", ".join(f"{where}{name}" for name in empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"left out, holding no pictures: {listed}")
    if others:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in others.most_common(3))
        more = ", ..." if len(others) > 3 else ""
        notes.append(f"left out, being no pictures by their names: {others.total():,} ({listed}{more})")
    if unread := sum(others[kind] for kind in UNREAD):
        notes.append(f"{unread:,} of them are photographs that are not read: convert HEIC and AVIF to JPEG")
    return tuple(notes)


def loose(root: Path, *folders: str) -> tuple[str, ...]:
    """A note on pictures that lie directly in folders which should hold folders of classes."""
    notes = []
    for folder in folders:
        inside = entries(root / folder) if (root / folder).is_dir() else []
        count = sum(is_picture(entry.name) and not is_folder(entry) for entry in inside)
        if count:
            notes.append(f"left out, lying in no class's folder: {count:,} pictures directly in {root / folder}")
    return tuple(notes)


def suffix(file: str) -> str:
    """By which a file that is no picture is counted."""
    return os.path.splitext(file)[1].lower() or "without suffix"


def unknown(path: Path) -> DataError:
    """The error of a folder in which no layout was recognised: what is there instead of folders of classes."""
    folders, empty = class_folders(path)
    if len(folders) == 1:
        inner, _ = class_folders(path / folders[0])
        if len(inner) > 1:
            return DataError(f"{path} has one folder, with the classes in it", f"did you mean {path / folders[0]}?")
        return DataError(f"{path} has pictures of one class only: {folders[0]}", "a second one is to be told from it")
    inside = entries(path)
    loose_ = sum(is_picture(entry.name) for entry in inside)
    if loose_:
        return DataError(f"{path} holds {loose_:,} pictures and no folders of classes", NEITHER)
    others = Counter(suffix(file) for name in empty for file in walk(path / name, path))
    others.update(suffix(entry.name) for entry in inside if not is_folder(entry))
    if unread := sum(others[kind] for kind in UNREAD):
        return DataError(f"{path} holds {unread:,} HEIC or AVIF pictures, which are not read", "convert them to JPEG")
    if not others:
        return DataError(f"{path} is empty", NEITHER)
    return DataError(
        f"{path} has no pictures in a layout that is known. Looked for: ILSVRC2012_img_train.tar, "
        "ILSVRC/Data/CLS-LOC/, train-*.parquet, train/CLASS/ with val/CLASS/, "
        "Tiny ImageNet (val/val_annotations.txt), CLASS/",
        NEITHER,
    )
