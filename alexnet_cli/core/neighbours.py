"""Figure 4 (right) of the paper: the training pictures whose layer-7 activations are nearest to a picture's. No torch.

An index lies beside the network that it is of:

fc7.npy        float16 N x units (4096 at full width): a row for each training picture, in the order of the set
squares.npy    float32 N: the squared length of each row
axes.npy       float64 units x d: the axes of the outlines
outlines.npy   float32 N x (d + 1): the outline of each row, which tells how near it can be at all
index.json     written last: the hashes of the weights and of the data set, without which the others say nothing

`nearest` searches it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import outlines
from alexnet_cli.core.atomic import write_text
from alexnet_cli.core.nearest import Index
from alexnet_cli.core.outlines import Outlines, Vectors
from alexnet_cli.core.resolve import is_best, is_training_data
from alexnet_cli.core.responses import responses
from alexnet_cli.core.runs import MODEL, ONNX
from alexnet_cli.core.session import Layer, Session
from alexnet_cli.core.shards import Dataset, Split
from alexnet_cli.errors import StorageError, WeightsError

SCHEMA = "alexnet.neighbours/2"
LAYER: Layer = "fc7"
VECTORS, SQUARES, AXES, OUTLINES, RECORD = f"{LAYER}.npy", "squares.npy", "axes.npy", "outlines.npy", "index.json"
FILES = (VECTORS, SQUARES, AXES, OUTLINES, RECORD)
HINT = "no trained network's do: look at its training"

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


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place(weights: Path, run: Path | None, dataset: Dataset) -> Path:
    """The folder of a network's index: in its run, or beside its file.

    One of a checkpoint in a run with an ONNX file, of another checkpoint, another ONNX file or another data set than
    the run's own has a name of its own, so that it does not take the place of the run's: `neighbours-00000280`,
    `neighbours-alexnet-int8`, `neighbours-NAME`.
    """
    if run is None:
        return weights.with_name(f"{weights.stem}.neighbours")
    words = ["neighbours"]
    if weights.name not in {ONNX, MODEL}:
        words.append(weights.stem)
    elif weights.name == MODEL and (not is_best(weights) or (run / ONNX).is_file()):
        words.append(weights.resolve().parent.name)
    if not is_training_data(weights, dataset):
        words.append(dataset.path.resolve().name)
    return run / "-".join(words)


def open_index(folder: Path, origin: Origin) -> Index | None:
    """The index in a folder; None if there is none, or it is of other weights or data, or damaged."""
    try:
        if json.loads((folder / RECORD).read_text(encoding="utf-8")) != {"schema": SCHEMA, **asdict(origin)}:
            return None
        files = [np.lib.format.open_memmap(folder / name, mode="r") for name in (VECTORS, SQUARES, AXES, OUTLINES)]
    except Exception:  # the reader of a .npy header raises nearly anything; whatever it is, the index is made anew
        return None
    vectors, squares, axes, rows = files
    whole = vectors.dtype == np.float16 and vectors.ndim == 2 and len(vectors) == origin.images
    whole = whole and squares.dtype == np.float32 and squares.shape == (origin.images,)
    whole = whole and bool(((squares >= 0) & (squares < np.inf)).all())
    whole = whole and axes.dtype == np.float64 and axes.ndim == 2 and len(axes) == vectors.shape[1]
    whole = whole and rows.dtype == np.float32 and rows.shape == (origin.images, axes.shape[1] + 1)
    index = Index(vectors, squares, Outlines(axes, rows)) if whole else None
    return index if index and index.outlines.whole else None


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
                squares[rows] = (vectors.astype(np.float64) ** 2).sum(axis=1)
                advance(len(rows))
            file.flush()
            os.fsync(file.fileno())
        np.save(new / SQUARES, squares)
        written = np.lib.format.open_memmap(new / VECTORS, mode="r")
        axes = outlines.principal(written)
        np.save(new / AXES, axes)
        np.save(new / OUTLINES, outlines.of(written, axes))
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


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder; if the block ends well, its files take their places in `folder`, the record last, and nothing else
    there is touched. It is gone in the end.
    """
    folder = folder.resolve() if folder.is_symlink() else folder  # an index takes room, which may be elsewhere
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is no folder: the index has no place", "move it away")
    new = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            with contextlib.suppress(BlockingIOError), _held(left):  # unless somebody is writing it: killed
                shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
        with _held(new):
            yield new
            folder.mkdir(exist_ok=True)
            with _held(folder):
                (folder / RECORD).unlink(missing_ok=True)
                for name in FILES:
                    (new / name).replace(folder / name)
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
