"""Nearest neighbours: the search against every distance in float64, and an index that is right or not there."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_files import random_model, save_model

from alexnet_cli.core import neighbours
from alexnet_cli.core.neighbours import Index, Origin, Vectors
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.errors import StorageError, WeightsError
from alexnet_cli.recipe import PAPER


def index_of(vectors: Vectors) -> Index:
    return Index(vectors, (vectors.astype(np.float32) ** 2).sum(axis=1))


@pytest.mark.parametrize(("block", "piece"), [(1, 1), (7 * 64, 3 * 64), (100 * 64, 64), (2**24, 2**18)])
def test_the_search_is_exact(block: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    monkeypatch.setattr(neighbours, "PIECE", piece)
    rng = np.random.default_rng(0)
    vectors = np.maximum(rng.standard_normal((300, 64)), 0).astype(np.float16)
    vectors[200:210] = vectors[5]  # ties, told in the order of the set
    queries = np.concatenate([vectors[[5, 299]], np.maximum(rng.standard_normal((9, 64)), 0).astype(np.float16)])
    found = neighbours.search(index_of(vectors), queries, 6)
    for query, rows, distances in zip(queries, found.rows, found.distances, strict=True):
        every = np.sqrt(((vectors.astype(np.float64) - query.astype(np.float64)) ** 2).sum(axis=1))
        order = np.argsort(every, kind="stable")[:6]
        assert rows.tolist() == order.tolist()
        assert distances == pytest.approx(every[order], abs=1e-12)
    assert found.rows[0].tolist() == [5, 200, 201, 202, 203, 204]
    assert found.distances[0].tolist() == [0] * 6


def test_long_vectors_that_hardly_differ_are_told_apart() -> None:
    """In float32 |x|^2 - 2 x.q + |q|^2 is off by more than these distances."""
    base = np.full(4096, 60.0, np.float16)
    vectors = np.tile(base, (12, 1))
    for row in range(12):
        vectors[row, : 12 - row] += np.float16(0.03125)
    found = neighbours.search(index_of(vectors), base[None], 12)
    assert found.rows[0].tolist() == list(range(11, -1, -1))
    assert found.distances[0] == pytest.approx(0.03125 * np.sqrt(np.arange(1, 13)))


def test_every_float16_keeps_its_value() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found = neighbours.shifted(finite, np.empty(finite.shape, np.int32))
    assert (found * np.float32(2.0**112) == finite.astype(np.float32)).all()
    assert (np.signbit(found) == np.signbit(finite)).all()


def test_fewer_pictures_than_neighbours_are_all_there_is() -> None:
    vectors = np.eye(3, 8, dtype=np.float16)
    assert neighbours.search(index_of(vectors), vectors[:1], 9).rows.tolist() == [[0, 1, 2]]


def test_activations_that_float16_cannot_hold_are_an_error() -> None:
    with pytest.raises(WeightsError, match="too large for float16"):
        neighbours.half(np.array([[1e5, 0]], np.float32), Path("m"))


@pytest.fixture
def made(prepared: Path, tmp_path: Path) -> tuple[Path, Origin, Index]:
    path = save_model(random_model(replace(PAPER, width=1 / 32)), tmp_path / "m.safetensors")
    dataset = open_dataset(prepared)
    split = dataset.split("train")
    origin, folder = Origin.of(path, dataset, split), neighbours.place(path, None)
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
