"""Data sets as WebDataset shards: tar archives of samples, an image KEY.jpg and its label KEY.cls each. No torch.

The split is in the name of a shard (imagenet1k-train-0000.tar) or of its folder (train/0.tar). The label is a number in
text; classnames.txt has a line for each class, in their order. `prepare` itself writes such shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from alexnet_cli.core.data.folders import class_folders, find_splits, group_splits, has_image_suffix
from alexnet_cli.core.data.samples import DetectedLayout, detect_numbered_classes
from alexnet_cli.core.data.shards import RECORD
from alexnet_cli.core.data.tar_archives import ArchiveImages, Member, scan_members
from alexnet_cli.core.files import read_text
from alexnet_cli.errors import DataError

NAMES = "classnames.txt"
LABEL_DIGITS = 6  # more are no label
LOOKED_AT = 100  # members of the first shard, among which there must be a label


def detect_webdataset(path: Path) -> DetectedLayout | None:
    """NAME-train-0000.tar with NAME-val-0000.tar, train/*.tar with val/*.tar, or *.tar, of KEY.jpg and KEY.cls."""
    shards = _find_shards(path)
    train, val, test = (shards.get(split, ()) for split in ("train", "val", "test"))
    if not train or (path / RECORD).is_file() or not _has_labels(train[0]):
        return None
    names = read_text(path / NAMES).split("\n") if (path / NAMES).is_file() else []
    use = "" if val else "; rename it to val to validate on it"
    notes = [f"the test split is not used ({test[0].name} and others){use}"] if test else []
    return detect_numbered_classes(
        path,
        f"WebDataset: {len(train):,} train and {len(val):,} validation shards",
        [name.strip() for name in names if name.strip()],
        _scan_shards(path, train),
        _scan_shards(path, val) if val else None,
        notes,
    )


def _find_shards(path: Path) -> Mapping[str, Sequence[Path]]:
    """Return the shards of each split: all are training shards if no name says train. None next to class folders."""
    folders = {split: [path / folder for folder in choices[0]] for split, choices in find_splits(path).items()}
    if any(class_folders(folder)[0] for folder in (path, *folders.get("train", []))):
        return {}
    stems = [file.stem for file in _list_shards(path)]
    if not stems:
        return {split: [file for folder in group for file in _list_shards(folder)] for split, group in folders.items()}
    splits = group_splits(stems)
    chosen = {split: choices[0] for split, choices in splits.items()} if "train" in splits else {"train": stems}
    return {split: [path / f"{stem}.tar" for stem in group] for split, group in chosen.items()}


def _list_shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("[!.]*.tar") if file.is_file())


def _has_labels(shard: Path) -> bool:
    return any(member.name.lower().endswith(".cls") for member in islice(scan_members(shard), LOOKED_AT))


def _scan_shards(root: Path, shards: Sequence[Path]) -> ArchiveImages:
    """Return the images of all shards, in their order. Raises DataError for an image without label."""
    images = ArchiveImages(*shards)
    for number, path in enumerate(shards):
        found: dict[str, Member] = {}
        labels: dict[str, int] = {}
        with path.open("rb") as shard:
            for member in scan_members(path):
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = f"{folder}/{stem}"
                if suffix.lower() == "cls":
                    labels[key] = _read_label(shard, member, path)
                elif "." not in suffix and has_image_suffix(file):
                    if key in found:
                        raise DataError(f"{path}: {stem}.cls has two images", "keep one of them")
                    found[key] = member
        for key, member in found.items():
            if key not in labels:
                raise DataError(f"{path}: {member.name} has no label", "add a KEY.cls with the number of its class")
            images.add(f"{path.relative_to(root).as_posix()}/{member.name}", labels[key], member, number)
    return images


def _read_label(shard: BinaryIO, member: Member, path: Path) -> int:
    shard.seek(member.offset)
    text = shard.read(min(member.size, LABEL_DIGITS + 2)).strip()
    if not text.isdigit() or len(text) > LABEL_DIGITS:
        raise DataError(f"{path}: {member.name} is not the number of a class", "it must be a number from 0, in text")
    return int(text)
