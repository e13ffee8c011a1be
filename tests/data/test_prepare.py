"""Preparing a data set: the bytes are the same for any number of workers, interruptions and kills."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from alexnet_cli.core.data import fast_images, images, prepare, shards, sources
from alexnet_cli.core.data.images import PixelBudget
from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.prepare import pack
from alexnet_cli.errors import DataError, PartialError, StorageError
from shapes import make_plan, read_tree


@pytest.mark.parametrize("workers", [1, 5])
def test_workers_do_not_change_the_bytes(shapes: Path, packed_shapes: Path, tmp_path: Path, workers: int) -> None:
    list(pack(make_plan(shapes, tmp_path / "again"), workers))
    assert read_tree(tmp_path / "again") == read_tree(packed_shapes)


def test_threads_share_the_pixel_budget(
    shapes: Path, packed_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    list(pack(make_plan(shapes, tmp_path / "again"), 4))
    assert most == [1]
    assert read_tree(tmp_path / "again") == read_tree(packed_shapes)


@pytest.mark.parametrize("steps", [1, 3, 7, 8])
def test_interruptions_do_not_change_the_bytes(shapes: Path, packed_shapes: Path, tmp_path: Path, steps: int) -> None:
    output = tmp_path / "again"
    running = pack(make_plan(shapes, output), 2)
    for _ in range(steps):
        next(running)
    running.close()
    assert make_plan(shapes, output).state() == ("unfinished" if steps > 1 else "new")
    with pytest.raises(DataError, match="not a prepared data set"):
        shards.open_dataset(output)
    rest = list(pack(make_plan(shapes, output), 2))
    assert [step.images for step in rest if step.kept] == [20] * (steps // 2)
    assert read_tree(output) == read_tree(packed_shapes)
    assert not list(pack(make_plan(shapes, output), 2)), "nothing is left to do"


def _killed(shapes: Path, output: Path, at: int) -> None:
    """Prepare until the `at`-th time something would be made durable, and vanish then."""
    synced, times = os.fsync, itertools.count(1)

    def sync(descriptor: int) -> None:
        if next(times) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        synced(descriptor)

    os.fsync = sync  # type: ignore[assignment]
    list(pack(make_plan(shapes, output), 2))


@pytest.mark.slow
def test_kill_9_at_any_moment_does_not_change_the_bytes(shapes: Path, packed_shapes: Path, tmp_path: Path) -> None:
    """The plan, shards and their sidecars, the last shard, the index, dataset.json itself; then at random."""
    moments = [1, 4, 8, 23, 28, 37, random.randint(2, 36)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alexnet_cli.core.data.prepare"])  # or every process would take torch's second
    started = {}
    for place, at in enumerate(moments):
        started[tmp_path / f"{place}"] = context.Process(target=_killed, args=(shapes, tmp_path / f"{place}", at))
    for process in started.values():
        process.start()
    for output, process in started.items():
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"moments: {moments}"
        assert not (output / "dataset.json").exists()
        list(pack(make_plan(shapes, output), 2))
        assert read_tree(output) == read_tree(packed_shapes), f"moments: {moments}"


def test_a_second_command_on_the_same_output_is_refused(shapes: Path, tmp_path: Path) -> None:
    first = pack(make_plan(shapes, tmp_path / "out"), 1)
    next(first)
    with pytest.raises(DataError, match="another command is preparing"):
        next(pack(make_plan(shapes, tmp_path / "out"), 1))
    list(first)
    assert make_plan(shapes, tmp_path / "out").state() == "finished"


def test_overwrite_replaces_every_file(shapes: Path, packed_shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    list(pack(Plan(sources.detect_source(shapes), output, 50, shard_images=5), 2))
    assert len(list(output.glob("train-*.tar"))) == 18
    list(pack(make_plan(shapes, output), 2, overwrite=True))
    assert read_tree(output) == read_tree(packed_shapes)


@pytest.mark.parametrize("at", [1, 2, 4, 8])
def test_interrupted_overwrite_continues(
    shapes: Path, packed_shapes: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(packed_shapes, output)
    removed = itertools.count(1)
    unlink = Path.unlink

    def vanish(path: Path, missing_ok: bool = False) -> None:
        if next(removed) == at:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", vanish)
        with pytest.raises(KeyboardInterrupt):
            list(pack(make_plan(shapes, output), 1, overwrite=True))
    (output / ".lock").unlink(missing_ok=True)
    assert make_plan(shapes, output).state() == "new"
    list(pack(make_plan(shapes, output), 1))
    assert read_tree(output) == read_tree(packed_shapes)


def test_on_corrupt_fail_stops_at_the_first_bad_file(shapes: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(PartialError, match=r"train/(star/star 07|circle/circle 03)\.jpg: ") as caught:
            list(pack(make_plan(shapes, tmp_path / "out"), 2, on_corrupt="fail"))
        assert "--on-corrupt skip" in caught.value.hint


def test_a_source_of_bad_files_only_is_refused(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"text")
    with pytest.raises(DataError, match="none of the 2 training images"):
        list(pack(make_plan(tmp_path / "in", tmp_path / "out"), 2))


def test_full_disk(shapes: Path, packed_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    synced = os.fsync

    def full(descriptor: int) -> None:
        if (output / "train-000001.tar").exists():
            raise OSError(28, "No space left on device")
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            list(pack(make_plan(shapes, output), 2))
    assert re.match(r"free about [\d.]+ MB; the same command", caught.value.hint)
    assert not list((output / ".partial").glob("*.tar.tmp"))
    list(pack(make_plan(shapes, output), 2))
    assert read_tree(output) == read_tree(packed_shapes)
    with pytest.raises(StorageError, match="needs about"):
        make_plan(shapes, output).check_space(10**18)
