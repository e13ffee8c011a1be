"""A prepared data set: any tar reader reads it, damage is named, and it is found by name."""

from __future__ import annotations

import gc
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from alexnet_cli.core.data import fast_images, shards
from alexnet_cli.core.files import replace_link
from alexnet_cli.errors import DataError, VerificationError
from shapes import CLASSES, read_tree


def test_files_and_counts_of_a_data_set(packed_shapes: Path) -> None:
    names = [f"train-{i:06d}.tar" for i in range(5)] + ["val-000000.tar", "train.index.npy", "val.index.npy"]
    lists = ["duplicates.jsonl", "rejected.jsonl", "damaged.jsonl", "single_color.jsonl"]
    assert set(read_tree(packed_shapes)) == {*names, "mean.npy", *lists, "dataset.json"}
    rejected = [json.loads(line) for line in (packed_shapes / "rejected.jsonl").read_text().splitlines()]
    assert {line["path"]: line["split"] for line in rejected} == {
        "train/star/star 07.jpg": "train",
        "train/circle/circle 03.jpg": "train",
    }
    assert {"truncated" in line["reason"] or "empty" in line["reason"] for line in rejected} == {True}
    dataset = shards.open_dataset(packed_shapes)
    assert dataset.rejected() == rejected
    assert dataset.record["splits"]["train"]["images_per_class"] == {"min": 29, "median": 29.0, "max": 30}
    assert list(shards.verify_dataset(dataset)) == [
        *names[:6],
        "train.index.npy",
        "val.index.npy",
        "mean.npy",
        *lists,
    ]
    damaged = [json.loads(line) for line in (packed_shapes / "damaged.jsonl").read_text().splitlines()]
    assert [(line["split"], line["path"]) for line in damaged] == [("train", "train/circle/circle 04.jpg")]
    assert "premature end" in damaged[0]["reason"]
    assert repr(dataset) == f"<Dataset {packed_shapes}: 3 classes, train 88, val 12>"
    record = dataset.record
    assert (record["rejected"], record["damaged"], record["turned"]) == (2, 1, 0)
    assert record["source_sizes"] == {
        "width": {"min": 70, "median": 70.0, "max": 70},
        "height": {"min": 50, "median": 50.0, "max": 50},
    }
    assert record["duplicates"] == {"groups": 0, "pictures": 0, "across_splits": 0, "across_classes": 0}


def test_tarfile_finds_the_same_images(shapes: Path, packed_shapes: Path) -> None:
    """tarfile is the second truth for the index; the source is the second truth for pixels and labels."""
    dataset = shards.open_dataset(packed_shapes)
    for name in ("train", "val"):
        split = dataset.split(name)
        members: list[tuple[str, bytes, int]] = []
        for shard in dataset.record["splits"][name]["shards"]:
            with tarfile.open(packed_shapes / shard["file"], "r:") as tar:
                files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
            keys = [file.removesuffix(".jpg") for file in files if file.endswith(".jpg")]
            members += [(key, files[f"{key}.jpg"], int(files[f"{key}.cls"])) for key in keys]
        assert len(split) == len(members) == {"train": 88, "val": 12}[name]
        assert len({key for key, _, _ in members}) == len(members)
        for row, (key, jpeg, label) in enumerate(members):
            assert (split.key(row), bytes(split.jpeg(row)), split.labels[row]) == (key, jpeg, label)
            number, stem = key.split("_", 1)
            original = shapes / name / CLASSES[label] / f"{stem.replace('_', ' ')}.jpg"
            pixels = fast_images.resize_and_crop(fast_images.decode(original.read_bytes()))
            assert jpeg == fast_images.encode(pixels, 95)
            assert int(number) >= row
    first = dataset.split("train").labels[:20]
    assert len(set(first.tolist())) == 3, "classes are mixed within a shard"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(packed_shapes: Path) -> None:
    """The package of that name finds the same pictures and labels, in the same order."""
    webdataset = pytest.importorskip("webdataset")
    dataset = shards.open_dataset(packed_shapes)
    for name in ("train", "val"):
        split = dataset.split(name)
        files = [str(packed_shapes / shard["file"]) for shard in dataset.record["splits"][name]["shards"]]
        read = list(webdataset.WebDataset(files, shardshuffle=False))
        assert len(read) == len(split)
        for row, sample in enumerate(read):
            assert sample["__key__"] == split.key(row)
            assert sample["jpg"] == bytes(split.jpeg(row))
            assert int(sample["cls"]) == split.labels[row]
    gc.collect()  # the package leaves files open: have that said here, where it is expected


def read_all(path: Path) -> None:
    dataset = shards.open_dataset(path)
    dataset.mean_image()
    for name in shards.SPLITS:
        dataset.split(name)


@pytest.mark.parametrize("file", ["train-000002.tar", "val.index.npy", "mean.npy", "dataset.json"])
def test_the_message_names_the_damaged_file(packed_shapes: Path, tmp_path: Path, file: str) -> None:
    for name, data in read_tree(packed_shapes).items():
        (tmp_path / name).write_bytes(data[:-100] if name == file else data)
    with pytest.raises(DataError, match=f"{re.escape(file)} is damaged"):
        read_all(tmp_path)


def test_verify_finds_one_changed_bit(packed_shapes: Path, tmp_path: Path) -> None:
    for name, data in read_tree(packed_shapes).items():
        changed = bytes([data[2000] ^ 1]) if name == "train-000001.tar" else data[2000:2001]
        (tmp_path / name).write_bytes(data[:2000] + changed + data[2001:])
    with pytest.raises(VerificationError, match=r"1 of 13 files .* is damaged: train-000001\.tar \(sha256 ") as error:
        list(shards.verify_dataset(shards.open_dataset(tmp_path)))
    assert error.value.exit_code == 6


def test_verify_names_up_to_ten_damaged_files(
    packed_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(packed_shapes, tmp_path / "out")
    (output / "train-000003.tar").unlink()
    for name in ("train-000000.tar", "mean.npy"):
        with (output / name).open("r+b") as file:
            file.write(b"x")
    right: list[str] = []

    def read_message() -> str:
        right.clear()
        with pytest.raises(VerificationError) as error:
            right.extend(shards.verify_dataset(shards.open_dataset(output)))
        return error.value.what

    what, first = f"3 of 13 files in {output} are damaged: ", r"train-000000\.tar \(sha256 \w{12}, recorded \w{12}\), "
    second, third = r"train-000003\.tar \(No such file or directory\)", r"mean\.npy \(sha256 \w{12}, recorded \w{12}\)"
    assert re.fullmatch(f"{re.escape(what)}{first}{second}, {third}", read_message())
    assert set(read_tree(output)) - set(right) == {"dataset.json", "train-000000.tar", "mean.npy"}
    monkeypatch.setattr(shards, "MAX_NAMED", 2)
    assert re.fullmatch(f"{re.escape(what)}{first}{second} and 1 more", read_message())


def test_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"schema": "alexnet.dataset/9"}')
    with pytest.raises(DataError, match="has schema alexnet"):
        shards.open_dataset(tmp_path)


@pytest.fixture
def here(packed_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prepared/one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared" / "one").mkdir(parents=True)
    (tmp_path / "prepared" / "one" / "dataset.json").write_bytes((packed_shapes / "dataset.json").read_bytes())
    return tmp_path


@pytest.mark.usefixtures("_any_disk")
def test_find_dataset(here: Path, packed_shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Path("prepared/one"), Path("prepared/two")
    assert shards.find_dataset(None) == one
    assert shards.find_dataset("one") == one
    assert shards.find_dataset("prepared/one") == one
    assert shards.find_dataset(str(packed_shapes)) == packed_shapes
    two.mkdir()
    (two / "dataset.json").write_bytes((one / "dataset.json").read_bytes())
    with pytest.raises(DataError, match="several data sets under prepared: one, two"):
        shards.find_dataset(None)
    replace_link(Path("prepared/latest"), two)
    assert shards.find_dataset(None) == two
    assert shards.find_dataset("latest").resolve() == two.resolve()
    monkeypatch.setenv("ALEXNET_DATA", "one")
    assert shards.find_dataset(None) == one
    assert shards.find_dataset("two") == two
    with pytest.raises(DataError, match="no prepared data set three") as caught:
        shards.find_dataset("three")
    assert "one, two" in caught.value.hint


def test_find_dataset_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no prepared data set under") as caught:
        shards.find_dataset(None)
    assert "alexnet prepare SOURCE" in caught.value.hint


def test_a_data_set_of_version_0_1_0_is_read(packed_shapes: Path, tmp_path: Path) -> None:
    record = (packed_shapes / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(record.replace('"color_', '"colour_'))
    old, new = shards.open_dataset(tmp_path), shards.open_dataset(packed_shapes)
    np.testing.assert_array_equal(old.color_std, new.color_std)
    np.testing.assert_array_equal(old.color_axes, new.color_axes)
