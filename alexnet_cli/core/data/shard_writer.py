"""One shard of a prepared data set being written: a plain tar with fixed headers, then a sidecar.

A shard is finished once its sidecar, `.partial/SHARD.npz`, exists: the tar is synced and renamed before
it. The sidecars hold what the data set's own files are made of in the end, and they go when dataset.json
is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
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
from alexnet_cli.core.files import sync_folder, write_chunks

TAR_END = bytes(2 * TAR_BLOCK)
NO_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is on disk: entry in dataset.json, rows of the index, sums, facts, what was refused or damaged."""

    entry: dict[str, Any]
    rows: npt.NDArray[np.void]
    sums: PixelSums
    facts: ImageFacts
    rejected: list[dict[str, str]]
    damaged: list[dict[str, str]]


class ShardWriter:
    """Writes shard `number` of a split. Close it with `finish`, or `abandon` it when something went wrong."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.folder, self.number = folder, number
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
        self._member(f"{key}.jpg", jpeg)
        self._member(f"{key}.cls", str(label).encode())

    def finish(self) -> FinishedShard:
        """Make the shard and then its sidecar durable, or abandon it. May run in another thread, as the last call."""
        try:
            self._write(TAR_END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
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
        facts = np.array(self.facts, IMAGE_FACT)
        finished = FinishedShard(entry, np.array(self._rows, ROW), self.sums, facts, self.rejected, self.damaged)
        write_chunks(_sidecar(self.folder, self.name), [_packed(finished)])
        return finished

    def abandon(self) -> None:
        """Drop what was written."""
        with contextlib.suppress(OSError):  # on a full disk the last bytes cannot be written even now
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _member(self, name: str, data: bytes) -> None:
        padding = bytes(-len(data) % TAR_BLOCK)
        self._write(tar_header(name, len(data)) + data + padding)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def tar_header(name: str, size: int) -> bytes:
    """A ustar header with modification time, owner and group 0, so that equal pictures make equal bytes.

    The same as tarfile writes, in an eighth of the time: two a picture were felt.
    """
    header = bytearray(NO_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % size
    header[148:156] = b"        "  # the sum counts its own place as blanks
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def read_finished_shard(folder: Path, split: str, number: int) -> FinishedShard | None:
    """The shard as an earlier, interrupted run left it; None if it is not finished."""
    name = shard_name(split, number)
    try:
        with _sidecar(folder, name).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            text = json.loads(str(arrays["text"]))
            sums = PixelSums(int(arrays["images"]), arrays["pixels"].astype(np.int64), arrays["products"])
            lists = text["rejected"], text["damaged"]
            finished = FinishedShard(text["entry"], arrays["rows"], sums, arrays["facts"], *lists)
        whole = (folder / name).stat().st_size == finished.entry["bytes"] and finished.facts.dtype == IMAGE_FACT
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return finished if whole else None


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """The bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npy_header(dtype: np.dtype[Any], rows: int) -> bytes:
    """What comes before the rows of a one-dimensional array in an .npy file."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": (rows,)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _sidecar(folder: Path, name: str) -> Path:
    return folder / PARTIAL / f"{name.removesuffix('.tar')}.npz"


def _packed(finished: FinishedShard) -> bytes:
    buffer = io.BytesIO()
    text = json.dumps({"entry": finished.entry, "rejected": finished.rejected, "damaged": finished.damaged})
    sums = finished.sums
    np.savez(
        buffer,
        text=np.array(text),
        rows=finished.rows,
        images=np.array(sums.images),
        pixels=sums.pixels.astype(np.uint32),  # 255 times the pictures of a shard fits
        products=sums.products,
        facts=finished.facts,
    )
    return buffer.getvalue()
