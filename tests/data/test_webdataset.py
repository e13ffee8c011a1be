"""WebDataset shards as a source, written by the package of that name (the writer that others use)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import imagenet_files
from alexnet_cli.core.data import prepare
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.data.sources import detect_source
from alexnet_cli.errors import DataError
from imagenet_files import VAL

WNIDS = sorted(imagenet_files.CLASSES)
Samples = Sequence[Mapping[str, Any]]


def write_shards(root: Path, pattern: str, samples: Samples, per_shard: int = 5) -> None:
    webdataset = pytest.importorskip("webdataset")
    for number, first in enumerate(range(0, len(samples), per_shard)):
        file = root / pattern.format(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(str(file)) as writer:
            for sample in samples[first : first + per_shard]:
                writer.write(dict(sample))


def make_samples(with_wnids: bool = True) -> tuple[Samples, Samples]:
    """The drawn images: keys such as n01440764_2 or s0000002, and members that are neither image nor label."""
    train, val = imagenet_files.drawn_images()
    pairs = [(name.split("/")[0], data) for name, data in train.items()]
    splits: list[Samples] = []
    for split in (pairs, list(zip(VAL, val.values(), strict=True))):
        splits.append([
            {
                "__key__": f"{wnid}_{i}" if with_wnids else f"s{i:07d}",
                "jpg": data, "cls": WNIDS.index(wnid), "json": {"label": WNIDS.index(wnid)},
            }
            for i, (wnid, data) in enumerate(split)
        ])  # fmt: skip
    return splits[0], splits[1]


def read_all(root: Path) -> dict[str, list[tuple[int, bytes]]]:
    return {
        name: [(image.label, image.read()) for image in split] for name, split in detect_source(root).splits.items()
    }


@pytest.mark.parametrize(
    ("train_pattern", "val_pattern"),
    [
        ("imagenet1k-train-{:04}.tar", "imagenet1k-validation-{:04}.tar"),  # as timm's copies on the Hugging Face Hub
        ("train/{}.tar", "val/{}.tar"),  # as CLIP benchmark's
    ],
)
def test_images_labels_and_names(train_pattern: str, val_pattern: str, tmp_path: Path) -> None:
    train, val = make_samples()
    write_shards(tmp_path / "in", train_pattern, train)
    write_shards(tmp_path / "in", val_pattern, val)
    source = detect_source(tmp_path / "in")
    assert source.layout == "WebDataset: 3 train and 1 validation shards"
    assert [name.wnid for name in source.classes] == WNIDS
    assert source.classes[0] == ClassName("tench", "n01440764")
    expected = {"train": [(s["cls"], s["jpg"]) for s in train], "val": [(s["cls"], s["jpg"]) for s in val]}
    assert read_all(tmp_path / "in") == expected
    for _ in prepare.pack(Plan(source, tmp_path / "out"), workers=1):
        pass
    assert len(open_dataset(tmp_path / "out").split("train")) == len(train)
    with pytest.raises(DataError, match="no files with an image suffix"):
        detect_source(tmp_path / "out")  # a prepared set is not prepared again, with its classes numbered


def test_without_a_validation_split(tmp_path: Path) -> None:
    train, val = make_samples(with_wnids=False)
    write_shards(tmp_path, "train/{}.tar", train)
    write_shards(tmp_path, "test/{}.tar", val)
    (tmp_path / "classnames.txt").write_text("fish\nbird\ncat\nmachine\n")
    source = detect_source(tmp_path)
    assert [name.name for name in source.classes] == ["fish", "bird", "cat", "machine"]
    assert [len(images) for images in source.splits.values()] == [8, 4]
    assert source.notes[0] == "the test split is not used: 0.tar, ...; rename it to val to validate on it"
    (tmp_path / "classnames.txt").write_text("fish\nbird\ncat\n")
    with pytest.raises(DataError, match="has label 3, but there are 3 classes"):
        detect_source(tmp_path)
    (tmp_path / "classnames.txt").write_text("fish\n\nbird\ncat\nmachine\n")
    with pytest.raises(DataError, match="line 2 is empty"):
        detect_source(tmp_path)
    (tmp_path / "classnames.txt").unlink()
    assert [name.name for name in detect_source(tmp_path).classes] == ["0", "1", "2", "3"]


def test_shards_of_one_split_are_for_training(tmp_path: Path) -> None:
    write_shards(tmp_path, "imagenet12k-train-{:04}.tar", make_samples()[0])  # timm's copies of all of ImageNet
    assert detect_source(tmp_path).layout == "WebDataset: 3 train and 0 validation shards"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"", "b.cls": b"0"}, "a.jpg has no label"),
        ({"a.jpg": b"", "a.cls": b"cat"}, "a.cls is not the number of a class"),
        ({"a.jpg": b"", "a.cls": b"-1"}, "a.cls is not the number of a class"),
        ({"a.jpg": b"", "a.cls": b"1" * 400}, "a.cls is not the number of a class"),
        ({"a.jpg": b"", "a.png": b"", "a.cls": b"0"}, "a has two images"),
        ({"a.jpg": b"", "a.cls": b"0"}, "fewer than two classes"),
    ],
)
def test_samples_that_cannot_be_used(members: Mapping[str, bytes], message: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=message):
        detect_source(tmp_path)


def test_no_shard_of_another_split_is_trained_on(tmp_path: Path) -> None:
    train, val = make_samples()
    write_shards(tmp_path / "in", "coco-val-{}.tar", val)
    with pytest.raises(DataError, match="no files with an image suffix") as caught:
        detect_source(tmp_path / "in")
    assert "WebDataset needs training shards" in caught.value.hint
    write_shards(tmp_path / "in", "cc-train-{}.tar", train)
    write_shards(tmp_path / "in", "extra-{}.tar", val)
    source = detect_source(tmp_path / "in")
    assert [len(images) for images in source.splits.values()] == [len(train), len(val)]
    assert source.notes[0] == "left out (not named like a split): extra-0.tar, ..."


def test_archives_next_to_class_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(imagenet_files.jpeg(0, 1))
    (tmp_path / "backup.tar").write_bytes(b"no archive")
    assert detect_source(tmp_path).layout == "one folder per class"
