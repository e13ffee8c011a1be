"""What goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import io
import json
import time
from pathlib import Path

import pytest

from alexnet_cli.console import Reporter, format_duration


def test_with_json_only_the_result_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("test", json=True)
    reporter.line("data", "somewhere")
    reporter.warn("careful", "do this")
    reporter.show("for people")
    reporter.result({"loss": float("nan"), "deep": [{"x": float("inf")}], "path": "é"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"schema": "alexnet.test/1", "loss": None, "deep": [{"x": None}], "path": "é"}
    assert out.count("\n") == 1
    assert err == "data    somewhere\nwarn    careful\nhint    do this\n"


def test_without_json_only_text_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("test")
    reporter.result({"x": 1})
    reporter.show("seen")
    assert capsys.readouterr().out == "seen\n"


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("test", quiet=True)
    reporter.line("data", "somewhere")
    reporter.warn("careful")
    with reporter.progress("work", total=3) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == "warn    careful\n"


def test_without_a_terminal_progress_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Reporter("test").progress("train", total=1000) as bar:
        for _ in range(10):
            now[0] += 10
            bar.advance(100, "loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # every 30 s, and the end
    assert lines[0] == "train   300/1,000 img  loss 1.5  10 img/s  eta 1m10s"
    assert lines[-1] == "train   1,000/1,000 img  loss 1.5  10 img/s"


def test_lines_appear_while_nothing_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation, or steps that take more than half a minute."""
    monkeypatch.setattr("alexnet_cli.console.SECONDS_BETWEEN_LINES", 0.15)
    with Reporter("test").progress("train", total=1000) as bar:
        bar.advance(100, "loss 1.5")
        deadline, written = time.monotonic() + 60, ""
        while "100/1,000" not in written and time.monotonic() < deadline:
            time.sleep(0.05)
            written += capsys.readouterr().err
    assert "train   100/1,000 img  loss 1.5" in written


@pytest.mark.parametrize("terminal", [True, False])
def test_write_failures_on_stderr_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool) -> None:
    """A terminal that was closed, a log on a full disk: what is written there fails, and the work goes on."""

    class Closed(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def isatty(self) -> bool:
            return terminal

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with (tmp_path / "log").open("wb") as file, Closed(file) as closed:
        monkeypatch.setattr("sys.stderr", closed)
        reporter = Reporter("test")
        with reporter.progress("train", total=10) as bar:
            for _ in range(10):
                reporter.line("val", "better")
                bar.advance(1)
        reporter.warn("careful", "do this")


def test_long_names_and_slow_work_read_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Reporter("test").progress("startup fp32", total=2, unit="rounds") as bar:
        now[0] += 20
        bar.advance(1)
        now[0] += 20
        bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["startup fp32 2/2 rounds  0.05 rounds/s"]  # once, though it is the end too


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (60, "1m0s"), (3725, "1h2m"), (266400, "3d2h"), (59.7, "1m0s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_only_long_waits_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter("prepare")
    with reporter.waiting("look", "reading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("alexnet_cli.console.SECONDS_BEFORE_WAITING_LINE", 0.01)
    with reporter.waiting("look", "reading"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "look    reading (0s so far)\n"
