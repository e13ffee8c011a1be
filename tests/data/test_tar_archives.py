"""Tar archives indexed by their headers: every format, hostile and damaged ones."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from alexnet_cli.core.data.tar_archives import ArchiveImages, Member, scan_members
from alexnet_cli.errors import DataError

LONG = "deep/" * 40 + "é name of more than a hundred bytes.JPEG"


def tar(path: Path, files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def list_archive(archive: Path, outer: Member | None = None) -> ArchiveImages:
    images = ArchiveImages(archive)
    for member in scan_members(archive, outer):
        images.add(member.name, 0, member)
    return images


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_format_as_tarfile_reads_it(tmp_path: Path, format: int) -> None:
    files = {"a.JPEG": b"one", "empty.jpg": b"", "block.jpg": b"x" * 512, "prefix/" * 16 + "p.jpg": b"p"}
    files |= {} if format == tarfile.USTAR_FORMAT else {LONG: b"long", "bytes\udcff.jpg": b"odd"}
    path = tar(tmp_path / "a.tar", files, format)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive]
    assert [(m.name, m.offset, m.size) for m in scan_members(path)] == expected
    assert {item.name: item.read() for item in list_archive(path)} == files


def test_members_that_a_system_left_are_skipped(tmp_path: Path) -> None:
    left = ("._a.jpg", "__MACOSX/n1/._b.jpg", "n1/@eaDir/a.jpg/THUMB.jpg", "./.Trash-1000/c.jpg")
    path = tar(tmp_path / "a.tar", dict.fromkeys((*left, "./n1/a.jpg", "n1/@b.jpg", "../c.jpg"), b"x"))
    assert [member.name for member in scan_members(path)] == ["./n1/a.jpg", "n1/@b.jpg", "../c.jpg"]


def test_sizes_in_other_notations(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a.jpg")
    entry.size = 3
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"abc".ljust(512, b"\0") + bytes(1024))
    assert [item.read() for item in list_archive(tmp_path / "a.tar")] == [b"abc"]
    header[124:136] = b"-0000000512\0"
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match="negative size"):
        list(scan_members(tmp_path / "a.tar"))
    data = b"12 size=-77\n"
    extension = tarfile.TarInfo("pax")
    extension.type, extension.size = b"x", len(data)
    tar(tmp_path / "b.tar", {"a.jpg": b"abc"})
    extended = extension.tobuf() + data.ljust(512, b"\0") + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(extended)
    with pytest.raises(DataError, match="negative size"):
        list(scan_members(tmp_path / "a.tar"))


def test_a_name_of_exabytes(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (1 << 62).to_bytes(11, "big")
    header[156:157] = tarfile.GNUTYPE_LONGNAME
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(2048))
    with pytest.raises(DataError, match="is damaged"):
        list(scan_members(tmp_path / "a.tar"))


def test_an_archive_in_an_archive(tmp_path: Path) -> None:
    inner = tar(tmp_path / "n1.tar", {"1.jpg": b"first", "2.jpg": b"second"})
    outer = tar(tmp_path / "train.tar", {"n0.txt": b"?", "n1.tar": inner.read_bytes()})
    member = list(scan_members(outer))[1]
    assert [item.read() for item in list_archive(outer, member)] == [b"first", b"second"]


def test_hostile_members_are_listed_and_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("../outside.jpg", str(outside), "a/../../outside.jpg", "dots..jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            archive.addfile(entry, io.BytesIO(b"new"))
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        for kind in kinds:
            entry = tarfile.TarInfo(f"kind{kind.decode()}.jpg")
            entry.type, entry.linkname, entry.size = kind, str(outside), 0
            archive.addfile(entry)
        archive.addfile(tarfile.TarInfo("last.jpg"))
    before = sorted(tmp_path.rglob("*"))
    images = list_archive(path)
    assert len(images) == 4 + len(kinds) + 1
    good = {"dots..jpg": b"new", "last.jpg": b""}
    for item in images:
        if item.name in good:
            assert item.read() == good[item.name]
        else:
            with pytest.raises(DataError, match="leads out" if "outside" in item.name else "a link or a device"):
                item.read()
    assert outside.read_bytes() == b"secret"
    assert sorted(tmp_path.rglob("*")) == before


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", {"1.jpg": b"x" * 700, "2.jpg": b"y" * 700}).read_bytes()
    end = 2 * (512 + 1024)
    cut = tmp_path / "cut.tar"
    for size in (1, 511, 512, 600, 1536, 1600, 2048, 2100, end - 400, end):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated") as caught:
            list(scan_members(cut))
        assert "cut.tar" in caught.value.what
        assert caught.value.hint
    cut.write_bytes(whole[: end + 512])
    assert len(list(scan_members(cut))) == 2


def test_damaged_files_and_files_that_are_no_archive(tmp_path: Path) -> None:
    whole = bytearray(tar(tmp_path / "a.tar", {"1.jpg": b"x" * 700, "2.jpg": b"y"}).read_bytes())
    whole[1536 + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(whole)
    with pytest.raises(DataError, match="damaged: no header at byte 1,536"):
        list(scan_members(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(os.urandom(2000))
    with pytest.raises(DataError, match="is not a tar archive"):
        list(scan_members(tmp_path / "a.tar"))
    with pytest.raises(DataError, match="cannot be read"):
        list(scan_members(tmp_path / "missing.tar"))


def test_an_archive_that_shrinks_after_it_was_listed(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"1.jpg": b"x" * 700})
    item = list_archive(path)[0]
    os.truncate(path, 1000)
    with pytest.raises(DataError, match="ends after 488 of its 700 bytes"):
        item.read()
