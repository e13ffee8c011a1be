"""CIFAR-10 as it is distributed: python or binary batches of 32x32 images. No torch.

A python batch is a pickle that Python 2 wrote. A pickle may name any function to be called when it is read, so only the
three names are allowed by which it describes an array, and none of them is called: `_Record` keeps what it is given.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.samples import DetectedLayout, ImageList, NameList
from alexnet_cli.core.files import decode_text, read_file
from alexnet_cli.errors import DataError

PLACES = {"python": ("cifar-10-batches-py", ""), "binary": ("cifar-10-batches-bin", ".bin")}
"""Where each kind of batches is unpacked to, and the suffix of its files."""
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
SHAPE = (3, 32, 32)  # planes of red, green and blue
IMAGE_BYTES = 3 * 32 * 32
ARRAY_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),  # as numpy 2 writes it
}


class CifarImages(ImageList):
    """Images in memory, 3072 bytes each; read as PNG."""

    def __init__(self) -> None:
        self.labels: array[int] = array("I")
        self._pixels: list[ImageArray] = []  # one view per image of its batch
        self._names = NameList()

    def add(self, batch: str, pixels: ImageArray, labels: Sequence[int]) -> None:
        """Append a batch: Nx3072 pixels and N labels."""
        self.labels.extend(labels)
        self._pixels.extend(pixels)
        for row in range(len(labels)):
            self._names.append(f"{batch}/{row:05}")

    def name(self, row: int) -> str:
        """Return the batch and the image's number in it, from 0."""
        return self._names[row]

    def read(self, row: int) -> bytes:
        """Return the image as a PNG file, which loses nothing."""
        buffer = io.BytesIO()
        Image.fromarray(self._pixels[row].reshape(SHAPE).transpose(1, 2, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    def size(self, row: int) -> int:
        """Return the number of bytes of its pixels."""
        return IMAGE_BYTES


def detect_cifar(path: Path) -> DetectedLayout | None:
    """cifar-10-batches-py/ or cifar-10-batches-bin/, or what is in them; test_batch is the validation split."""
    for kind, (name, suffix) in PLACES.items():
        for folder in (path, path / name):
            if any((folder / f"{batch}{suffix}").is_file() for batch in (*TRAIN, TEST)):
                return _read_folder(folder, kind, suffix)
    return None


def _read_folder(folder: Path, kind: str, suffix: str) -> DetectedLayout:
    """Read all batches. Raises DataError if one is missing or damaged."""
    with _read(folder / ("batches.meta" if kind == "python" else "batches.meta.txt"), kind) as content:
        classes = _parse_python_classes(content) if kind == "python" else _parse_binary_classes(content)
        if not 2 <= len(classes) == len(set(classes)):
            raise ValueError("it does not name two or more classes")
    train, val = CifarImages(), CifarImages()
    for batch in (*TRAIN, TEST):
        with _read(folder / f"{batch}{suffix}", kind) as content:
            pixels, labels = _parse_python(content) if kind == "python" else _parse_binary(content)
            wrong = [label for label in labels if type(label) is not int or not 0 <= label < len(classes)]
            if wrong:
                raise ValueError(f"it has label {wrong[0]!r}, but there are {len(classes)} classes")
            (val if batch == TEST else train).add(batch, pixels, labels)
    return DetectedLayout(f"CIFAR-10, {kind} batches, test_batch for validation", classes, train, val)


@contextlib.contextmanager
def _read(file: Path, kind: str) -> Iterator[bytes]:
    """Yield a file's content. Any error, also of what is done with it, becomes a DataError that names the file."""
    hint = f"unpack cifar-10-{kind}.tar.gz again"
    try:
        yield read_file(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing", hint) from error
    except Exception as error:  # a damaged pickle may raise any
        raise DataError(f"{file} cannot be used: {error}", hint) from error


class _Record:
    """What a pickle says of an array or its type: the arguments it is made with, and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        if (module, name) not in ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of CIFAR-10 does")
        return _Record


def _load_pickle(content: bytes, *keys: bytes) -> list[Any]:
    """Return the values of these keys in a pickled dictionary."""
    values = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(values, dict) or not values.keys() >= {*keys}:
        raise ValueError(f"it is no dictionary with {' and '.join(key.decode() for key in keys)}")
    return [values[key] for key in keys]


def _parse_python(content: bytes) -> tuple[ImageArray, Sequence[int]]:
    """Return the pixels and labels of a python batch."""
    data, labels = _load_pickle(content, b"data", b"labels")
    shape, dtype, is_fortran, pixels = data.state[-4:]  # a version may come first
    if dtype.arguments[0] != b"u1" or not labels or shape != (len(labels), IMAGE_BYTES):
        raise ValueError(f"data must be uint8 of shape Nx{IMAGE_BYTES}, with N labels")
    return np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if is_fortran else "C"), labels


def _parse_binary(content: bytes) -> tuple[ImageArray, Sequence[int]]:
    """Return the pixels and labels of a binary batch: for each image its label, then its pixels."""
    if not content or len(content) % (1 + IMAGE_BYTES):
        raise ValueError(f"its {len(content):,} bytes are not a multiple of {1 + IMAGE_BYTES:,}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + IMAGE_BYTES)
    return rows[:, 1:], rows[:, 0].tolist()


def _parse_python_classes(content: bytes) -> list[str]:
    (names,) = _load_pickle(content, b"label_names")
    return [name.decode() for name in names]


def _parse_binary_classes(content: bytes) -> list[str]:
    return [name for line in decode_text(content).splitlines() if (name := line.strip())]
