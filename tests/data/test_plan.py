"""What may become an output folder, and the space that it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alexnet_cli.core.data.prepare import pack
from alexnet_cli.errors import UsageError
from shapes import make_plan, read_tree


def test_refused_outputs(shapes: Path, packed_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds another prepared data set") as caught:
        make_plan(shapes, packed_shapes, quality=80).state()
    assert "--overwrite" in caught.value.hint
    with pytest.raises(UsageError, match="inside the source"):
        next(pack(make_plan(shapes, shapes / "train" / "out"), 1))
    assert not (shapes / "train" / "out").exists()
    (tmp_path / "diary.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            next(pack(make_plan(shapes, tmp_path), 1, overwrite=overwrite))
    assert read_tree(tmp_path) == {"diary.txt": b"mine"}


def test_folders_of_other_programs_are_never_replaced(shapes: Path, tmp_path: Path) -> None:
    sets: list[dict[str, bytes]] = [
        {"train-000000.tar": b"mine", "train-000001.tar": b"mine"},  # any WebDataset
        {"dataset.json": b'{"mine": 1}', "mean.npy": b"mine"},
        {".partial/download.bin": b"mine"},
        {"dataset.json": b"not JSON", "val-000000.tar": b"mine"},
    ]
    for number, files in enumerate(sets):
        output = tmp_path / str(number)
        for name, data in files.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="not empty and not a prepared data set"):
                list(pack(make_plan(shapes, output), 1, overwrite=overwrite))
        assert {str(f.relative_to(output)): f.read_bytes() for f in output.rglob("*") if f.is_file()} == files


def test_a_data_set_with_a_foreign_file_is_not_replaced(shapes: Path, packed_shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(packed_shapes, output)
    (output / "notes.md").write_text("mine")
    before = read_tree(output)
    with pytest.raises(UsageError, match=r"holds notes\.md, which is no part"):
        list(pack(make_plan(shapes, output, quality=80), 1, overwrite=True))
    assert read_tree(output) == before


def test_a_changed_source_is_noticed(shapes: Path, packed_shapes: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(shapes, source)
    list(pack(make_plan(source, output), 1))
    one, other = sorted(source.rglob("*.jpg"))[:2]
    one.write_bytes(other.read_bytes() + bytes(3))
    with pytest.raises(UsageError, match="another prepared data set: other images or --val-fraction"):
        make_plan(source, output).state()


def test_estimated_size(shapes: Path, packed_shapes: Path, tmp_path: Path) -> None:
    actual = sum(len(data) for name, data in read_tree(packed_shapes).items() if name.endswith(".tar"))
    beside = sum(name.endswith(".tar") for name in read_tree(packed_shapes)) + 1  # sidecars, and the mean picture
    assert make_plan(shapes, tmp_path / "out").estimate_bytes() - beside * 1_000_000 == pytest.approx(actual, rel=0.25)
