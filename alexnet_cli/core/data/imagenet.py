"""ImageNet as it is distributed: the official archives, their flat val/, and Kaggle's tree. No torch.

Training images are in ILSVRC2012_img_train.tar (a tar of one WNID.tar per class), in train/WNID.tar once that is
unpacked, or in train/WNID once these are unpacked too. Validation images are in ILSVRC2012_img_val.tar or in a flat
val/, their classes in the development kit or in LOC_val_solution.csv; or they are sorted into val/WNID. Any mix works.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from alexnet_cli.core.data.devkit import find_devkit, read_devkit
from alexnet_cli.core.data.folders import (
    class_folders,
    describe_left_out,
    get_suffix,
    has_image_suffix,
    list_images,
    list_train,
    list_val,
)
from alexnet_cli.core.data.samples import DetectedLayout, ImageList
from alexnet_cli.core.data.tar_archives import ArchiveImages, Member, scan_members
from alexnet_cli.core.files import read_text
from alexnet_cli.errors import DataError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"
SOLUTION = "LOC_val_solution.csv"
MAPPING = "LOC_synset_mapping.txt"
TREE = "Data/CLS-LOC"


class _GroundTruth(NamedTuple):
    """wnid of each validation image, by the stem of its file name; the file that says so, and its name in messages."""

    path: Path
    name: str
    wnids: Mapping[str, str]


def detect_archives(path: Path) -> DetectedLayout | None:
    """The archives of image-net.org, or the train/ and flat val/ that they unpack to, next to the development kit."""
    has_train_folder = (path / "train").is_dir()
    has_flat_val = _is_flat(path / "val")
    has_archives = (path / TRAIN_TAR).is_file() or (path / VAL_TAR).is_file() or _list_packed_classes(path / "train")
    if not has_archives and not (has_train_folder and has_flat_val):
        return None
    truth, words = _read_ground_truth(path)
    train = _detect_train(path, "train")._replace(words=words)
    if has_flat_val or (path / VAL_TAR).is_file():
        if truth is None:
            what = f"{path} has no {DEVKIT_TAR}, which has the labels of the validation images"
            raise DataError(what, f"put it into {path}")
        return _add_unsorted_val(path, "val", train, truth)
    if (path / "val").is_dir():
        return _add_sorted_val(path, "val", train)
    note = f"{VAL_TAR} is missing; with it and {DEVKIT_TAR}, validation would use its images"
    return train._replace(notes=(*train.notes, note))


def detect_kaggle(path: Path) -> DetectedLayout | None:
    """ILSVRC/Data/CLS-LOC/{train,val}, given as the folder above ILSVRC, as ILSVRC itself, or as CLS-LOC."""
    here = path.resolve()
    table_folders = {f"ILSVRC/{TREE}": (here, here / "ILSVRC"), TREE: (here, here.parent)}
    if here.match(TREE):
        table_folders["."] = (here.parents[1], here.parents[1].parent)
    tree = next((place for place in table_folders if (path / place / "train").is_dir()), None)
    if tree is None:
        return None
    mapping = next((folder / MAPPING for folder in table_folders[tree] if (folder / MAPPING).is_file()), None)
    solution = next((folder / SOLUTION for folder in table_folders[tree] if (folder / SOLUTION).is_file()), None)
    prefix = "" if tree == "." else f"{tree}/"
    train = _detect_train(path, f"{prefix}train", "Kaggle, ILSVRC/Data/CLS-LOC/train/WNID")
    train = train._replace(words=_read_mapping(mapping) if mapping else {})
    if (path / tree / "test").is_dir():
        train = train._replace(notes=(*train.notes, f"left out (no labels): {prefix}test/"))
    val = path / tree / "val"
    if not val.is_dir():
        return train
    if not _is_flat(val):
        return _add_sorted_val(path, f"{prefix}val", train)
    if solution is None:
        what = f"{path} has no {SOLUTION}, which has the labels of the images in {prefix}val"
        raise DataError(what, f"put it into {path}")
    return _add_unsorted_val(path, f"{prefix}val", train, _GroundTruth(solution, SOLUTION, _read_solution(solution)))


def _detect_train(path: Path, folder: str, layout: str = "train/WNID") -> DetectedLayout:
    """Return the training split, from the archive if there is one."""
    if (path / TRAIN_TAR).is_file():
        return _scan_train_archive(path / TRAIN_TAR)
    if not (path / folder).is_dir():
        raise DataError(f"{path} has no {TRAIN_TAR} and no {folder}/", "add one of them: training needs its images")
    if packed := _list_packed_classes(path / folder):
        if class_folders(path / folder)[0]:
            what = f"{path / folder} has class folders, but {packed[0].name} is still packed"
            raise DataError(what, f"unpack it into a folder {packed[0].stem}, or remove it")
        classes = [(file.stem, number, None) for number, file in enumerate(packed)]
        return _scan_class_archives("train/WNID.tar", packed, classes, Counter(), f"{folder}/")
    keys, images, notes = list_train(path, folder)
    return DetectedLayout(layout, keys, images, notes=notes)


def _list_packed_classes(folder: Path) -> list[Path]:
    """Return every FOLDER/WNID.tar for which there is no FOLDER/WNID."""
    files = sorted(folder.glob(f"n{'[0-9]' * 8}.tar"))
    return [file for file in files if file.is_file() and not file.with_suffix("").is_dir()]


def _scan_train_archive(archive: Path) -> DetectedLayout:
    """Return the training split in a tar of WNID.tar."""
    inner: list[Member] = []
    others = Counter[str]()
    for member in scan_members(archive):
        name = PurePosixPath(member.name)
        if name.suffix == ".tar":
            if member.refusal:
                what = f"{archive}: {member.name!r} is a link, or its name leads out of the archive"
                raise DataError(what, "download the archive from image-net.org")
            inner.append(member)
        elif has_image_suffix(member.name):
            what = f"{archive}: {member.name!r} is not in a WNID.tar"
            raise DataError(what, "unpack the archive and give the folder instead")
        else:
            others[get_suffix(member.name)] += 1
    classes = sorted(((PurePosixPath(m.name).stem, 0, m) for m in inner), key=lambda entry: (entry[0], entry[2].offset))
    layout = f"{TRAIN_TAR} (a tar of WNID.tar)"
    train = _scan_class_archives(layout, [archive], classes, others, f"{archive.name}/")
    if (archive.parent / "train").is_dir():
        return train._replace(notes=(*train.notes, f"left out (not needed next to {archive.name}): train/"))
    return train


def _scan_class_archives(
    layout: str,
    archives: Sequence[Path],
    classes: Sequence[tuple[str, int, Member | None]],
    others: Counter[str],
    where: str,
) -> DetectedLayout:
    """Return the training split in one archive per class.

    `classes`: wnid, index of the file in `archives`, and the member of it that is the class's archive (None: the file).
    `others` counts files that are no images; `where` precedes the names of images.
    """
    images = ArchiveImages(*archives)
    keys: list[str] = []
    for key, number, outer in classes:
        for member in scan_members(archives[number], outer):
            if not has_image_suffix(member.name):
                others[get_suffix(member.name)] += 1
                continue
            if not keys or keys[-1] != key:
                keys.append(key)
            images.add(f"{where}{key}/{member.name}", len(keys) - 1, member, number)
    if len(keys) < 2:
        place = archives[0] if len(archives) == 1 else archives[0].parent
        raise DataError(f"{place} has fewer than two WNID.tar with images", f"check that it is {TRAIN_TAR}")
    empty = sorted(f"{where}{key}" for key in {key for key, _, _ in classes} - set(keys))
    return DetectedLayout(layout, keys, images, notes=describe_left_out(where, empty, others))


def _add_unsorted_val(path: Path, folder: str, train: DetectedLayout, truth: _GroundTruth) -> DetectedLayout:
    """Add validation images that are not sorted by class: from the archive if there is one, else from a flat folder."""
    images: ImageList
    if (path / VAL_TAR).is_file():
        images, others = _scan_val_archive(path / VAL_TAR)
        place, name = path / VAL_TAR, VAL_TAR
    else:
        images, others = list_images(path, [folder])
        place, name = path / folder, "flat val/"
    images = images.relabel(_find_labels(place, images, truth, train.keys))
    notes = (*train.notes, *describe_left_out("", (), others))
    return train._replace(layout=f"{train.layout}, {name}, classes from {truth.name}", val=images, notes=notes)


def _add_sorted_val(path: Path, folder: str, train: DetectedLayout) -> DetectedLayout:
    """Add validation images that are sorted into folders by class."""
    images, others = list_val(path, [folder], train.keys)
    notes = (*train.notes, *describe_left_out("", (), others))
    return train._replace(layout=f"{train.layout} and val/WNID", val=images, notes=notes)


def _scan_val_archive(archive: Path) -> tuple[ArchiveImages, Counter[str]]:
    """Return the images of an archive, all with label 0, and the number of other members by suffix."""
    images = ArchiveImages(archive)
    others = Counter[str]()
    for member in scan_members(archive):
        if has_image_suffix(member.name):
            images.add(f"{archive.name}/{member.name}", 0, member)
        else:
            others[get_suffix(member.name)] += 1
    return images, others


def _find_labels(place: Path, images: ImageList, truth: _GroundTruth, keys: Sequence[str]) -> array[int]:
    """Return the label of each image. Raises DataError unless images and ground truth match one to one."""
    label_of = {key: label for label, key in enumerate(keys)}
    labels: array[int] = array("I")
    stems: set[str] = set()
    for image in images:
        stem = PurePosixPath(image.name).stem
        if stem in stems:
            raise DataError(f"{place} has {stem} twice", "remove one of the two")
        if stem not in truth.wnids:
            what = f"{truth.path} has labels of {len(truth.wnids):,} images, but none for {image.name}"
            raise DataError(what, "check that it belongs to this data set and is complete")
        wnid = truth.wnids[stem]
        if wnid not in label_of:
            what = f"{image.name} is of class {wnid}, but the training split has no images of it"
            raise DataError(what, "complete the training split")
        stems.add(stem)
        labels.append(label_of[wnid])
    if missing := truth.wnids.keys() - stems:
        what = f"{place} has {len(labels):,} images, but {truth.path} has labels of {len(truth.wnids):,}"
        raise DataError(f"{what}: {min(missing)} is missing", "copy or unpack the validation images again")
    return labels


def _is_flat(folder: Path) -> bool:
    """Return whether a folder holds validation images directly."""
    if not folder.is_dir():
        return False
    return any(file.name.startswith("ILSVRC2012_val_") and has_image_suffix(file.name) for file in folder.iterdir())


def _read_ground_truth(path: Path) -> tuple[_GroundTruth | None, Mapping[str, str]]:
    """Return the labels of the validation images (None if nothing has them) and the names of the classes by wnid."""
    if kit := find_devkit(path):
        devkit = read_devkit(kit)
        return _GroundTruth(kit, kit.name, devkit.truth), devkit.words
    words = _read_mapping(path / MAPPING) if (path / MAPPING).is_file() else {}
    file = path / SOLUTION
    return _GroundTruth(file, SOLUTION, _read_solution(file)) if file.is_file() else None, words


def _read_mapping(file: Path) -> dict[str, str]:
    """Return names by wnid from lines such as `n01440764 tench, Tinca tinca`."""
    pairs = (line.split(maxsplit=1) for line in _read_lines(file))
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _read_solution(file: Path) -> dict[str, str]:
    """Return wnids by stem from lines such as `ILSVRC2012_val_00048981,n03995372 85 1 499 272`, after a heading."""
    wnids: dict[str, str] = {}
    for number, line in enumerate(_read_lines(file)[1:], 2):
        stem, _, prediction = line.partition(",")
        wnid = (prediction.split() or [""])[0]
        if not wnid or stem in wnids:
            what = f"{file}, line {number}: {line!r} has no class, or repeats an image"
            raise DataError(what, "download the file again")
        wnids[stem] = wnid
    return wnids


def _read_lines(file: Path) -> list[str]:
    return [line for line in read_text(file).splitlines() if line.strip()]
