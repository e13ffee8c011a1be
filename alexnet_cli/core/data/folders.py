"""Data sets as folders of images: one folder per class, train/ and val/, Tiny ImageNet. No torch.

Links to folders are followed, since many people build a smaller data set out of them, but no folder is entered twice;
a link to nowhere is listed, and refused when it is read. Names that begin with a dot are skipped.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alexnet_cli.core.data.samples import DetectedLayout, Files, ImageList
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
VAL_FOLDERS = ("val", "valid", "validation")


def folder_of_classes(path: Path) -> DetectedLayout | None:
    """CLASS/IMAGE: one folder per class."""
    folders, empty = class_folders(path)
    if len(folders) < 2:
        return None
    items, others = list_images(path, [*folders, *empty])
    notes = describe_left_out("", empty, others) + describe_loose(path, ".")
    return DetectedLayout("one folder per class", folders, {}, items, None, notes)


def train_and_val(path: Path) -> DetectedLayout | None:
    """train/CLASS/IMAGE and, where it is there, val/CLASS/IMAGE."""
    if not (path / "train").is_dir():
        return None
    folders, empty = class_folders(path / "train")
    val_name = next((name for name in VAL_FOLDERS if (path / name).is_dir()), None)
    if len(folders) < 2:
        if val_name is None:
            return None  # "train" may be a class, beside other vehicles
        raise DataError(f"{path / 'train'} has fewer than two class folders with pictures", "one folder per class")
    train, others = list_images(path, [f"train/{name}" for name in (*folders, *empty)])
    if val_name is None:
        notes = describe_left_out("train/", empty, others) + describe_loose(path, "train")
        return DetectedLayout("train/CLASS", folders, {}, train, None, notes + _describe_test(path, folders, None))
    val, val_others = _list_val(path, val_name, folders)
    notes = describe_left_out("train/", empty, others + val_others) + describe_loose(path, "train", val_name)
    notes += _describe_test(path, folders, val_name)
    return DetectedLayout(f"train/CLASS and {val_name}/CLASS", folders, {}, train, val, notes)


def _list_val(path: Path, val_name: str, folders: Sequence[str]) -> tuple[ImageList, Counter[str]]:
    """The images of the validation folder, labeled by the training folders' places, and other files by suffix."""
    val_folders, _ = class_folders(path / val_name)
    if not val_folders:
        raise DataError(f"{path / val_name} has no class folders", "put its pictures into one folder per class")
    if unknown := sorted(set(val_folders) - set(folders)):
        raise DataError(
            f"{path / val_name} has the class {unknown[0]}, of which train/ has no pictures",
            "the folders of both splits must have the same names",
        )
    val, others = list_images(path, [f"{val_name}/{name}" for name in val_folders])
    label_of = {name: label for label, name in enumerate(folders)}
    return val.relabel(array("I", [label_of[val_folders[label]] for label in val.labels])), others


def _describe_test(path: Path, folders: Sequence[str], val_name: str | None) -> tuple[str, ...]:
    """A note on test/, which is not taken; in folders of the same classes it could be."""
    if not (path / "test").is_dir():
        return ()
    test_folders, _ = class_folders(path / "test")
    if not test_folders or not set(test_folders) <= set(folders):
        return ("left out, having no labels that are known: test/",)
    count = len(list_images(path, [f"test/{name}" for name in test_folders])[0])
    why = f"{val_name}/ is what is measured on" if val_name else "name it val/ to measure on it"
    return (f"test/ ({count:,} pictures) is not used: {why}",)


def tiny_imagenet(path: Path) -> DetectedLayout | None:
    """train/WNID/images/IMAGE and val/images/IMAGE, whose classes are in val/val_annotations.txt."""
    annotations = path / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (path / "train").is_dir():
        return None
    folders, empty = class_folders(path / "train")
    train, others = list_images(path, [f"train/{name}" for name in (*folders, *empty)])
    label_of_file = _read_annotations(annotations, {wnid: label for label, wnid in enumerate(folders)})
    found, val_others = list_images(path, ["val/images"])
    if strays := sorted(set(found.names) - set(label_of_file)):
        raise DataError(f"{annotations} has no line for {strays[0]}", "without a line its class is unknown")
    names = sorted(label_of_file)  # an image that has a line but no file is refused when it is read
    val = Files(path, names, [label_of_file[name] for name in names])
    layout = "Tiny ImageNet: train/WNID/images, val/val_annotations.txt"
    return DetectedLayout(layout, folders, {}, train, val, describe_left_out("train/", empty, others + val_others))


def _read_annotations(annotations: Path, label_of: Mapping[str, int]) -> dict[str, int]:
    """Label by file from lines of `val_0.JPEG<TAB>n03444034<TAB>...`."""
    label_of_file: dict[str, int] = {}
    text = annotations.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        file, wnid = (*line.split("\t"), "", "")[:2]
        if "/" in file or label_of_file.get(f"val/images/{file}", label_of.get(wnid)) != label_of.get(wnid):
            raise DataError(f"{annotations}, line {number}: {file!r} is no file name, or has two classes", "correct it")
        if wnid not in label_of:
            what = f"{annotations}, line {number}: class {wnid!r} has no pictures under train/"
            raise DataError(what, "complete train/, or remove the line")
        label_of_file[f"val/images/{file}"] = label_of[wnid]
    return label_of_file


def class_folders(path: Path) -> tuple[list[str], list[str]]:
    """Folders directly under `path`, sorted as torchvision does: those with a picture inside, the rest.

    Raises:
        DataError: a folder cannot be listed.
    """
    folders = sorted(entry.name for entry in _entries(path) if _is_folder(entry))
    filled = [name for name in folders if any(has_image_suffix(file) for file in walk_files(path / name, path))]
    return filled, sorted(set(folders) - set(filled))


def list_images(root: Path, folders: Sequence[str]) -> tuple[Files, Counter[str]]:
    """The pictures under each folder, the folder's place being the label, and how many other files, by suffix.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = Files(root)
    others: Counter[str] = Counter()
    for label, folder in enumerate(folders):
        files = sorted(walk_files(root / folder, root))
        pictures = [f"{folder}/{file}" for file in files if has_image_suffix(file)]
        others.update(suffix(file) for file in files if not has_image_suffix(file))
        found.names.extend(pictures)
        found.labels.extend([label] * len(pictures))
    return found, others


def describe_left_out(where: str, empty: Sequence[str], others: Counter[str]) -> tuple[str, ...]:
    """Notes on what is not taken: classes without pictures, files that are none."""
    notes = []
    if empty:
        listed = ", ".join(f"{where}{name}" for name in empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"left out, holding no pictures: {listed}")
    if others:
        notes.append(f"left out, being no pictures by their names: {format_suffixes(others)}")
    if pictures := select_unread(others):
        notes.append(f"in a format that is not read: {format_suffixes(pictures)}; convert them to JPEG")
    return tuple(notes)


def select_unread(others: Counter[str]) -> Counter[str]:
    """Those that are pictures all the same, in formats that are not read."""
    return Counter({ending: count for ending, count in others.items() if ending.lower() in UNREAD})


def format_suffixes(others: Counter[str]) -> str:
    """`.HEIC 24, .txt 1`, the most frequent first."""
    told = [f"{ending} {count:,}" for ending, count in sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))]
    return ", ".join(told[:SHOWN]) + (", ..." if len(told) > SHOWN else "")


def suffix(file: str) -> str:
    """How a file's name ends, as it is spelled; `others` where that is no suffix."""
    ending = os.path.splitext(file)[1]
    return ending if re.fullmatch(r"\.\w{1,12}", ending, re.ASCII) else "others"


def describe_loose(root: Path, *folders: str) -> tuple[str, ...]:
    """A note on pictures that lie directly in folders which should hold folders of classes."""
    notes = []
    for folder in folders:
        entries = _entries(root / folder) if (root / folder).is_dir() else []
        count = sum(has_image_suffix(entry.name) and not _is_folder(entry) for entry in entries)
        if count:
            notes.append(f"left out, lying in no class's folder: {count:,} pictures directly in {root / folder}")
    return tuple(notes)


def has_image_suffix(file: str) -> bool:
    """Whether a file is a picture by its name."""
    return os.path.splitext(file)[1].lower() in SUFFIXES


def walk_files(folder: Path, root: Path, refused: list[str] | None = None) -> Iterator[str]:
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
