"""Atomic writes, checksums, exclusive locks, links and bounded reads, on Linux, macOS and Windows.

A file system may lack links, locks, folders that can be synced, or mapping. Then the functions here do without.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import mmap
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from alexnet_cli.errors import AlexNetError, AlexNetWarning, DataError

MAX_BYTES = 2**28  # of a file that is read into memory, unless the caller sets another limit
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.\d+\.tmp[^/]*")
"""Name of a temporary file, which only a killed process leaves behind; `name` is the file it was to replace."""
UNSUPPORTED = {
    errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOLCK, errno.ENODEV, errno.ENOTTY,
}  # fmt: skip
"""What file systems answer to a call that they do not know. None of them is an error of the disk or a missing right."""
LINK_NAMES = {"latest", "last", "best"}


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is synced and replaces `path` when the block ends without an error.

    Readers see the old file or the new one, never a part of it, even after a power failure.
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
    """Write a file atomically from pieces. Returns its SHA-256, hexadecimal."""
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
        _sync(file.fileno())
        with suppress(AttributeError, OSError):  # without this call, the page cache is read back, not the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    digest = hash_file(path)
    if digest != hashlib.sha256(content).hexdigest():
        raise OSError(errno.EIO, f"{path.name} does not read back as written")
    return digest


def replace_link(link: Path, target: Path) -> None:
    """Make `link`, which has one of LINK_NAMES, point to the folder `target` next to it, atomically.

    It becomes a symbolic link. On Windows, and on disks without links, it is a text file with the folder's name.
    """
    if link.is_dir() and not link.is_symlink():  # a program that copied the folder has followed the link
        raise OSError(errno.EISDIR, f"{link} is a folder, not a link: rename or delete it")
    if sys.platform != "win32":  # there, links need special rights, and one to a folder cannot be replaced
        temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        with suppress(OSError, AttributeError):
            os.symlink(target.name, temporary)
            temporary.replace(link)
            return
    write_text(link, target.name + "\n")


def read_link(link: Path) -> Path | None:
    """The folder that a link made by `replace_link` points to. None if `link` is something else, or missing."""
    if link.is_symlink():
        return link.parent / os.readlink(link)
    if link.name not in LINK_NAMES or not link.is_file():
        return None
    with suppress(UnicodeDecodeError), link.open("rb") as file:
        text = file.read(4096).decode().strip()
        # as `replace_link` writes it: a folder next to the link, not another link, which could lead back
        is_name = text == Path(text).name and text.isprintable() and text not in {"..", *LINK_NAMES}
        return link.parent / text if text and is_name else None
    return None


def follow_text_links(path: Path) -> Path:
    """The path with the text files of `replace_link` in it replaced by what they point to.

    Symbolic links stay in the path: the system follows them.
    """
    for part in (path, *path.parents):
        if part.is_file():
            target = None if part.is_symlink() else read_link(part)
            return follow_text_links(target / path.relative_to(part)) if target else path
        if part.exists():
            break
    return path


def map_file(path: Path) -> memoryview:
    """The content of a file, mapped into memory, or read where the disk cannot map files. Raises OSError, ValueError.

    An empty file cannot be mapped.
    """
    with path.open("rb") as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return memoryview(file.read())


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb+") as file:
        _sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where that needs a call and the disk knows it."""
    if sys.platform == "win32":
        return
    with suppress(PermissionError):  # a folder that can be written but not read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextmanager
def lock_file(path: Path, message: str, error: type[AlexNetError] = DataError) -> Iterator[None]:
    """Hold an exclusive lock inside the block. The system releases it however the process ends.

    The file `path` stays: removed, it would leave a process that has just opened it with a lock that others cannot see.
    Where the disk knows no locks there is none, and a warning.

    Raises:
        AlexNetError: `error` with `message`, if another process holds the lock.
        OSError: the file cannot be created.
    """
    with warnings.catch_warnings(action="ignore"):  # where Python lacks the system's locks, it warns of its own kind
        from filelock import FileLock, Timeout  # takes 0.1 s to import, and few commands need it
    lock: AbstractContextManager[object] = nullcontext()
    try:
        # its fallback, a file with a process id, would outlive a process killed on another machine
        lock = FileLock(path, fallback_to_soft=False).acquire(blocking=False)
    except Timeout:
        raise error(message, "wait until it is done") from None
    except OSError as reason:
        if reason.errno not in UNSUPPORTED:
            raise
        text = f"the disk of {path.parent} has no locks ({reason.strerror}): do not run two commands on this folder"
        warnings.warn(text, AlexNetWarning, stacklevel=2)
    with lock:
        yield


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Checksum of a file, hexadecimal; `algorithm` is a name that hashlib knows. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file. Pipes and devices are refused, since reading them could take forever.

    Raises:
        DataError: it is no regular file, or has more than `max_bytes`.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError("it is not a regular file")
    check_bytes(status.st_size, max_bytes)
    return path.read_bytes()


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a text file of the user's, from any system: see `decode_text`. Lines end with a line feed.

    Raises:
        DataError: it is no regular file, has more than `max_bytes`, is no such text, or cannot be read.
    """
    try:
        text = decode_text(read_file(path, max_bytes))
    except UnicodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from error
    except DataError as error:
        raise DataError(f"{path} cannot be read: {error.what}", "check that it is the right file") from error
    return text.replace("\r\n", "\n")


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one, as Windows writes them.

    Raises:
        UnicodeError: it is something else. Python's `errors` may allow bytes that are not UTF-8, but no zero bytes.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    text = data.decode(encoding, errors)
    if "\0" in text:
        raise UnicodeError("it has zero bytes, as UTF-16 without a byte order mark")
    return text


def check_bytes(size: int, max_bytes: int = MAX_BYTES) -> None:
    """Raise DataError if a file of `size` bytes is too large to be read into memory."""
    if size > max_bytes:
        raise DataError(f"it has {size:,} bytes, more than {max_bytes:,}")
