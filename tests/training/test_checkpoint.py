"""Nothing that happens to the process or the disk while a checkpoint is written costs the one before."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.files import read_link
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import checkpoint
from alexnet_cli.core.training.loop import TrainingLoop
from alexnet_cli.errors import StorageError, UsageError, WeightsError
from alexnet_cli.recipe import TINY
from alexnet_plugins.train.command import train
from alexnet_plugins.train.setup import check_max_steps
from trainings import new_loop

CPU = Placement(torch.device("cpu"), "CPU", "fp32")
SMALL = replace(TINY, width=1 / 64, batch_size=8, epochs=2, precision="fp32", dropout=0.5)  # six steps an epoch
Start = Callable[..., TrainingLoop]
NAMES = iter(f"run{i}" for i in range(1000))


@pytest.fixture
def start(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))

    def start(run: Run | None = None, keep: int = 1) -> TrainingLoop:
        return new_loop(SMALL, open_dataset(prepared), run or Run.create(next(NAMES), SMALL, {}), CPU, 1, keep=keep)

    return start


def values(training: TrainingLoop) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.trainer.network.parameters()])


def steps(run: Run) -> list[int]:
    return sorted(int(path.name) for path in run.checkpoints.iterdir() if read_link(path) is None)


class Killed(BaseException):
    """As by kill -9: nothing is cleaned up by what catches exceptions."""


@contextmanager
def killed_at(count: int) -> Iterator[list[str]]:
    """Die instead of the `count`th operation on the disk; afterwards the operations that were asked for."""
    told: list[str] = []
    places = [
        (os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (os, "symlink"), (Path, "unlink"),
        (shutil, "rmtree"),
    ]  # fmt: skip

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if len(told) != count or not count:  # the dead do nothing more
                told.append(name)
            if len(told) == count:
                raise Killed
            return original(*arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, counting(name, getattr(owner, name)))
        yield told


@pytest.mark.usefixtures("_any_disk")
@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_operation_the_newest_whole_checkpoint_leads_to_the_same_weights(
    start: Start, every: int
) -> None:
    """Saving every second step: checkpoints within an epoch, at its end, over an older one, the best and another."""
    whole = start()
    with killed_at(0) as operations:
        list(whole.fit(save_every=2))
    assert len(operations) > 80
    lost = []
    for count in range(1, len(operations) + 1, every):
        first = start()
        with killed_at(count) as told, pytest.raises(Killed):
            list(first.fit(save_every=2))
        assert len(told) == count
        second = start(Run(first.run.path))
        found, damaged = checkpoint.find_newest(second.run)
        lost.append(first.trainer.steps_done - int(found.name if found else 0))
        list(second.fit(found, save_every=2))
        assert torch.equal(values(second), values(whole)), f"killed instead of {told[-1]}, number {count}"
        assert damaged == []
        assert set(steps(whole.run)) <= set(steps(second.run))  # killed at the very end, an older one may be left
        for name in ("last", "best"):
            kept, expected = (read_link(run.checkpoints / name) for run in (second.run, whole.run))
            assert kept is not None
            assert expected is not None
            assert kept.name == expected.name
        told_of = [[r["step"] for r in t.run.records() if r["event"] == "validation"] for t in (second, whole)]
        assert told_of[0] == told_of[1]
    assert max(lost) <= 3  # a checkpoint that was being written, and the two steps before it


@pytest.mark.usefixtures("_any_disk")
def test_every_so_many_steps_and_so_many_are_kept(start: Start) -> None:
    training = start(keep=3)
    records = list(training.fit(save_every=2))
    saved = [(r.step, r.epoch) for r in records if r.event == "checkpoint"]
    assert saved == [(2, 1), (4, 1), (6, 1), (8, 2), (10, 2), (12, 2)]
    best_folder = read_link(training.run.checkpoints / "best")
    assert best_folder is not None
    best = int(best_folder.name)
    assert steps(training.run) == sorted({best, 8, 10, 12})
    for step in (8, 10, 12):
        assert checkpoint.load(training.run.checkpoints / f"{step:08}").position["step"] == step
    assert [r.step for r in records if r.event == "step"] == [2, 4, 6, 8, 10, 12]


def test_a_run_keeps_to_what_it_was_told_until_it_is_told_otherwise(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    settings, run = ["width=0.0625"], Run(tmp_path / "r")
    options = {"save_every": 2, "keep": 3, "micro_batch": 5}
    train(str(prepared), "tiny", settings, batch_size=8, max_steps=3, name="r", jobs=1, quiet=True, **options)  # type: ignore[arg-type]
    train(resume="r", max_steps=5, jobs=1, quiet=True)
    assert steps(run) == [3, 4, 5]
    train(resume="r", max_steps=9, keep=1, jobs=1, quiet=True)
    assert steps(run) == [6, 9]  # the best of the first epoch, and the last
    assert {key: run.about[key] for key in options} == options | {"keep": 1}


def test_any_kept_checkpoint_leads_to_the_same_weights(start: Start) -> None:
    whole = start(keep=9)
    list(whole.fit(save_every=1))
    assert steps(whole.run) == list(range(4, 13))
    for step in (5, 6, 11):
        run = Run.create(next(NAMES), SMALL, {})
        shutil.copytree(whole.run.checkpoints / f"{step:08}", run.checkpoints / f"{step:08}")
        other = start(run)
        list(other.fit(run.checkpoints / f"{step:08}"))
        assert torch.equal(values(other), values(whole))


def test_what_is_damaged_and_newer_is_not_kept(start: Start) -> None:
    training = start(keep=2)
    list(training.fit(save_every=2, max_steps=10))
    assert steps(training.run) == [6, 8, 10]
    (training.run.checkpoints / "00000010" / "optimizer.safetensors").write_bytes(b"")
    again = start(Run(training.run.path), keep=2)
    found, damaged = checkpoint.find_newest(again.run)
    assert [path.name for path in (found, *damaged) if path] == ["00000008", "00000010"]
    check_max_steps(again.run, 8)  # --max-steps goes by what the run goes on from
    with pytest.raises(UsageError, match=r"--max-steps 7 counts from the start of the run, and .* has done 8 steps"):
        check_max_steps(again.run, 7)
    list(again.fit(found, max_steps=9))
    assert steps(again.run) == [6, 8, 9]


@pytest.mark.usefixtures("_any_disk")
def test_a_run_that_was_copied_without_its_links_keeps_its_best(start: Start) -> None:
    training = start(keep=1)
    for record in training.fit():
        if record.event == "checkpoint" and record.best:
            training.best = (0.0, 0.0)  # no later epoch is better
    assert steps(training.run) == [6, 12]
    for name in ("last", "best"):
        (training.run.checkpoints / name).unlink()
    again = start(Run(training.run.path))
    assert checkpoint.find_newest(again.run) == (training.run.checkpoints / "00000012", [])
    links = [read_link(training.run.checkpoints / name) for name in ("last", "best")]
    assert links == [training.run.checkpoints / "00000012", training.run.checkpoints / "00000006"]


@pytest.mark.parametrize(("damaged", "best"), [([12], 6), ([12, 6], None)])
def test_a_damaged_checkpoint_is_no_longer_the_best(start: Start, damaged: list[int], best: int | None) -> None:
    training = start(keep=9)
    for record in training.fit(save_every=4):
        if record.event == "checkpoint":
            training.best = None  # each epoch is better than those before
    for step in damaged:
        (training.run.checkpoints / f"{step:08}" / "model.safetensors").write_bytes(b"")
    checkpoint.find_newest(training.run)
    link = read_link(training.run.checkpoints / "best")
    assert link == (best and training.run.checkpoints / f"{best:08}")


def test_stopped_while_validating_it_goes_on_to_the_same_weights(start: Start) -> None:
    whole, training = start(), start()
    told = [r.as_dict() for r in whole.fit() if r.event == "validation"]
    calls = 0

    def stop() -> str | None:
        nonlocal calls
        calls += training.trainer.steps_done == 6
        return "SIGTERM" if calls >= 2 else None  # the first is that of the loop, before it takes a batch

    records = list(training.fit(stop=stop))
    assert [(r.event, r.step, r.epoch) for r in records[-2:]] == [("checkpoint", 6, 1), ("end", 6, 1)]
    assert records[-1].reason == "SIGTERM"
    assert "validation" not in {r.event for r in records}
    once_more = start(Run(training.run.path))
    killed = once_more.fit(checkpoint.find_newest(once_more.run)[0])
    assert [next(killed).event for _ in range(2)] == ["start", "validation"]
    again = start(Run(training.run.path))
    rest = list(again.fit(checkpoint.find_newest(again.run)[0]))
    assert [r.event for r in rest[:3]] == ["start", "validation", "checkpoint"]
    assert len((again.run.path / "metrics.csv").read_text().splitlines()) == 3  # the epoch is told once
    assert torch.equal(values(again), values(whole))
    for record, other in zip(told, [r.as_dict() for r in rest if r.event == "validation"], strict=True):
        assert {**record, "images_per_second": 0} == {**other, "images_per_second": 0}


def test_a_file_that_reads_back_otherwise_is_no_checkpoint(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start()
    list(training.fit(max_steps=2))
    before = (training.run.checkpoints / "last").resolve()

    def bad_disk(descriptor: int, _offset: int, length: int, _advice: int) -> None:
        os.pwrite(descriptor, b"\xff", 1000)

    monkeypatch.setattr(os, "posix_fadvise", bad_disk)
    again = start(Run(training.run.path))
    with pytest.raises(StorageError, match="does not read back as written"):
        list(again.fit(before, max_steps=3))
    assert (training.run.checkpoints / "last").resolve() == before
    checkpoint.load(before)
    assert steps(training.run) == [2]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_within_a_checkpoint_keeps_the_last(
    start: Start, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    training = start()
    list(training.fit(max_steps=2))
    before = (training.run.checkpoints / "last").resolve()
    original = Path.open

    def open_(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if "w" in mode and name in self.name:
            raise OSError(code, os.strerror(code), str(self))
        return original(self, mode, *arguments, **more)

    again = start(Run(training.run.path))
    records = again.fit(before, max_steps=3)
    next(records)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        with pytest.raises(StorageError) as caught:
            list(records)
    assert caught.value.exit_code == 7
    assert os.strerror(code) in caught.value.what
    assert f"last good checkpoint: {before}; " in caught.value.hint
    assert f"alexnet train --resume {training.run.path.name}" in caught.value.hint
    assert steps(training.run) == [2]
    checkpoint.load(before)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_between_checkpoints(start: Start, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Even a line of metrics.jsonl that cannot be written stops the run with the way on."""
    training = start()
    records = training.fit(record_every=1, save_every=2)
    next(record for record in records if record.event == "checkpoint")
    original = Path.open

    def open_(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if mode == "ab+":
            raise OSError(code, os.strerror(code), str(self))
        return original(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(StorageError, match=f"run.* cannot be written: {os.strerror(code)}") as caught:
        list(records)
    assert "last good checkpoint: " in caught.value.hint
    checkpoint.load((training.run.checkpoints / "last").resolve())


def test_a_run_folder_that_is_deleted_meanwhile(start: Start) -> None:
    for event in ("step", "validation"):
        training = start()
        records = training.fit(record_every=1)
        next(record for record in records if record.event == event)
        shutil.rmtree(training.run.path)
        with pytest.raises(StorageError) as caught:
            list(records)
        assert "start a new run" in caught.value.hint
        assert not training.run.path.exists()


def test_a_checkpoint_in_an_older_format_says_what_to_do(start: Start) -> None:
    folder = start().run.checkpoints / "00000003"
    folder.mkdir()
    (folder / "state.pt").touch()
    with pytest.raises(WeightsError, match="was saved in an older format and cannot be resumed") as caught:
        checkpoint.find_newest(Run(folder.parents[1]))
    assert caught.value.hint == "train again"
