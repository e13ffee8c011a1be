"""Data sets as they are found: recognise the layout, name the classes, list the pictures. No torch.

A layout is a function from a folder to a Source, or to None where the folder is not of its kind;
`LAYOUTS` are tried in order. A split may be any sequence of Item, so that archives fit beside folders. A
source is only read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from alexnet_cli.core.listing import Files, Item, class_folders, listing
from alexnet_cli.errors import DataError, UsageError

VAL_FRACTION = 0.1  # of each class, where the source has no validation split of its own
VAL_FOLDERS = ("val", "valid", "validation")
WNID = re.compile(r"n\d{8}")


class ClassName(NamedTuple):
    """What a class is called, and its WordNet id where it has one (`n02123045`)."""

    name: str
    wnid: str | None = None


@dataclass(frozen=True)
class Source:
    """A recognised data set: its layout in words, classes in label order, pictures by split (train, val)."""

    path: Path
    layout: str
    classes: tuple[ClassName, ...]
    splits: Mapping[str, Sequence[Item]]
    notes: tuple[str, ...] = ()
    """What was found and left out."""

    def fingerprint(self) -> str:
        """sha256 over the classes and every picture's split, label and name: is it still the same source?"""
        digest = hashlib.sha256(repr([tuple(name) for name in self.classes]).encode(errors="surrogateescape"))
        for split, items in self.splits.items():
            digest.update(f"\n{split} {len(items)}\n".encode())
            for item in items:
                digest.update(f"{item.label} {item.name}\0".encode(errors="surrogateescape"))
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
        missing = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{path} {missing}", "name the folder that holds train/ and val/, or one folder per class")
    for layout in LAYOUTS:
        source = layout(path, val_fraction)
        if source is not None:
            return source
    raise DataError(
        f"{path} has no pictures in a layout that is known. Looked for: train/CLASS/ with val/CLASS/, "
        "Tiny ImageNet (val/val_annotations.txt), CLASS/",
        "put the pictures of each class into a folder of its own, at least two classes",
    )


def _tiny_imagenet(path: Path, val_fraction: float | None) -> Source | None:
    annotations = path / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (path / "train").is_dir():
        return None
    _refuse_fraction(path, val_fraction)
    folders, empty = class_folders(path / "train")
    train, others = listing(path, [f"train/{name}" for name in folders])
    label_of = {wnid: label for label, wnid in enumerate(folders)}
    label_of_file: dict[str, int] = {}
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        file, wnid = (*line.split("\t"), "", "")[:2]
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
    notes = _notes("train/", empty, others + more)
    return Source(path, layout, _class_names(path, folders), {"train": train, "val": val}, notes)


def _train_and_val(path: Path, val_fraction: float | None) -> Source | None:
    if not (path / "train").is_dir():
        return None
    folders, empty = class_folders(path / "train")
    found = next((name for name in VAL_FOLDERS if (path / name).is_dir()), None)
    if len(folders) < 2:
        if found is None:
            return None  # "train" may be a class, beside other vehicles
        raise DataError(f"{path / 'train'} has fewer than two class folders with pictures", "one folder per class")
    classes = _class_names(path, folders)
    train, others = listing(path, [f"train/{name}" for name in folders])
    if found is None:
        splits = _split_by_name(train, len(classes), val_fraction)
        return Source(path, "train/CLASS", classes, splits, _notes("train/", empty, others))
    _refuse_fraction(path, val_fraction)
    theirs, _ = class_folders(path / found)
    if not theirs:
        raise DataError(f"{path / found} has no class folders", "put its pictures into one folder per class")
    if unknown := sorted(set(theirs) - set(folders)):
        raise DataError(
            f"{path / found} has the class {unknown[0]}, of which train/ has no pictures",
            "the folders of both splits must have the same names",
        )
    val, more = listing(path, [f"{found}/{name}" for name in theirs])
    labels = [folders.index(theirs[label]) for label in val.labels] if theirs != folders else val.labels
    splits = {"train": train, "val": Files(path, val.names, labels)}
    notes = _notes("train/", empty, others + more)
    return Source(path, f"train/CLASS and {found}/CLASS", classes, splits, notes)


def _folder_of_classes(path: Path, val_fraction: float | None) -> Source | None:
    folders, empty = class_folders(path)
    if len(folders) < 2:
        return None
    items, others = listing(path, folders)
    splits = _split_by_name(items, len(folders), val_fraction)
    notes = _notes("", empty, others)
    return Source(path, "one folder per class", _class_names(path, folders), splits, notes)


LAYOUTS: tuple[Callable[[Path, float | None], Source | None], ...] = (
    _tiny_imagenet,
    _train_and_val,
    _folder_of_classes,
)


def _refuse_fraction(path: Path, val_fraction: float | None) -> None:
    if val_fraction is not None:
        raise UsageError(f"{path} has a validation split of its own", "leave --val-fraction out")


def _split_by_name(items: Files, classes: int, val_fraction: float | None) -> dict[str, Files]:
    """Each class gives its share, at least one of two or more, in the order of its names' hashes.

    Pictures that are added later therefore move few of the others to the other split.
    """
    fraction = VAL_FRACTION if val_fraction is None else val_fraction
    by_class: list[list[int]] = [[] for _ in range(classes)]
    for row, label in enumerate(items.labels):
        by_class[label].append(row)
    chosen: set[int] = set()
    for rows in by_class:
        wanted = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction else 0
        chosen.update(sorted(rows, key=lambda row: _hash(items.names[row]))[:wanted])
    kept = [row for row in range(len(items)) if row not in chosen]
    return {"train": items.chosen(kept), "val": items.chosen(sorted(chosen))}


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _class_names(path: Path, folders: Sequence[str]) -> tuple[ClassName, ...]:
    words = _words(path)
    full = [words.get(folder, folder) for folder in folders]
    short = [
        text.partition(",")[0].strip() if folder in words else text for folder, text in zip(folders, full, strict=True)
    ]
    # "crane" is a bird and a machine: where the first word is not enough, all of them are kept.
    names = [text if short.count(first) > 1 else first for first, text in zip(short, full, strict=True)]
    wnids = [folder if WNID.fullmatch(folder) else None for folder in folders]
    return tuple(ClassName(name, wnid) for name, wnid in zip(names, wnids, strict=True))


def _words(path: Path) -> dict[str, str]:
    """words.txt in the folder or in its train/: `n02123045<TAB>tabby, tabby cat`."""
    for file in (path / "words.txt", path / "train" / "words.txt"):
        if file.is_file():
            pairs = (line.partition("\t") for line in file.read_text(errors="replace").splitlines())
            return {wnid.strip(): text.strip() for wnid, _, text in pairs if text.strip()}
    return {}


def _notes(where: str, empty: Sequence[str], others: int) -> tuple[str, ...]:
    notes = []
    if empty:
        listed = ", ".join(f"{where}{name}" for name in empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"left out, holding no pictures: {listed}")
    if others:
        notes.append(f"left out, being no pictures by their names: {others:,}")
    return tuple(notes)
