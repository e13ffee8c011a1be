"""Recognizes what kind of data set a folder is, names its classes and lists its images. No torch.

A layout is a function from a folder to what is DetectedLayout there, or to None where the folder is not of its kind;
`LAYOUTS` are tried in order. Images may lie in folders, archives or tables. A source is only read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from alexnet_cli.core.data.classes import WNID, ClassName, ilsvrc_words, name_classes, read_words
from alexnet_cli.core.data.folders import (
    READ,
    class_folders,
    folder_of_classes,
    format_suffixes,
    has_image_suffix,
    select_unread,
    suffix,
    tiny_imagenet,
    train_and_val,
    walk_files,
)
from alexnet_cli.core.data.imagenet import kaggle, official
from alexnet_cli.core.data.parquet import huggingface
from alexnet_cli.core.data.samples import DetectedLayout, ImageList
from alexnet_cli.errors import DataError, UsageError

VAL_FRACTION = 0.1  # of each class, where the source has no validation split of its own
LAYOUTS: tuple[Callable[[Path], DetectedLayout | None], ...] = (
    kaggle,
    official,
    huggingface,
    tiny_imagenet,
    train_and_val,
    folder_of_classes,
)
LOOKED_FOR = (
    "ILSVRC2012_img_train.tar, ILSVRC/Data/CLS-LOC/, train-*.parquet, train/CLASS/ with val/CLASS/, "
    "Tiny ImageNet (val/val_annotations.txt), CLASS/"
)
ONE_FOLDER_EACH = "put the pictures of each class into a folder of its own, at least two classes"


@dataclass(frozen=True)
class SourceDataset:
    """A recognized data set: its layout in words, classes in label order, images by split (train, val)."""

    path: Path
    layout: str
    classes: tuple[ClassName, ...]
    splits: Mapping[str, ImageList]
    notes: tuple[str, ...] = ()
    """What was found and left out."""

    def fingerprint(self) -> str:
        """sha256 over the classes and every image's split, label, name and size: is it still the same source?"""
        digest = hashlib.sha256(repr([tuple(name) for name in self.classes]).encode(errors="surrogateescape"))
        for split, items in self.splits.items():
            digest.update(f"\n{split} {len(items)}\n".encode())
            for row, (label, name) in enumerate(zip(items.labels, items.names, strict=True)):
                digest.update(f"{label} {items.size(row)} {name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def detect_source(path: Path, val_fraction: float | None = None) -> SourceDataset:
    """Find out what kind of data set a folder is and list its images, in sorted order.

    `val_fraction` (0.1 if None) of each class becomes the validation split where the source has none.

    Raises:
        DataError: the folder is missing, of no known layout, or contradicts its layout.
        UsageError: `val_fraction` is out of range, or the folder has a validation split of its own.
    """
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} is not at least 0 and below 1", "0.1 is one in ten")
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{path} is not a folder", f"name the folder that it lies in: {path.parent}")
        raise DataError(f"{path} does not exist", "name the folder that holds train/ and val/, or one folder per class")
    found = next((found for layout in LAYOUTS if (found := layout(path)) is not None), None)
    if found is None:
        raise _unknown_layout(path)
    words, notes = _class_words(path, found)
    classes = name_classes(found.keys, words)
    if found.val is not None:
        if val_fraction is not None:
            raise UsageError(f"{path} has a validation split of its own", "leave --val-fraction out")
        return SourceDataset(path, found.layout, classes, {"train": found.train, "val": found.val}, notes)
    splits = _split_by_name(found.train, len(classes), VAL_FRACTION if val_fraction is None else val_fraction)
    if splits["val"]:
        notes = (*notes, _describe_split(splits["val"], len(found.train), len(classes)))
    return SourceDataset(path, found.layout, classes, splits, notes)


def _class_words(path: Path, found: DetectedLayout) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Words by key, from the layout, words.txt or ILSVRC's list; and the notes, with one on that list if it is used."""
    words = found.words or read_words(path)
    wnids = [key for key in found.keys if WNID.fullmatch(key)]
    if words or not wnids:
        return words, found.notes
    words = {wnid: name for wnid, name in ilsvrc_words(wnids).items() if name not in found.keys}
    return words, (*found.notes, _describe_names(len(words), len(wnids), len(found.keys)))


def _describe_names(named: int, wnids: int, classes: int) -> str:
    """A note on how classes are called that are wnids, where the source has no names for them."""
    theirs = "named as torchvision names those of ILSVRC 2012"
    some = f"{named:,} of {classes:,} classes are {theirs}" if named < classes else f"the classes are {theirs}"
    if named == wnids:
        return some
    if named:
        others = f"{some}, {'the others' if wnids == classes else 'others'}"
    else:
        others = "the classes are" if wnids == classes else f"{wnids:,} of {classes:,} classes are"
    return f"{others} called by their wnids: words.txt beside them would name them, a line each, wnid<TAB>name"


def _describe_split(val: ImageList, total: int, classes: int) -> str:
    """A note on what was taken for validation: of few images it is another share than was asked for."""
    counts = Counter(val.labels)
    each = [counts[label] for label in range(classes)]
    low, high = min(each), max(each)
    spread = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    kept = f"{len(val):,} of {total:,} pictures, {spread} of each class"
    return f"kept for validation, as the source has no such split: {kept}"


def _split_by_name(items: ImageList, classes: int, fraction: float) -> dict[str, ImageList]:
    """Each class gives its share, at least one of two or more, in the order of its names' hashes.

    Images that are added later therefore move few of the others to the other split.
    """
    by_class = [array("I") for _ in range(classes)]
    for row, label in enumerate(items.labels):
        by_class[label].append(row)
    is_val = bytearray(len(items))
    for rows in by_class:
        wanted = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction else 0
        for row in sorted(rows, key=lambda row: _hash(items.names[row]))[: max(0, wanted)]:
            is_val[row] = 1
    train, val = (array("I", (row for row, taken in enumerate(is_val) if taken == split)) for split in (0, 1))
    return {"train": items.select(train), "val": items.select(val)}


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _unknown_layout(path: Path) -> DataError:
    """The error for a folder that no layout fits: empty, no images, no folders, one class, one folder too high."""
    folder = _descend(path)
    if _has_classes(folder):
        return DataError(f"{path} holds no folders of classes, but {folder} does", f"did you mean {folder}?")
    filled, _ = class_folders(path)
    if filled:
        only = folder.relative_to(path).as_posix()
        return DataError(f"{path} has one class only: {only}", f"a network tells classes apart: {ONE_FOLDER_EACH}")
    files = list(walk_files(path, path))
    if loose := sum(map(has_image_suffix, files)):
        return DataError(f"{path} has {loose:,} pictures, but no folders of classes", ONE_FOLDER_EACH)
    others = Counter(map(suffix, files))
    if pictures := select_unread(others):
        what = f"{path} holds no pictures but in a format that is not read: {format_suffixes(pictures)}"
        return DataError(what, f"convert them to JPEG; read are {READ}")
    if others:
        what = f"{path} holds no pictures by their names: {format_suffixes(others)}"
        return DataError(f"{what}. Looked for: {LOOKED_FOR}", f"{ONE_FOLDER_EACH}; read are {READ}")
    return DataError(f"{path} is empty", ONE_FOLDER_EACH)


def _descend(path: Path) -> Path:
    """The folder that has classes, or lies lowest, going down as long as there is one with images below it."""
    while not _has_classes(path) and len(filled := class_folders(path)[0]) == 1:
        path = path / filled[0]
    return path


def _has_classes(path: Path) -> bool:
    """Whether it would be taken for one folder per class, or for train/CLASS."""
    return any(folder.is_dir() and len(class_folders(folder)[0]) > 1 for folder in (path, path / "train"))
