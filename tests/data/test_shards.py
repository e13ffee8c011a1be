"""The prepared set: same bytes however it was made, readable by anything that reads a tar, every damage named."""

from __future__ import annotations

import gc
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.core.data import fast_images, images, prepare, shards, sources
from alexnet_cli.core.data.images import PixelBudget
from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.prepare import pack
from alexnet_cli.core.data.shard_writer import encode_tar_header
from alexnet_cli.core.data.statistics import PixelSums
from alexnet_cli.errors import DataError, StorageError, UsageError, VerificationError

CLASSES = ("circle", "square", "star")


def picture(seed: int, width: int = 70, height: int = 50) -> bytes:
    """A colored gradient, different for each seed."""
    random = np.random.default_rng(seed)
    corners = random.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 30 training and 4 validation pictures, two of the first being bad and one damaged."""
    root = tmp_path_factory.mktemp("source") / "shapes"
    for split, count in (("train", 30), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                path = root / split / name / f"{name} {i:02d}.jpg"
                path.write_bytes(picture(1000 * label + i + (500 if split == "val" else 0)))
    (root / "train" / "star" / "star 07.jpg").write_bytes(picture(1)[:-60])
    (root / "train" / "circle" / "circle 03.jpg").write_bytes(b"")
    (root / "train" / "circle" / "circle 04.jpg").write_bytes(picture(4)[:-60] + b"\xff\xd9")  # cut, and ended well
    return root


def plan(folder: Path, output: Path, quality: int = 95) -> Plan:
    return Plan(sources.detect_source(folder), output, quality, shard_images=20)


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "shapes"
    steps = list(pack(plan(folder, output), workers=3))
    assert sum(step.images for step in steps) == 102
    assert sum(step.rejected for step in steps) == 2
    return output


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_is_in_the_folder(prepared: Path) -> None:
    names = [f"train-{i:06d}.tar" for i in range(5)] + ["val-000000.tar", "train.index.npy", "val.index.npy"]
    lists = ["duplicates.jsonl", "rejected.jsonl", "damaged.jsonl"]
    assert set(contents(prepared)) == {*names, "mean.npy", *lists, "dataset.json"}
    rejected = [json.loads(line) for line in (prepared / "rejected.jsonl").read_text().splitlines()]
    assert {line["path"]: line["split"] for line in rejected} == {
        "train/star/star 07.jpg": "train",
        "train/circle/circle 03.jpg": "train",
    }
    assert {"truncated" in line["reason"] or "empty" in line["reason"] for line in rejected} == {True}
    dataset = shards.open_dataset(prepared)
    assert dataset.rejected() == rejected
    assert dataset.record["splits"]["train"]["images_per_class"] == {"min": 29, "median": 29.0, "max": 30}
    assert list(shards.verify_dataset(dataset)) == [
        *names[:6],
        "train.index.npy",
        "val.index.npy",
        "mean.npy",
        *lists,
    ]
    damaged = [json.loads(line) for line in (prepared / "damaged.jsonl").read_text().splitlines()]
    assert [(line["split"], line["path"]) for line in damaged] == [("train", "train/circle/circle 04.jpg")]
    assert "premature end" in damaged[0]["reason"]
    record = dataset.record
    assert (record["rejected"], record["damaged"], record["turned"]) == (2, 1, 0)
    assert record["source_sizes"] == {
        "width": {"min": 70, "median": 70.0, "max": 70},
        "height": {"min": 50, "median": 50.0, "max": 50},
    }
    assert record["duplicates"] == {"groups": 0, "pictures": 0, "across_splits": 0, "across_classes": 0}


def test_any_tar_reader_finds_the_same_pictures(folder: Path, prepared: Path) -> None:
    """tarfile is the second truth for the index; the source is the second truth for pixels and labels."""
    dataset = shards.open_dataset(prepared)
    for name in ("train", "val"):
        split = dataset.split(name)
        members: list[tuple[str, bytes, int]] = []
        for shard in dataset.record["splits"][name]["shards"]:
            with tarfile.open(prepared / shard["file"], "r:") as tar:
                files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
            keys = [file.removesuffix(".jpg") for file in files if file.endswith(".jpg")]
            members += [(key, files[f"{key}.jpg"], int(files[f"{key}.cls"])) for key in keys]
        assert len(split) == len(members) == {"train": 88, "val": 12}[name]
        assert len({key for key, _, _ in members}) == len(members)
        for row, (key, jpeg, label) in enumerate(members):
            assert (split.key(row), bytes(split.jpeg(row)), split.labels[row]) == (key, jpeg, label)
            number, stem = key.split("_", 1)
            original = folder / name / CLASSES[label] / f"{stem.replace('_', ' ')}.jpg"
            pixels = fast_images.resize_and_crop(fast_images.decode(original.read_bytes()))
            assert jpeg == fast_images.encode(pixels, 95)
            assert int(number) >= row
    first = dataset.split("train").labels[:20]
    assert len(set(first.tolist())) == 3, "classes are mixed within a shard"


@pytest.mark.parametrize(("name", "size"), [("00000001_a-b.jpg", 33_333), ("x" * 73 + ".cls", 3), ("a.jpg", 8**11 - 1)])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    expected = tarfile.TarInfo(name)
    expected.size = size
    assert encode_tar_header(name, size) == expected.tobuf(tarfile.USTAR_FORMAT)


def test_statistics_are_those_of_the_pixels(folder: Path, prepared: Path) -> None:
    files = [
        file for file in sorted((folder / "train").rglob("*.jpg")) if file.name not in ("star 07.jpg", "circle 03.jpg")
    ]
    pixels = np.stack([fast_images.resize_and_crop(fast_images.decode(file.read_bytes())) for file in files])
    dataset = shards.open_dataset(prepared)
    np.testing.assert_allclose(dataset.mean_image(), pixels.mean(0).transpose(2, 0, 1), rtol=1e-6)
    flat = pixels.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.mean_rgb, flat.mean(0), rtol=1e-6)
    covariance = np.cov(flat.T, bias=True)
    assert (np.diff(dataset.color_std) > 0).all()
    axes = dataset.color_axes.astype(np.float64)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(covariance @ axes, axes * dataset.color_std**2, rtol=1e-4, atol=1e-2)
    # The stored JPEGs are what training sees: nearly the same.
    split = dataset.split("train")
    stored = np.stack([fast_images.decode(bytes(split.jpeg(row))) for row in range(len(split))])
    assert np.abs(stored.mean((0, 1, 2)) - dataset.mean_rgb).max() < 0.5


def test_sums_are_exact_at_the_extreme() -> None:
    sums = PixelSums()
    for _ in range(2):
        sums.add([np.full((256, 256, 3), 255, np.uint8)] * 257)
    assert (sums.products == 514 * 256 * 256 * 255 * 255).all()
    assert (sums.pixels == 514 * 255).all()
    deviations, _ = sums.compute_color_axes()
    np.testing.assert_array_equal(deviations, 0)


def test_sums_are_those_of_integers() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 256, 256, 3)).astype(np.uint8)
    sums = PixelSums()
    sums.add(list(noise))
    flat = noise.reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(sums.products, flat.T @ flat)
    np.testing.assert_array_equal(sums.pixels, noise.sum(0, dtype=np.int64))


@pytest.mark.parametrize("workers", [1, 5])
def test_workers_do_not_change_the_bytes(folder: Path, prepared: Path, tmp_path: Path, workers: int) -> None:
    list(pack(plan(folder, tmp_path / "again"), workers))
    assert contents(tmp_path / "again") == contents(prepared)


def test_threads_share_the_room_for_pixels(
    folder: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one of these pictures, of 3,500 pixels: never are two decoded at once."""
    decoding, most, examined = set[int](), [0], fast_images.decode_with_damage

    def counted(data: bytes) -> tuple[images.ImageArray, str]:
        decoding.add(threading.get_ident())
        most[0] = max(most[0], len(decoding))
        time.sleep(0.001)
        try:
            return examined(data)
        finally:
            decoding.discard(threading.get_ident())

    monkeypatch.setattr(fast_images, "decode_with_damage", counted)
    monkeypatch.setattr(prepare, "PixelBudget", lambda: PixelBudget(5000))
    list(pack(plan(folder, tmp_path / "again"), 4))
    assert most == [1]
    assert contents(tmp_path / "again") == contents(prepared)


@pytest.mark.parametrize("steps", [1, 3, 7, 8])
def test_interruptions_do_not_change_the_bytes(folder: Path, prepared: Path, tmp_path: Path, steps: int) -> None:
    output = tmp_path / "again"
    running = pack(plan(folder, output), 2)
    for _ in range(steps):
        next(running)
    running.close()
    assert plan(folder, output).state() == ("unfinished" if steps > 1 else "new")
    with pytest.raises(DataError, match="not a prepared data set"):
        shards.open_dataset(output)
    rest = list(pack(plan(folder, output), 2))
    assert [step.images for step in rest if step.kept] == [20] * (steps // 2)
    assert contents(output) == contents(prepared)
    assert not list(pack(plan(folder, output), 2)), "nothing is left to do"


def _killed(folder: Path, output: Path, at: int) -> None:
    """Prepare until the `at`-th time something would be made durable, and vanish then."""
    synced, times = os.fsync, itertools.count(1)

    def sync(descriptor: int) -> None:
        if next(times) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        synced(descriptor)

    os.fsync = sync  # type: ignore[assignment]
    list(pack(plan(folder, output), 2))


def test_kill_at_any_moment_does_not_change_the_bytes(folder: Path, prepared: Path, tmp_path: Path) -> None:
    """The plan, shards and their sidecars, the last shard, the index, dataset.json itself; then at random."""
    moments = [1, 4, 8, 23, 28, 37, random.randint(2, 36)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alexnet_cli.core.data.prepare"])  # or every process would take torch's second
    started = {}
    for place, at in enumerate(moments):
        started[tmp_path / f"{place}"] = context.Process(target=_killed, args=(folder, tmp_path / f"{place}", at))
    for process in started.values():
        process.start()
    for output, process in started.items():
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"moments: {moments}"
        assert not (output / "dataset.json").exists()
        list(pack(plan(folder, output), 2))
        assert contents(output) == contents(prepared), f"moments: {moments}"


def test_a_second_command_on_the_same_output_leaves(folder: Path, tmp_path: Path) -> None:
    first = pack(plan(folder, tmp_path / "out"), 1)
    next(first)
    with pytest.raises(DataError, match="another command is preparing"):
        next(pack(plan(folder, tmp_path / "out"), 1))
    list(first)
    assert plan(folder, tmp_path / "out").state() == "finished"


def test_outputs_that_are_refused(folder: Path, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds another prepared data set") as caught:
        plan(folder, prepared, quality=80).state()
    assert "--overwrite" in caught.value.hint
    with pytest.raises(UsageError, match="inside the source"):
        next(pack(plan(folder, folder / "train" / "out"), 1))
    assert not (folder / "train" / "out").exists()
    (tmp_path / "diary.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            next(pack(plan(folder, tmp_path), 1, overwrite=overwrite))
    assert contents(tmp_path) == {"diary.txt": b"mine"}


def test_overwrite_replaces_everything_of_the_old_set(folder: Path, prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    list(pack(Plan(sources.detect_source(folder), output, 50, shard_images=5), 2))
    assert len(list(output.glob("train-*.tar"))) == 18
    list(pack(plan(folder, output), 2, overwrite=True))
    assert contents(output) == contents(prepared)


def test_fail_stops_at_the_first_bad_file_in_every_run(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"train/(star/star 07|circle/circle 03)\.jpg: ") as caught:
            list(pack(plan(folder, tmp_path / "out"), 2, on_corrupt="fail"))
        assert "--on-corrupt skip" in caught.value.hint


def test_nothing_but_bad_files(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"text")
    with pytest.raises(DataError, match="no training image"):
        list(pack(plan(tmp_path / "in", tmp_path / "out"), 2))


def test_files_of_others_are_never_taken_for_ours(folder: Path, tmp_path: Path) -> None:
    sets: list[dict[str, bytes]] = [
        {"train-000000.tar": b"mine", "train-000001.tar": b"mine"},  # any WebDataset
        {"dataset.json": b'{"mine": 1}', "mean.npy": b"mine"},
        {".partial/download.bin": b"mine"},
        {"dataset.json": b"not JSON", "val-000000.tar": b"mine"},
    ]
    for number, files in enumerate(sets):
        output = tmp_path / str(number)
        for name, data in files.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="not empty and not a prepared data set"):
                list(pack(plan(folder, output), 1, overwrite=overwrite))
        assert {str(f.relative_to(output)): f.read_bytes() for f in output.rglob("*") if f.is_file()} == files


def test_a_note_beside_a_data_set_stops_its_replacement(folder: Path, prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(prepared, output)
    (output / "notes.md").write_text("mine")
    before = contents(output)
    with pytest.raises(UsageError, match=r"holds notes\.md, which is no part"):
        list(pack(plan(folder, output, quality=80), 1, overwrite=True))
    assert contents(output) == before


@pytest.mark.parametrize("at", [1, 2, 4, 8])
def test_killed_while_clearing_for_a_replacement(
    folder: Path, prepared: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(prepared, output)
    removed = itertools.count(1)
    unlink = Path.unlink

    def vanish(path: Path, missing_ok: bool = False) -> None:
        if next(removed) == at:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", vanish)
        with pytest.raises(KeyboardInterrupt):
            list(pack(plan(folder, output), 1, overwrite=True))
    (output / ".lock").unlink(missing_ok=True)
    assert plan(folder, output).state() == "new"
    list(pack(plan(folder, output), 1))
    assert contents(output) == contents(prepared)


def test_a_picture_replaced_under_its_name_is_noticed(folder: Path, prepared: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(folder, source)
    list(pack(plan(source, output), 1))
    one, other = sorted(source.rglob("*.jpg"))[:2]
    one.write_bytes(other.read_bytes() + bytes(3))
    with pytest.raises(UsageError, match="another prepared data set: other images or classes"):
        plan(source, output).state()


def test_a_cut_sidecar_costs_its_shard_only(folder: Path, prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = pack(plan(folder, output), 2)
    for _ in range(6):
        next(running)
    running.close()
    sidecar = output / ".partial" / "train-000001.npz"
    sidecar.write_bytes(sidecar.read_bytes()[:1000])
    rest = list(pack(plan(folder, output), 2))
    assert [step.images for step in rest if step.kept] == [20]
    assert contents(output) == contents(prepared)


def test_full_disk(folder: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    synced = os.fsync

    def full(descriptor: int) -> None:
        if (output / "train-000001.tar").exists():
            raise OSError(28, "No space left on device")
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            list(pack(plan(folder, output), 2))
    assert re.match(r"free about [\d.]+ MB; the same command", caught.value.hint)
    assert not list((output / ".partial").glob("*.tar.tmp"))
    list(pack(plan(folder, output), 2))
    assert contents(output) == contents(prepared)
    with pytest.raises(StorageError, match="needs about"):
        plan(folder, output).check_space(10**18)


def test_the_estimate_is_about_right(folder: Path, prepared: Path, tmp_path: Path) -> None:
    actual = sum(len(data) for name, data in contents(prepared).items() if name.endswith(".tar"))
    beside = sum(name.endswith(".tar") for name in contents(prepared)) + 1  # sidecars, and the mean picture
    assert plan(folder, tmp_path / "out").estimate_bytes() - beside * 1_000_000 == pytest.approx(actual, rel=0.25)


def read_all(path: Path) -> None:
    dataset = shards.open_dataset(path)
    dataset.mean_image()
    for name in shards.SPLITS:
        dataset.split(name)


@pytest.mark.parametrize("file", ["train-000002.tar", "val.index.npy", "mean.npy", "dataset.json"])
def test_damage_is_named(prepared: Path, tmp_path: Path, file: str) -> None:
    for name, data in contents(prepared).items():
        (tmp_path / name).write_bytes(data[:-100] if name == file else data)
    with pytest.raises(DataError, match=f"{re.escape(file)} is damaged"):
        read_all(tmp_path)


def test_verify_sees_one_changed_bit(prepared: Path, tmp_path: Path) -> None:
    for name, data in contents(prepared).items():
        changed = bytes([data[2000] ^ 1]) if name == "train-000001.tar" else data[2000:2001]
        (tmp_path / name).write_bytes(data[:2000] + changed + data[2001:])
    with pytest.raises(VerificationError, match=r"1 of 12 files .* is damaged: train-000001\.tar \(sha256 ") as error:
        list(shards.verify_dataset(shards.open_dataset(tmp_path)))
    assert error.value.exit_code == 6


def test_verify_names_all_that_is_damaged_up_to_ten(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(prepared, tmp_path / "out")
    (output / "train-000003.tar").unlink()
    for name in ("train-000000.tar", "mean.npy"):
        with (output / name).open("r+b") as file:
            file.write(b"x")
    right: list[str] = []

    def said() -> str:
        right.clear()
        with pytest.raises(VerificationError) as error:
            right.extend(shards.verify_dataset(shards.open_dataset(output)))
        return error.value.what

    what, first = f"3 of 12 files in {output} are damaged: ", r"train-000000\.tar \(sha256 \w{12}, recorded \w{12}\), "
    second, third = r"train-000003\.tar \(No such file or directory\)", r"mean\.npy \(sha256 \w{12}, recorded \w{12}\)"
    assert re.fullmatch(f"{re.escape(what)}{first}{second}, {third}", said())
    assert set(contents(output)) - set(right) == {"dataset.json", "train-000000.tar", "mean.npy"}
    monkeypatch.setattr(shards, "MAX_NAMED", 2)
    assert re.fullmatch(f"{re.escape(what)}{first}{second} and 1 more", said())


def test_foreign_schema(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"schema": "alexnet.dataset/9"}')
    with pytest.raises(DataError, match="has schema alexnet"):
        shards.open_dataset(tmp_path)


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prepared/one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared" / "one").mkdir(parents=True)
    (tmp_path / "prepared" / "one" / "dataset.json").write_bytes((prepared / "dataset.json").read_bytes())
    return tmp_path


def test_finding_a_data_set(here: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Path("prepared/one"), Path("prepared/two")
    assert shards.find_dataset(None) == one
    assert shards.find_dataset("one") == one
    assert shards.find_dataset("prepared/one") == one
    assert shards.find_dataset(str(prepared)) == prepared
    two.mkdir()
    (two / "dataset.json").write_bytes((one / "dataset.json").read_bytes())
    with pytest.raises(DataError, match="several data sets under prepared: one, two"):
        shards.find_dataset(None)
    Path("prepared/latest").symlink_to("two")
    assert shards.find_dataset(None) == two
    monkeypatch.setenv("ALEXNET_DATA", "one")
    assert shards.find_dataset(None) == one
    assert shards.find_dataset("two") == two
    with pytest.raises(DataError, match="no prepared data set three") as caught:
        shards.find_dataset("three")
    assert "one, two" in caught.value.hint


def test_finding_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no prepared data set under") as caught:
        shards.find_dataset(None)
    assert "alexnet prepare SOURCE" in caught.value.hint


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(prepared: Path) -> None:
    """The package of that name finds the same pictures and labels, in the same order."""
    webdataset = pytest.importorskip("webdataset")
    dataset = shards.open_dataset(prepared)
    for name in ("train", "val"):
        split = dataset.split(name)
        files = [str(prepared / shard["file"]) for shard in dataset.record["splits"][name]["shards"]]
        read = list(webdataset.WebDataset(files, shardshuffle=False))
        assert len(read) == len(split)
        for row, sample in enumerate(read):
            assert sample["__key__"] == split.key(row)
            assert sample["jpg"] == bytes(split.jpeg(row))
            assert int(sample["cls"]) == split.labels[row]
    gc.collect()  # the package leaves files open: have that said here, where it is expected
