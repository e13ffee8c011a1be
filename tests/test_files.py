"""Atomic writes, locks, links, checksums and bounded reads."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_cli.core import files
from alexnet_cli.core.files import (
    TEMPORARY_NAME,
    hash_file,
    lock_file,
    read_file,
    read_text,
    replace_file,
    replace_link,
    write_and_verify,
    write_chunks,
    write_text,
)
from alexnet_cli.errors import DataError

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


def test_replace_link(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        replace_link(tmp_path / "latest", tmp_path / name)
        assert os.readlink(tmp_path / "latest") == name
    assert sorted(os.listdir(tmp_path)) == ["latest", "one", "two"]


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


def test_no_other_module_syncs_hashes_or_locks_files() -> None:
    root = Path(__file__).parents[1]
    modules = [*(root / "alexnet_cli").rglob("*.py"), *(root / "plugins").rglob("*.py")]
    pattern = re.compile(r"os\.(fsync|replace|rename)\b|file_digest|fcntl|filelock")
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
