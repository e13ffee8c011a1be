"""Layouts of ImageNet as it is distributed: the official archives, their flat val/, and Kaggle's tree.

The training pictures are in ILSVRC2012_img_train.tar, a tar of one WNID.tar a class, in train/WNID.tar once
that is unpacked, or in train/WNID once these are too. The validation pictures are in ILSVRC2012_img_val.tar or
flat in val/, their classes in the development kit or in LOC_val_solution.csv; or in val/WNID, sorted by hand.
Any mix of these is understood.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from alexnet_cli.core.data.devkit import find_devkit, read_devkit
from alexnet_cli.core.data.folders import class_folders, describe_left_out, has_image_suffix, list_images, suffix
from alexnet_cli.core.data.samples import DetectedLayout, ImageList
from alexnet_cli.core.data.tar_archives import Member, Members, members
from alexnet_cli.errors import DataError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
TREE = "Data/CLS-LOC"
KIT = "ILSVRC2012_devkit_t12.tar.gz"


class _Split(NamedTuple):
    layout: str
    keys: Sequence[str]
    pictures: ImageList
    notes: tuple[str, ...]


class _Truth(NamedTuple):
    """Where the classes of the validation pictures stand: wnid by the stem of the picture's name."""

    path: Path
    layout: str
    wnids: Mapping[str, str]


def official(path: Path) -> DetectedLayout | None:
    """The archives of image-net.org, or train/ with the val/ that unpacking them gives, beside the kit."""
    flat = (path / "train").is_dir() and _is_flat(path / "val")
    archives = (path / TRAIN).is_file() or (path / VAL).is_file() or _still_packed(path / "train")
    if not archives and not flat:
        return None
    truth, words = _truth(path)
    train = _train(path, "train")
    if not flat and not (path / VAL).is_file():
        if (path / "val").is_dir():
            return _sorted_val(path, "val", train, words)
        note = f"{VAL} is not there; with it and {KIT}, validation would be on its pictures"
        return DetectedLayout(train.layout, train.keys, words, train.pictures, None, (*train.notes, note))
    if truth is None:
        raise DataError(f"{path} has no {KIT}, which names the classes of the validation pictures", "put it there")
    return _with_val(path, "val", train, truth, words)


def kaggle(path: Path) -> DetectedLayout | None:
    """ILSVRC/Data/CLS-LOC/{train,val}, named by the folder above ILSVRC, by ILSVRC itself, or by CLS-LOC."""
    here = path.resolve()
    tables = {f"ILSVRC/{TREE}": (here, here / "ILSVRC"), TREE: (here, here.parent)}
    if here.match(TREE):
        tables["."] = (here.parents[1], here.parents[1].parent)
    tree = next((place for place in tables if (path / place / "train").is_dir()), None)
    if tree is None:
        return None
    mapping = next((folder / MAPPING for folder in tables[tree] if (folder / MAPPING).is_file()), None)
    solution = next((folder / SOLUTION for folder in tables[tree] if (folder / SOLUTION).is_file()), None)
    words = _mapping(mapping) if mapping else {}
    inside = "" if tree == "." else f"{tree}/"
    train = _train(path, f"{inside}train", "Kaggle, ILSVRC/Data/CLS-LOC/train/WNID")
    if (path / tree / "test").is_dir():
        train = train._replace(notes=(*train.notes, f"left out, having no labels: {inside}test/"))
    val = path / tree / "val"
    if not val.is_dir():
        return DetectedLayout(train.layout, train.keys, words, train.pictures, None, train.notes)
    if not _is_flat(val):
        return _sorted_val(path, f"{inside}val", train, words)
    if solution is None:
        what = f"{path} has no {SOLUTION}, which names the classes of the pictures in {inside}val"
        raise DataError(what, "put it there")
    return _with_val(path, f"{inside}val", train, _Truth(solution, SOLUTION, _solution(solution)), words)


def _truth(path: Path) -> tuple[_Truth | None, Mapping[str, str]]:
    """Where the classes of the validation pictures stand, if anywhere, and the words of the classes."""
    if kit := find_devkit(path):
        devkit = read_devkit(kit)
        return _Truth(kit, kit.name, devkit.truth), devkit.words
    words = _mapping(path / MAPPING) if (path / MAPPING).is_file() else {}
    file = path / SOLUTION
    return _Truth(file, SOLUTION, _solution(file)) if file.is_file() else None, words


def _train(path: Path, folder: str, layout: str = "train/WNID") -> _Split:
    if (path / TRAIN).is_file():
        return _train_archive(path / TRAIN)
    if not (path / folder).is_dir():
        raise DataError(f"{path} has no {TRAIN} and no {folder}/", "validation pictures alone cannot be prepared")
    keys, empty = class_folders(path / folder)
    if packed := _still_packed(path / folder):
        if keys:
            what = f"{path / folder} has class folders, and {packed[0].name} beside them is still packed"
            raise DataError(what, f"unpack it into a folder {packed[0].stem}, or remove it")
        classes = [(file.stem, number, None) for number, file in enumerate(packed)]
        return _from_archives("train/WNID.tar", packed, classes, Counter(), f"{folder}/")
    if len(keys) < 2:
        raise DataError(f"{path / folder} has fewer than two class folders with pictures", "one folder per class")
    pictures, others = list_images(path, [f"{folder}/{key}" for key in (*keys, *empty)])
    return _Split(layout, keys, pictures, describe_left_out(f"{folder}/", empty, others))


def _still_packed(folder: Path) -> list[Path]:
    """FOLDER/WNID.tar of which there is no FOLDER/WNID."""
    return sorted(
        file for file in folder.glob(f"n{'[0-9]' * 8}.tar") if file.is_file() and not file.with_suffix("").is_dir()
    )


def _train_archive(archive: Path) -> _Split:
    inner, others = _class_archives(archive)
    classes = [(key, 0, member) for key, member in inner]
    split = _from_archives(f"{TRAIN} (a tar of WNID.tar)", [archive], classes, others, f"{archive.name}/")
    if (archive.parent / "train").is_dir():
        return split._replace(notes=(*split.notes, f"left out: train/, since {archive.name} is there"))
    return split


def _from_archives(
    layout: str,
    archives: Sequence[Path],
    classes: Sequence[tuple[str, int, Member | None]],
    others: Counter[str],
    where: str,
) -> _Split:
    """One archive a class: its key, the number of its file, and the member of it that it is, unless it is all of it."""
    pictures = Members(*archives)
    keys: list[str] = []
    for key, number, inside in classes:
        for picture in members(archives[number], inside):
            if not _is_listed(picture.name):
                others[suffix(picture.name)] += 1
                continue
            if not keys or keys[-1] != key:
                keys.append(key)
            pictures.add(f"{where}{key}/{picture.name}", len(keys) - 1, picture, number)
    if len(keys) < 2:
        place = archives[0] if len(archives) == 1 else archives[0].parent
        raise DataError(f"{place} has fewer than two WNID.tar with pictures inside", "is it the right one?")
    empty = sorted({key for key, _, _ in classes} - set(keys))
    return _Split(layout, keys, pictures, describe_left_out(where, empty, others))


def _class_archives(archive: Path) -> tuple[list[tuple[str, Member]], Counter[str]]:
    """The archives inside, sorted by class, and how many other members there are."""
    inner, others = [], Counter[str]()
    for member in members(archive):
        name = PurePosixPath(member.name)
        if name.suffix == ".tar" and not name.name.startswith("."):
            if member.refused:
                raise DataError(f"{archive}: {member.name!r} is a link or has a name that leads out", "is it genuine?")
            inner.append((name.stem, member))
        elif _is_listed(member.name):
            raise DataError(f"{archive}: {member.name!r} is not in a WNID.tar", "unpack it and name the folder instead")
        else:
            others[suffix(member.name)] += 1
    return sorted(inner, key=lambda pair: (pair[0], pair[1].offset)), others


def _is_listed(name: str) -> bool:
    return has_image_suffix(name) and not name.rpartition("/")[2].startswith(".")


def _with_val(path: Path, folder: str, train: _Split, truth: _Truth, words: Mapping[str, str]) -> DetectedLayout:
    """Validation pictures without classes in their names: from the archive if it is there, else a flat folder."""
    pictures: ImageList
    if (path / VAL).is_file():
        pictures, others, place = *_val_archive(path / VAL), VAL
    else:
        pictures, others, place = *list_images(path, [folder]), f"flat {PurePosixPath(folder).name}/"
    labels = _labels(path / place.removeprefix("flat "), pictures, truth, train.keys)
    layout = f"{train.layout}, {place}, classes from {truth.layout}"
    notes = (*train.notes, *describe_left_out("", (), others))
    return DetectedLayout(layout, train.keys, words, train.pictures, pictures.relabel(labels), notes)


def _val_archive(archive: Path) -> tuple[Members, Counter[str]]:
    pictures, others = Members(archive), Counter[str]()
    for member in members(archive):
        if _is_listed(member.name):
            pictures.add(f"{archive.name}/{member.name}", 0, member)
        else:
            others[suffix(member.name)] += 1
    return pictures, others


def _sorted_val(path: Path, folder: str, train: _Split, words: Mapping[str, str]) -> DetectedLayout:
    """Validation pictures that somebody has put into folders by class."""
    keys, _ = class_folders(path / folder)
    label_of = {key: label for label, key in enumerate(train.keys)}
    if unknown := [key for key in keys if key not in label_of]:
        raise DataError(f"{path / folder} has the class {unknown[0]}, of which train/ has no pictures", "complete it")
    pictures, others = list_images(path, [f"{folder}/{key}" for key in keys])
    labels = array("I", [label_of[keys[label]] for label in pictures.labels])
    notes = (*train.notes, *describe_left_out("", (), others))
    chosen = pictures.relabel(labels)
    return DetectedLayout(f"{train.layout} and val/WNID", train.keys, words, train.pictures, chosen, notes)


def _labels(place: Path, pictures: ImageList, truth: _Truth, keys: Sequence[str]) -> array[int]:
    label_of = {key: label for label, key in enumerate(keys)}
    labels, seen = array("I"), set()
    for name in pictures.names:
        stem = PurePosixPath(name).stem
        if stem in seen:
            raise DataError(f"{place} has {stem} twice", "which of the two is right is unknown; remove one")
        if stem not in truth.wnids:
            raise DataError(
                f"{truth.path} has classes for {len(truth.wnids):,} pictures, but none for {name}",
                "is it the kit of this data set, and whole?",
            )
        if truth.wnids[stem] not in label_of:
            what = f"{name} is of class {truth.wnids[stem]}, of which the training split has no pictures"
            raise DataError(what, "complete the training split")
        seen.add(stem)
        labels.append(label_of[truth.wnids[stem]])
    if len(labels) != len(truth.wnids):
        first = min(truth.wnids.keys() - seen)
        what = f"{place} has {len(labels):,} pictures, but {truth.path} classes for {len(truth.wnids):,}"
        raise DataError(f"{what}: {first} is missing", "a picture is missing; copy or unpack it again")
    return labels


def _is_flat(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(file.name.startswith("ILSVRC2012_val_") and has_image_suffix(file.name) for file in folder.iterdir())


def _mapping(file: Path) -> dict[str, str]:
    """`n01440764 tench, Tinca tinca`."""
    pairs = (line.partition(" ") for line in _lines(file))
    return {wnid: text.strip() for wnid, _, text in pairs if text.strip()}


def _solution(file: Path) -> dict[str, str]:
    """`ILSVRC2012_val_00048981,n03995372 85 1 499 272`: the class, then boxes; the first line is a heading."""
    found = {}
    for number, line in enumerate(_lines(file)[1:], 2):
        stem, _, prediction = line.partition(",")
        wnid = (prediction.split() or [""])[0]
        if not wnid or stem in found:
            raise DataError(f"{file}, line {number}: {line!r} names no class, or a picture again", "download it again")
        found[stem] = wnid
    return found


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "check its permissions") from error
