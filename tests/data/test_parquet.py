"""Hugging Face parquet shards, written here as the `datasets` library does (needs pyarrow)."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imagenet_files
from alexnet_cli.core.data import classes, images, prepare
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.shards import Dataset, open_dataset
from alexnet_cli.core.data.sources import detect_source
from alexnet_cli.errors import DataError, MissingError
from imagenet_files import NAMES, VAL

WNIDS = sorted(imagenet_files.CLASSES)
WITH_CHECKSUMS: dict[str, Any] = {
    "use_dictionary": False,
    "write_page_checksum": True,
    "write_statistics": False,
    "compression": "none",
}
Row = tuple[bytes | None, str | None, int | None]


def write_shard(path: Path, rows: Sequence[Row], names: Sequence[str] | None, group: int = 3, **options: Any) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pa.array(
        [{"bytes": data, "path": name} for data, name, _ in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, "label": pa.array([label for _, _, label in rows], pa.int64())})
    label = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": label}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, **options)
    return path


def write_shards(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes], paths: bool = True) -> None:
    """Write two files of training images in mixed order, one of validation images, one without labels."""
    words = [imagenet_files.CLASSES[wnid][0] for wnid in WNIDS]
    rows: list[Row] = [
        (data, name.split("/")[1] if paths else None, WNIDS.index(name.split("/")[0]))
        for name, data in sorted(train.items(), key=lambda pair: pair[0][::-1])
    ]
    write_shard(root / "train-00000-of-00002.parquet", rows[:7], words)
    write_shard(root / "train-00001-of-00002.parquet", rows[7:], words)
    val_rows: list[Row] = [
        (val[name], name.replace(".", f"_{wnid}.") if paths else None, WNIDS.index(wnid))
        for wnid, name in zip(VAL, sorted(val), strict=True)
    ]
    write_shard(root / "validation-00000-of-00001.parquet", val_rows, words)
    write_shard(root / "test-00000-of-00001.parquet", [(imagenet_files.jpeg(0, 0), "t.JPEG", -1)], words)


def prepared(root: Path, output: Path, val_fraction: float | None = None) -> Dataset:
    for _ in prepare.pack(Plan(detect_source(root, val_fraction), output, shard_images=4), workers=2):
        pass
    return open_dataset(output)


@pytest.mark.parametrize("kind", ["drawn", "real"])
@pytest.mark.parametrize("folder", [".", "data"])
def test_images_labels_and_names(kind: str, folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    train, val = (
        imagenet_files.drawn_images()
        if kind == "drawn"
        else imagenet_files.real_images(request.getfixturevalue("samples"))
    )
    write_shards(tmp_path / "in" / folder, train, val)
    dataset = prepared(tmp_path / "in", tmp_path / "out")
    assert dataset.record["layout"] == "Hugging Face parquet: 2 train and 1 validation files"
    assert dataset.classes == NAMES
    assert "test-*.parquet" in detect_source(tmp_path / "in").notes[0]
    expected = {
        "train": sorted((WNIDS.index(name.split("/")[0]), data) for name, data in train.items()),
        "val": sorted((WNIDS.index(w), val[name]) for w, name in zip(VAL, sorted(val), strict=True)),
    }
    for name, expected_images in expected.items():
        split = dataset.split(name)
        left = [(int(split.labels[row]), images.decode(bytes(split.jpeg(row)))) for row in range(len(split))]
        assert len(left) == len(expected_images)
        for label, data in expected_images:
            whole = images.resize_and_crop(images.decode(data)).astype(float)
            distance = [np.abs(pixels - whole).mean() if at == label else 255 for at, pixels in left]
            assert min(distance) < 5, "every image is there, with its label"
            left.pop(int(np.argmin(distance)))
    assert prepared(tmp_path / "in", tmp_path / "again").hash == dataset.hash


def test_row_groups_stay_together(tmp_path: Path) -> None:
    write_shards(tmp_path, *imagenet_files.drawn_images())
    items = detect_source(tmp_path).splits["train"]
    order = prepare.shuffled_rows(items, np.random.default_rng(1))
    assert sorted(order) == list(range(12))
    assert items.blocks is not None
    blocks = [items.blocks[row] for row in order]
    assert sum(a != b for a, b in itertools.pairwise(blocks)) == len(set(blocks)) - 1
    assert blocks != sorted(blocks)
    some = items.select([11, 0, 5])
    assert some[0][:2] == (items.labels[11], items.name(11))
    assert [item.read() for item in some] == [items[row].read() for row in (11, 0, 5)]
    assert list(some.blocks or ()) == [items.blocks[row] for row in (11, 0, 5)]


def test_without_names_and_without_a_validation_split(tmp_path: Path) -> None:
    rows: list[Row] = [(imagenet_files.jpeg(i % 2, i), None, i % 2) for i in range(10)]
    write_shard(tmp_path / "train.parquet", rows, None)
    source = detect_source(tmp_path, 0.2)
    assert source.classes == (ClassName("0"), ClassName("1"))
    assert "numbered" in source.notes[0]
    assert [len(items) for items in source.splits.values()] == [8, 2]
    assert [len(items) for items in detect_source(tmp_path).splits.values()] == [8, 2]  # one in ten, but at least one
    assert not len(detect_source(tmp_path, 0.0).splits["val"])
    write_shard(tmp_path / "train.parquet", rows, ["n01440764", "n02012849"])
    (tmp_path / "words.txt").write_text("n01440764\ttench, Tinca tinca\n")
    assert detect_source(tmp_path).classes[0].wnid == "n01440764"


@pytest.mark.parametrize(
    ("labels", "val", "note"),
    [
        (
            (0, 1, 1),
            False,
            "test-*.parquet (3 images) is not used; rename it to validation-*.parquet to validate on it",
        ),
        ((0, 1, 1), True, "test-*.parquet (3 images) is not used; validation uses validation-*.parquet"),
        ((-1, None), False, "left out (no labels): test-*.parquet"),
        ((), False, "left out (cannot be read): data/test-0.parquet"),
    ],
)
def test_what_is_said_of_a_test_split(labels: tuple[int | None, ...], val: bool, note: str, tmp_path: Path) -> None:
    rows: list[Row] = [(imagenet_files.jpeg(i % 2, i), None, i % 2) for i in range(6)]
    for split in ("train", "validation") if val else ("train",):
        write_shard(tmp_path / "data" / f"{split}-0.parquet", rows, ["a", "b"])
    test = write_shard(tmp_path / "data" / "test-0.parquet", [(rows[0][0], None, label) for label in labels], None)
    if not labels:
        test.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert detect_source(tmp_path).notes[0] == note


def test_files_of_other_splits_are_named(tmp_path: Path) -> None:
    rows: list[Row] = [(imagenet_files.jpeg(i % 2, i), None, i % 2) for i in range(6)]
    for name in ("train-0", "dev-0", "eval-0", "unsupervised-0"):
        write_shard(tmp_path / "pets" / "data" / f"{name}.parquet", rows, ["a", "b"])
    source = detect_source(tmp_path / "pets")
    assert source.notes == ("left out (not one of these splits): data/eval-0.parquet, data/unsupervised-0.parquet",)
    assert len(source.splits["val"]) == 6
    with pytest.raises(DataError) as caught:
        detect_source(tmp_path)
    assert caught.value.hint == "give the folder that holds train-*.parquet"


def test_bare_wnids_and_short_words_are_named(tmp_path: Path) -> None:
    rows: list[Row] = [(imagenet_files.jpeg(i % 2, i), None, i % 2) for i in range(6)]
    write_shard(tmp_path / "train-0.parquet", rows, ["n01443537", "n02123045"])  # as in Tiny ImageNet's copies
    assert detect_source(tmp_path).classes == (ClassName("goldfish", "n01443537"), ClassName("tabby", "n02123045"))
    write_shard(tmp_path / "train-0.parquet", rows, ["goldfish, Carassius auratus", "tabby, tabby cat"])
    assert [name.name for name in detect_source(tmp_path).classes] == ["goldfish", "tabby"]


@pytest.mark.parametrize("spelling", [str, lambda name: name.title().replace(" ", "_") + ", and more"])
def test_the_thousand_names_in_their_order_have_wnids(spelling: Callable[[str], str], tmp_path: Path) -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    names = [
        name.replace("crane bird", "crane").replace("maillot tank suit", "maillot") for name in _IMAGENET_CATEGORIES
    ]
    rows: list[Row] = [(imagenet_files.jpeg(i % 2, i), None, i) for i in (0, 134, 517, 999)]
    write_shard(tmp_path / "train-0.parquet", rows, [spelling(name) for name in names])
    found = detect_source(tmp_path).classes
    assert [name.wnid for name in found] == classes.ilsvrc_wnids()
    assert len({name.name for name in found}) == 1000
    assert found[517].name.endswith("(n03126707)")
    assert not classes.find_ilsvrc_wnids(names[::-1])
    assert not classes.find_ilsvrc_wnids(names[:999])


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    rows: list[Row] = [(imagenet_files.jpeg(i % 2, i), "../../x.jpg", i % 2) for i in range(6)]
    write_shard(tmp_path / "in" / "train-0.parquet", [*rows, (None, "none.jpg", 1), (b"no image", None, 0)], ["a", "b"])
    dataset = prepared(tmp_path / "in", tmp_path / "out", 0.0)
    assert len(dataset.split("train")) == 6
    refused = {line["path"].rpartition("_")[2]: line["reason"] for line in dataset.rejected()}
    assert refused["none.jpg"] == "the row has no bytes"
    assert len(refused) == 2
    for label in (None, -1, 2):
        write_shard(tmp_path / "in" / "train-1.parquet", [(imagenet_files.jpeg(0, 1), None, label)], ["a", "b"])
        with pytest.raises(DataError, match=f"label {-1 if label is None else label}, but there are 2 classes"):
            detect_source(tmp_path / "in")


def test_damaged_files(tmp_path: Path) -> None:
    rows: list[Row] = [(imagenet_files.jpeg(i % 2, i), None, i % 2) for i in range(6)]
    path = write_shard(tmp_path / "in" / "train-0.parquet", rows, ["a", "b"], **WITH_CHECKSUMS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-0\.parquet is damaged or truncated"):
        detect_source(tmp_path / "in")
    start = whole.index(rows[0][0][:20] if rows[0][0] else b"", whole.index(b"PAR1") + 1) + 50  # not the statistics
    path.write_bytes(whole[:start] + bytes(byte ^ 255 for byte in whole[start : start + 20]) + whole[start + 20 :])
    dataset = prepared(tmp_path / "in", tmp_path / "out", 0.0)
    assert len(dataset.split("train")) + len(dataset.rejected()) == 6
    assert all("damaged" in line["reason"] for line in dataset.rejected())
    assert dataset.rejected()
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match=r"needs columns image .* but has text \(string\)"):
        detect_source(tmp_path / "in")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError, match="needs pyarrow, which is not installed") as caught:
        detect_source(tmp_path)
    assert caught.value.hint == "pip install 'alexnet-cli[parquet]'"
    assert caught.value.exit_code == 4
