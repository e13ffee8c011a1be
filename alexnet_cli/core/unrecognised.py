"""What is wrong with a folder that no layout fits: empty, no pictures, no folders, one class, one folder too high."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from alexnet_cli.core.folders import READ, by_suffix, class_folders, is_picture, suffix, unread, walk
from alexnet_cli.errors import DataError

CLASSES = "put the pictures of each class into a folder of its own, at least two classes"
LOOKED_FOR = (
    "ILSVRC2012_img_train.tar, ILSVRC/Data/CLS-LOC/, train-*.parquet, train/CLASS/ with val/CLASS/, "
    "Tiny ImageNet (val/val_annotations.txt), CLASS/"
)


def explained(path: Path) -> DataError:
    """The error that says it, and what to do. The folder is there."""
    others = Counter(suffix(file) for file in walk(path, path) if not is_picture(file))
    folder = _descended(path)
    if _has_classes(folder):
        return DataError(f"{path} holds no folders of classes, but {folder} does", f"did you mean {folder}?")
    filled, _ = class_folders(path)
    if filled:
        only = folder.relative_to(path).as_posix()
        return DataError(f"{path} has one class only: {only}", f"a network tells classes apart: {CLASSES}")
    if loose := sum(map(is_picture, walk(path, path))):
        return DataError(f"{path} has {loose:,} pictures, but no folders of classes", CLASSES)
    if pictures := unread(others):
        what = f"{path} holds no pictures but in a format that is not read: {by_suffix(pictures)}"
        return DataError(what, f"convert them to JPEG; read are {READ}")
    if others:
        found = f"{path} holds no pictures by their names: {by_suffix(others)}"
        return DataError(f"{found}. Looked for: {LOOKED_FOR}", f"{CLASSES}; read are {READ}")
    return DataError(f"{path} is empty", CLASSES)


def _descended(path: Path) -> Path:
    """The folder that has classes, or lies lowest, going down as long as there is one with pictures below it."""
    while not _has_classes(path) and len(filled := class_folders(path)[0]) == 1:
        path = path / filled[0]
    return path


def _has_classes(path: Path) -> bool:
    """Whether it would be taken for one folder per class, or for train/CLASS."""
    return any(folder.is_dir() and len(class_folders(folder)[0]) > 1 for folder in (path, path / "train"))
