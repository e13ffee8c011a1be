"""The nearest of many vectors: both searches against every distance in float64, and what an outline promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hostile import generated
from hypothesis import given
from hypothesis import strategies as st

from alexnet_cli.core import nearest, outlines
from alexnet_cli.core.nearest import Index, Neighbours, search, search_all, search_outlined
from alexnet_cli.core.outlines import Outlines, Vectors

Search = Callable[[Index, Vectors, int], Neighbours]


def outlined(index: Index, queries: Vectors, k: int) -> Neighbours:
    """However many rows are left: few ones as here are no obstacle."""
    found = search_outlined(index, queries, k, many=np.inf)
    assert found is not None
    return found


BOTH = pytest.mark.parametrize("find", [outlined, search_all, search])


def index_of(vectors: Vectors) -> Index:
    axes = outlines.principal(vectors)
    squares = (vectors.astype(np.float64) ** 2).sum(axis=1).astype(np.float32)
    return Index(vectors, squares, Outlines(axes, outlines.of(vectors, axes)))


def assert_exact(found: Neighbours, vectors: Vectors, queries: Vectors, k: int) -> None:
    """Against every distance in float64."""
    assert found.rows.shape == found.distances.shape == (len(queries), min(k, len(vectors)))
    for query, rows, distances in zip(queries, found.rows, found.distances, strict=True):
        every = np.sqrt(((vectors.astype(np.float64) - query.astype(np.float64)) ** 2).sum(axis=1))
        order = np.argsort(every, kind="stable")[:k]
        assert rows.tolist() == order.tolist()
        assert distances.tolist() == every[order].tolist()


@BOTH
@pytest.mark.parametrize(("block", "piece"), [(1, 1), (7 * 64, 3 * 64), (100 * 64, 64), (2**24, 2**18)])
def test_the_search_is_exact(find: Search, block: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCK", block)
    monkeypatch.setattr(nearest, "PIECE", piece)
    rng = np.random.default_rng(0)
    vectors = np.maximum(rng.standard_normal((300, 64)), 0).astype(np.float16)
    vectors[200:210] = vectors[5]  # ties, told in the order of the set
    queries = np.concatenate([vectors[[5, 299]], np.maximum(rng.standard_normal((9, 64)), 0).astype(np.float16)])
    found = find(index_of(vectors), queries, 6)
    assert_exact(found, vectors, queries, 6)
    assert found.rows[0].tolist() == [5, 200, 201, 202, 203, 204]
    assert found.distances[0].tolist() == [0] * 6


@BOTH
def test_long_vectors_that_hardly_differ_are_told_apart(find: Search) -> None:
    """In float32 |x|^2 - 2 x.q + |q|^2 is off by more than these distances."""
    base = np.full(4096, 60.0, np.float16)
    vectors = np.tile(base, (12, 1))
    for row in range(12):
        vectors[row, : 12 - row] += np.float16(0.03125)
    found = find(index_of(vectors), base[None], 12)
    assert found.rows[0].tolist() == list(range(11, -1, -1))
    assert found.distances[0] == pytest.approx(0.03125 * np.sqrt(np.arange(1, 13)))


def test_every_float16_keeps_its_value() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found = nearest.shifted(finite, np.empty(finite.shape, np.int32))
    assert (found * np.float32(2.0**112) == finite.astype(np.float32)).all()
    assert (np.signbit(found) == np.signbit(finite)).all()


SCALES = {"usual": 1.0, "large": 9000.0, "subnormal": 2.0**-23, "around 2^-14": 2.0**-13}


@BOTH
@given(st.sampled_from(sorted(SCALES)), st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 50))
@generated(80)
def test_the_search_is_exact_whatever_the_numbers(find: Search, scale: str, seed: int, count: int, k: int) -> None:
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
    assert_exact(find(index_of(vectors), queries, k), vectors, queries, k)


@BOTH
def test_the_largest_numbers_do_not_overflow(find: Search) -> None:
    vectors = np.full((5, 4096), 65504, np.float16)
    vectors[1:, 0] = [65472, -65504, 0, 65504]
    assert_exact(find(index_of(vectors), vectors[:3], 3), vectors, vectors[:3], 3)


@BOTH
def test_a_hundred_rows_that_float32_cannot_order_do_not_hide_the_nearest(find: Search) -> None:
    """They are closer to one another than the rounding of |x|^2 / 2 - x.q, and the nearest is the last."""
    rng = np.random.default_rng(0)
    base = rng.uniform(9000, 16000, 4096).astype(np.float16)
    steps = rng.choice([-8, 8], (300, 4096)) * (rng.random((300, 4096)) < 0.05)
    vectors = (base + steps.astype(np.float16)).astype(np.float16)
    vectors[-1] = base
    vectors[-1, 7] += np.float16(8)
    found = find(index_of(vectors), base[None], 2)
    assert found.rows[0, 0] == 299
    assert_exact(found, vectors, base[None], 2)


def test_a_library_that_takes_subnormal_numbers_for_zero_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of what is below 2^-14, as they are common in a network that has hardly learned."""

    def flushed(vectors: Vectors, work: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        exact = shifted(vectors, work)
        exact[np.abs(exact) < np.finfo(np.float32).tiny] = 0
        return exact

    shifted = nearest.shifted
    monkeypatch.setattr(nearest, "shifted", flushed)
    rng = np.random.default_rng(0)
    vectors = (rng.random((50, 20)) * 2.0**-13).astype(np.float16)
    vectors[::2] = (rng.random((25, 20)) * 2.0**-14).astype(np.float16)
    queries = (rng.random((9, 20)) * np.array([[2.0**-14], [2.0**-13], [1.0]]).repeat(3, 0)).astype(np.float16)
    assert_exact(search_all(index_of(vectors), queries, 4), vectors, queries, 4)


@BOTH
def test_fewer_pictures_than_neighbours_are_all_there_is(find: Search) -> None:
    vectors = np.eye(3, 8, dtype=np.float16)
    assert find(index_of(vectors), vectors[:1], 9).rows.tolist() == [[0, 1, 2]]
    assert_exact(find(index_of(vectors[:0]), vectors, 9), vectors[:0], vectors, 9)


def test_an_outline_is_never_farther_than_the_vectors_are() -> None:
    rng = np.random.default_rng(0)
    vectors = (np.maximum(rng.standard_normal((400, 200)), 0) * 2.0 ** rng.integers(-20, 12, (400, 1))).astype(
        np.float16
    )
    axes = outlines.principal(vectors)
    assert axes.shape == (200, outlines.AXES)
    assert np.abs(axes.T @ axes - np.eye(outlines.AXES)).max() < 1e-12
    drawn = outlines.of(vectors, axes).astype(np.float64)
    exact = vectors.astype(np.float64)
    assert np.sqrt((drawn**2).sum(1)) == pytest.approx(np.sqrt((exact**2).sum(1)), rel=1e-6)
    low = np.sqrt(((drawn[:, None] - drawn) ** 2).sum(2))
    true = np.sqrt(((exact[:, None] - exact) ** 2).sum(2))
    lengths = np.sqrt((exact**2).sum(1))
    assert (low <= true + 2.0**-24 * outlines.ROUNDING * (lengths[:, None] + lengths)).all()


def test_of_vectors_long_along_few_axes_few_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As trained networks make them; of those without any such axes `search` reads all."""
    read: list[int] = []
    measure = nearest._distances

    def counted(
        vectors: Vectors, rows: npt.NDArray[np.int64], query: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        read.append(len(rows))
        return measure(vectors, rows, query)

    rng = np.random.default_rng(0)
    low = rng.standard_normal((4000, 20)) @ rng.standard_normal((20, 256)) + 0.1 * rng.standard_normal((4000, 256))
    index, queries = index_of(low.astype(np.float16)), low[:5].astype(np.float16)
    monkeypatch.setattr(nearest, "_distances", counted)
    assert_exact(search(index, queries, 6), index.vectors, queries, 6)
    assert sum(read) < 0.05 * 5 * 4000
    noise = index_of(rng.standard_normal((4000, 256)).astype(np.float16))
    assert search_outlined(noise, noise.vectors[:5], 6) is None
    assert_exact(search(noise, noise.vectors[:5], 6), noise.vectors, noise.vectors[:5], 6)
