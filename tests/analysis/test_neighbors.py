"""The search of the nearest neighbors is exact, and their index is right or not there."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alexnet_cli.core.analysis import neighbors
from alexnet_cli.core.analysis.neighbors import IndexSource, Vectors, find_nearest
from alexnet_cli.core.data.shards import Split, open_dataset
from alexnet_cli.core.files import hash_file
from alexnet_cli.core.inference.session import Session
from alexnet_cli.errors import StorageError, WeightsError
from alexnet_cli.recipe import PAPER
from hostile import repeatable
from model_files import random_model, save_model


def assert_exact(vectors: Vectors, queries: Vectors, k: int) -> None:
    """Against every distance in float64."""
    found, found_distances = find_nearest(vectors, queries, k)
    assert found.shape == found_distances.shape == (len(queries), min(k, len(vectors)))
    for query, rows, distances in zip(queries, found, found_distances, strict=True):
        every = np.sqrt(((vectors.astype(np.float64) - query.astype(np.float64)) ** 2).sum(axis=1))
        order = np.argsort(every, kind="stable")[:k]
        assert rows.tolist() == order.tolist()
        assert distances.tolist() == every[order].tolist()


@pytest.mark.parametrize("block", [1, 7 * 64, 100 * 64, 2**22])
def test_equal_rows_come_in_the_order_of_the_set_whatever_the_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "BLOCK", block)
    rng = np.random.default_rng(0)
    vectors = np.maximum(rng.standard_normal((300, 64), np.float32), 0)
    vectors[200:210] = vectors[5]
    queries = np.concatenate([vectors[[5, 299]], np.maximum(rng.standard_normal((9, 64), np.float32), 0)])
    assert_exact(vectors, queries, 6)
    rows, distances = find_nearest(vectors, queries, 6)
    assert rows[0].tolist() == [5, 200, 201, 202, 203, 204]
    assert distances[0].tolist() == [0] * 6


def test_rows_that_float32_cannot_order_are_ordered() -> None:
    """They are closer to one another than the rounding of |x|^2 / 2 - x.q, and the nearest is the last."""
    rng = np.random.default_rng(0)
    base = rng.uniform(9000, 16000, 4096).astype(np.float32)
    steps = rng.choice([-1, 1], (300, 4096)) * (rng.random((300, 4096)) < 0.05)
    vectors = base + steps.astype(np.float32)
    vectors[-1] = base
    vectors[-1, 7] += 1
    assert find_nearest(vectors, base[None], 2)[0][0, 0] == 299
    assert_exact(vectors, base[None], 2)


@given(
    st.sampled_from([1.0, 1e12, 1e-18, 1e-38, 1e-44]), st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 50)
)
@repeatable(80)
def test_the_search_is_exact_whatever_the_numbers(scale: float, seed: int, count: int, k: int) -> None:
    """Of any size and either sign; with rows of zeros, equal rows, and rows that are a last bit away from a query."""
    rng = np.random.default_rng(seed)
    units = int(rng.choice([1, 3, 64, 300]))
    there = rng.random((count + 3, units)) < rng.choice([0.2, 1])
    every = (rng.uniform(-1, 1, (count + 3, units)) * there * scale).astype(np.float32)
    queries, vectors = every[:3].copy(), every[3:]
    for row in range(0, count, 2):
        kind = rng.integers(4)
        vectors[row] = vectors[rng.integers(count)] if kind == 0 else 0 if kind == 1 else queries[rng.integers(3)]
        if kind == 3:
            place = rng.integers(units)
            vectors[row, place] = np.nextafter(vectors[row, place], np.float32(0))
    assert_exact(vectors, queries, k)


def test_activations_whose_squares_overflow_are_an_error() -> None:
    with pytest.raises(WeightsError, match="too large to compare"):
        neighbors.check_range(np.array([[1e13, 0]], np.float32), Path("m"))


@pytest.fixture
def network(prepared: Path, tmp_path: Path) -> tuple[Path, IndexSource, Split, Session]:
    """The folder of its index, what that is of, the training split, and the network."""
    path = save_model(random_model(replace(PAPER, width=1 / 32)), tmp_path / "m.safetensors")
    dataset = open_dataset(prepared)
    split = dataset.split("train")
    source = IndexSource(hash_file(path), dataset.hash, len(split))
    return neighbors.index_folder(path, None, dataset), source, split, neighbors.open_network(path, fast_start=False)


def test_an_index_is_found_again_until_weights_data_or_files_change(
    network: tuple[Path, IndexSource, Split, Session],
) -> None:
    folder, source, split, session = network
    counted: list[int] = []
    index = neighbors.write_index(folder, source, split, session, counted.append)
    assert sum(counted) == len(split) == 48
    assert index.shape == (48, 128)
    assert (index > 0).any()
    again = neighbors.open_index(folder, source)
    assert again is not None
    assert (again == index).all()
    for other in (replace(source, weights="0"), replace(source, data="0"), replace(source, images=47)):
        assert neighbors.open_index(folder, other) is None
    whole = (folder / "fc7.npy").read_bytes()
    for damaged in (whole[:-1], b"\x93NUMPY" + whole[20:], np.float32(1).tobytes()):
        (folder / "fc7.npy").write_bytes(damaged)
        assert neighbors.open_index(folder, source) is None
    (folder / "fc7.npy").write_bytes(whole)
    assert neighbors.open_index(folder, source) is not None
    (folder / "index.json").unlink()
    assert neighbors.open_index(folder, source) is None


def test_an_interrupted_index_leaves_the_old_one(
    network: tuple[Path, IndexSource, Split, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source, split, session = network
    neighbors.write_index(folder, source, split, session)
    before = {path.name for path in folder.iterdir()}

    def interrupt(_n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neighbors.write_index(folder, source, split, session, interrupt)

    def fill_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fill_disk)
    with pytest.raises(StorageError, match="No space left"):
        neighbors.write_index(folder, source, split, session)
    assert neighbors.open_index(folder, source) is not None
    assert {path.name for path in folder.iterdir()} == before


def test_an_index_may_lie_elsewhere_and_takes_no_files_place(
    network: tuple[Path, IndexSource, Split, Session],
) -> None:
    folder, source, split, session = network
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to("elsewhere")
    neighbors.write_index(folder, source, split, session)
    assert folder.is_symlink()
    assert neighbors.open_index(elsewhere, source) is not None
    folder.unlink()
    folder.write_text("a note")
    with pytest.raises(StorageError, match="File exists"):
        neighbors.write_index(folder, source, split, session)
    assert folder.read_text() == "a note"


def test_one_process_writes_an_index_at_a_time_and_cleans_up_after_a_killed_one(
    network: tuple[Path, IndexSource, Split, Session],
) -> None:
    folder, source, split, session = network
    writing = (
        "import sys; from pathlib import Path\n"
        "from alexnet_cli.core.analysis import neighbors\nfrom alexnet_cli.core.files import lock_file, replace_file\n"
        "folder = Path(sys.argv[1]); folder.mkdir()\n"
        "with lock_file(folder / neighbors.LOCK, 'busy'), replace_file(folder / 'fc7.npy') as path:\n"
        " path.write_bytes(b'half'); print(); input()"
    )
    command = [sys.executable, "-uc", writing, str(folder)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"\n"
    with pytest.raises(StorageError, match="another process is writing"):
        neighbors.write_index(folder, source, split, session)
    child.kill()
    child.communicate()
    assert list(folder.glob(".fc7.npy.*"))
    neighbors.write_index(folder, source, split, session)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"fc7.npy", "index.json"}
