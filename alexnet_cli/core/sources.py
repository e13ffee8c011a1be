"""Data sets as they are found: recognise the layout, name the classes, list the pictures. No torch.

A layout is a function from a folder to what is Found there, or to None where the folder is not of its kind;
`LAYOUTS` are tried in order. Pictures may lie in folders, archives or tables. A source is only read.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from alexnet_cli.core.folders import class_folders, left_out, listing, loose
from alexnet_cli.core.ilsvrc import ilsvrc_words
from alexnet_cli.core.imagenet import kaggle, official
from alexnet_cli.core.listing import Files, Found, Pictures
from alexnet_cli.core.parquet import huggingface
from alexnet_cli.core.unrecognised import explained
from alexnet_cli.errors import DataError, UsageError

VAL_FRACTION = 0.1  # of each class, where the source has no validation split of its own
VAL_FOLDERS = ("val", "valid", "validation")
WNID = re.compile(r"n\d{8}")


class ClassName(NamedTuple):
    """What a class is called, and its WordNet id where it has one (`n02123045`)."""

    name: str
    wnid: str | None = None


def class_list(names: Sequence[Any], wnids: Sequence[Any]) -> tuple[ClassName, ...]:
    """The classes that a file names. Raises ValueError for what cannot be a list of names."""
    if not names or len(names) != len(wnids):
        raise ValueError(f"{len(names)} class names for {len(wnids)} wnids")
    for name, wnid in zip(names, wnids, strict=True):
        if not isinstance(name, str) or not isinstance(wnid, str | None):
            raise ValueError(f"{name!r} ({wnid!r}) is no name of a class")
    return tuple(map(ClassName, names, wnids))


@dataclass(frozen=True)
class Source:
    """A recognised data set: its layout in words, classes in label order, pictures by split (train, val)."""

    path: Path
    layout: str
    classes: tuple[ClassName, ...]
    splits: Mapping[str, Pictures]
    notes: tuple[str, ...] = ()
    """What was found and left out."""

    def fingerprint(self) -> str:
        """sha256 over the classes and every picture's split, label, name and size: is it still the same source?"""
        digest = hashlib.sha256(repr([tuple(name) for name in self.classes]).encode(errors="surrogateescape"))
        for split, items in self.splits.items():
            digest.update(f"\n{split} {len(items)}\n".encode())
            for row, (label, name) in enumerate(zip(items.labels, items.names, strict=True)):
                digest.update(f"{label} {items.size(row)} {name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def recognise(path: Path, val_fraction: float | None = None) -> Source:
    """Find out what kind of data set a folder is and list its pictures, in sorted order.

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
    for layout in LAYOUTS:
        found = layout(path)
        if found is not None:
            return _source(path, found, val_fraction)
    raise explained(path)


def _source(path: Path, found: Found, val_fraction: float | None) -> Source:
    """Names for the classes; a validation split, taken from the training pictures where there is none."""
    words = found.words or _words(path)
    if not words and (wnids := [key for key in found.keys if WNID.fullmatch(key)]):
        words = {wnid: name for wnid, name in ilsvrc_words(wnids).items() if name not in found.keys}
        found = found._replace(notes=(*found.notes, _told(len(words), len(wnids), len(found.keys))))
    classes = _class_names(found.keys, words)
    if found.val is not None:
        if val_fraction is not None:
            raise UsageError(f"{path} has a validation split of its own", "leave --val-fraction out")
        return Source(path, found.layout, classes, {"train": found.train, "val": found.val}, found.notes)
    fraction = VAL_FRACTION if val_fraction is None else val_fraction
    splits = _split_by_name(found.train, len(classes), fraction)
    notes = (*found.notes, _kept(splits["val"], len(found.train), len(classes)))
    return Source(path, found.layout, classes, splits, notes if splits["val"] else found.notes)


def _told(named: int, wnids: int, classes: int) -> str:
    """How classes are called that are wnids, where the source says nothing of their names."""
    theirs = "named as torchvision names those of ILSVRC 2012"
    some = f"{named:,} of {classes:,} classes are {theirs}" if named < classes else f"the classes are {theirs}"
    if named == wnids:
        return some
    if named:
        others = f"{some}, {'the others' if wnids == classes else 'others'}"
    else:
        others = "the classes are" if wnids == classes else f"{wnids:,} of {classes:,} classes are"
    return f"{others} called by their wnids: words.txt beside them would name them, a line each, wnid<TAB>name"


def _kept(val: Pictures, total: int, classes: int) -> str:
    """What was taken for validation, as it came out: of few pictures it is another share than was asked for."""
    counts = Counter(val.labels)
    each = [counts[label] for label in range(classes)]
    low, high = min(each), max(each)
    spread = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    kept = f"{len(val):,} of {total:,} pictures, {spread} of each class"
    return f"kept for validation, as the source has no such split: {kept}"


def _tiny_imagenet(path: Path) -> Found | None:
    annotations = path / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (path / "train").is_dir():
        return None
    folders, empty = class_folders(path / "train")
    train, others = listing(path, [f"train/{name}" for name in (*folders, *empty)])
    label_of = {wnid: label for label, wnid in enumerate(folders)}
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
    found, more = listing(path, ["val/images"])
    if strays := sorted(set(found.names) - set(label_of_file)):
        raise DataError(f"{annotations} has no line for {strays[0]}", "without a line its class is unknown")
    names = sorted(label_of_file)  # a picture that has a line but no file is refused when it is read
    val = Files(path, names, [label_of_file[name] for name in names])
    layout = "Tiny ImageNet: train/WNID/images, val/val_annotations.txt"
    return Found(layout, folders, {}, train, val, left_out("train/", empty, others + more))


def _train_and_val(path: Path) -> Found | None:
    if not (path / "train").is_dir():
        return None
    folders, empty = class_folders(path / "train")
    found = next((name for name in VAL_FOLDERS if (path / name).is_dir()), None)
    if len(folders) < 2:
        if found is None:
            return None  # "train" may be a class, beside other vehicles
        raise DataError(f"{path / 'train'} has fewer than two class folders with pictures", "one folder per class")
    train, others = listing(path, [f"train/{name}" for name in (*folders, *empty)])
    if found is None:
        notes = left_out("train/", empty, others) + loose(path, "train") + _unused(path, folders, None)
        return Found("train/CLASS", folders, {}, train, None, notes)
    theirs, _ = class_folders(path / found)
    if not theirs:
        raise DataError(f"{path / found} has no class folders", "put its pictures into one folder per class")
    if unknown := sorted(set(theirs) - set(folders)):
        raise DataError(
            f"{path / found} has the class {unknown[0]}, of which train/ has no pictures",
            "the folders of both splits must have the same names",
        )
    val: Pictures
    val, more = listing(path, [f"{found}/{name}" for name in theirs])
    label_of = {name: label for label, name in enumerate(folders)}
    val = val.chosen(range(len(val)), array("I", [label_of[theirs[label]] for label in val.labels]))
    notes = left_out("train/", empty, others + more) + loose(path, "train", found) + _unused(path, folders, found)
    return Found(f"train/CLASS and {found}/CLASS", folders, {}, train, val, notes)


def _unused(path: Path, folders: Sequence[str], val: str | None) -> tuple[str, ...]:
    """A note on test/, which is not taken; in folders of the same classes it could be."""
    if not (path / "test").is_dir():
        return ()
    theirs, _ = class_folders(path / "test")
    if not theirs or not set(theirs) <= set(folders):
        return ("left out, having no labels that are known: test/",)
    count = len(listing(path, [f"test/{name}" for name in theirs])[0])
    why = f"{val}/ is what is measured on" if val else "name it val/ to measure on it"
    return (f"test/ ({count:,} pictures) is not used: {why}",)


def _folder_of_classes(path: Path) -> Found | None:
    folders, empty = class_folders(path)
    if len(folders) < 2:
        return None
    items, others = listing(path, [*folders, *empty])
    return Found("one folder per class", folders, {}, items, None, left_out("", empty, others) + loose(path, "."))


LAYOUTS: tuple[Callable[[Path], Found | None], ...] = (
    kaggle,
    official,
    huggingface,
    _tiny_imagenet,
    _train_and_val,
    _folder_of_classes,
)


def _split_by_name(items: Pictures, classes: int, fraction: float) -> dict[str, Pictures]:
    """Each class gives its share, at least one of two or more, in the order of its names' hashes.

    Pictures that are added later therefore move few of the others to the other split.
    """
    by_class = [array("I") for _ in range(classes)]
    for row, label in enumerate(items.labels):
        by_class[label].append(row)
    chosen = bytearray(len(items))
    for rows in by_class:
        wanted = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction else 0
        for row in sorted(rows, key=lambda row: _hash(items.names[row]))[: max(0, wanted)]:
            chosen[row] = 1
    train, val = (array("I", (row for row, taken in enumerate(chosen) if taken == split)) for split in (0, 1))
    return {"train": items.chosen(train), "val": items.chosen(val)}


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _class_names(keys: Sequence[str], words: Mapping[str, str]) -> tuple[ClassName, ...]:
    full = [words.get(key, key) for key in keys]
    short = [text.partition(",")[0].strip() if key in words else text for key, text in zip(keys, full, strict=True)]
    times = Counter(short)
    # "crane" is a bird and a machine: where the first word is not enough, all of them are kept.
    names = [text if times[first] > 1 else first for first, text in zip(short, full, strict=True)]
    wnids = [key if WNID.fullmatch(key) else None for key in keys]
    times = Counter(names)  # and where these are "crane" both times, too, the wnid tells them apart
    names = [f"{name} ({wnid})" if wnid and times[name] > 1 else name for name, wnid in zip(names, wnids, strict=True)]
    return tuple(ClassName(name, wnid) for name, wnid in zip(names, wnids, strict=True))


def _words(path: Path) -> dict[str, str]:
    """words.txt in the folder or in its train/: `n02123045<TAB>tabby, tabby cat`."""
    for file in (path / "words.txt", path / "train" / "words.txt"):
        if file.is_file():
            pairs = (line.partition("\t") for line in file.read_text(errors="replace").splitlines())
            return {wnid.strip(): text.strip() for wnid, _, text in pairs if text.strip()}
    return {}
