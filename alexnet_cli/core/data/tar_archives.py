"""Pictures inside tar archives, read where they lie: an archive is indexed by its headers and never unpacked.

A member's name is a name only and no path is ever made of it. Pictures whose name would lead out of the
archive, links and devices are listed like any other and refused when they are read, so that they are reported.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

from alexnet_cli.core.data.samples import ImageList, Names
from alexnet_cli.core.files import check_bytes
from alexnet_cli.errors import DataError

BLOCK = 512  # bytes; headers and data are padded to it
EXTENSION_LIMIT = 1 << 20  # bytes of a long name or a pax record
REGULAR, FOLDER = b"0\0" + b"7", b"5"
REASONS = ("", "its name leads out of the archive", "it is a link, a device or the like, not a file")
DAMAGED = "download or copy the archive again"


class Member(NamedTuple):
    """A member of an archive: offset and size of its data (bytes), and index of the reason to refuse it (0: none)."""

    name: str
    offset: int
    size: int
    refused: int


class Members(ImageList):
    """Pictures inside archives: names, labels, offsets and sizes."""

    def __init__(self, *archives: Path) -> None:
        self.archives = archives
        self.names: Names = Names()
        self.labels: array[int] = array("I")
        self._archive, self._offsets, self._sizes, self._refused = array("H"), array("Q"), array("Q"), array("B")

    def add(self, name: str, label: int, member: Member, archive: int = 0) -> None:
        """Append a picture, `name` being what it is called in reports, `archive` the number of its archive."""
        self.names.extend([name])
        self._archive.append(archive)
        self.labels.append(label)
        self._offsets.append(member.offset)
        self._sizes.append(member.size)
        self._refused.append(member.refused)

    def reader(self, row: int) -> Callable[[], bytes]:
        """Reads that part of its archive."""
        place = self._offsets[row], self._sizes[row], self._refused[row]
        return functools.partial(_read, self.archives[self._archive[row]], *place)

    def size(self, row: int) -> int:
        """Of the member's data."""
        return self._sizes[row]


def members(archive: Path, inside: Member | None = None) -> Iterator[Member]:
    """All members but folders, in their order; with `inside`, those of an archive that is itself a member.

    Raises:
        DataError: it cannot be read, is no tar archive, is damaged, or ends too early.
    """
    where = f"{archive} ({inside.name})" if inside else str(archive)
    try:
        with archive.open("rb", buffering=0) as file:
            start = inside.offset if inside else 0
            end = start + inside.size if inside else os.fstat(file.fileno()).st_size
            yield from _scan(file, start, end, where)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}", "check its permissions") from error


def _scan(file: RawIOBase, place: int, end: int, where: str) -> Iterator[Member]:
    path, length = "", -1  # from an extension, for the next member
    while True:
        header = _read_at(file, place, BLOCK) if place + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise DataError(f"{where} is truncated: it has no end mark after {place:,} bytes", DAMAGED)
        if not header.strip(b"\0"):
            return
        _check(header, where, place)
        kind, size, offset = header[156:157], _number(header[124:136], where), place + BLOCK
        if kind in REGULAR and length >= 0:
            size = length
        place = offset + (0 if kind in b"123456" else -(-size // BLOCK) * BLOCK)
        if offset + (0 if kind in b"123456" else size) > end:
            raise DataError(
                f"{where} is truncated in {path or _name(header)!r}: {end - offset:,} of {size:,} bytes", DAMAGED
            )
        if kind in b"LKxg":
            if size > EXTENSION_LIMIT:
                raise DataError(f"{where} has a name of {size:,} bytes, which cannot be right", DAMAGED)
            data = _read_at(file, offset, size)
            if kind == b"L":
                path = data.rstrip(b"\0").decode(errors="surrogateescape")
            elif kind == b"x":
                path, length = _pax(data, where, path, length)
            continue
        name = path or _name(header)
        path, length = "", -1
        if kind != FOLDER and not (kind in REGULAR and name.endswith("/")):
            yield Member(name, offset, size, _reason(name, kind))


def _check(header: bytes, where: str, place: int) -> None:
    """A header's sum counts its own field as eight spaces; old writers took the bytes as signed."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        recorded = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        recorded = -1
    if recorded != total and recorded != total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        what = f"is damaged: no header {place:,} bytes in" if place else "is not a tar archive"
        raise DataError(f"{where} {what}", DAMAGED)


def _number(field: bytes, where: str) -> int:
    try:
        if field[0] & 0x80:  # GNU: base 256
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        number = int(field.strip(b" \0") or b"0", 8)
        if number < 0:
            raise ValueError
    except ValueError as error:
        raise DataError(f"{where} is damaged: a member's size is {field!r}", DAMAGED) from error
    return number


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return name.decode(errors="surrogateescape")


def _pax(data: bytes, where: str, path: str, length: int) -> tuple[str, int]:
    """`LENGTH KEY=VALUE\\n` records: those that change a member's name or size."""
    try:
        while data:
            count = int(data[: data.index(b" ")])
            key, _, value = data[data.index(b" ") + 1 : count - 1].partition(b"=")
            if count < 5 or count > len(data):
                raise ValueError
            path = value.decode(errors="surrogateescape") if key == b"path" else path
            length = int(value) if key == b"size" else length
            data = data[count:]
    except ValueError as error:
        raise DataError(f"{where} is damaged: a pax header cannot be read", DAMAGED) from error
    return path, length


def _reason(name: str, kind: bytes) -> int:
    if kind not in REGULAR:
        return 2
    return int(name.startswith("/") or ".." in name.split("/"))


def _read_at(file: RawIOBase, offset: int, size: int) -> bytes:
    """Up to `size` bytes from there on. Not os.pread, which Windows has not."""
    file.seek(offset)
    return file.read(size) or b""


def _read(archive: Path, offset: int, size: int, refused: int) -> bytes:
    if refused:
        raise DataError(REASONS[refused], "")
    check_bytes(size)
    with archive.open("rb", buffering=0) as file:
        data = _read_at(file, offset, size)
    if len(data) != size:
        raise DataError(f"the archive ends after {len(data):,} of its {size:,} bytes", DAMAGED)
    return data
