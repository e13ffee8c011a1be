"""Nearest neighbours: the search against every distance in float64, and an index that is right or not there."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hostile import generated
from hypothesis import given
from hypothesis import strategies as st
from model_files import random_model, save_model

from alexnet_cli.core import neighbours
from alexnet_cli.core.neighbours import Index, Neighbours, Origin, Vectors
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.errors import StorageError, WeightsError
from alexnet_cli.recipe import PAPER


def index_of(vectors: Vectors) -> Index:
    return Index(vectors, (vectors.astype(np.float32) ** 2).sum(axis=1))


def assert_exact(found: Neighbours, vectors: Vectors, queries: Vectors, k: int) -> None:
    """Against every distance in float64."""
    assert found.rows.shape == found.distances.shape == (len(queries), min(k, len(vectors)))
    for query, rows, distances in zip(queries, found.rows, found.distances, strict=True):
        every = np.sqrt(((vectors.astype(np.float64) - query.astype(np.float64)) ** 2).sum(axis=1))
        order = np.argsort(every, kind="stable")[:k]
        assert rows.tolist() == order.tolist()
        assert distances.tolist() == every[order].tolist()


@pytest.mark.parametrize(("block", "piece"), [(1, 1), (7 * 64, 3 * 64), (100 * 64, 64), (2**24, 2**18)])
def test_the_search_is_exact(block: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    monkeypatch.setattr(neighbours, "PIECE", piece)
    rng = np.random.default_rng(0)
    vectors = np.maximum(rng.standard_normal((300, 64)), 0).astype(np.float16)
    vectors[200:210] = vectors[5]  # ties, told in the order of the set
    queries = np.concatenate([vectors[[5, 299]], np.maximum(rng.standard_normal((9, 64)), 0).astype(np.float16)])
    found = neighbours.search(index_of(vectors), queries, 6)
    assert_exact(found, vectors, queries, 6)
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


SCALES = {"usual": 1.0, "large": 9000.0, "subnormal": 2.0**-23, "around 2^-14": 2.0**-13}


@given(st.sampled_from(sorted(SCALES)), st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 50))
@generated(80)
def test_the_search_is_exact_whatever_the_numbers(scale: str, seed: int, count: int, k: int) -> None:
    """Of any size and either sign; with rows of zeros, equal rows, and rows that are a last bit away from a query."""
    rng = np.random.default_rng(seed)
    units = int(rng.choice([1, 3, 64, 300]))
    there = rng.random((count + 3, units)) < rng.choice([0.2, 1])
    some = rng.standard_normal((count + 3, units)) * there * SCALES[scale]
    every = some.clip(-65504, 65504).astype(np.float16)
    queries, vectors = every[:3].copy(), every[3:]
    for row in range(0, count, 2):
        kind = rng.integers(4)
        vectors[row] = vectors[rng.integers(count)] if kind == 0 else 0 if kind == 1 else queries[rng.integers(3)]
        if kind == 3:
            place = rng.integers(units)
            vectors[row, place] = np.nextafter(vectors[row, place], np.float16(0))
    queries[2] = rng.choice([0, 65504, -65504], units)
    assert_exact(neighbours.search(index_of(vectors), queries, k), vectors, queries, k)


def test_the_largest_numbers_do_not_overflow() -> None:
    vectors = np.full((5, 4096), 65504, np.float16)
    vectors[1:, 0] = [65472, -65504, 0, 65504]
    assert_exact(neighbours.search(index_of(vectors), vectors[:3], 3), vectors, vectors[:3], 3)


def test_a_hundred_rows_that_float32_cannot_order_do_not_hide_the_nearest() -> None:
    """They are closer to one another than the rounding of |x|^2 / 2 - x.q, and the nearest is the last."""
    rng = np.random.default_rng(0)
    base = rng.uniform(9000, 16000, 4096).astype(np.float16)
    steps = rng.choice([-8, 8], (300, 4096)) * (rng.random((300, 4096)) < 0.05)
    vectors = (base + steps.astype(np.float16)).astype(np.float16)
    vectors[-1] = base
    vectors[-1, 7] += np.float16(8)
    found = neighbours.search(index_of(vectors), base[None], 2)
    assert found.rows[0, 0] == 299
    assert_exact(found, vectors, base[None], 2)


def test_a_library_that_takes_subnormal_numbers_for_zero_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of what is below 2^-14, as they are common in a network that has hardly learned."""

    def flushed(vectors: Vectors, work: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        exact = shifted(vectors, work)
        exact[np.abs(exact) < np.finfo(np.float32).tiny] = 0
        return exact

    shifted = neighbours.shifted
    monkeypatch.setattr(neighbours, "shifted", flushed)
    rng = np.random.default_rng(0)
    vectors = (rng.random((50, 20)) * 2.0**-13).astype(np.float16)
    vectors[::2] = (rng.random((25, 20)) * 2.0**-14).astype(np.float16)
    queries = (rng.random((9, 20)) * np.array([[2.0**-14], [2.0**-13], [1.0]]).repeat(3, 0)).astype(np.float16)
    assert_exact(neighbours.search(index_of(vectors), queries, 4), vectors, queries, 4)


def test_fewer_pictures_than_neighbours_are_all_there_is() -> None:
    vectors = np.eye(3, 8, dtype=np.float16)
    assert neighbours.search(index_of(vectors), vectors[:1], 9).rows.tolist() == [[0, 1, 2]]
    assert_exact(neighbours.search(index_of(vectors[:0]), vectors, 9), vectors[:0], vectors, 9)


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
    squares = (folder / "squares.npy").read_bytes()
    for damage in (np.nan, np.inf, -1.0):
        (folder / "squares.npy").write_bytes(squares[:-4] + np.float32(damage).tobytes())
        assert neighbours.open_index(folder, origin) is None
    (folder / "squares.npy").write_bytes(squares)
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


def test_what_a_killed_indexing_left_goes_with_the_next_and_what_another_writes_stays(
    prepared: Path, tmp_path: Path
) -> None:
    """Two processes are killed with -9 in the midst of it, one after the other has ended; a third is alive."""
    path = save_model(random_model(replace(PAPER, width=1 / 32)), tmp_path / "m.safetensors")
    dataset = open_dataset(prepared)
    split = dataset.split("train")
    origin, folder = Origin.of(path, dataset, split), neighbours.place(path, None)
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
