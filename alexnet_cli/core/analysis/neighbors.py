"""Find the training images nearest to an image by their fc7 activations (figure 4, right). No torch.

The activations of the training set are computed once and kept as an index in the run:

fc7.npy       float32 N x units (4096 at full width): one row per training image, in the order of the data set
index.json    hashes of weights and data set; written last, and the index is valid only with it

float16 would need half the space, but numpy converts it so slowly that a search takes seven times as long.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.analysis.units import (
    compute_activations,
    iterate_activations,
    read_images,
    read_images_by_row,
)
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.shards import Dataset, Split
from alexnet_cli.core.drawing import Row, Tile
from alexnet_cli.core.files import hash_file, lock_file, replace_file, sync_file, write_text
from alexnet_cli.core.inference.session import ModelSource, Session
from alexnet_cli.core.model.architecture import last_step_name
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.runs.resolve import is_best, is_training_data
from alexnet_cli.core.runs.run import MODEL, ONNX
from alexnet_cli.errors import StorageError, WeightsError, storage_errors

SCHEMA = "alexnet.neighbors/3"
LAYER = "fc7"
VECTORS, RECORD, LOCK = f"{LAYER}.npy", "index.json", ".lock"
BLOCK = 2**22  # activations compared at once: 16 MB
LARGEST = 1e12  # activation; the squared length of a row still fits float32
QUERIES, NEAREST = 5, 6  # images in a report, neighbors of each, as in figure 4

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Distances = npt.NDArray[np.float64]


@dataclass(frozen=True)
class IndexSource:
    """What an index was computed from: SHA-256 of the weights file and of the data set, and the number of images."""

    weights: str
    data: str
    images: int


def index_folder(weights: Path, run: Path | None, dataset: Dataset) -> Path:
    """Return the folder of a network's index: in its run, or next to its file.

    `neighbors` is for the run's best checkpoint or ONNX file with the run's data set. Other weights and data sets get
    their own folders, such as `neighbors-00000280` or `neighbors-NAME`.
    """
    if run is None:
        return weights.with_name(f"{weights.stem}.neighbors")
    words = ["neighbors"]
    if weights.name not in {ONNX, MODEL}:
        words.append(weights.stem)
    elif weights.name == MODEL and (not is_best(weights) or (run / ONNX).is_file()):
        words.append(weights.resolve().parent.name)
    if not is_training_data(weights, dataset):
        words.append(dataset.path.resolve().name)
    return run / "-".join(words)


def open_network(source: ModelSource, fast_start: bool, provider: Literal["auto", "cpu"] = "auto") -> Session:
    """Open a network up to layer 7, as layer 8 sees it: after the nonlinearity and times dropout's test-time factor.

    Raises:
        WeightsError: the file cannot be used.
    """
    return Session(
        source, fast_start=fast_start, provider=provider, layers=lambda recipe: [last_step_name(recipe, LAYER)]
    )


def open_index(folder: Path, source: IndexSource) -> Vectors | None:
    """Open an index as a memory map. Returns None if it is missing, damaged, or has another source."""
    try:
        if json.loads((folder / RECORD).read_text(encoding="utf-8")) != {"schema": SCHEMA, **asdict(source)}:
            return None
        vectors: Vectors = np.lib.format.open_memmap(folder / VECTORS, mode="r")
    except Exception:  # numpy raises many types for a damaged header; the index is computed again
        return None
    is_whole = vectors.dtype == np.float32 and vectors.ndim == 2 and len(vectors) == source.images
    return vectors if is_whole else None


def write_index(
    folder: Path, source: IndexSource, split: Split, session: Session, advance: Callable[[int], None] = lambda n: None
) -> Vectors:
    """Run a split through the network and write its index. An old index stays until the new one is complete.

    Raises:
        StorageError: the folder cannot be written, or another process is writing it.
        WeightsError: activations are NaN or infinite, or too large to compare.
    """
    with storage_errors(folder, "free some space, or copy the run"):
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / LOCK, f"{folder}: another process is writing this index", StorageError):
            for leftover in folder.glob(f".{VECTORS}.*"):  # of a process that was killed
                leftover.unlink()
            with replace_file(folder / VECTORS) as temporary:
                _write_vectors(temporary, source.images, split, session, advance)
                sync_file(temporary)  # a full disk must show now, while the old index is still there
                (folder / RECORD).unlink(missing_ok=True)
            write_text(folder / RECORD, json.dumps({"schema": SCHEMA, **asdict(source)}) + "\n")
    vectors = open_index(folder, source)
    if vectors is None:
        raise StorageError(f"{folder} does not hold what was written to it", "check the disk")
    return vectors


def _write_vectors(path: Path, images: int, split: Split, session: Session, advance: Callable[[int], None]) -> None:
    """Write batch by batch, not through a memory map, which raises a signal instead of an error on a full disk."""
    with path.open("wb") as file:
        for rows, activations in iterate_activations(split, session):
            vectors = check_range(activations, session.path).astype("<f4")
            if file.tell() == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (images, vectors.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(vectors.tobytes())
            advance(len(rows))


def check_range(activations: Vectors, path: Path) -> Vectors:
    """Return the activations. Raises WeightsError if their squares could overflow; `path` is for the message."""
    if (largest := float(np.abs(activations).max(initial=0))) > LARGEST:
        what = f"{path}: activations of {LAYER} reach {largest:.0e}, too large to compare"
        raise WeightsError(what, "training probably diverged; use an earlier checkpoint")
    return activations


def find_nearest(vectors: Vectors, queries: Vectors, k: int) -> tuple[Rows, Distances]:
    """Find the `k` rows of `vectors` (N x units) nearest to each query (Q x units).

    Returns row numbers, nearest first, and Euclidean distances, Q x k each. The search is exact; equal distances come
    in row order. A float32 matrix product per block finds candidates, namely all rows that could be among the nearest
    given its rounding error. Their distances are then computed in float64.
    """
    k, size = min(k, len(vectors)), max(1, BLOCK // max(1, vectors.shape[1]))
    rows, distances = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0))
    for first in range(0, len(vectors), size):
        block = vectors[first : first + size]
        squares = np.einsum("nu,nu->n", block, block)
        halves = squares / 2 - (block @ queries.T).T  # half the squared distance - |q|^2 / 2; this order is fast
        kth = min(k, len(block)) - 1
        limits = np.partition(halves, kth, axis=1)[:, kth] + 2 * _bound_error(queries, float(squares.max()))
        nearest = [
            _measure_candidates(block, query, np.flatnonzero(half <= limit), k)
            for query, half, limit in zip(queries, halves, limits, strict=True)
        ]
        rows = np.concatenate([rows, [near + first for near, _ in nearest]], axis=1)
        distances = np.concatenate([distances, [distance for _, distance in nearest]], axis=1)
        best = np.argsort(distances, axis=1, kind="stable")[:, :k]
        rows, distances = np.take_along_axis(rows, best, 1), np.take_along_axis(distances, best, 1)
    return rows, distances


def _measure_candidates(block: Vectors, query: Vectors, candidates: Rows, k: int) -> tuple[Rows, Distances]:
    """Return the nearest `k` of some rows of a block, and their distances in float64."""
    distances = np.sqrt(((block[candidates].astype(np.float64) - query) ** 2).sum(axis=1))
    best = np.argsort(distances, kind="stable")[:k]
    return candidates[best], distances[best]


def _bound_error(queries: Vectors, largest_square: float) -> npt.NDArray[np.float64]:
    """Return the largest float32 error of |x|^2 / 2 - x.q for each query q and any x of at most this squared length.

    The error of a float32 sum of n products is at most about n 2^-24 times the sum of their sizes (Higham, Accuracy
    and Stability of Numerical Algorithms, section 3.1), for both sums together at most (|x| + |q|)^2 / 2. Twice that
    allows for the few other roundings, 2^-126 for each product that underflows.
    """
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1) + np.sqrt(largest_square)
    bound: npt.NDArray[np.float64] = (queries.shape[1] + 4) * (2.0**-24 * lengths**2 + 2.0**-126)
    return bound


def make_sheet_row(
    name: str, image: ImageArray, rows: Rows, distances: Distances, split: Split, classes: Sequence[ClassName]
) -> Row:
    """Make a row of a contact sheet: the image, then its neighbors with distance and class."""
    images = read_images_by_row(split, rows)
    tiles = [
        Tile(images[row], f"{distance:.3g} {classes[split.labels[row]].name}")
        for row, distance in zip(rows.tolist(), distances.tolist(), strict=True)
    ]
    return Row(name, [Tile(image), *tiles], is_first_apart=True)


def make_records(rows: Rows, distances: Distances, split: Split, classes: Sequence[ClassName]) -> list[dict[str, Any]]:
    """Make the records for `--json`. `source` is the image's folder and name before preparation, as far as kept."""
    records = []
    for rank, (row, distance) in enumerate(zip(rows.tolist(), distances.tolist(), strict=True), 1):
        label, key = int(split.labels[row]), split.key(row)
        name, wnid = classes[label]
        records.append({
            "rank": rank, "distance": distance, "label": name, "wnid": wnid, "index": label, "row": row, "key": key,
            "source": f"{wnid or name}/{key.partition('_')[2]}",
        })  # fmt: skip
    return records


@dataclass(frozen=True)
class Neighborhood:
    """A validation image, uint8 256 x 256 x 3, its class, and its nearest training images.

    `nearest` has image, class and distance of each. Class numbers are those of the data set.
    """

    image: ImageArray
    label: int
    nearest: tuple[tuple[ImageArray, int, float], ...]


def find_neighborhoods(
    model: Model,
    sha256: str,
    run: Path | None,
    data: Dataset,
    keep_index: bool,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Neighborhood, ...]:
    """Find the neighbors of a few validation images, spread evenly over the split. Returns () if a split is empty.

    Uses the index of `alexnet neighbors` if there is one. Otherwise computes one, and keeps it if `keep_index`.

    Raises:
        DataError, WeightsError, StorageError: as `write_index` and `read_images` do.
    """
    train, val = data.split("train"), data.split("val")
    if not len(train) or not len(val):
        return ()
    network, weights = _choose_network(model, sha256, run)
    folder = index_folder(network if isinstance(network, Path) else model.path, run, data)
    source = IndexSource(weights, data.hash, len(train))
    vectors = open_index(folder, source)
    session = open_network(network, fast_start=vectors is not None)
    with ExitStack() as stack:
        if vectors is None:
            if not keep_index:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            vectors = write_index(folder, source, train, session, advance)
        queries = val.spread_rows(QUERIES).tolist()
        images = list(read_images(val, queries))
        rows, distances = find_nearest(vectors, check_range(compute_activations(session, images), model.path), NEAREST)
    neighborhoods = []
    for image, query, best, distance in zip(images, queries, rows, distances, strict=True):
        nearest = zip(read_images(train, best.tolist()), train.labels[best].tolist(), distance.tolist(), strict=True)
        neighborhoods.append(Neighborhood(image, int(val.labels[query]), tuple(nearest)))
    return tuple(neighborhoods)


def _choose_network(model: Model, sha256: str, run: Path | None) -> tuple[ModelSource, str]:
    """Return the run's ONNX file, as `alexnet neighbors` does; the model if the file is another's or lacks the layer.

    The second value is its SHA-256.
    """
    exported = run / ONNX if run else None
    if exported and exported.is_file():
        try:
            if open_network(exported, fast_start=True, provider="cpu").metadata.sha256 == sha256:
                return exported, hash_file(exported)
        except WeightsError:
            return model, sha256
    return model, sha256
