"""Data sets as folders of images: one folder per class, train/ and val/, Tiny ImageNet. No torch.

Links to folders are followed, because many people build a smaller data set out of them, but no folder is entered twice.
A broken link is listed, and refused when it is read. Hidden files, and folders that a NAS or system makes, are skipped.
"""

from __future__ import annotations

import contextlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alexnet_cli.core.data.images import OTHER_FORMATS, can_read
from alexnet_cli.core.data.samples import DetectedLayout, ImageFiles, ImageList
from alexnet_cli.core.files import read_text
from alexnet_cli.errors import DataError

READABLE_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF and PPM"
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"
}  # fmt: skip
SHOWN_SUFFIXES = 5  # in a message
SPLIT_WORDS = {
    "train": ("train", "training", "trainset", "trainval"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation", "valset"),
    "test": ("test", "testing", "testset"),
}
"""Words by which a folder is known to be a split; of two folders, the one with the earlier word is used."""
FILLERS = {"set", "data", "dataset", "images", "image", "imgs", "img", "seg", "split", "part", "folder", "x"}
"""Words that may be next to them: "training_set", "seg_train", "train.X1"."""
NEUTRAL_WORDS = FILLERS.union(*SPLIT_WORDS.values())
SYSTEM_FOLDER = re.compile(
    r"\.|(@(eadir|tmp|recycle|recently-snapshot|sharesnap)|[#~](recycle|snapshot)|\$(recycle\.bin|extend)|recycler"
    r"|__(macosx|pycache__)|lost\+found|system volume information|network trash folder|temporary items)$",
    re.I,
)
"""Matches names of folders of a system: ".Trash-1000", "@eaDir", "$RECYCLE.BIN"; "#cats" and "@me" are classes."""


def detect_class_folders(path: Path) -> DetectedLayout | None:
    """CLASS/IMAGE: one folder per class."""
    folders, empty = class_folders(path)
    if len(folders) < 2:
        return None
    inside = {".": folders}
    for name in folders:
        while len(inner := class_folders(path / name)[0]) == 1:
            name = f"{name}/{inner[0]}"
        _refuse_splits(str(path / name), inner)
        inside[name] = inner
    images, others = list_images(path, [*folders, *empty])
    notes = describe_left_out("", empty, others) + _describe_loose(path, ".")
    return DetectedLayout("one folder per class", folders, images, notes=notes, warnings=_find_alike(inside))


def detect_train_and_val(path: Path) -> DetectedLayout | None:
    """train/CLASS/IMAGE and, if present, val/CLASS/IMAGE, by any name that `find_splits` knows."""
    splits = find_splits(path)
    if "train" not in splits:
        return None
    train_folders = splits["train"][0]
    if len(splits) == 1 and len(_list_classes(path, train_folders)) < 2:
        return None  # train/ may be a class: the vehicle
    keys, train, notes = list_train(path, *train_folders)
    layout, val, val_folders = _join(train_folders, "/CLASS"), None, splits.get("val", [[]])[0]
    if val_folders:
        layout = f"{layout} and {_join(val_folders, '/CLASS')}"
        val, others = list_val(path, val_folders, keys)
        notes += describe_left_out(_join(val_folders), (), others)
    notes += _describe_loose(path, *train_folders, *val_folders) + _describe_unused(path, splits, keys)
    return DetectedLayout(layout, keys, train, val, notes)


def detect_tiny_imagenet(path: Path) -> DetectedLayout | None:
    """train/WNID/images/IMAGE and val/images/IMAGE, whose classes are in val/val_annotations.txt."""
    annotations = path / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (path / "train").is_dir():
        return None
    if "images" not in class_folders(path / "val")[0] or class_folders(path / "val" / "images")[0]:
        return None  # somebody has sorted them into val/WNID or val/images/WNID
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


def find_splits(path: Path) -> dict[str, list[list[str]]]:
    """Return the folders directly under `path` that are splits by name: see `_group_splits`.

    A single folder inside is added if its name has no new word: seg_train/seg_train, Final_Training/Images.
    """
    splits = _group_splits([entry.name for entry in _list_entries(path) if _is_folder(entry)])
    for folders in (folders for choices in splits.values() for folders in choices):
        for i, name in enumerate(folders):
            inside, _ = class_folders(path / name)
            if len(inside) == 1 and _list_words(inside[0]) <= NEUTRAL_WORDS | _list_words(name):
                folders[i] = f"{name}/{inside[0]}"
    return splits


def _group_splits(names: Sequence[str]) -> dict[str, list[list[str]]]:
    """Return those names that are splits: for train, val and test, the best first.

    They count without capitals, digits and `FILLERS`; a split in parts is one entry: train.X1 and train.X2. Other words
    must be shared by train and another split: pets_train and pets_test.
    """
    parsed = [(name, *parse_split(name)) for name in sorted(names)]
    kinds_by_rest: dict[frozenset[str], set[str]] = {}
    for _, kind, _, rest in parsed:
        kinds_by_rest.setdefault(rest, set()).add(kind)
    splits: dict[str, list[list[str]]] = {}
    for split, words in SPLIT_WORDS.items():
        parts: dict[tuple[int, bool, str], list[str]] = {}
        for name, kind, word, rest in parsed:
            if kind == split and (not rest or {"train"} < kinds_by_rest[rest]):
                rank = (words.index(word), bool(rest), re.sub(r"\d+", "#", name.lower()))
                parts.setdefault(rank, []).append(name)
        if parts:
            splits[split] = [parts[rank] for rank in sorted(parts)]
    return splits


def parse_split(name: str) -> tuple[str, str, frozenset[str]]:
    """Return the split that a name is of, the word that says so, and its other words; "" if it is of none."""
    words = _list_words(name)
    for split, known in SPLIT_WORDS.items():
        for word in known:
            if word in words:
                return split, word, frozenset(words - NEUTRAL_WORDS)
    return "", "", frozenset()


def _list_words(name: str) -> set[str]:
    """Return the words of a folder's name in small letters: seg and train in SegTrain2."""
    return {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def _list_classes(root: Path, folders: Sequence[str]) -> list[str]:
    """Return the names of the class folders with images in any of the folders, sorted."""
    return sorted({key for folder in folders for key in class_folders(root / folder)[0]})


def _refuse_splits(place: str, folders: Sequence[str]) -> None:
    """Raise DataError if folders that should be in one class, or one split, are train and val or test."""
    if {"train"} < _group_splits(folders).keys():
        hint = f"did you mean {place}? Otherwise sort the images into train/CLASS and val/CLASS"
        raise DataError(f"{place} has splits inside: {_join(folders)}", hint)


def _join(names: Sequence[str], end: str = "/") -> str:
    """Return the first folders' names in words: "train.X1/, train.X2/"."""
    return ", ".join(f"{name}{end}" for name in names[:5]) + (", ..." if len(names) > 5 else "")


def list_train(root: Path, *folders: str) -> tuple[list[str], ImageList, tuple[str, ...]]:
    """Return the class folders under `folders` that have images, their images, and notes on the rest.

    Raises:
        DataError: there are fewer than two such folders, or a folder cannot be listed.
    """
    place = " and ".join(str(root / folder) for folder in folders)
    keys = _list_classes(root, folders)
    if len(keys) < 2:
        has = f"only one class: {keys[0]}" if keys else "no class folders with images"
        raise DataError(f"{place} has {has}", "put the images of each class into a folder of its own; two are needed")
    _refuse_splits(place, keys)
    images, others, empty = _list_split(root, folders, keys)
    return keys, images, describe_left_out(_join(folders), empty, others)


def list_val(root: Path, folders: Sequence[str], keys: Sequence[str]) -> tuple[ImageList, Counter[str]]:
    """Return the images in the class folders under `folders`, and the number of other files by suffix.

    An image's label is the index of its folder in `keys`, the folders of the training split.

    Raises:
        DataError: there are no class folders, or one that `keys` lacks, or a folder cannot be listed.
    """
    place = " and ".join(str(root / folder) for folder in folders)
    val_keys = _list_classes(root, folders)
    if not val_keys:
        raise DataError(
            f"{place} has no class folders", "put the images of each class in a folder, or move it elsewhere"
        )
    if unknown := sorted(set(val_keys) - set(keys)):
        raise DataError(
            f"{place} has the class {unknown[0]}, but the training split has no images of it",
            "use the same folder names in both splits",
        )
    images, others, _ = _list_split(root, folders, keys)
    return images, others


def _list_split(root: Path, parts: Sequence[str], keys: Sequence[str]) -> tuple[ImageList, Counter[str], list[str]]:
    """Return the images of the classes in all parts, the number of other files by suffix, and the other folders."""
    places = [
        (f"{part}/{key}", label) for label, key in enumerate(keys) for part in parts if (root / part / key).is_dir()
    ]
    empty = [f"{part}/{key}" for part in parts for key in class_folders(root / part)[1] if key not in keys]
    images, others = list_images(root, [*(folder for folder, _ in places), *empty])
    return images.relabel(array("I", [places[index][1] for index in images.labels])), others, empty


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
    filled = [name for name in folders if _has_image(path / name, path)]
    return filled, sorted(set(folders) - set(filled))


def _has_image(folder: Path, root: Path) -> bool:
    """Return whether there is an image anywhere below a folder of `root`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # most have one directly inside, found at once
        for entry in entries:
            if has_image_suffix(entry.name) and not is_left_out(entry.name, False) and not _is_folder(entry):
                return True
    return any(has_image_suffix(file) for file in walk_files(folder, root))


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
    """Return notes on empty classes, and on files `where` that have no image suffix."""
    notes = []
    if empty:
        names = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
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


def _describe_unused(path: Path, splits: Mapping[str, list[list[str]]], keys: Sequence[str]) -> tuple[str, ...]:
    """Return notes on folders that are not used: test/, second choices, and others."""
    notes = []
    for split, choices in splits.items():
        use = "rename it to val/ to validate on it"
        if split == "train" or "val" in splits:
            used = splits["train" if split == "train" else "val"][0]
            use = f"{'training' if split == 'train' else 'validation'} uses {_join(used)}"
        for folders in choices if split == "test" else choices[1:]:
            classes = _list_classes(path, folders)
            if classes and set(classes) <= set(keys):
                count = len(_list_split(path, folders, classes)[0])
                notes.append(f"{_join(folders)} ({count:,} images) is not used; {use}")
            else:
                notes.append(f"left out (not sorted into the classes of the training split): {_join(folders)}")
    named = {folder.partition("/")[0] for choices in splits.values() for folders in choices for folder in folders}
    if others := [name for name in class_folders(path)[0] if name not in named]:
        notes.append(f"left out (not named like a split): {_join(others)}")
    return tuple(notes)


def _find_alike(inside: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return a warning if classes hold folders of the same names, as splits do. `inside`: the folders in each class."""
    owners: dict[str, list[str]] = {}
    for name, folders in inside.items():
        for folder in folders:
            owners.setdefault(folder, []).append(name)
    shared = [folder for folder, names in owners.items() if len(names) > 1]
    if len(shared) < 2:  # a folder images/ in each class is common
        return ()
    return (f"{_join(owners[shared[0]])} hold the same folders: {_join(shared)}",)


def select_unreadable(others: Counter[str]) -> Counter[str]:
    """Return the suffixes of image formats that cannot be read, of files without a readable one."""
    suffixes = {suffix for other in OTHER_FORMATS for suffix in other.suffixes}
    return Counter({ending: count for ending, count in others.items() if ending.lower() in suffixes})


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
    """Return whether a file is an image that can be read, by its name."""
    suffix = os.path.splitext(file)[1].lower()
    return suffix in IMAGE_SUFFIXES or any(suffix in other.suffixes and can_read(other) for other in OTHER_FORMATS)


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


def is_left_out(name: str, is_folder: bool) -> bool:
    """Return whether a file or folder is hidden, or a folder of a NAS or system, by its name."""
    return name.startswith(".") or (is_folder and SYSTEM_FOLDER.match(name) is not None)


def describe_system_folders(root: Path) -> tuple[str, ...]:
    """Return a note on the images in folders of a NAS or system below a folder, which are left out."""
    counts = Counter[str]()
    for folder, names, _ in os.walk(root):
        for name in [name for name in names if is_left_out(name, True)]:
            names.remove(name)
            files = (file for _, _, files in os.walk(os.path.join(folder, name)) for file in files)
            counts[name] += sum(has_image_suffix(file) for file in files)
    texts = [f"{name} ({count:,} image{'s' * (count > 1)})" for name, count in counts.items() if count]
    return (f"left out (folders of a NAS or system): {', '.join(texts)}",) if texts else ()


def _list_entries(folder: Path, unlisted: list[str] | None = None) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            matches = SYSTEM_FOLDER.match
            return [
                entry for entry in entries if not matches(entry.name) or not is_left_out(entry.name, _is_folder(entry))
            ]
    except OSError as error:
        if unlisted is None:
            raise DataError(f"{folder} cannot be listed: {error.strerror}", "check its permissions") from error
        unlisted.append(str(folder))
        return []


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
