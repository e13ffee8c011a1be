"""Files on disk: atomic writes, checksums, exclusive locks, links and bounded reads, on Linux, macOS and Windows."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alexnet_cli.errors import AlexNetError, DataError

LARGEST = 1 << 28  # bytes of a file that is read into memory, unless the caller allows fewer or more
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp[^/]*")
"""Names of temporary files. Only a killed process leaves one behind."""


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to. It is synced and takes the place of `path` if the block ends well.

    A reader, or a machine that loses power, finds the old file or the new one, never half of one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_chunks(path, [text.encode()])


def write_chunks(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a file of several pieces atomically. Returns its sha256, hexadecimal."""
    digest = hashlib.sha256()
    with replace_file(path) as temporary, temporary.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def write_and_verify(path: Path, content: bytes | memoryview) -> str:
    """Write and sync a file, and read it back from the disk. Returns its SHA-256; OSError if it differs."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # otherwise the page cache is read back, not the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    digest = hash_file(path)
    if digest != hashlib.sha256(content).hexdigest():
        raise OSError(errno.EIO, f"{path.name} does not read back as written")
    return digest


def replace_link(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to the folder `target`, atomically where the system can do that."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    except OSError:
        if sys.platform == "win32":
            import _winapi

            _winapi.CreateJunction(str(target.resolve()), str(temporary))  # unlike a symbolic link, open to every user
        else:
            raise
    if sys.platform == "win32":
        link.unlink(missing_ok=True)  # Windows replaces no folder, and a link to one counts as one
    temporary.replace(link)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, message: str, error: type[AlexNetError] = DataError) -> Iterator[None]:
    """Hold an exclusive lock inside the block. Creates the file `path`, and removes it at the end.

    The system releases the lock however the process ends.

    Raises:
        AlexNetError: `error` with `message`, if another process holds the lock.
        OSError: the file cannot be created.
    """
    from filelock import FileLock, Timeout  # a tenth of a second to import, for few commands

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise error(message, "wait until it is done") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            path.unlink()
        lock.release()


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Checksum of a file, hexadecimal: sha256, or another that hashlib knows. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def read_file(path: Path, most: int = LARGEST) -> bytes:
    """The bytes of a regular file; reading a pipe or a device could wait forever.

    Raises:
        DataError: it is no regular file, or has more than `most` bytes.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError("it is not a regular file")
    check_bytes(status.st_size, most)
    return path.read_bytes()


def check_bytes(size: int, most: int = LARGEST) -> None:
    """Refuse a file that would fill the memory, before it is read.

    Raises:
        DataError: it has more than `most` bytes.
    """
    if size > most:
        raise DataError(f"it has {size:,} bytes, more than {most:,}")
