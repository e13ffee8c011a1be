"""Pictures, names and lists that somebody made to hurt: each is answered or refused with a reason, and nothing else."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from alexnet_cli.core.data import images
from alexnet_cli.core.data.images import PixelBudget
from alexnet_cli.core.inference.inputs import expand_inputs, load_image, prefetch
from alexnet_cli.recipe import PAPER
from commands import alexnet
from hostile import MUTATIONS, corrupt, limit_time_and_memory, repeatable, result_or_message
from model_files import draw, random_model, save_model

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("RGB", "JPEG", {"quality": 80}), "progressive": ("RGB", "JPEG", {"progressive": True}),
    "cmyk": ("CMYK", "JPEG", {}), "png": ("RGBA", "PNG", {}), "palette": ("P", "PNG", {}), "bmp": ("RGB", "BMP", {}),
    "gif": ("P", "GIF", {}), "webp": ("RGB", "WEBP", {}), "tiff": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("RGB", "PPM", {}),
}  # fmt: skip


def encoded(kind: str) -> bytes:
    mode, form, settings = KINDS[kind]
    buffer = io.BytesIO()
    Image.fromarray(PIXELS, "RGBA").convert("RGB").convert(mode).save(buffer, form, **settings)
    return buffer.getvalue()


WHOLE = {kind: encoded(kind) for kind in KINDS}


def answered(data: bytes) -> str:
    """Empty for a picture that was decoded; or why it was not."""
    found = load_image(data, True, PixelBudget())
    if isinstance(found, str):
        assert found.strip()
        return found
    assert found.shape == (256, 256, 3)
    assert found.dtype == np.uint8
    return ""


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    with limit_time_and_memory():
        yield


@given(st.sampled_from(sorted(KINDS)), MUTATIONS)
@repeatable(80)
def test_damaged_pictures(kind: str, mutations: list[tuple[str, int, bytes]]) -> None:
    answered(corrupt(WHOLE[kind], mutations))


@given(st.sampled_from(sorted(KINDS)), MUTATIONS)
@repeatable(60)
def test_damaged_beginnings(kind: str, mutations: list[tuple[str, int, bytes]]) -> None:
    answered(corrupt(WHOLE[kind], mutations, within=60))


def test_whole_ones_are_answered() -> None:
    assert [kind for kind in KINDS if answered(WHOLE[kind])] == []


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 1, color: int = 0, rows: int = 1) -> bytes:
    """A PNG that says it measures so much, with so many black rows of data in it."""
    bits = {0: 1, 2: 3, 3: 1, 6: 4}[color] * depth
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(bytes((width * bits + 7) // 8 + 1) * rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


ZEROS = zlib.compress(bytes(1 << 27), 9)


def unfolding(kind: bytes) -> bytes:
    """A PNG with a chunk that a few kilobytes make 128 MB."""
    return WHOLE["png"][:33] + chunk(kind, b"a\0\0" + ZEROS) + WHOLE["png"][33:]


FRAME = WHOLE["jpeg"].index(b"\xff\xc0")  # where a JPEG says how large it is
BOMBS = {
    "png 65535x65535": png(65535, 65535),
    "png 2^31-1": png(2**31 - 1, 2**31 - 1, rows=0),
    "png one row high": png(8_000_000, 1, 1),
    "png just too large": png(9460, 9460),
    "png whose text unfolds": unfolding(b"zTXt"),
    "png whose profile unfolds": unfolding(b"iCCP"),
    "bmp": WHOLE["bmp"][:18] + struct.pack("<ii", 2**31 - 1, -(2**31)) + WHOLE["bmp"][26:],
    "gif": WHOLE["gif"][:6] + b"\xff\xff\xff\xff" + WHOLE["gif"][10:],
    "ppm": b"P6 99999 99999 255 " + bytes(100),
    "ppm of numbers": b"P3 " + b"9" * 5000 + b" 1 255 ",
    "jpeg": WHOLE["jpeg"][: FRAME + 5] + b"\xff\xff\xff\xff" + WHOLE["jpeg"][FRAME + 9 :],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "empty": b"",
    "zeros": bytes(10_000),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    reason = answered(BOMBS[name])
    assert reason or name == "png one row high"
    assert "/etc/passwd" not in reason


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=4), st.booleans())
@repeatable(40)
def test_names_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, names: list[bytes], listed: bool) -> None:
    folder = tmp_path_factory.mktemp("names")
    kept = set()
    for name in names:
        plain = name.replace(b"/", b"_").replace(b"\0", b"_") + b".png"
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + plain))).write_bytes(WHOLE["png"])
        kept |= {plain} if not plain.startswith(b".") or listed else set()
    whole = b"".join(os.fsencode(folder) + b"/" + name + b"\0" for name in sorted(kept))
    arguments, stdin = (["-"], io.BytesIO(whole)) if listed else ([str(folder)], None)
    found = result_or_message(lambda: expand_inputs(arguments, stdin))
    if isinstance(found, str):
        assert not kept
        return
    assert sorted(os.path.basename(os.fsencode(path)) for path in found) == sorted(kept)
    assert all(not isinstance(picture, str) for _, picture in prefetch(found, 4, False))


@given(st.lists(st.binary(max_size=300) | st.sampled_from([b"/dev/zero", b"/proc/self/mem", b"x" * 5000, b"\0", b"*"])))
@repeatable(50)
def test_lists_of_junk(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("list")
    (folder / "list").write_bytes(b"\n".join([*lines, os.fsencode(folder) + b"/list"]))
    found = result_or_message(lambda: expand_inputs([f"@{folder}/list"]))
    if isinstance(found, list):
        assert all(isinstance(picture, str) and picture for _, picture in prefetch(found, 4, False))


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with folders in one another, deeper than a path can be long, and than pytest could remove."""
    levels = 1200
    monkeypatch.chdir(tmp_path)
    for _ in range(levels):
        os.mkdir("deeper")
        os.chdir("deeper")
    os.chdir(tmp_path)
    yield tmp_path
    for _ in range(levels):
        os.chdir("deeper")
    for _ in range(levels):
        os.chdir("..")
        os.rmdir("deeper")


def test_deep_folders_links_and_pipes(deep: Path) -> None:
    draw(deep / "good.png", 0)
    (deep / "round.png").symlink_to("round.png")
    (deep / "nowhere.png").symlink_to("gone")
    (deep / "circle").symlink_to(deep)
    os.mkfifo(deep / "pipe.png")
    found = dict(prefetch(expand_inputs([str(deep)]), 4, False))
    reasons = {os.path.basename(name): picture for name, picture in found.items() if isinstance(picture, str)}
    assert not isinstance(found[f"{deep}/good.png"], str)
    assert reasons.keys() == {"round.png", "nowhere.png", "pipe.png", "deeper"}
    assert all(reasons.values())


def test_the_command_says_it_in_a_line_and_with_the_right_code(tmp_path: Path) -> None:
    model = save_model(random_model(replace(PAPER, width=1 / 64)), tmp_path / "m.safetensors")
    album = tmp_path / "album"
    draw(album / "good.png", 0)
    for number, data in enumerate(BOMBS.values()):
        (album / f"{number}\n\x1b[2J.png").write_bytes(data)
    cases = {5: [str(album)], 3: [str(album / "gone\x1b[2J")], 2: [str(album), "--features", "fc9"]}
    for code, words in cases.items():
        result = alexnet("predict", *words, "-w", str(model))
        out, err = result.stdout, result.stderr
        assert result.returncode == code
        assert "\x1b" not in out + err
        assert "Traceback" not in err
        assert "error: " in err
        assert out.count("cannot be read") == (len(BOMBS) - 1 if code == 5 else 0)


@pytest.mark.slow
def test_a_folder_of_the_largest_pictures_fits_in_two_gigabytes(tmp_path: Path) -> None:
    """A process of its own, since only the kernel knows how much memory it really took."""
    model = save_model(random_model(replace(PAPER, width=1 / 64)), tmp_path / "m.safetensors")
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(png(9459, 9459, rows=9459))
        (tmp_path / f"{number}-color.png").write_bytes(png(9459, 9459, 8, 6, 9459))
    words = [sys.executable, "-m", "alexnet_cli", "predict", str(tmp_path), "-w", str(model), "-q"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        shown = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert shown.count("class ") == 12 * 5
    assert usage.ru_maxrss * 1024 < 2 << 30


@pytest.mark.slow
def test_large_pictures_are_prepared_one_at_a_time_whatever_the_workers(tmp_path: Path) -> None:
    """Six of 80 megapixels among small ones, so that several threads have one: 5.6 GB with six, without the limit."""
    for number in range(6):
        folder = tmp_path / "source" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(8944 + number, 8944, 8, 6 if number % 2 else 2, 8944))
        for other in range(40):
            (folder / f"{number}-{other}.jpg").write_bytes(WHOLE["jpeg"])
    words = ["prepare", str(tmp_path / "source"), "-o", str(tmp_path / "out"), "--workers", "6", "-q"]
    with subprocess.Popen([sys.executable, "-m", "alexnet_cli", *words]) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 < 1.5e9


def test_a_picture_of_the_limit_is_still_one() -> None:
    assert images.read_size(png(9459, 9459, rows=0)) == (9459, 9459)
