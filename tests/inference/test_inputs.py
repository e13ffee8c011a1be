"""The arguments of `predict`: lists, standard input, odd names, folders that cannot be listed, memory."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.core.data import images
from alexnet_cli.core.data.images import PixelBudget
from alexnet_cli.core.inference import inputs
from alexnet_cli.core.inference.inputs import expand_inputs, load_image, name_inputs, prefetch
from alexnet_cli.errors import DataError
from model_files import draw


def test_a_list_holds_a_path_a_line(tmp_path: Path) -> None:
    one, two = draw(tmp_path / "one.png", 0), draw(tmp_path / "below" / "two.png", 1)
    (tmp_path / "list.txt").write_text(f"{one}\r\n\n{tmp_path}/below\n{tmp_path}/gone*.png\n")
    assert expand_inputs([f"@{tmp_path}/list.txt"]) == [
        one,
        two,
        f"{tmp_path}/gone*.png",
    ]  # a name in a list is no pattern


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_list_of_powershell(encoding: str, tmp_path: Path) -> None:
    one, two = draw(tmp_path / "größer.png", 0), draw(tmp_path / "two.png", 1)
    text = f"{one}\r\n{two}\r\n".encode(encoding)
    (tmp_path / "list.txt").write_bytes(text)
    assert expand_inputs([f"@{tmp_path}/list.txt"]) == [one, two]
    assert expand_inputs(["-"], io.BytesIO(text)) == [one, two]


def test_a_utf16_list_without_a_mark_names_no_folders(tmp_path: Path) -> None:
    draw(tmp_path / "one.png", 0)
    (tmp_path / "list.txt").write_bytes(f"{tmp_path}/one.png\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"list\.txt is not UTF-8 text: .*UTF-16") as caught:
        expand_inputs([f"@{tmp_path}/list.txt"])
    assert "save it as UTF-8" in caught.value.hint
    with pytest.raises(DataError, match="standard input is not UTF-8 text"):
        expand_inputs(["-"], io.BytesIO("/\n.\n".encode("utf-16-be")))


def test_a_file_that_begins_with_an_at_sign_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "@one.png", 0)
    monkeypatch.chdir(tmp_path)
    assert expand_inputs(["@one.png"]) == ["@one.png"]


def test_images_drawn_for_runs_are_skipped_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo, drawn = draw(Path("photos/cat.png"), 0), draw(Path("runs/a/figures/conv1.png"), 1)
    run_images: list[str] = []
    assert expand_inputs(["."], None, run_images) == ["./photos/cat.png", "./runs/a/figures/conv1.png"]  # not a run yet
    Path("runs/a/run.json").write_text("{}", encoding="utf-8")
    assert expand_inputs(["."], None, run_images) == ["./photos/cat.png"]
    assert run_images == ["./runs/a/figures/conv1.png"]
    assert expand_inputs([str(tmp_path), "photos"], None, []) == [f"{tmp_path}/photos/cat.png", photo]
    for asked in ("runs", "runs/a", drawn, "runs/a/figures/*.png"):
        assert expand_inputs([asked], None, run_images) == [drawn]
    assert expand_inputs(["."]) == ["./photos/cat.png", "./runs/a/figures/conv1.png"]
    assert len(run_images) == 1


def test_messages_when_there_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for typed, stdin, words in (
        (["-"], b"", "no image found: standard input is empty"),
        (["-"], b"gone.jpg\n", "gone.jpg does not exist"),
        ([f"@{tmp_path}/empty"], b"", "no image found: the list is empty"),
        (["a", "b", "c", "d"], b"", "none of these files exist: a, b, c …"),
        (["*.such"], b"", "*.such matches no file"),
        ([str(tmp_path), "b"], b"", f"no image found: {tmp_path}, b"),
    ):
        with pytest.raises(DataError) as caught:
            expand_inputs(typed, io.BytesIO(stdin))
        assert caught.value.what == words
    with pytest.raises(DataError) as caught:
        expand_inputs(["https://example.org/cat.jpg"])
    assert "curl" in caught.value.hint


@pytest.mark.parametrize("name", ["missing", "", "folder", "a\0b", "x" * 300])
def test_a_list_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot read the list"):
        expand_inputs([f"@{tmp_path / name if name else ''}"])


def test_names_that_end_with_a_zero_byte_can_hold_anything(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/a\nb \xff.png"
    draw(tmp_path / "plain.png", 0)
    os.rename(tmp_path / "plain.png", odd)
    assert expand_inputs(["-"], io.BytesIO(odd + b"\0")) == [os.fsdecode(odd)]
    assert expand_inputs([str(tmp_path)]) == [os.fsdecode(odd)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_standard_input_can_be_an_image_of_any_format(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, kind)
    assert expand_inputs(["-"], io.BytesIO(buffer.getvalue())) == [buffer.getvalue()]
    [(name, image)] = prefetch([buffer.getvalue()], 4, False)
    assert name == "-"
    np.testing.assert_array_equal(image, images.resize_and_crop(images.decode(buffer.getvalue())))


def test_paths_that_begin_like_image_files_are_paths(tmp_path: Path) -> None:
    names = [draw(tmp_path / name, 0) for name in ("BMW 12.png", "P6 1.png", "GIF8.png", "RIFF.png", "II*.png")]
    for name in names:
        relative = os.path.basename(name).encode()
        assert not images.is_image(relative + b"\n" + relative), name


def test_too_much_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        expand_inputs(["-"], io.BytesIO(b"y\n" * 600))


def test_names_of_figures_tell_inputs_apart_and_are_short() -> None:
    typed = [["owl.png"], ["owl.webp"], ["other/owl.png"], ["owl.png", "owl.webp"], ["-"]]
    typed += [["ö" * 100 + end] for end in ("1.png", "2.png")]
    names = [name_inputs(arguments) for arguments in typed]
    assert len(set(names)) == len(typed)
    assert all("/" not in name and len(name.encode()) <= 90 for name in names)


def test_a_folder_gives_no_thumbnails_of_a_nas(tmp_path: Path) -> None:
    one, thumbnail = draw(tmp_path / "one.png", 0), draw(tmp_path / "@eaDir" / "one.png" / "THUMB_M.png", 0)
    draw(tmp_path / ".trash" / "two.png", 1)
    assert expand_inputs([str(tmp_path)]) == [one]
    assert expand_inputs([f"{tmp_path}/@eaDir"]) == [thumbnail]  # when asked for


def test_a_folder_that_cannot_be_listed_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        draw(tmp_path / name, 0)
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert expand_inputs([str(tmp_path)]) == [f"{tmp_path}/a/1.png", f"{tmp_path}/c/3.png", f"{tmp_path}/b"]


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert load_image(str(tmp_path / "pipe.jpg"), False, PixelBudget()) == "it is not a regular file"
    assert load_image("/dev/zero", False, PixelBudget()) == "it is not a regular file"


def test_the_pixel_budget_is_shared_and_the_largest_image_waits_until_it_is_alone() -> None:
    budget, most, at_once, lock = PixelBudget(100), [0], [0], threading.Lock()

    def work(pixels: int) -> None:
        with budget.reserve(pixels):
            with lock:
                at_once[0] += pixels
                most[0] = max(most[0], at_once[0])
            time.sleep(0.005)
            with lock:
                at_once[0] -= pixels

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in (30, 30, 30, 30, 100, 60, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert budget.used == 0
    assert 30 < most[0] <= 100
    with budget.reserve(500):  # more than there is room for: alone, rather than never
        assert budget.used == 500
