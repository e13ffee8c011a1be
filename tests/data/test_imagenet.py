"""ImageNet as it is distributed: each layout is written here and prepared, and must give the same data set."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.io import savemat

import imagenet_files
from alexnet_cli.core.data import classes, images, prepare
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.devkit import read_devkit
from alexnet_cli.core.data.plan import SHARD_IMAGES, Plan
from alexnet_cli.core.data.shards import Dataset, Split, open_dataset
from alexnet_cli.core.data.sources import SourceDataset, detect_source
from alexnet_cli.errors import DataError, UsageError
from imagenet_files import NAMES, VAL, val_name

Maker = Callable[[Path, Mapping[str, bytes], Mapping[str, bytes]], None]
LAYOUTS: dict[Maker, str] = {
    imagenet_files.write_archives: "ILSVRC2012_img_train.tar (a tar of WNID.tar), ILSVRC2012_img_val.tar, "
    "classes from ILSVRC2012_devkit_t12.tar.gz",
    imagenet_files.write_unpacked_once: "train/WNID.tar, flat val/, classes from ILSVRC2012_devkit_t12.tar.gz",
    imagenet_files.write_archive_and_folders: "ILSVRC2012_img_train.tar (a tar of WNID.tar) and val/WNID",
    imagenet_files.write_flat: "train/WNID, flat val/, classes from ILSVRC2012_devkit_t12",
    imagenet_files.write_kaggle: "Kaggle, ILSVRC/Data/CLS-LOC/train/WNID, flat val/, classes from LOC_val_solution.csv",
    imagenet_files.write_torchvision: "train/CLASS and val/CLASS",
    imagenet_files.write_tiny: "Tiny ImageNet: train/WNID/images, val/val_annotations.txt",
}


@pytest.fixture(params=["drawn", "real"])
def image_set(request: pytest.FixtureRequest) -> tuple[dict[str, bytes], dict[str, bytes]]:
    return (
        imagenet_files.drawn_images()
        if request.param == "drawn"
        else imagenet_files.real_images(request.getfixturevalue("samples"))
    )


def prepared(source: SourceDataset, output: Path, shard_images: int = SHARD_IMAGES) -> Dataset:
    for _ in prepare.pack(Plan(source, output, shard_images=shard_images), workers=2):
        pass
    return open_dataset(output)


def by_file(split: Split) -> Iterator[tuple[str, int, npt.NDArray[np.uint8]]]:
    """File stem, label and pixels of each image."""
    for row in range(len(split)):
        yield split.key(row).partition("_")[2], int(split.labels[row]), images.decode(bytes(split.jpeg(row)))


def check(dataset: Dataset, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    """Every image is there once, with its class, and looks as it did."""
    wnids = sorted(imagenet_files.CLASSES)
    expected = {
        "train": {Path(name).stem: (wnids.index(name.split("/")[0]), data) for name, data in train.items()},
        "val": {Path(n).stem: (wnids.index(w), val[n]) for w, n in zip(VAL, sorted(val), strict=True)},
    }
    assert dataset.classes == NAMES
    for name, expected_images in expected.items():
        packed = {stem: (label, pixels) for stem, label, pixels in by_file(dataset.split(name))}
        assert len(dataset.split(name)) == len(packed) == len(expected_images)
        for stem, (label, data) in expected_images.items():
            assert packed[stem][0] == label, stem
            whole = images.resize_and_crop(images.decode(data)).astype(np.float64)
            assert np.abs(packed[stem][1] - whole).mean() < 5, stem


@pytest.mark.parametrize("maker", LAYOUTS, ids=lambda maker: maker.__name__)
def test_each_layout(maker: Maker, image_set: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path) -> None:
    maker(imagenet_files.empty_folder(tmp_path / "in"), *image_set)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "in").rglob("*")}
    source = detect_source(tmp_path / "in")
    assert source.layout == LAYOUTS[maker]
    dataset = prepared(source, tmp_path / "out")
    assert dataset.record["layout"] == LAYOUTS[maker]
    check(dataset, *image_set)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "in").rglob("*")} == before


def test_archives_are_continued_to_the_same_bytes(tmp_path: Path) -> None:
    imagenet_files.write_archives(imagenet_files.empty_folder(tmp_path / "in"), *imagenet_files.drawn_images())
    whole = prepared(detect_source(tmp_path / "in"), tmp_path / "whole", shard_images=4)
    plan = Plan(detect_source(tmp_path / "in"), tmp_path / "cut", shard_images=4)
    steps = prepare.pack(plan, workers=1)
    for _ in range(2):
        next(steps)
    steps.close()
    plan = Plan(detect_source(tmp_path / "in"), tmp_path / "cut", shard_images=4)
    assert plan.state() == "unfinished"
    assert [step.kept for step in prepare.pack(plan, workers=2)].count(True) >= 1
    assert open_dataset(tmp_path / "cut").hash == whole.hash


@pytest.mark.parametrize("place", [".", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggle_from_each_of_its_folders(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet_files.write_kaggle(tmp_path, *imagenet_files.drawn_images())
    monkeypatch.chdir(tmp_path / place)
    for path in (Path(), tmp_path / place):
        source = detect_source(path)
        assert source.classes == NAMES
        assert [len(items) for items in source.splits.values()] == [12, 5]
        assert source.layout.startswith("Kaggle")
        assert source.notes[-1].endswith("test/")
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(DataError, match=r"no LOC_val_solution\.csv"):
        detect_source(tmp_path / place)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_saved_on_windows(encoding: str, tmp_path: Path) -> None:
    imagenet_files.write_kaggle(tmp_path, *imagenet_files.drawn_images())
    right = detect_source(tmp_path)
    for name in ("LOC_synset_mapping.txt", "LOC_val_solution.csv"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
    source = detect_source(tmp_path)
    assert source.classes == NAMES
    assert source.fingerprint() == right.fingerprint()


def test_kaggle_sorted_by_hand(tmp_path: Path) -> None:
    train, val = imagenet_files.drawn_images()
    imagenet_files.write_kaggle(tmp_path, train, val)
    place = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    for wnid, name in zip(VAL, sorted(val), strict=True):
        (place / wnid).mkdir(exist_ok=True)
        (place / name).rename(place / wnid / name)
    check(prepared(detect_source(tmp_path), tmp_path.parent / f"{tmp_path.name}-out"), train, val)


def test_training_archive_alone(tmp_path: Path) -> None:
    train, _ = imagenet_files.drawn_images()
    imagenet_files.write_train_archive(tmp_path / "ILSVRC2012_img_train.tar", train)
    source = detect_source(tmp_path)
    assert [len(items) for items in source.splits.values()] == [8, 4]
    assert source.notes[0].startswith("ILSVRC2012_img_val.tar is missing")
    assert source.notes[1] == "4 of 4 classes are named as in torchvision's list of ILSVRC 2012"
    assert "4 of 12 images are kept for validation" in source.notes[2]
    assert source.classes[0] == ClassName("tench", "n01440764")
    assert not len(detect_source(tmp_path, 0.0).splits["val"])
    third = detect_source(tmp_path, 0.3)
    assert [len(items) for items in third.splits.values()] == [8, 4]
    assert sorted(item.label for item in third.splits["val"]) == [0, 1, 2, 3]
    names = sorted(item.name for split in third.splits.values() for item in split)
    assert names == sorted(f"ILSVRC2012_img_train.tar/{name}" for name in train)
    imagenet_files.write_devkit(tmp_path)
    assert detect_source(tmp_path).classes == NAMES


def test_fractions_are_refused_where_there_is_a_validation_split(tmp_path: Path) -> None:
    imagenet_files.write_archives(tmp_path, *imagenet_files.drawn_images())
    with pytest.raises(UsageError, match="validation split of its own"):
        detect_source(tmp_path, 0.1)


def test_a_count_that_differs_from_the_ground_truth(tmp_path: Path) -> None:
    train, val = imagenet_files.drawn_images()
    imagenet_files.write_archives(tmp_path, train, val)
    imagenet_files.write_devkit(tmp_path, truth=(*VAL, VAL[0]))
    with pytest.raises(DataError, match=r"5 images, but .*devkit.* labels of 6: ILSVRC2012_val_00000006 is missing"):
        detect_source(tmp_path)
    imagenet_files.write_devkit(tmp_path, truth=VAL[:4])
    with pytest.raises(DataError, match=r"none for .*val_00000005"):
        detect_source(tmp_path)
    imagenet_files.write_devkit(tmp_path)
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo(val_name(2)))
    with pytest.raises(DataError, match="val_00000002 twice"):
        detect_source(tmp_path)
    for maker in (imagenet_files.write_kaggle, imagenet_files.write_flat):
        maker(imagenet_files.empty_folder(tmp_path), train, dict(list(val.items())[:-1]))
        with pytest.raises(DataError, match=r"4 images, but .* labels of 5: ILSVRC2012_val_00000005"):
            detect_source(tmp_path)


def test_truncated_archives(tmp_path: Path) -> None:
    train, val = imagenet_files.drawn_images()
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        imagenet_files.write_archives(imagenet_files.empty_folder(tmp_path), train, val)
        for size in (0.6, 0.1):
            os.truncate(tmp_path / name, int((tmp_path / name).stat().st_size * size))
            with pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
                detect_source(tmp_path)
            assert caught.value.hint
    inner = {"n01440764.tar": b"", "n02012849.tar": b"x" * 700}
    imagenet_files.write_tar(imagenet_files.empty_folder(tmp_path) / "ILSVRC2012_img_train.tar", inner)
    with pytest.raises(DataError, match=r"n01440764\.tar\) is truncated"):
        detect_source(tmp_path)


def test_parts_that_are_missing(tmp_path: Path) -> None:
    train, val = imagenet_files.drawn_images()
    imagenet_files.write_archives(tmp_path, train, val)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(DataError, match="has no ILSVRC2012_devkit_t12"):
        detect_source(tmp_path)
    imagenet_files.write_tar(
        tmp_path / "ILSVRC2012_devkit_t12.tar.gz", {"ILSVRC2012_devkit_t12/readme.txt": b"."}, "w:gz"
    )
    with pytest.raises(DataError, match="has no data/meta"):
        detect_source(tmp_path)
    imagenet_files.write_devkit(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(DataError, match=r"no ILSVRC2012_img_train\.tar and no train/"):
        detect_source(tmp_path)
    imagenet_files.write_train_archive(
        tmp_path / "ILSVRC2012_img_train.tar", {n: d for n, d in train.items() if "n0312" not in n}
    )
    with pytest.raises(DataError, match="of class n03126707, but the training split has no images of it"):
        detect_source(tmp_path)


def test_a_class_that_is_still_packed_next_to_folders(tmp_path: Path) -> None:
    train, val = imagenet_files.drawn_images()
    imagenet_files.write_flat(tmp_path, train, val)
    (packed,) = imagenet_files.write_class_archives(tmp_path / "train", {"n07000000/a.jpg": b"."})
    with pytest.raises(DataError, match=r"n07000000\.tar is still packed"):
        detect_source(tmp_path)
    packed.rename(packed.with_name("backup.tar"))  # not named like a class: ignored
    assert len(detect_source(tmp_path).splits["train"]) == len(train)


def test_hostile_archives_touch_nothing_outside(tmp_path: Path) -> None:
    train, _ = imagenet_files.drawn_images()
    secret = tmp_path / "secret.JPEG"
    secret.write_bytes(imagenet_files.jpeg(0, 0))
    inside = imagenet_files.empty_folder(tmp_path / "in")
    bad = {
        f"n01440764/{name}": imagenet_files.jpeg(1, 1)
        for name in ("../../../../evil.JPEG", str(tmp_path / "evil.JPEG"))
    }
    inner = {}
    for wnid in imagenet_files.CLASSES:
        files = {name.partition("/")[2]: data for name, data in {**train, **bad}.items() if name.startswith(wnid)}
        path = imagenet_files.write_tar(inside / "x.tar", files)
        with tarfile.open(path, "a") as archive:
            link = tarfile.TarInfo("link.JPEG")
            link.type, link.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(link)
        inner[f"{wnid}.tar"] = path.read_bytes()
        path.unlink()
    imagenet_files.write_tar(inside / "ILSVRC2012_img_train.tar", inner)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    dataset = prepared(detect_source(inside, 0.0), tmp_path / "out")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if tmp_path / "out" not in path.parents} == before
    assert len(dataset.split("train")) == len(train)
    reasons = sorted(line["reason"] for line in dataset.rejected())
    assert reasons == ["it is a link or a device, not a file"] * 4 + ["its name leads out of the archive"] * 2
    for bad_class in ("../n09.tar", "/n09.tar"):
        imagenet_files.write_tar(inside / "ILSVRC2012_img_train.tar", {**inner, bad_class: inner["n01440764.tar"]})
        with pytest.raises(DataError, match="leads out"):
            detect_source(inside)
    imagenet_files.write_tar(inside / "ILSVRC2012_img_train.tar", {**inner, "loose.JPEG": b""})
    with pytest.raises(DataError, match=r"not in a WNID\.tar"):
        detect_source(inside)


def test_a_link_in_the_devkit_is_not_followed(tmp_path: Path) -> None:
    kit = imagenet_files.write_devkit(tmp_path / "a", packed=False)
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as archive:
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            link = tarfile.TarInfo(f"kit/data/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(kit / "data" / name)
            archive.addfile(link)
    assert len(read_devkit(kit).truth) == len(VAL)
    with pytest.raises(DataError, match="has no data/meta"):
        read_devkit(tmp_path / "kit.tar.gz")


def test_the_devkit_says_ids_not_the_sorted_order(tmp_path: Path) -> None:
    kit = read_devkit(imagenet_files.write_devkit(tmp_path))
    assert kit.words["n02123045"] == "tabby, tabby cat"
    assert "n00001740" not in kit.words
    assert [kit.truth[f"ILSVRC2012_val_{i:08d}"] for i in range(1, 6)] == list(VAL)


@pytest.mark.parametrize("how", ["cut short", "text", "without synsets", "numbers"])
def test_a_devkit_with_a_damaged_table(how: str, tmp_path: Path) -> None:
    kit = imagenet_files.write_devkit(tmp_path, packed=False)
    meta, other = kit / "data" / "meta.mat", io.BytesIO()
    savemat(other, {"classes" if how == "without synsets" else "synsets": np.arange(3.0)})
    contents = {"cut short": meta.read_bytes()[:300], "text": b"tench\n" * 100}
    meta.write_bytes(contents.get(how, other.getvalue()))
    with pytest.raises(DataError, match=r"meta\.mat has no usable table of synsets") as caught:
        read_devkit(kit)
    assert caught.value.exit_code == 3


def test_names_of_the_thousand_classes() -> None:
    """Against torchvision's own list, and wnids that everybody knows."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    assert classes.is_ilsvrc(classes.ilsvrc_wnids())
    assert [name for name, _ in classes.ilsvrc_classes()] == _IMAGENET_CATEGORIES
    assert classes.ilsvrc_words(["n02123045", "n00000001", "n01440764"]) == {"n02123045": "tabby", "n01440764": "tench"}


def test_folders_of_wnids_are_named_where_nothing_else_names_them(tmp_path: Path) -> None:
    cranes, suits, unknown = ("n02012849", "n03126707"), ("n03710637", "n03710721"), "n00007846"
    for wnid in (*cranes, *suits, unknown):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "1.jpg").write_bytes(b".")
    source = detect_source(tmp_path, 0.0)
    assert [name.name for name in source.classes] == [unknown, "crane bird", "crane", "maillot", "maillot tank suit"]
    assert [name.wnid for name in source.classes] == [unknown, *cranes, *suits]
    assert source.notes[0] == "4 of 5 classes are named as in torchvision's list of ILSVRC 2012"
    assert source.notes[1].startswith("1 of 5 classes have only a wnid")
    words = {cranes[0]: "crane", cranes[1]: "crane", suits[0]: "maillot", suits[1]: "maillot, tank suit"}  # of the kit
    (tmp_path / "words.txt").write_text("".join(f"{wnid}\t{text}\n" for wnid, text in words.items()))
    source = detect_source(tmp_path, 0.0)
    names = [unknown, *(f"crane ({wnid})" for wnid in cranes), "maillot", "maillot, tank suit"]
    assert [name.name for name in source.classes] == names
    assert not any("torchvision" in note for note in source.notes)
    (tmp_path / "words.txt").unlink()
    shutil.rmtree(tmp_path / unknown)
    assert detect_source(tmp_path, 0.0).notes[0] == "4 of 4 classes are named as in torchvision's list of ILSVRC 2012"
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "1.jpg").write_bytes(b".")
    names = ["birds", "crane bird", "crane", "maillot", "maillot tank suit"]
    assert [name.name for name in detect_source(tmp_path, 0.0).classes] == names


def test_names_are_found_without_torch() -> None:
    code = "import sys; from alexnet_cli.core.data import classes; assert len(classes._torchvision_names()) == 1000; "
    code += "assert not {'torch', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
