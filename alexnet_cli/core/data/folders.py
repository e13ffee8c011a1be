"""Data sets as folders of images: one folder per class, train/ and val/, Tiny ImageNet. No torch.

Links to folders are followed, because many people build a smaller data set out of them, but no folder is entered twice.
A broken link is listed, and refused when it is read. Names that begin with a dot are skipped.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alexnet_cli.core.data.samples import DetectedLayout, ImageFiles, ImageList
from alexnet_cli.core.files import read_text
from alexnet_cli.errors import DataError

READABLE_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF and PPM"
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"
}  # fmt: skip
UNREADABLE_SUFFIXES = {
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"
}  # fmt: skip
"""Suffixes of image formats that cannot be read."""
SHOWN_SUFFIXES = 5  # in a message
VAL_FOLDERS = ("val", "valid", "validation")


def detect_class_folders(path: Path) -> DetectedLayout | None:
    """CLASS/IMAGE: one folder per class."""
    folders, empty = class_folders(path)
    if len(folders) < 2:
        return None
    images, others = list_images(path, [*folders, *empty])
    notes = describe_left_out("", empty, others) + _describe_loose(path, ".")
    return DetectedLayout("one folder per class", folders, images, notes=notes)


def detect_train_and_val(path: Path) -> DetectedLayout | None:
    """train/CLASS/IMAGE and, if present, val/CLASS/IMAGE."""
    if not (path / "train").is_dir():
        return None
    val_name = next((name for name in VAL_FOLDERS if (path / name).is_dir()), None)
    if val_name is None and len(class_folders(path / "train")[0]) < 2:
        return None  # train/ may be a class: the vehicle
    folders, train, notes = list_train(path, "train")
    if val_name is None:
        notes += _describe_loose(path, "train") + _describe_test(path, folders, None)
        return DetectedLayout("train/CLASS", folders, train, notes=notes)
    val, others = list_val(path, val_name, folders)
    notes += describe_left_out(f"{val_name}/", (), others) + _describe_loose(path, "train", val_name)
    notes += _describe_test(path, folders, val_name)
    return DetectedLayout(f"train/CLASS and {val_name}/CLASS", folders, train, val, notes)


def detect_tiny_imagenet(path: Path) -> DetectedLayout | None:
    """train/WNID/images/IMAGE and val/images/IMAGE, whose classes are in val/val_annotations.txt."""
    annotations = path / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (path / "train").is_dir():
        return None
    folders, train, notes = list_train(path, "train")
    label_of_file = _read_annotations(annotations, {wnid: label for label, wnid in enumerate(folders)})
    listed, others = list_images(path, ["val/images"])
    if unlabeled := sorted({image.name for image in listed} - set(label_of_file)):
        raise DataError(f"{annotations} has no line for {unlabeled[0]}", "add the line, or remove the image")
    val = ImageFiles(path)
    for name, label in sorted(label_of_file.items()):  # a missing file is refused when it is read
        val.add(name, label)
    notes += describe_left_out("val/", (), others)
    return DetectedLayout("Tiny ImageNet: train/WNID/images, val/val_annotations.txt", folders, train, val, notes)


def list_train(root: Path, folder: str) -> tuple[list[str], ImageFiles, tuple[str, ...]]:
    """Return the class folders under `folder` that have images, their images, and notes on the rest.

    Raises:
        DataError: there are fewer than two such folders, or a folder cannot be listed.
    """
    keys, empty = class_folders(root / folder)
    if len(keys) < 2:
        raise DataError(
            f"{root / folder} has fewer than two class folders with images", "put the images of each class in a folder"
        )
    images, others = list_images(root, [f"{folder}/{key}" for key in (*keys, *empty)])
    return keys, images, describe_left_out(f"{folder}/", empty, others)


def list_val(root: Path, folder: str, keys: Sequence[str]) -> tuple[ImageList, Counter[str]]:
    """Return the images in the class folders under `folder`, and the number of other files by suffix.

    An image's label is the index of its folder in `keys`, the folders of the training split.

    Raises:
        DataError: there are no class folders, or one that `keys` lacks, or a folder cannot be listed.
    """
    val_keys, _ = class_folders(root / folder)
    if not val_keys:
        raise DataError(f"{root / folder} has no class folders", "put the images of each class in a folder")
    if unknown := sorted(set(val_keys) - set(keys)):
        raise DataError(
            f"{root / folder} has the class {unknown[0]}, but train/ has no images of it",
            "use the same folder names in both splits",
        )
    images, others = list_images(root, [f"{folder}/{key}" for key in val_keys])
    label_of = {key: label for label, key in enumerate(keys)}
    return images.relabel(array("I", [label_of[val_keys[label]] for label in images.labels])), others


def _read_annotations(annotations: Path, label_of: Mapping[str, int]) -> dict[str, int]:
    """Return the label of each file from lines such as `val_0.JPEG<TAB>n03444034<TAB>...`."""
    label_of_file: dict[str, int] = {}
    for number, line in enumerate(read_text(annotations).splitlines(), 1):
        if not line.strip():
            continue
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        name = f"val/images/{file}"
        if wnid not in label_of:
            what = f"{annotations}, line {number}: class {wnid!r} has no images in train/"
            raise DataError(what, "complete train/, or remove the line")
        if "/" in file or label_of_file.get(name, label_of[wnid]) != label_of[wnid]:
            what = f"{annotations}, line {number}: {file!r} is not a file name, or has two classes"
            raise DataError(what, "correct the line")
        label_of_file[name] = label_of[wnid]
    return label_of_file


def class_folders(path: Path) -> tuple[list[str], list[str]]:
    """Return the folders directly under `path`, sorted as torchvision does: those with an image inside, the others.

    Raises:
        DataError: a folder cannot be listed.
    """
    folders = sorted(entry.name for entry in _list_entries(path) if _is_folder(entry))
    filled = [name for name in folders if any(has_image_suffix(file) for file in walk_files(path / name, path))]
    return filled, sorted(set(folders) - set(filled))


def list_images(root: Path, folders: Sequence[str]) -> tuple[ImageFiles, Counter[str]]:
    """Return the images under each folder, and the number of other files by suffix.

    An image's label is the index of its folder.

    Raises:
        DataError: a folder cannot be listed.
    """
    images = ImageFiles(root)
    others: Counter[str] = Counter()
    for label, folder in enumerate(folders):
        for file in sorted(walk_files(root / folder, root)):
            if has_image_suffix(file):
                images.add(f"{folder}/{file}", label)
            else:
                others[get_suffix(file)] += 1
    return images, others


def describe_left_out(where: str, empty: Sequence[str], others: Counter[str]) -> tuple[str, ...]:
    """Return notes on empty classes and on files without an image suffix."""
    notes = []
    if empty:
        names = ", ".join(f"{where}{name}" for name in empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"left out (no images inside): {names}")
    if others:
        place = f" in {where}" if where else ""
        notes.append(f"left out{place} (no image suffix): {format_suffixes(others)}")
    if unreadable := select_unreadable(others):
        notes.append(f"these image formats cannot be read: {format_suffixes(unreadable)}; convert them to JPEG")
    return tuple(notes)


def _describe_loose(root: Path, *folders: str) -> tuple[str, ...]:
    """Return a note for each folder that should hold class folders and holds images too."""
    notes = []
    for folder in folders:
        entries = _list_entries(root / folder)
        count = sum(has_image_suffix(entry.name) and not _is_folder(entry) for entry in entries)
        if count:
            notes.append(f"left out (in no class folder): {count:,} images directly in {root / folder}")
    return tuple(notes)


def _describe_test(path: Path, folders: Sequence[str], val_name: str | None) -> tuple[str, ...]:
    """Return a note on test/, which is not used; it could be if it has the same class folders."""
    if not (path / "test").is_dir():
        return ()
    test_folders, _ = class_folders(path / "test")
    if not test_folders or not set(test_folders) <= set(folders):
        return ("left out (no labels): test/",)
    count = len(list_images(path, [f"test/{name}" for name in test_folders])[0])
    reason = f"validation uses {val_name}/" if val_name else "rename it to val/ to validate on it"
    return (f"test/ ({count:,} images) is not used; {reason}",)


def select_unreadable(others: Counter[str]) -> Counter[str]:
    """Return the suffixes of image formats that cannot be read."""
    return Counter({ending: count for ending, count in others.items() if ending.lower() in UNREADABLE_SUFFIXES})


def format_suffixes(others: Counter[str]) -> str:
    """Format as `.HEIC 24, .txt 1`, the most frequent first."""
    ordered = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    text = ", ".join(f"{ending} {count:,}" for ending, count in ordered[:SHOWN_SUFFIXES])
    return text + (", ..." if len(ordered) > SHOWN_SUFFIXES else "")


def get_suffix(file: str) -> str:
    """Return a file's suffix, in its own spelling; `others` if it has none."""
    ending = os.path.splitext(file)[1]
    return ending if re.fullmatch(r"\.\w{1,12}", ending, re.ASCII) else "others"


def has_image_suffix(file: str) -> bool:
    """Return whether a file is an image by its name."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def walk_files(folder: Path, root: Path, unlisted: list[str] | None = None) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it.

    `unlisted`: gets the folders that cannot be listed, which raise DataError if it is None.
    """
    seen = {_identify(root), *(_identify(above) for above in folder.parents if above.is_relative_to(root))}
    seen.add(_identify(folder))
    pending = [""]
    while pending:
        inside = pending.pop()
        folders = []
        for entry in sorted(_list_entries(folder / inside, unlisted), key=lambda entry: entry.name):
            if not _is_folder(entry):
                yield inside + entry.name
                continue
            if entry.is_symlink():
                if (identity := _identify(folder / inside / entry.name)) in seen:
                    continue
                seen.add(identity)
            folders.append(f"{inside}{entry.name}/")
        pending += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether it is a folder or a link to one. A link to itself is neither, and fails when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _list_entries(folder: Path, unlisted: list[str] | None = None) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        if unlisted is None:
            raise DataError(f"{folder} cannot be listed: {error.strerror}", "check its permissions") from error
        unlisted.append(str(folder))
        return []


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
