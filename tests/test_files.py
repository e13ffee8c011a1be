"""Atomic writes, locks, links, checksums and bounded reads."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core import files
from alexnet_cli.core.files import (
    TEMPORARY_NAME,
    follow_text_links,
    hash_file,
    lock_file,
    map_file,
    read_file,
    read_link,
    read_text,
    replace_file,
    replace_link,
    write_and_verify,
    write_chunks,
    write_text,
)
from alexnet_cli.core.model.model_file import write_model
from alexnet_cli.errors import AlexNetWarning, DataError
from alexnet_cli.recipe import TINY
from model_files import random_model

HOLD = """
import sys
from pathlib import Path
from alexnet_cli.core.files import lock_file
with lock_file(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")

    def fail() -> Iterator[bytes]:
        yield b"half of the n"
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_chunks(path, fail())
    assert path.read_text() == "old"
    write_text(path, "neü\n")
    assert path.read_bytes() == "neü\n".encode()
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", os.fsync
    done: list[str] = []

    def sync(descriptor: int) -> None:
        done.append("after the rename" if path.exists() else "before the rename")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    assert write_chunks(path, [b"one", b"two"]) == hashlib.sha256(b"onetwo").hexdigest()
    assert done == ["before the rename", "after the rename"]  # the file, then its folder


def test_names_of_temporary_files(tmp_path: Path) -> None:
    with replace_file(tmp_path / "dataset.json") as temporary:
        temporary.touch()
        found = TEMPORARY_NAME.fullmatch(temporary.name)
    assert found is not None
    assert found["name"] == "dataset.json"
    assert TEMPORARY_NAME.fullmatch("dataset.json") is None


@pytest.mark.usefixtures("_any_disk")
def test_links(tmp_path: Path) -> None:
    latest = tmp_path / "latest"
    for name in ("one", "two"):
        (tmp_path / name / "checkpoints" / "7").mkdir(parents=True)
        replace_link(latest, tmp_path / name)
        replace_link(tmp_path / name / "checkpoints" / "best", tmp_path / name / "checkpoints" / "7")
        assert read_link(latest) == tmp_path / name
        (tmp_path / name / "checkpoints" / "7" / "file").write_bytes(b"7")
    assert sorted(os.listdir(tmp_path)) == ["latest", "one", "two"]
    assert follow_text_links(latest / "checkpoints" / "best" / "file").read_bytes() == b"7"
    assert read_link(tmp_path / "one") is read_link(tmp_path / "missing") is None


def test_a_link_of_a_disk_without_links_is_replaced_by_one_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    with monkeypatch.context() as patch:
        patch.delattr(os, "symlink")
        replace_link(tmp_path / "latest", tmp_path / "one")
        assert (tmp_path / "latest").read_bytes() == b"one\n"
        replace_link(tmp_path / "latest", tmp_path / "one")
    replace_link(tmp_path / "latest", tmp_path / "one")
    assert os.readlink(tmp_path / "latest") == "one"
    with monkeypatch.context() as patch:
        patch.delattr(os, "symlink")
        replace_link(tmp_path / "latest", tmp_path / "one")
    assert not (tmp_path / "latest").is_symlink()


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"\0", b"best", b"two\nlines", bytes(10000), b"..", b"../best/x", b"best/x", b"/etc"]
)
def test_other_files_are_no_links(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "best").write_bytes(content)
    assert read_link(tmp_path / "best") is None
    assert follow_text_links(tmp_path / "best" / "file") == tmp_path / "best" / "file"


def test_a_folder_in_the_place_of_a_link_stays(tmp_path: Path) -> None:
    """As a program leaves it that copies what links point to, such as zip."""
    (tmp_path / "last").mkdir()
    with pytest.raises(OSError, match=r"last is a folder, not a link: rename or delete it"):
        replace_link(tmp_path / "last", tmp_path)
    assert (tmp_path / "last").is_dir()


def test_a_lock_belongs_to_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="busy"), lock_file(path, "busy"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait(60)
    with lock_file(path, "busy"), pytest.raises(DataError, match="busy"), lock_file(path, "busy"):
        pass
    with lock_file(path, "busy"):
        pass


def test_a_lock_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), lock_file(tmp_path / "file" / ".lock", "busy"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("fcntl.flock", failing(code))
    text = f"{re.escape(str(tmp_path))} has no locks .*do not run two commands"
    with pytest.warns(AlexNetWarning, match=text), lock_file(tmp_path / ".lock", "busy"):
        pass
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), lock_file(tmp_path / ".lock", "busy"):
        pass


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(code))
    monkeypatch.setattr(os, "posix_fadvise", failing(code), raising=False)
    write_text(tmp_path / "file", "new")
    assert write_and_verify(tmp_path / "other", b"abc") == hash_file(tmp_path / "other")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "file", "newer")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new"


def test_a_file_that_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert bytes(map_file(tmp_path / "file")) == b"abc"
    monkeypatch.setattr("mmap.mmap", failing(errno.ENODEV))
    assert bytes(map_file(tmp_path / "file")) == b"abc"


def failing(code: int) -> Callable[..., Any]:
    """A call that the file system answers with this error."""

    def call(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_written_files_have_the_rights_of_the_umask(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        write_text(tmp_path / "text", "a")
        write_and_verify(tmp_path / "bytes", b"b")
        write_model(random_model(replace(TINY, width=1 / 64)), tmp_path / "model.safetensors")
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_hash_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file").startswith("ba7816bf")
    assert hash_file(tmp_path / "file", "sha1").startswith("a9993e36")


def test_read_file_refuses_pipes_and_large_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(bytes(1001))
    with pytest.raises(DataError, match="not a regular file"):
        read_file(tmp_path / "pipe")
    with pytest.raises(DataError, match="1,001 bytes, more than 1,000"):
        read_file(tmp_path / "file", 1000)
    assert len(read_file(tmp_path / "file")) == 1001
    with pytest.raises(DataError, match="more than"):
        files.check_bytes(files.MAX_BYTES + 1)


def test_a_file_that_reads_back_differently_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_and_verify(tmp_path / "file", b"abc") == hash_file(tmp_path / "file")
    monkeypatch.setattr(files, "hash_file", lambda path: "0" * 64)
    with pytest.raises(OSError, match="file does not read back as written"):
        write_and_verify(tmp_path / "file", b"abc")


def test_text_files_have_an_explicit_encoding() -> None:
    """Without one, Windows takes that of the country."""
    root = Path(__file__).parents[1]
    for path in [*(root / "alexnet_cli").rglob("*.py"), *(root / "plugins").rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith((".read_text", ".write_text")):
                assert "encoding" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


def test_no_other_module_syncs_hashes_or_locks_files() -> None:
    root = Path(__file__).parents[1]
    modules = [*(root / "alexnet_cli").rglob("*.py"), *(root / "plugins").rglob("*.py")]
    pattern = re.compile(r"os\.(fsync|replace|rename)\b|file_digest|flock|lockf|filelock")
    names = [path.name for path in modules if pattern.search(path.read_text(encoding="utf-8"))]
    assert names == ["files.py"]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be with a mark"], ids=lambda name: name.split()[0]
)
def test_text_of_any_system_is_read(encoding: str, tmp_path: Path) -> None:
    text = "n01440764\tSchleie (größer)\nn01443537\t金魚\n"
    windows = text.replace("\n", "\r\n")
    data = windows.encode(encoding) if " " not in encoding else ("\ufeff" + windows).encode("utf-16-be")
    (tmp_path / "words.txt").write_bytes(data)
    assert read_text(tmp_path / "words.txt") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Bär\n".encode("cp1252"), "is not UTF-8 text"),
        ("no mark\n".encode("utf-16-le"), "is not UTF-8 text: it has zero bytes"),
        ("cut".encode("utf-16")[:-1], "is not UTF-8 text"),
        (b"y" * 101, "has 101 bytes, more than 100"),
        (None, "No such file"),
    ],
)
def test_what_is_not_text_is_refused_with_its_name(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "words.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"words\.txt .*{message}"):
        read_text(tmp_path / "words.txt", 100)


def test_user_text_is_read_by_read_text() -> None:
    root = Path(__file__).parents[1] / "alexnet_cli" / "core"
    calls = {
        path.name
        for path in (*root.glob("data/*.py"), *root.glob("inference/*.py"), root.parent / "recipe_io.py")
        if re.search(r"\.read_text\(", path.read_text(encoding="utf-8"))
    }
    assert calls == {"classes.py", "shards.py"}, "those read files of our own"
