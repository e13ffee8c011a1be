"""The index of nearest neighbours: right, or not there."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_files import random_model, save_model

from alexnet_cli.core import neighbours
from alexnet_cli.core.nearest import Index
from alexnet_cli.core.neighbours import Origin
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.errors import StorageError, WeightsError
from alexnet_cli.recipe import PAPER


def test_activations_that_float16_cannot_hold_are_an_error() -> None:
    with pytest.raises(WeightsError, match="too large for float16"):
        neighbours.half(np.array([[1e5, 0]], np.float32), Path("m"))


@pytest.fixture
def made(prepared: Path, tmp_path: Path) -> tuple[Path, Origin, Index]:
    path = save_model(random_model(replace(PAPER, width=1 / 32)), tmp_path / "m.safetensors")
    dataset = open_dataset(prepared)
    split = dataset.split("train")
    origin, folder = Origin.of(path, dataset, split), neighbours.place(path, None, dataset)
    told: list[int] = []
    index = neighbours.write_index(folder, origin, split, Session(path, layer="fc7"), told.append)
    assert sum(told) == len(split) == 48
    return folder, origin, index


def test_an_index_is_found_again_until_weights_data_or_files_change(made: tuple[Path, Origin, Index]) -> None:
    folder, origin, index = made
    assert index.vectors.shape == (48, 128)
    assert (index.vectors > 0).any()
    again = neighbours.open_index(folder, origin)
    assert again is not None
    assert (again.vectors == index.vectors).all()
    assert again.squares == pytest.approx((index.vectors.astype(np.float64) ** 2).sum(1), rel=1e-5)
    for other in (replace(origin, weights="0"), replace(origin, data="0"), replace(origin, images=47)):
        assert neighbours.open_index(folder, other) is None
    whole = (folder / "fc7.npy").read_bytes()
    (folder / "fc7.npy").write_bytes(whole[:-1])
    assert neighbours.open_index(folder, origin) is None
    (folder / "fc7.npy").write_bytes(whole)
    assert neighbours.open_index(folder, origin) is not None
    squares = (folder / "squares.npy").read_bytes()
    for damage in (np.nan, np.inf, -1.0):
        (folder / "squares.npy").write_bytes(squares[:-4] + np.float32(damage).tobytes())
        assert neighbours.open_index(folder, origin) is None
    (folder / "squares.npy").write_bytes(squares)
    # Without true ones rows would be passed over.
    for name, bits in (("axes.npy", np.float64(0.5).tobytes()), ("outlines.npy", np.float32("nan").tobytes())):
        good = (folder / name).read_bytes()
        for bad in (good[: -len(bits)] + bits, good[: -len(bits)]):
            (folder / name).write_bytes(bad)
            assert neighbours.open_index(folder, origin) is None
        (folder / name).write_bytes(good)
    assert neighbours.open_index(folder, origin) is not None
    (folder / "index.json").unlink()
    assert neighbours.open_index(folder, origin) is None
    assert {path.name for path in folder.parent.iterdir()} == {"m.safetensors", "m.neighbours"}


def test_an_interrupted_index_leaves_the_old_one_and_nothing_else(
    made: tuple[Path, Origin, Index], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, origin, _ = made
    split = open_dataset(prepared).split("train")
    session = Session(folder.parent / "m.safetensors", layer="fc7")

    def interrupt(_n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neighbours.write_index(folder, origin, split, session, interrupt)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(neighbours, "write_text", full)
    with pytest.raises(StorageError, match="No space left"):
        neighbours.write_index(folder, origin, split, session)
    assert neighbours.open_index(folder, origin) is not None
    assert {path.name for path in folder.parent.iterdir()} == {"m.safetensors", "m.neighbours"}
    shutil.rmtree(folder)
    with pytest.raises(StorageError, match="No space left"):
        neighbours.write_index(folder, origin, split, session)
    assert {path.name for path in folder.parent.iterdir()} == {"m.safetensors"}


def test_an_index_may_lie_elsewhere_and_takes_no_files_place(made: tuple[Path, Origin, Index], prepared: Path) -> None:
    folder, origin, _ = made
    split, session = open_dataset(prepared).split("train"), Session(folder.parent / "m.safetensors", layer="fc7")
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")
    (folder / "note.txt").write_text("somebody's")
    assert neighbours.open_index(folder, origin) is not None
    other = replace(origin, weights="0")
    neighbours.write_index(folder, other, split, session)
    assert folder.is_symlink()
    assert neighbours.open_index(folder.parent / "elsewhere", other) is not None
    assert (folder / "note.txt").read_text() == "somebody's"
    folder.unlink()
    folder.write_text("a note")
    told: list[int] = []
    with pytest.raises(StorageError, match="is no folder"):
        neighbours.write_index(folder, origin, split, session, told.append)
    assert (told, folder.read_text()) == ([], "a note")


def test_what_a_killed_indexing_left_goes_with_the_next_and_what_another_writes_stays(
    prepared: Path, tmp_path: Path
) -> None:
    """Two processes are killed with -9 in the midst of it, one after the other has ended; a third is alive."""
    path = save_model(random_model(replace(PAPER, width=1 / 32)), tmp_path / "m.safetensors")
    dataset = open_dataset(prepared)
    split = dataset.split("train")
    origin, folder = Origin.of(path, dataset, split), neighbours.place(path, None, dataset)
    writing = "import sys; from pathlib import Path; from alexnet_cli.core.neighbours import _replacing\n"
    writing += "with _replacing(Path(sys.argv[1])) as new:\n (new / 'fc7.npy').write_bytes(b'half'); print(); input()"
    for number in range(3):
        command = [sys.executable, "-uc", writing, str(folder)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert [left.name for left in tmp_path.glob(".*")] == [f".m.neighbours.{child.pid}.tmp"]
        if number == 2:
            neighbours.write_index(folder, origin, split, Session(path, layer="fc7"))
            assert [left.name for left in tmp_path.glob(".*")] == [f".m.neighbours.{child.pid}.tmp"]
        child.kill()
        child.communicate()
    neighbours.write_index(folder, origin, split, Session(path, layer="fc7"))
    assert {left.name for left in tmp_path.iterdir()} == {"m.safetensors", "m.neighbours"}
