"""One command in several processes: every way it can end, with no process left behind."""

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
    """A running `alexnet train`; its runs are in `runs`."""

    process: subprocess.Popen[str]
    runs: Path

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(number) for number in children.read_text(encoding="utf-8").split()]

    def wait_for_checkpoint(self, name: str = "r", step: int = 1) -> None:
        """Wait for a checkpoint of that step or later."""
        deadline = time.monotonic() + SECONDS
        last = self.runs / name / "checkpoints" / "last"
        while not (last.exists() and int(last.resolve().name) >= step):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def wait(self) -> tuple[int, str, str]:
        """Wait for the end: exit code, stdout and stderr."""
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
        one.process.terminate()  # on which launchers stop their ranks, too
        one.process.communicate(timeout=SECONDS)


RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_command(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """Run a command that must fail before it starts ranks: exit code, stdout and stderr."""
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(launch, "launch", None)

    def command(*extra: str) -> tuple[int, str, str]:
        result = alexnet("train", "--data", str(prepared), *SMALL, "--name", "r", *extra)
        return result.returncode, result.stdout, result.stderr

    return command


def all_ended(numbers: list[int]) -> bool:
    """Whether all these processes end within 20 s (zombies count as ended)."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        stats = [Path(f"/proc/{number}/stat") for number in numbers]
        left = [s for s in stats if s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z"]
        if not left:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_killed_rank_stops_all_ranks(start: Any) -> None:
    command = start("--processes", "2")
    command.wait_for_checkpoint()
    ranks, killed = command.ranks(), time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = command.wait()
    assert time.monotonic() - killed < 30
    assert code == 4
    assert err.count("error: ") == 1
    assert "error: rank 1 was killed by SIGKILL" in err
    assert "Traceback" not in err
    assert all_ended(ranks)
    assert (command.runs / "r" / "checkpoints" / "last" / "meta.json").is_file()
    assert json.loads((command.runs / "r" / "run.json").read_text())["placement"] == {
        "tower 1": "CPU process 0", "tower 2": "CPU process 1",
    }  # fmt: skip


def test_a_usage_error_is_printed_once(run_command: RunCommand) -> None:
    code, out, err = run_command("--processes", "2", "--set", "widht=1")
    assert (code, out) == (2, "")
    assert err == "error: recipe: no key is called widht\nhint: did you mean width?\n"


def test_tower_parallel_refuses_three_processes(run_command: RunCommand) -> None:
    code, out, err = run_command("--processes", "3", "--parallel", "tower")
    assert (code, out) == (2, "")
    assert err.count("\n") == 2
    assert "two towers on two devices: the number of devices is odd (3)" in err


def test_processes_option_is_for_the_cpu(run_command: RunCommand) -> None:
    code, _, err = run_command("--gpus", "0", "--processes", "2")
    assert code == 2
    assert "--gpus 0,1 starts one process per GPU" in err


def test_processes_option_is_refused_under_a_launcher(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, _, err = run_command("--processes", "2")
    assert code == 2
    assert "error: --processes 2: a launcher has started this process as rank 0 of 1\nhint: remove --processes" in err


def test_missing_gpus_are_an_error(run_command: RunCommand) -> None:
    code, _, err = run_command("--gpus", "98,99")
    assert code == 4
    assert "error: --gpus 98,99: GPUs available here: " in err
    assert "--gpus none uses the CPU" in err


@pytest.mark.slow
def test_sigterm_stops_all_ranks_and_saves_once(start: Any) -> None:
    command = start("--processes", "2", "--json")
    command.wait_for_checkpoint()
    ranks = command.ranks()
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.wait()
    assert code == 143
    assert err.count("error: stopped (SIGTERM)") == 1
    assert all_ended(ranks)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-1]["event"] == "end"
    assert [line["event"] for line in lines].count("start") == 1, "only rank 0 speaks"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 129)])
def test_other_signals(start: Any, number: signal.Signals, code: int) -> None:
    command = start("--processes", "2")
    command.wait_for_checkpoint()
    ranks = command.ranks()
    command.process.send_signal(number)
    found, _, err = command.wait()
    assert found == code
    assert err.count("checkpoint saved in") == 1
    assert all_ended(ranks)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(start: Any) -> None:
    command = start("--processes", "2")
    command.wait_for_checkpoint()
    ranks = command.ranks()
    command.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.wait()
    assert code == 130
    assert err.count("error: stopped") == 1
    assert all_ended(ranks)


@pytest.mark.slow
def test_a_signal_during_startup(start: Any) -> None:
    command = start("--processes", "2")
    while len(command.ranks()) < 2:
        time.sleep(0.01)
    command.process.send_signal(signal.SIGTERM)
    code, _, err = command.wait()
    assert (code, err) == (143, "error: stopped by SIGTERM\n")


@pytest.mark.slow
def test_modules_of_the_user_are_not_imported(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typer.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).resolve().parents[2]
    path = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'plugins'}"}
    code, _, err = start("--processes", "2", "--resume", "none", before=("-P",), settings=path).wait()
    assert code == 2
    assert "error: there is no run none in" in err


@pytest.mark.slow
def test_max_time_stops_all_ranks(start: Any) -> None:
    code, _, err = start("--processes", "2", "--max-time", "2s").wait()
    assert code == 75
    assert "stopped (time is up)" in err


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "4"])
def test_a_rank_that_hangs_is_named(start: Any, processes: str) -> None:
    command = start("--processes", processes, settings={"ALEXNET_TIMEOUT": "5"})
    command.wait_for_checkpoint()
    ranks = command.ranks()
    os.kill(ranks[-1], signal.SIGSTOP)
    code, _, err = command.wait()
    assert code == 4
    assert err.count("error: ") == 1
    assert re.search(
        rf"error: rank \d (timed out|lost its connection) in .*: rank {len(ranks) - 1} did not arrive\n", err
    )
    assert all_ended(ranks)


@pytest.mark.slow
def test_ranks_save_and_end_when_their_launcher_is_killed(start: Any) -> None:
    command = start("--processes", "2")
    command.wait_for_checkpoint()
    ranks = command.ranks()
    command.process.kill()
    assert all_ended(ranks)
    assert json.loads((command.runs / "r" / "run.json").read_text())["reason"] == "SIGTERM"


@pytest.mark.slow
def test_torchrun_starts_again_and_the_run_goes_on(start: Any) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    command = start("--resume", "auto", "--epochs", "12", before=torchrun)
    command.wait_for_checkpoint(step=12)
    os.kill(command.ranks()[1], signal.SIGKILL)
    code, _, err = command.wait()
    assert code == 0, err
    about = json.loads((command.runs / "r" / "run.json").read_text())
    assert about["status"] == "finished"
    assert len(about["resumed"]) == 1
    records = [json.loads(line) for line in (command.runs / "r" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 12 * 6
    assert [r["epoch"] for r in records if r["event"] == "validation"] == list(range(1, 13))
