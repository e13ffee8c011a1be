"""One command as several processes: how it ends, whatever ends it. Nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core.parallel import launch
from commands import alexnet

SECONDS = 90
SMALL = ("--recipe", "paper", "--set", "width=0.03125", "-b", "8", "--gpus", "none")


@dataclass
class Command:
    """A training in processes of its own; `runs` is where its runs are."""

    process: subprocess.Popen[str]
    runs: Path

    def ranks(self) -> list[int]:
        """The processes it has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(number) for number in children.read_text().split()]

    def saved(self, name: str = "r", step: int = 1) -> None:
        """Wait for a checkpoint of that step or later."""
        deadline = time.monotonic() + SECONDS
        last = self.runs / name / "checkpoints" / "last"
        while not (last.exists() and int(last.resolve().name) >= step):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


@pytest.fixture
def start(prepared: Path, tmp_path: Path) -> Iterator[Any]:
    started: list[Command] = []

    def command(*extra: str, before: tuple[str, ...] = (), settings: dict[str, str] | None = None) -> Command:
        words = ["-m", "alexnet_cli", "train", "--data", str(prepared), *SMALL, "--name", "r", *extra]
        environment = {**os.environ, "ALEXNET_RUNS_DIR": str(tmp_path / "runs"), **(settings or {})}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, *before, *words], text=True, env=environment, **pipes)
        started.append(Command(process, tmp_path / "runs"))
        return started[-1]

    yield command
    for one in started:
        one.process.terminate()  # by which launchers end what they have started, too
        one.process.communicate(timeout=SECONDS)


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Said:
    """What a command says that starts no process: exit code, stdout and stderr."""
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(launch, "launch", None)

    def command(*extra: str) -> tuple[int, str, str]:
        result = alexnet("train", "--data", str(prepared), *SMALL, "--name", "r", *extra)
        return result.returncode, result.stdout, result.stderr

    return command


def gone(numbers: list[int]) -> bool:
    """Whether all these processes are gone, or will be as soon as somebody asks how they ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        stats = [Path(f"/proc/{number}/stat") for number in numbers]
        left = [s for s in stats if s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z"]
        if not left:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_rank_ends_all(start: Any) -> None:
    command = start("--processes", "2")
    command.saved()
    ranks, killed = command.ranks(), time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = command.end()
    assert time.monotonic() - killed < 30
    assert code == 4
    assert err.count("error: ") == 1
    assert "error: rank 1 was killed by SIGKILL" in err
    assert "Traceback" not in err
    assert gone(ranks)
    assert (command.runs / "r" / "checkpoints" / "last" / "meta.json").is_file()
    assert json.loads((command.runs / "r" / "run.json").read_text())["placement"] == {
        "tower 1": "CPU process 0", "tower 2": "CPU process 1",
    }  # fmt: skip


def test_a_wrong_word_is_told_once(said: Said) -> None:
    code, out, err = said("--processes", "2", "--set", "widht=1")
    assert (code, out) == (2, "")
    assert err == "error: recipe: no key is called widht\nhint: did you mean width?\n"


def test_three_are_no_pairs(said: Said) -> None:
    code, out, err = said("--processes", "3", "--parallel", "tower")
    assert (code, out) == (2, "")
    assert err.count("\n") == 2
    assert "two towers on two devices: the number of devices is odd (3)" in err


def test_processes_are_for_the_cpu(said: Said) -> None:
    code, _, err = said("--gpus", "0", "--processes", "2")
    assert code == 2
    assert "--gpus 0,1 starts one process per GPU" in err


def test_processes_are_the_launchers_affair_where_there_is_one(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, _, err = said("--processes", "2")
    assert code == 2
    assert "error: --processes 2: a launcher has started this process as rank 0 of 1\nhint: remove --processes" in err


def test_gpus_that_are_not_there(said: Said) -> None:
    code, _, err = said("--gpus", "98,99")
    assert code == 4
    assert "error: --gpus 98,99: GPUs available here: " in err
    assert "--gpus none uses the CPU" in err


@pytest.mark.slow
def test_sigterm_reaches_all_and_saves_once(start: Any) -> None:
    command = start("--processes", "2", "--json")
    command.saved()
    ranks = command.ranks()
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.end()
    assert code == 143
    assert err.count("error: stopped (SIGTERM)") == 1
    assert gone(ranks)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-1]["event"] == "end"
    assert [line["event"] for line in lines].count("start") == 1, "only rank 0 speaks"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 129)])
def test_other_signals(start: Any, number: signal.Signals, code: int) -> None:
    command = start("--processes", "2")
    command.saved()
    ranks = command.ranks()
    command.process.send_signal(number)
    found, _, err = command.end()
    assert found == code
    assert err.count("checkpoint saved in") == 1
    assert gone(ranks)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(start: Any) -> None:
    command = start("--processes", "2")
    command.saved()
    ranks = command.ranks()
    command.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.end()
    assert code == 130
    assert err.count("error: stopped") == 1
    assert gone(ranks)


@pytest.mark.slow
def test_a_signal_before_anything_is_there(start: Any) -> None:
    command = start("--processes", "2")
    while len(command.ranks()) < 2:
        time.sleep(0.01)
    command.process.send_signal(signal.SIGTERM)
    code, _, err = command.end()
    assert (code, err) == (143, "error: stopped by SIGTERM\n")


@pytest.mark.slow
def test_modules_of_the_user_are_not_ours(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typer.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).resolve().parents[2]
    path = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'plugins'}"}
    code, _, err = start("--processes", "2", "--resume", "none", before=("-P",), settings=path).end()
    assert code == 2
    assert "error: no run is called none" in err


@pytest.mark.slow
def test_time_is_up(start: Any) -> None:
    code, _, err = start("--processes", "2", "--max-time", "2s").end()
    assert code == 75
    assert "stopped (time is up)" in err


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "4"])
def test_a_rank_that_hangs_is_named(start: Any, processes: str) -> None:
    command = start("--processes", processes, settings={"ALEXNET_TIMEOUT": "5"})
    command.saved()
    ranks = command.ranks()
    os.kill(ranks[-1], signal.SIGSTOP)
    code, _, err = command.end()
    assert code == 4
    assert err.count("error: ") == 1
    assert re.search(
        rf"error: rank \d (timed out|lost its connection) in .*: rank {len(ranks) - 1} did not arrive\n", err
    )
    assert gone(ranks)


@pytest.mark.slow
def test_ranks_save_and_end_when_their_launcher_is_killed(start: Any) -> None:
    command = start("--processes", "2")
    command.saved()
    ranks = command.ranks()
    command.process.kill()
    assert gone(ranks)
    assert json.loads((command.runs / "r" / "run.json").read_text())["reason"] == "SIGTERM"


@pytest.mark.slow
def test_torchrun_starts_again_and_the_run_goes_on(start: Any) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    command = start("--resume", "auto", "--epochs", "12", before=torchrun)
    command.saved(step=12)
    os.kill(command.ranks()[1], signal.SIGKILL)
    code, _, err = command.end()
    assert code == 0, err
    about = json.loads((command.runs / "r" / "run.json").read_text())
    assert about["status"] == "finished"
    assert len(about["resumed"]) == 1
    records = [json.loads(line) for line in (command.runs / "r" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 12 * 6
    assert [r["epoch"] for r in records if r["event"] == "validation"] == list(range(1, 13))
