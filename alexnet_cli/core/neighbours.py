"""Figure 4 (right) of the paper: the training pictures whose layer-7 activations are nearest to a picture's. No torch.

An index lies beside the network that it is of:

fc7.npy        float16 N x units (4096 at full width): a row for each training picture, in the order of the set
squares.npy    float32 N: the squared length of each row
index.json     written last: the hashes of the weights and of the data set, without which the others say nothing

The search is exact over these rows: blocks are multiplied with all pictures at once, and every row whose
|x|^2 / 2 - x.q in float32 could be among the least, by a bound on its rounding, is measured again in float64.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from alexnet_cli.core.atomic import write_text
from alexnet_cli.core.devices import cores
from alexnet_cli.core.origin import is_best, own_data
from alexnet_cli.core.responses import responses
from alexnet_cli.core.runs import MODEL, ONNX
from alexnet_cli.core.session import Layer, Session
from alexnet_cli.core.shards import Dataset, Split
from alexnet_cli.errors import StorageError, WeightsError

SCHEMA = "alexnet.neighbours/1"
LAYER: Layer = "fc7"
VECTORS, SQUARES, RECORD = f"{LAYER}.npy", "squares.npy", "index.json"
BLOCK = 2**24  # activations that a thread searches at once
PIECE = 2**18  # of them, those that it converts at once: 1 MB as float32, which stays in the cache
SHIFT = 2.0**112  # between the exponents of float16 and float32
HINT = "no trained network's do: look at its training"

Vectors = npt.NDArray[np.float16]
Activations = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Origin:
    """What an index is of: SHA-256 of the weights file and of the data set, and how many pictures."""

    weights: str
    data: str
    images: int

    @classmethod
    def of(cls, weights: Path, dataset: Dataset, split: Split) -> Origin:
        """Read the whole weights file for its hash."""
        return cls(sha256(weights), dataset.hash, len(split))


@dataclass(frozen=True)
class Index:
    """An index on disk, mapped: a search reads it once, from front to back."""

    vectors: Vectors
    squares: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """The `k` nearest rows of each picture, nearest first, and their Euclidean distances: Q x k each."""

    rows: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place(weights: Path, run: Path | None, dataset: Dataset | None = None) -> Path:
    """The folder of a network's index: in its run, or beside its file.

    One of another checkpoint, another ONNX file or another data set than the run's own has a name of its own, so that
    it does not take the place of the run's: `neighbours-00000280`, `neighbours-alexnet-int8`, `neighbours-NAME`.
    """
    if run is None:
        return weights.with_name(f"{weights.stem}.neighbours")
    words = ["neighbours"]
    if weights.name not in {ONNX, MODEL}:
        words.append(weights.stem)
    elif weights.name == MODEL and not is_best(weights):
        words.append(weights.resolve().parent.name)
    if dataset is not None and not own_data(weights, dataset):
        words.append(dataset.path.resolve().name)
    return run / "-".join(words)


def open_index(folder: Path, origin: Origin) -> Index | None:
    """The index in a folder; None if there is none, or it is of other weights or data, or damaged."""
    try:
        if json.loads((folder / RECORD).read_text(encoding="utf-8")) != {"schema": SCHEMA, **asdict(origin)}:
            return None
        vectors, squares = (np.lib.format.open_memmap(folder / name, mode="r") for name in (VECTORS, SQUARES))
    except Exception:  # the reader of a .npy header raises nearly anything; whatever it is, the index is made anew
        return None
    whole = vectors.dtype == np.float16 and vectors.ndim == 2 and len(vectors) == origin.images
    whole = whole and squares.dtype == np.float32 and squares.shape == (origin.images,)
    whole = whole and bool(((squares >= 0) & (squares < np.inf)).all())
    return Index(vectors, squares) if whole else None


def write_index(
    folder: Path, origin: Origin, split: Split, session: Session, advance: Callable[[int], None] = lambda n: None
) -> Index:
    """Run the split through the network, in order, and write the index whole or not at all.

    Raises:
        StorageError: it cannot be written.
        WeightsError: activations are no numbers, or too large for float16.
    """
    squares = np.zeros(origin.images, np.float32)
    with _replacing(folder) as new:
        with (new / VECTORS).open("wb") as file:  # not mapped: a full disk shall be an error, not a signal
            for rows, values in responses(split, session):
                vectors = half(values, session.path)
                if file.tell() == 0:
                    header = {"descr": "<f2", "fortran_order": False, "shape": (origin.images, vectors.shape[1])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(vectors.astype("<f2").tobytes())
                squares[rows] = (vectors.astype(np.float32) ** 2).sum(axis=1)
                advance(len(rows))
            file.flush()
            os.fsync(file.fileno())
        np.save(new / SQUARES, squares)
        write_text(new / RECORD, json.dumps({"schema": SCHEMA, **asdict(origin)}) + "\n")
    index = open_index(folder, origin)
    if index is None:
        raise StorageError(f"{folder} does not hold what was written to it", "check the disk")
    return index


def half(values: Activations, path: Path) -> Vectors:
    """Activations as the index keeps them."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise WeightsError(f"{path}: activations of {LAYER} reach {values.max():.0f}, too large for float16", HINT)
    return rounded


def search(index: Index, queries: Vectors, k: int) -> Neighbours:
    """The nearest rows of every query, Q x units, or all where there are fewer; equal ones in the order of the set."""
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
    # k rows lie below the k-th least and its error; what lies above that by more than its own is none of them.
    limits = np.partition(halves, k - 1, axis=1)[:, k - 1] + 2 * _error(queries, float(squares.max()))
    near = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k))
    for place, (query, values, limit) in enumerate(zip(queries, halves, limits.astype(np.float32), strict=True)):
        rows = np.flatnonzero(values <= limit) + first
        best = _best(rows[None], _distances(index.vectors, rows, query)[None], k)
        near[place], distances[place] = best.rows[0], best.distances[0]
    return Neighbours(near, distances)


def _error(queries: Activations, square: float) -> npt.NDArray[np.float64]:
    """The most by which |x|^2 / 2 - x.q in float32 can be wrong, for each query and any x of at most that square.

    A sum of n products, added in whatever order, is off by at most n u / (1 - n u) times the sum of their sizes, where
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). |x|^2 is one such sum and x.q is
    another; together they come to (|x| + |q|)^2 / 2 at most. Four more roundings are for adding them up and to spare.
    The last term is for a BLAS that takes for zero what `shifted` makes of a subnormal float16, which is below 2^-14.
    """
    exact = queries.astype(np.float64)
    off = (exact.shape[1] + 4) * 2.0**-24
    lengths = np.sqrt((exact**2).sum(axis=1)) + np.sqrt(square)
    error: npt.NDArray[np.float64] = off / (1 - 2 * off) * lengths**2 / 2 + 2.0**-14 * np.abs(exact).sum(axis=1)
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


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well, and is gone if it does not."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            with contextlib.suppress(BlockingIOError), _held(left):  # unless somebody is writing it: killed
                shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
        with _held(new):
            yield new
            shutil.rmtree(folder, ignore_errors=True)
            new.replace(folder)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"{folder} cannot be written: {reason}", "free some space, or copy the run") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; the kernel lets go however the process ends. Raises BlockingIOError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
