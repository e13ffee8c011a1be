"""Images inside tar archives. An archive is indexed by its headers and never unpacked. No torch.

A member's name is never used as a path. Images with a name that leads out of the archive, links and devices are listed
like any other image, and refused when they are read, so that they appear among the rejected images.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from alexnet_cli.core.data.folders import is_left_out
from alexnet_cli.core.data.samples import ImageList, NameList
from alexnet_cli.core.files import check_bytes
from alexnet_cli.errors import DataError

REFUSALS = ("", "its name leads out of the archive", "it is a link or a device, not a file")
NOT_A_FILE = 2  # in REFUSALS
DAMAGED_HINT = "download or copy the archive again"


class Member(NamedTuple):
    """A member of an archive: offset and size of its data in bytes, and index of the reason to refuse it (0: none)."""

    name: str
    offset: int
    size: int
    refusal: int


class ArchiveImages(ImageList):
    """Images inside archives."""

    def __init__(self, *archives: Path) -> None:
        self.archives = archives
        self.labels: array[int] = array("I")
        self._names = NameList()
        self._archive = array("H")
        self._offsets = array("Q")
        self._sizes = array("Q")
        self._refusals = array("B")

    def add(self, name: str, label: int, member: Member, archive: int = 0) -> None:
        """Append an image. `name` is for reports, `archive` is the index of its archive."""
        self._names.append(name)
        self.labels.append(label)
        self._archive.append(archive)
        self._offsets.append(member.offset)
        self._sizes.append(member.size)
        self._refusals.append(member.refusal)

    def name(self, row: int) -> str:
        """Return the name for reports."""
        return self._names[row]

    def read(self, row: int) -> bytes:
        """Return the member's data."""
        if self._refusals[row]:
            raise DataError(REFUSALS[self._refusals[row]])
        size = self._sizes[row]
        check_bytes(size)
        with self.archives[self._archive[row]].open("rb", buffering=0) as file:
            file.seek(self._offsets[row])
            data = file.read(size)
        if len(data) != size:
            raise DataError(f"the archive ends after {len(data):,} of its {size:,} bytes", DAMAGED_HINT)
        return data

    def size(self, row: int) -> int:
        """Return the size of the member's data."""
        return self._sizes[row]


def scan_members(archive: Path, outer: Member | None = None) -> Iterator[Member]:
    """Yield all members in their order, except folders, hidden files and what is in folders of a system.

    `outer`: scan this member, itself an archive, instead.

    Raises:
        DataError: the file cannot be read, is not a tar archive, or is damaged or truncated.
    """
    where = f"{archive} ({outer.name})" if outer else str(archive)
    try:
        with archive.open("rb") as file:
            start = file.seek(outer.offset if outer else 0)
            end = start + outer.size if outer else os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                for info in tar:
                    refusal = _find_refusal(info)
                    size = 0 if refusal == NOT_A_FILE else info.size
                    if size < 0:
                        raise DataError(f"{where} is damaged: {info.name!r} has a negative size", DAMAGED_HINT)
                    if info.offset_data + size > end:
                        raise DataError(f"{where} is truncated in {info.name!r}", DAMAGED_HINT)
                    if not info.isdir() and not _is_hidden(info.name):
                        yield Member(info.name, info.offset_data, size, refusal)
                _check_end(file, tar.offset, end, where)
    except tarfile.TarError as error:
        raise DataError(f"{where} is not a tar archive, or is truncated: {error}", DAMAGED_HINT) from error
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:  # a header with an absurd size
        raise DataError(f"{where} is damaged: {error or 'a header has an absurd size'}", DAMAGED_HINT) from error
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}", "check its permissions") from error


def _is_hidden(name: str) -> bool:
    """Return whether a member is left out by its name, as a file or folder of the name would be."""
    *folders, file = name.split("/")
    return is_left_out(file, False) or any(is_left_out(folder, True) for folder in folders if folder not in (".", ".."))


def _check_end(file: BinaryIO, offset: int, end: int, where: str) -> None:
    """Raise DataError unless there is an end mark: tarfile takes a damaged or missing header for the end."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or offset + tarfile.BLOCKSIZE > end:
        raise DataError(f"{where} is truncated: it has no end mark after {offset:,} bytes", DAMAGED_HINT)
    if block.strip(b"\0"):
        raise DataError(f"{where} is damaged: no header at byte {offset:,}", DAMAGED_HINT)


def _find_refusal(info: tarfile.TarInfo) -> int:
    """Return the index of the reason to refuse a member; 0 if there is none."""
    if not info.isreg() or info.issparse():
        return NOT_A_FILE
    return int(info.name.startswith("/") or ".." in info.name.split("/"))
