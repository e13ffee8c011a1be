"""`alexnet prepare` as it is typed: what it prints, leaves behind and exits with."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.cli import main
from alexnet_cli.core.data import shards
from alexnet_cli.core.data.plan import Plan


def jpeg(color: tuple[int, int, int], size: tuple[int, int] = (40, 30), comment: str = "") -> bytes:
    """One color and a black dot."""
    buffer = io.BytesIO()
    picture = Image.new("RGB", size, color)
    picture.paste((0, 0, 0), (size[0] // 2, size[1] // 2, size[0] // 2 + 2, size[1] // 2 + 2))
    picture.save(buffer, "JPEG", quality=95, comment=comment)
    return buffer.getvalue()


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One folder per class, ten red cats and ten blue dogs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, color in (("cats", (200, 0, 0)), ("dogs", (0, 0, 200))):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "pets" / name / f"{i}.jpg").write_bytes(jpeg(color, comment=str(i)))
    return Path("pets")


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["prepare", *map(str, arguments)])
    assert isinstance(exit.value.code, int)
    return exit.value.code


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record = json.loads(capsys.readouterr().out)
    assert record.pop("schema") == "alexnet.prepare/1"
    return dict(record)


def test_class_names_are_printed_and_doubtful_ones_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("ensemble1", "ensemble2"):
        for number in range(12):
            (tmp_path / "digits" / split / f"c{number:02}").mkdir(parents=True)
            (tmp_path / "digits" / split / f"c{number:02}" / "1.jpg").write_bytes(jpeg((200, 0, 0), comment=split))
    assert run("digits", "--dry-run") == 0
    said = capsys.readouterr().err.splitlines()
    assert "classes ensemble1, ensemble2" in said
    warning = said.index("warn    ensemble1/, ensemble2/ hold the same folders: c00/, c01/, c02/, c03/, c04/, ...")
    assert said[warning + 1].endswith("rename them to train/ and val/")
    assert run("digits/ensemble1", "--dry-run") == 0
    names = ", ".join(f"c{number:02}" for number in range(10))
    assert f"classes {names}, …" in capsys.readouterr().err.splitlines()


def test_prepare_a_folder(pets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the next step depends on the machine
    before = {path: path.stat().st_mtime_ns for path in pets.rglob("*")}
    assert run(pets) == 0
    said = capsys.readouterr()
    assert not said.out
    assert [line.split()[0] for line in said.err.splitlines()] == [
        "found",
        "classes",
        "note",
        "plan",
        "train",
        "val",
        "stats",
        "stats",
        "done",
        "next",
    ]
    assert "next    alexnet train --recipe tiny --data prepared/pets" in said.err
    dataset = shards.open_dataset(shards.find_dataset(None))
    assert dataset.path == Path("prepared/pets")
    assert os.readlink("prepared/latest") == "pets"
    assert [c.name for c in dataset.classes] == ["cats", "dogs"]
    assert len(dataset.split("train")) == 18
    assert len(dataset.split("val")) == 2
    np.testing.assert_allclose(dataset.mean_rgb, (100, 0, 100), atol=2)
    # Red against blue is the only direction in which these pictures differ.
    np.testing.assert_allclose(np.abs(dataset.color_axes[:, 2]), (0.7071, 0, 0.7071), atol=0.02)
    assert dataset.color_std[2] == pytest.approx(100 * 2**0.5, abs=2)
    assert {path: path.stat().st_mtime_ns for path in pets.rglob("*")} == before


def test_json(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pets, "-o", "out", "--json", "-q", "--val-fraction", "0.3") == 0
    said = capsys.readouterr()
    assert not said.err
    record = json.loads(said.out)
    assert record["images_per_second"] == pytest.approx(20 / record["seconds"])
    assert {key: record[key] for key in ("schema", "output", "images", "classes", "rejected", "damaged", "turned")} == {
        "schema": "alexnet.prepare/1", "output": "out", "images": {"train": 14, "val": 6}, "classes": 2, "rejected": 0,
        "damaged": 0, "turned": 0,
    }  # fmt: skip
    assert not Path("prepared").exists(), "latest is for what lies under prepared/"


def test_a_second_run_does_nothing(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pets) == 0
    first = Path("prepared/pets/dataset.json").stat().st_mtime_ns
    assert run(pets) == 0
    assert "prepared/pets is already prepared" in capsys.readouterr().err
    assert run(pets, "--json") == 0
    assert result(capsys)["images"] == {"train": 18, "val": 2}
    assert run(pets, "--quality", "50") == 2
    said = capsys.readouterr().err
    assert "holds another prepared data set: quality 95, not 50" in said
    assert "hint: use --overwrite to replace it" in said
    assert Path("prepared/pets/dataset.json").stat().st_mtime_ns == first
    assert run(pets, "--quality", "50", "--overwrite") == 0
    assert shards.open_dataset(Path("prepared/pets")).record["image"] == {
        "size": 256,
        "jpeg_quality": 50,
        "exif_rotate": False,
    }


def test_a_dry_run_leaves_nothing(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pets, "--dry-run", "--json") == 0
    record = result(capsys)
    assert record["images"] == {"train": 18, "val": 2}
    assert 20 * 2000 < record["bytes_needed"] - 3_000_000 < 20 * 20_000
    assert os.listdir() == ["pets"]


def test_warnings_of_pillow_do_not_come_through(pets: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The EXIF of this image says that it has five entries, and ends after the first."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\0\x01\0\x01\0\0"
    good = (pets / "cats" / "3.jpg").read_bytes()
    odd = good[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + good[2:]
    (pets / "cats" / "3.jpg").write_bytes(odd)
    warnings.simplefilter("always")  # until the end of recwarn
    with Image.open(pets / "cats" / "3.jpg") as picture:
        picture.getexif()
    assert [str(warning.message)[:12] for warning in recwarn] == ["Corrupt EXIF"]
    recwarn.clear()
    assert run(pets, "-q") == 0
    assert not recwarn.list


def test_images_of_a_single_color_are_listed(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dark = np.random.default_rng(0).integers(0, 4096, (30, 40)).astype(np.uint16)  # 12 bits as 16: 0 to 16 of 255
    Image.fromarray(dark).save(pets / "cats" / "3.png")
    assert run(pets, "-o", "one", "--json", "-q") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["single_color"] == 1
    warning = "warn    1 of 21 images is a single color or nearly so, such as cats/3.png"
    assert said.err.splitlines() == [warning, "hint    look at it; one/single_color.jsonl lists them all"]
    Image.new("L", (5, 5), 255).save(pets / "dogs" / "1.png")
    assert run(pets, "-o", "two", "-q") == 0
    assert "warn    2 of 22 images are a single color or nearly so, such as " in capsys.readouterr().err
    listed = shards.open_dataset(Path("two")).single_color()
    assert sorted(entry["path"] for entry in listed) == ["cats/3.png", "dogs/1.png"]


def test_bad_images_are_named(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (pets / "cats" / "3.jpg").read_bytes()
    (pets / "cats" / "3.jpg").write_bytes(good[:-20])
    assert run(pets, "--on-corrupt", "fail", "-o", "strict") == 5
    strict = capsys.readouterr().err
    assert "error: cats/3.jpg: it is damaged (image file is truncated" in strict
    assert "--on-corrupt skip" in strict
    assert run(pets, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rejected"] == 1
    assert "warn    left out cats/3.jpg: it is damaged (image file is truncated" in said.err
    assert "warn    1 of 20 images" in said.err
    assert len(shards.open_dataset(Path("prepared/pets")).split("train")) in (17, 18)  # 18 if it was for validation
    (pets / "cats" / "3.jpg").write_bytes(good)
    assert run(pets, "--on-corrupt", "fail", "-o", "strict") == 0


def test_a_jpeg_decoded_in_part_is_packed_and_reported(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut, and ended as a JPEG is: Pillow says nothing of it."""
    good = jpeg((7, 8, 9), (400, 300))
    (pets / "cats" / "3.jpg").write_bytes(good[: len(good) - 300] + b"\xff\xd9")
    assert run(pets) == 0
    said = capsys.readouterr().err
    assert "note    1 image is damaged and was decoded in part: damaged.jsonl" in said
    [line] = (Path("prepared/pets") / "damaged.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "cats/3.jpg"
    assert run(pets, "--json") == 0
    assert result(capsys)["damaged"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 3, "nowhere does not exist"),
        (["pets/cats"], 3, "pets/cats has 10 images, but no class folders"),
        (["pets", "-o", "pets/out"], 2, "is inside the source"),
        (["pets", "-o", "pets/cats/1.jpg"], 2, "is inside the source"),
        (["pets", "-o", "."], 2, "not empty and not a prepared data set"),
        (["pets", "--quality", "101"], 2, "quality"),
        (["pets", "--val-fraction", "1"], 2, "val-fraction"),
    ],
)
def test_refused_arguments(
    pets: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run(*arguments) == code
    said = capsys.readouterr().err
    assert "error: " in said
    assert message in said
    assert "hint: " in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_ctrl_c(pets: Path, number: int, code: int) -> None:
    """The signal comes while the third image is written."""
    code_to_run = f"""
        import itertools, os
        from alexnet_cli.cli import main
        from alexnet_cli.core.data.shard_writer import ShardWriter
        add, calls = ShardWriter.add, itertools.count(1)
        def add_and_signal(*arguments):
            if next(calls) == 3:
                os.kill(os.getpid(), {number:d})
            add(*arguments)
        ShardWriter.add = add_and_signal
        main(["prepare", "pets", "--workers", "1"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code_to_run)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    said = process.stderr
    assert process.returncode == code, said
    assert not list(Path("prepared").glob("pets/.partial/*.tar.tmp"))
    assert "error: interrupted: no shard was finished yet" in said
    assert "hint: run the same command again to start over" in said
    assert not Path("prepared/pets/dataset.json").exists()


def test_a_real_data_set(tiny10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny10, "-o", tmp_path / "tiny", "--dry-run") == 0
    assert "train 5,000 · val 500 images of 10 classes" in capsys.readouterr().err


def test_rejected_images_are_a_warning_in_every_run(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`prepare && train` goes on; who wants to stop says --on-corrupt fail, the first time and later."""
    (pets / "cats" / "bad.jpg").write_bytes(b"")
    for _ in range(2):
        assert run(pets, "--json") == 0
        said = capsys.readouterr()
        assert "warn    left out cats/bad.jpg: the file is empty" in said.err
        assert "warn    1 of 21 images was left out: prepared/pets/rejected.jsonl" in said.err
        assert "error" not in said.err
        assert json.loads(said.out)["rejected"] == 1
    assert run(pets, "--on-corrupt", "fail") == 5
    assert "error: cats/bad.jpg: the file is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("split", "kind"), [("train", "2 training"), ("val", "2 validation")])
def test_a_split_without_any_image_left_is_an_error(
    pets: Path, capsys: pytest.CaptureFixture[str], split: str, kind: str
) -> None:
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            target = Path("two") / part / name / "0.jpg"
            target.parent.mkdir(parents=True)
            target.write_bytes(b"" if part == split else (pets / name / "0.jpg").read_bytes())
    assert run("two") == 3
    assert f"error: none of the {kind} images of two can be decoded: the file is empty" in capsys.readouterr().err


def test_duplicates_and_leaks_are_reported(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pets) == 0
    capsys.readouterr()
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (pets / split / name).mkdir(parents=True)
            for i in range(4):
                (pets / split / name / f"{i}.jpg").write_bytes(jpeg((i, 50, 80), comment=f"{split}{name}{i}"))
    (pets / "val" / "cats" / "leak.jpg").write_bytes((pets / "train" / "cats" / "2.jpg").read_bytes())
    (pets / "train" / "dogs" / "copy.jpg").write_bytes((pets / "train" / "dogs" / "0.jpg").read_bytes())
    for twin in ("train/cats/twin.jpg", "train/dogs/other.jpg"):
        (pets / twin).write_bytes((pets / "train" / "cats" / "1.jpg").read_bytes())
    assert run(pets, "-o", "leaky") == 0
    told = capsys.readouterr().err
    assert "note    7 images have identical copies: duplicates.jsonl" in told
    assert "warn    1 image is in train and in val: train/cats/2.jpg = val/cats/leak.jpg" in told
    assert "warn    1 image is in two classes: train/cats/1.jpg = train/dogs/other.jpg" in told
    dataset = shards.open_dataset(Path("leaky"))
    assert dataset.record["duplicates"] == {"groups": 3, "pictures": 7, "across_splits": 1, "across_classes": 1}
    assert [entry["class"] for entry in dataset.duplicates()[0]] == ["cats", "cats", "dogs"]
    assert [[entry["path"] for entry in group] for group in dataset.duplicates()] == [
        ["train/cats/1.jpg", "train/cats/twin.jpg", "train/dogs/other.jpg"],
        ["train/cats/2.jpg", "val/cats/leak.jpg"],
        ["train/dogs/0.jpg", "train/dogs/copy.jpg"],
    ]


@pytest.mark.parametrize(
    ("images", "arguments", "hint", "hint_of_train"),
    [
        (2, ["--val-fraction", "0"], "--val-fraction 0.1 takes one", "--overwrite --val-fraction 0.1"),
        (1, [], "each class needs at least two images", "at least two images per class"),
    ],
)
def test_hints_without_validation_images(
    pets: Path, capsys: pytest.CaptureFixture[str], images: int, arguments: list[str], hint: str, hint_of_train: str
) -> None:
    for file in pets.glob("*/*.jpg"):
        if int(file.stem) >= images:
            file.unlink()
    assert run(pets, *arguments) == 0
    message = capsys.readouterr().err
    assert "warn    no validation images, which training needs" in message
    assert f"hint    {hint}" in message
    with pytest.raises(SystemExit) as exit:
        main(["train", "--data", "pets", "--gpus", "none"])
    assert exit.value.code == 3
    message = capsys.readouterr().err
    assert "prepared/pets: split val has no images" in message
    assert hint_of_train in message


def test_verify(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pets) == 0
    capsys.readouterr()
    assert run("--verify", "prepared/pets", "--json") == 0
    assert result(capsys) == {"output": "prepared/pets", "files": 9, "verified": True}
    shard = Path("prepared/pets/train-000000.tar")
    content = bytearray(shard.read_bytes())
    content[1500] ^= 1
    shard.write_bytes(content)
    assert run("--verify", "prepared/pets") == 6
    assert "error: 1 of 9 files in prepared/pets is damaged: train-000000.tar (sha256 " in capsys.readouterr().err
    assert run("--verify", "nowhere") == 3
    assert run() == 2


def test_exif_rotate(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lying on its side in the file, red above blue once it is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32, 0], picture[:, 32:, 2] = 255, 255  # red left, blue right
    for name in ("cats", "dogs"):
        for i in range(10):
            Image.fromarray(picture).save(pets / name / f"{i}.jpg", exif=exif, comment=f"{name}{i}")
    (pets / "dogs" / "0.jpg").write_bytes(jpeg((5, 6, 7)))
    assert run(pets) == 0
    said = capsys.readouterr().err
    assert "warn    the EXIF orientation of 19 of 20 images is ignored" in said
    assert "hint    use --exif-rotate --overwrite to rotate them" in said
    assert run(pets, "--exif-rotate", "-o", "turned") == 0
    assert "note    rotated 19 of 20 images by their EXIF orientation" in capsys.readouterr().err
    plain, turned = (np.load(f"{folder}/mean.npy") for folder in ("prepared/pets", "turned"))
    assert plain[0, 200, 50] > 200  # below, left: red
    assert plain[0, 50, 200] < 50
    assert turned[0, 50, 50] > 200  # orientation 6: turn clockwise, left comes to the top
    assert turned[0, 50, 200] > 200
    assert turned[0, 200, 50] < 50
    assert shards.open_dataset(Path("turned")).record["image"]["exif_rotate"] is True
    assert run(pets, "--exif-rotate") == 2, "another set of settings"


def test_a_disk_that_is_too_small(
    pets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "free_bytes", lambda self: 1000)
    assert run(pets) == 7
    assert "prepared/pets needs about " in capsys.readouterr().err
    assert os.listdir() == ["pets"]


def test_full_disk(pets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    synced = os.fsync

    def full(descriptor: int) -> None:
        if Path("prepared/pets/train-000000.tar").exists():
            raise OSError(28, "No space left on device")
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(pets) == 7
    said = capsys.readouterr().err
    assert "error: prepared/pets cannot be written: No space left on device" in said
    assert "MB; the same command then continues where it stopped" in said
    assert run(pets) == 0
    assert len(shards.open_dataset(Path("prepared/pets")).split("train")) == 18
