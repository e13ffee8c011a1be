"""Writes one shard of a prepared data set: a plain tar with fixed headers, then a sidecar.

A shard is finished once its sidecar, `.partial/SHARD.npz`, exists: the tar is synced and renamed first. The data set's
own files are made from the sidecars, which are deleted once dataset.json exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.shards import PARTIAL, ROW, TAR_BLOCK, shard_name
from alexnet_cli.core.data.statistics import IMAGE_FACT, ImageFact, ImageFacts, PixelSums
from alexnet_cli.core.files import sync_file, sync_folder, write_chunks

TAR_END = bytes(2 * TAR_BLOCK)
EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


@dataclass(frozen=True)
class FinishedShard:
    """A shard on disk, and what its sidecar holds."""

    entry: dict[str, Any]
    """Its entry in dataset.json."""
    rows: npt.NDArray[np.void]
    """Its rows of the split's index."""
    sums: PixelSums
    facts: ImageFacts
    rejected: list[dict[str, str]]
    damaged: list[dict[str, str]]


class ShardWriter:
    """Writes shard `number` of a split. End it with `finish`, or with `abandon` after an error."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.folder = folder
        self.number = number
        self.name = shard_name(split, number)
        self.sums = PixelSums()
        self.rejected: list[dict[str, str]] = []
        self.damaged: list[dict[str, str]] = []
        self.facts: list[ImageFact] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self._digest = hashlib.sha256()
        self._position = 0
        self._temporary = folder / PARTIAL / f"{self.name}.tmp"
        self._file = self._temporary.open("wb")

    def add(self, key: str, label: int, jpeg: bytes) -> None:
        """Append KEY.jpg and KEY.cls."""
        self._rows.append((self.number, self._position + TAR_BLOCK, len(jpeg), label))
        self._write_member(f"{key}.jpg", jpeg)
        self._write_member(f"{key}.cls", str(label).encode())

    def finish(self) -> FinishedShard:
        """Make the shard, then its sidecar, durable; abandon it on an error. May be called from another thread."""
        try:
            self._write(TAR_END)
            self._file.close()
            sync_file(self._temporary)
            self._temporary.replace(self.folder / self.name)
        except BaseException:
            self.abandon()
            raise
        sync_folder(self.folder)
        entry = {
            "file": self.name,
            "bytes": self._position,
            "sha256": self._digest.hexdigest(),
            "images": len(self._rows),
        }
        rows = np.array(self._rows, ROW)
        facts = np.array(self.facts, IMAGE_FACT)
        finished = FinishedShard(entry, rows, self.sums, facts, self.rejected, self.damaged)
        write_chunks(_sidecar_path(self.folder, self.name), [_encode_sidecar(finished)])
        return finished

    def abandon(self) -> None:
        """Delete the unfinished file."""
        with contextlib.suppress(OSError):  # on a full disk the last bytes cannot be written even now
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_member(self, name: str, data: bytes) -> None:
        padding = bytes(-len(data) % TAR_BLOCK)
        self._write(encode_tar_header(name, len(data)) + data + padding)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def encode_tar_header(name: str, size: int) -> bytes:
    """A ustar header with modification time, owner and group 0, so that equal images make equal bytes.

    The bytes are tarfile's, in an eighth of the time; with two headers per image that counts.
    """
    header = bytearray(EMPTY_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % size
    header[148:156] = b"        "  # the checksum counts its own field as spaces
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def read_finished_shard(folder: Path, split: str, number: int) -> FinishedShard | None:
    """A shard that an interrupted run finished, or None if it is missing or incomplete."""
    name = shard_name(split, number)
    try:
        with _sidecar_path(folder, name).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            text = json.loads(str(arrays["text"]))
            sums = PixelSums(int(arrays["images"]), arrays["pixels"].astype(np.int64), arrays["products"])
            finished = FinishedShard(
                text["entry"], arrays["rows"], sums, arrays["facts"], text["rejected"], text["damaged"]
            )
        size = (folder / name).stat().st_size
        is_complete = size == finished.entry["bytes"] and finished.facts.dtype == IMAGE_FACT
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return finished if is_complete else None


def encode_npy(array: npt.NDArray[Any]) -> bytes:
    """The bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def encode_npy_header(dtype: np.dtype[Any], rows: int) -> bytes:
    """The bytes of an .npy file of a one-dimensional array, up to its rows."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": (rows,)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _sidecar_path(folder: Path, name: str) -> Path:
    return folder / PARTIAL / f"{name.removesuffix('.tar')}.npz"


def _encode_sidecar(finished: FinishedShard) -> bytes:
    buffer = io.BytesIO()
    text = json.dumps({"entry": finished.entry, "rejected": finished.rejected, "damaged": finished.damaged})
    np.savez(
        buffer,
        text=np.array(text),
        rows=finished.rows,
        images=np.array(finished.sums.images),
        pixels=finished.sums.pixels.astype(np.uint32),  # 255 times the images of a shard fits
        products=finished.sums.products,
        facts=finished.facts,
    )
    return buffer.getvalue()
