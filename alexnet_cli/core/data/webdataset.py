"""Data sets as WebDataset shards: tar archives of samples, an image KEY.jpg and its label KEY.cls each. No torch.

The split is in the name of a shard (imagenet1k-train-0000.tar) or of its folder (train/0.tar). The label is a number in
text; classnames.txt has a line for each class, in their order. `prepare` itself writes such shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from alexnet_cli.core.data.folders import class_folders, describe_left_out, find_splits, has_image_suffix, parse_split
from alexnet_cli.core.data.samples import DetectedLayout, make_numbered_layout
from alexnet_cli.core.data.shards import PARTIAL, RECORD
from alexnet_cli.core.data.tar_archives import ArchiveImages, Member, scan_members
from alexnet_cli.core.files import read_text
from alexnet_cli.errors import DataError

NAMES = "classnames.txt"
LABEL_DIGITS = 6  # more are no label
FIRST_MEMBERS = 100  # of the first shard; a label must be among them


def detect_webdataset(path: Path) -> DetectedLayout | None:
    """NAME-train-0000.tar with NAME-val-0000.tar, train/*.tar with val/*.tar, or *.tar, of KEY.jpg and KEY.cls."""
    shards = _find_shards(path)
    train, val = shards.get("train", ()), shards.get("val", ())
    if not train or len(class_folders(train[0].parent)[0]) > 1 or not _has_labels(train[0]):
        return None
    if (path / RECORD).is_file() or (path / PARTIAL).is_dir():  # a prepared data set
        return None
    others = Counter[str]()
    images = _scan_shards(path, train, others)
    val_images = _scan_shards(path, val, others) if val else None
    hint = "" if val else "; rename it to val to validate on it"
    notes = [f"the test split is not used: {shards['test'][0].name}, ...{hint}"] if "test" in shards else []
    notes += [f"left out (not named like a split): {shards[''][0].name}, ..."] if "" in shards else []
    layout = f"WebDataset: {len(train):,} train and {len(val):,} validation shards"
    notes += describe_left_out("", (), others)
    return make_numbered_layout(path, layout, _read_names(path / NAMES), images, val_images, notes)


def _find_shards(path: Path) -> Mapping[str, Sequence[Path]]:
    """Return the shards of each split, by their folders or else their names; "" are those whose name is of no split.

    If no name is of a split, all are training shards.
    """
    shards: dict[str, list[Path]] = {}
    for split, choices in find_splits(path).items():
        if files := [file for folder in choices[0] for file in _list_shards(path / folder)]:
            shards[split] = files
    if "train" in shards:
        return shards
    shards = {}
    for file in _list_shards(path):
        shards.setdefault(parse_split(file.stem)[0], []).append(file)
    return {"train": shards[""]} if list(shards) == [""] else shards


def _list_shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("[!.]*.tar") if file.is_file())


def _has_labels(shard: Path) -> bool:
    with suppress(DataError):  # no archive: not a shard
        return any(member.name.lower().endswith(".cls") for member in islice(scan_members(shard), FIRST_MEMBERS))
    return False


def _read_names(file: Path) -> list[str]:
    names = [line.strip() for line in read_text(file).rstrip().splitlines()] if file.is_file() else []
    if "" in names:
        raise DataError(f"{file}, line {names.index('') + 1} is empty", "it has a line for each class, in their order")
    return names


def _scan_shards(root: Path, shards: Sequence[Path], others: Counter[str]) -> ArchiveImages:
    """Return the images of all shards, in their order. `others` counts the suffixes of other members.

    Raises:
        DataError: an image has no label, or two.
    """
    images = ArchiveImages(*shards)
    for number, path in enumerate(shards):
        image_members: dict[str, Member] = {}
        labels: dict[str, int] = {}
        with path.open("rb") as shard:
            for member in scan_members(path):
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key, is_label = f"{folder}/{stem}", suffix.lower() == "cls"
                if not is_label and ("." in suffix or not has_image_suffix(file)):
                    others[f".{suffix}"] += 1
                elif key in (labels if is_label else image_members):
                    raise DataError(f"{path}: {stem} has two {'labels' if is_label else 'images'}", "keep one of them")
                elif is_label:
                    labels[key] = _read_label(shard, member, path)
                else:
                    image_members[key] = member
        where = path.relative_to(root).as_posix()
        for key, member in image_members.items():
            if key not in labels:
                raise DataError(f"{path}: {member.name} has no label", "add a KEY.cls with the number of its class")
            images.add(f"{where}/{member.name}", labels[key], member, number)
    return images


def _read_label(shard: BinaryIO, member: Member, path: Path) -> int:
    shard.seek(member.offset)
    text = shard.read(member.size).strip() if member.size <= LABEL_DIGITS + 2 else b""
    if not text.isdigit() or len(text) > LABEL_DIGITS:
        raise DataError(f"{path}: {member.name} is not the number of a class", "it must be a number from 0, in text")
    return int(text)
