"""The nearest of many vectors, exactly: `search` by their outlines, and `search_all` by all of their numbers. No torch.

Both find half the squared distance less |q|^2 / 2, which is the same for all rows, in float32 by a product of matrices:
of the outlines, which are few numbers, or of the vectors, a cache-full at a time. Every row that could be among the
least, by a bound on the rounding, is measured again in float64.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from alexnet_cli.core import outlines
from alexnet_cli.core.devices import cores
from alexnet_cli.core.outlines import Outlines, Vectors

BLOCK = 2**24  # activations that a thread searches at once
PIECE = 2**18  # of them, those that it converts at once: 1 MB as float32, which stays in the cache
SHIFT = 2.0**112  # between the exponents of float16 and float32
AT_ONCE = 16  # queries whose outlines are compared at once
MANY = 0.1  # of all rows: when more than these are to be measured one by one, reading all of them is quicker

Activations = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Index:
    """N vectors, float16 N x units, the squared length of each, and their outlines."""

    vectors: Vectors
    squares: npt.NDArray[np.float32]
    outlines: Outlines


@dataclass(frozen=True)
class Neighbours:
    """The `k` nearest rows of each picture, nearest first, and their Euclidean distances: Q x k each."""

    rows: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]


def search(index: Index, queries: Vectors, k: int) -> Neighbours:
    """The nearest rows of every query, Q x units, or all where there are fewer; equal ones in the order of the set.

    Of vectors that are long along few axes only some are read.
    """
    found = [
        search_outlined(index, part, k) or search_all(index, part, k)
        for part in np.array_split(queries, max(1, -(-len(queries) // AT_ONCE)))
    ]
    return Neighbours(np.concatenate([f.rows for f in found]), np.concatenate([f.distances for f in found]))


def search_outlined(index: Index, queries: Vectors, k: int, many: float = MANY) -> Neighbours | None:
    """The same as `search`, from the outlines; None where they leave more than `many` of all rows to be measured."""
    k = min(k, len(index.vectors))
    near, distances = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    if not k:
        return Neighbours(near, distances)
    exact, drawn = queries.astype(np.float32), outlines.of(queries, index.outlines.axes)
    lows = -drawn @ index.outlines.rows.T
    lows += index.squares / 2
    errors = _error(exact, float(index.squares.max()), drawn.shape[1] + outlines.ROUNDING)
    measured = 0
    for place, (query, values, error) in enumerate(zip(exact, lows, errors, strict=True)):
        first = np.argpartition(values, k - 1)[:k]
        farthest = _distances(index.vectors, first, query).max()
        limit = (farthest**2 - (query.astype(np.float64) ** 2).sum()) / 2 + error
        rows = np.flatnonzero(values <= np.float32(limit))
        measured += len(rows)
        if measured > many * len(index.vectors):
            return None
        best = _best(rows[None], _distances(index.vectors, rows, query)[None], k)
        near[place], distances[place] = best.rows[0], best.distances[0]
    return Neighbours(near, distances)


def search_all(index: Index, queries: Vectors, k: int) -> Neighbours:
    """The same as `search`, from every number of every row: it reads the index once, from front to back."""
    exact = queries.astype(np.float32)
    k = min(k, len(index.vectors))
    size = max(1, BLOCK // max(1, index.vectors.shape[1]))
    starts = range(0, len(index.vectors), size)
    # Each thread multiplies by itself: those of the BLAS, called by several at once, would wait for one another.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        found = list(pool.map(lambda first: _nearest(index, exact, first, first + size, k), starts))
    rows = np.concatenate([np.empty((len(exact), 0), np.int64), *(part.rows for part in found)], axis=1)
    distances = np.concatenate([np.empty((len(exact), 0)), *(part.distances for part in found)], axis=1)
    return _best(rows, distances, k)


def _nearest(index: Index, queries: Activations, first: int, end: int, k: int) -> Neighbours:
    """The same among the rows of a block."""
    squares = index.squares[first:end]
    halves = _products(index.vectors[first:end], queries)
    halves += squares / 2  # half the squared distance, less |q|^2 / 2, which is the same for all
    k = min(k, len(squares))
    errors = _error(queries, float(squares.max()), queries.shape[1])
    # A BLAS may take for zero what `shifted` makes of a subnormal float16, which is below 2^-14.
    errors += 2.0**-14 * np.abs(queries.astype(np.float64)).sum(axis=1)
    # k rows lie below the k-th least and its error; what lies above that by more than its own is none of them.
    limits = np.partition(halves, k - 1, axis=1)[:, k - 1] + 2 * errors
    near = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k))
    for place, (query, values, limit) in enumerate(zip(queries, halves, limits.astype(np.float32), strict=True)):
        rows = np.flatnonzero(values <= limit) + first
        best = _best(rows[None], _distances(index.vectors, rows, query)[None], k)
        near[place], distances[place] = best.rows[0], best.distances[0]
    return Neighbours(near, distances)


def _error(queries: Activations, square: float, terms: int) -> npt.NDArray[np.float64]:
    """The most by which |x|^2 / 2 - x.q can be wrong as a float32 product of so many terms, for each query and any x of
    at most that square.

    A sum of n products, added in whatever order, is off by at most n u / (1 - n u) times the sum of their sizes, where
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). |x|^2 is one such sum and x.q is
    another; together they come to (|x| + |q|)^2 / 2 at most. Four more roundings are for adding them up and to spare.
    """
    exact = queries.astype(np.float64)
    off = (terms + 4) * 2.0**-24
    lengths = np.sqrt((exact**2).sum(axis=1)) + np.sqrt(square)
    error: npt.NDArray[np.float64] = off / (1 - 2 * off) * lengths**2 / 2
    return error


def _distances(vectors: Vectors, rows: npt.NDArray[np.int64], query: Activations) -> npt.NDArray[np.float64]:
    """Of some rows from one query, in float64, a piece at a time: there may be thousands that hardly differ."""
    size = max(1, PIECE // max(1, vectors.shape[1]))
    parts = (vectors[rows[start : start + size]].astype(np.float64) for start in range(0, len(rows), size))
    return np.concatenate([np.sqrt(((part - query) ** 2).sum(axis=1)) for part in parts])


def _products(vectors: Vectors, queries: Activations) -> Activations:
    """-x.q of each query (down) and each vector (along), a piece at a time."""
    scaled = queries * np.float32(-SHIFT)  # the largest float16 so just stays below infinity
    products = np.empty((len(queries), len(vectors)), np.float32)
    size = max(1, PIECE // max(1, vectors.shape[1]))
    work = np.empty((size, vectors.shape[1]), np.int32)
    for start in range(0, len(vectors), size):
        piece = vectors[start : start + size]
        products[:, start : start + size] = scaled @ shifted(piece, work[: len(piece)]).T
    return products


def shifted(vectors: Vectors, work: npt.NDArray[np.int32]) -> Activations:
    """The same numbers times 2^-112, without infinities: the bits of a float16 in the place of those of a float32.

    numpy converts float16 one by one, which would take five times as long as everything else here. `work` has the
    shape of `vectors`, and becomes the result.
    """
    np.copyto(work, vectors.view(np.int16))  # which repeats the sign
    work <<= 13
    work &= ~(7 << 28)
    return work.view(np.float32)


def _best(rows: npt.NDArray[np.int64], distances: npt.NDArray[np.float64], k: int) -> Neighbours:
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Neighbours(np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1))
