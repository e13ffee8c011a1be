"""Detects the layout of a data set in a folder, names its classes and lists its images. No torch.

A detector is a function from a folder to a DetectedLayout, or None if the folder has another layout; `DETECTORS` are
tried in order. Images may be in folders, archives, shards, parquet files or CIFAR-10's batches. The source is never
written to.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from alexnet_cli.core.data.cifar import detect_cifar
from alexnet_cli.core.data.classes import WNID, ClassName, ilsvrc_words, name_classes, read_words
from alexnet_cli.core.data.folders import (
    READABLE_FORMATS,
    class_folders,
    describe_system_folders,
    detect_class_folders,
    detect_tiny_imagenet,
    detect_train_and_val,
    find_splits,
    format_suffixes,
    get_suffix,
    has_image_suffix,
    select_unreadable,
    walk_files,
)
from alexnet_cli.core.data.imagenet import detect_archives, detect_kaggle
from alexnet_cli.core.data.parquet import detect_parquet
from alexnet_cli.core.data.samples import DetectedLayout, ImageList
from alexnet_cli.core.data.webdataset import detect_webdataset
from alexnet_cli.errors import DataError, UsageError

DEFAULT_VAL_FRACTION = 0.1  # of each class, if the source has no validation split
DETECTORS: tuple[Callable[[Path], DetectedLayout | None], ...] = (
    detect_kaggle,
    detect_archives,
    detect_parquet,
    detect_webdataset,
    detect_tiny_imagenet,
    detect_train_and_val,
    detect_class_folders,
    detect_cifar,
)
KNOWN_LAYOUTS = (
    "ILSVRC2012_img_train.tar, ILSVRC/Data/CLS-LOC/, train-*.parquet, WebDataset shards, train/CLASS/ with val/CLASS/, "
    "Tiny ImageNet (val/val_annotations.txt), cifar-10-batches-py/, cifar-10-batches-bin/, CLASS/"
)
FOLDERS_HINT = "put the images of each class into a folder of its own; at least two classes are needed"
CONVERT_HINT = f"convert them to JPEG; these can be read: {READABLE_FORMATS}"


@dataclass(frozen=True)
class SourceDataset:
    """A data set that is not prepared yet: its layout in words, classes in label order, images by split (train, val).

    `notes` say what was left out or assumed, `warnings` which classes are probably splits.
    """

    path: Path
    layout: str
    classes: tuple[ClassName, ...]
    splits: Mapping[str, ImageList]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a sha256 over the classes and every image's split, label, name and size."""
        digest = hashlib.sha256(repr([tuple(name) for name in self.classes]).encode(errors="surrogateescape"))
        for split, images in self.splits.items():
            digest.update(f"\n{split} {len(images)}\n".encode())
            for row, label in enumerate(images.labels):
                digest.update(f"{label} {images.size(row)} {images.name(row)}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def detect_source(path: Path, val_fraction: float | None = None) -> SourceDataset:
    """Detect the layout of a data set and list its images, in sorted order.

    If the source has no validation split, `val_fraction` of each class (0.1 if None) becomes one.

    Raises:
        DataError: the folder is missing, has no known layout, or contradicts its layout.
        UsageError: `val_fraction` is out of range, or the source has a validation split.
    """
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be at least 0 and below 1", "for example 0.1")
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{path} is not a folder", f"give the folder that contains it: {path.parent}")
        raise DataError(f"{path} does not exist", "give the folder that holds train/ and val/, or one folder per class")
    detected = next((layout for detect in DETECTORS if (layout := detect(path)) is not None), None)
    if detected is None:
        raise _explain_unknown_layout(path)
    words, notes = _find_words(path, detected)
    notes = (*notes, *describe_system_folders(path))
    classes = name_classes(detected.keys, words)
    if detected.val is not None:
        if val_fraction is not None:
            raise UsageError(f"{path} has a validation split of its own", "leave --val-fraction out")
        splits: Mapping[str, ImageList] = {"train": detected.train, "val": detected.val}
    else:
        fraction = DEFAULT_VAL_FRACTION if val_fraction is None else val_fraction
        splits = _split_by_name(detected.train, len(classes), fraction)
        if len(splits["val"]):
            kept = f"{len(splits['val']):,} of {len(detected.train):,} images are kept for validation"
            notes = (*notes, f"the source has no validation split: {kept}")
    return SourceDataset(path, detected.layout, classes, splits, notes, detected.warnings)


def _find_words(path: Path, detected: DetectedLayout) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return names by key, from the source, its words.txt or ILSVRC's list; and the notes, with some on that list."""
    words = detected.words or read_words(path)
    wnids = [key for key in detected.keys if WNID.fullmatch(key)]
    if not wnids or not words.keys().isdisjoint(wnids):
        return words, detected.notes
    known = {wnid: name for wnid, name in ilsvrc_words(wnids).items() if name not in detected.keys}
    notes, total = list(detected.notes), f"of {len(detected.keys):,} classes"
    if known:
        notes.append(f"{len(known):,} {total} are named as in torchvision's list of ILSVRC 2012")
    if unnamed := len(wnids) - len(known):
        notes.append(f"{unnamed:,} {total} have only a wnid; name them in words.txt, one wnid<TAB>name per line")
    return {**words, **known}, tuple(notes)


def _split_by_name(images: ImageList, classes: int, fraction: float) -> dict[str, ImageList]:
    """Split by the hashes of the names: each class gives its share, at least one image of two or more.

    Images that are added later therefore move few of the others to the other split.
    """
    rows_of_class = [array("I") for _ in range(classes)]
    for row, label in enumerate(images.labels):
        rows_of_class[label].append(row)
    is_val = bytearray(len(images))
    for rows in rows_of_class:
        wanted = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction else 0
        for row in sorted(rows, key=lambda row: _hash_name(images.name(row)))[: max(0, wanted)]:
            is_val[row] = 1
    train, val = (array("I", (row for row, flag in enumerate(is_val) if flag == split)) for split in (0, 1))
    return {"train": images.select(train), "val": images.select(val)}


def _hash_name(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _explain_unknown_layout(path: Path) -> DataError:
    """Return the error for a folder of no known layout: empty, no images, one class, one folder too high."""
    folder = _descend(path)
    if _has_classes(folder):
        return DataError(f"{path} has no class folders, but {folder} has", f"did you mean {folder}?")
    if class_folders(path)[0]:
        what = f"{path} has only one class: {folder.relative_to(path).as_posix()}"
        if unreadable := select_unreadable(Counter(map(get_suffix, walk_files(path, path)))):
            return DataError(f"{what}, and images that cannot be read: {format_suffixes(unreadable)}", CONVERT_HINT)
        return DataError(what, FOLDERS_HINT)
    files = list(walk_files(path, path))
    if count := sum(map(has_image_suffix, files)):
        return DataError(f"{path} has {count:,} images, but no class folders", FOLDERS_HINT)
    suffixes = Counter(map(get_suffix, files))
    if unreadable := select_unreadable(suffixes):
        what = f"{path} has only images that cannot be read: {format_suffixes(unreadable)}"
        return DataError(what, CONVERT_HINT)
    if suffixes:
        what = f"{path} has no files with an image suffix ({format_suffixes(suffixes)}). Known layouts: {KNOWN_LAYOUTS}"
        if suffixes[".parquet"]:
            return DataError(what, "give the folder that holds train-*.parquet")
        if suffixes[".tar"]:
            return DataError(what, "unpack the archives; WebDataset needs training shards of KEY.jpg and KEY.cls")
        return DataError(what, f"{FOLDERS_HINT}; these can be read: {READABLE_FORMATS}")
    return DataError(f"{path} is empty", FOLDERS_HINT)


def _descend(path: Path) -> Path:
    """Descend while a folder has one subfolder with images. Returns the first with classes, otherwise the last."""
    while not _has_classes(path) and len(filled := class_folders(path)[0]) == 1:
        path = path / filled[0]
    return path


def _has_classes(path: Path) -> bool:
    """Return whether the layout would be CLASS or train/CLASS."""
    train = find_splits(path).get("train", [[]])[0]
    return any(len(class_folders(folder)[0]) > 1 for folder in (path, *(path / name for name in train)))
