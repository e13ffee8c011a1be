"""Output of the commands: the result on stdout, everything else on stderr.

Progress is one moving line on a terminal, and a plain line every 30 seconds in a log.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BEFORE_WAITING_LINE = 2.0
FILE_WIDTH = 160  # columns of a table that goes to a file or a pipe
BAR_WIDTH, MIN_NAME_WIDTH = 24, 20  # characters: the bar of a probability of 1, the column of class names


class Progress(Protocol):
    """A progress display."""

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more units, and show `note` next to the count."""

    def skip(self, n: int) -> None:
        """Count `n` units that were done earlier, without counting them for the rate."""


class Reporter:
    """Writes the output of one command: as text or as JSON, quiet or not."""

    def __init__(self, command: str, *, json: bool = False, quiet: bool = False, speaks: bool = True) -> None:
        """`speaks` is False in all but one of the processes that run a command together."""
        self.command, self.json, self.quiet, self.speaks = command, json and speaks, quiet or not speaks, speaks
        self._bar: Any = None

    def line(self, label: str, text: str, *, always: bool = False) -> None:
        """Write a labeled line to stderr, unless quiet; with `always` even then."""
        if self.speaks and (always or not self.quiet):
            self._stderr(f"{label:<7} {make_printable(text)}")

    def warn(self, text: str, hint: str = "") -> None:
        """Write a warning and a hint to stderr, even when quiet."""
        if not self.speaks:
            return
        self._stderr(f"warn    {make_printable(text)}")
        if hint:
            self._stderr(f"hint    {make_printable(hint)}")

    def result(self, record: Mapping[str, Any]) -> None:
        """Write the result to stdout as one line of JSON, if --json was given."""
        if self.json:
            line = {"schema": f"alexnet.{self.command}/1", **record}
            stdout = _kept_stdout[-1] if _kept_stdout else sys.stdout
            stdout.write(json.dumps(_to_json_value(line), separators=(",", ":"), allow_nan=False) + "\n")
            stdout.flush()

    def show(self, renderable: RenderableType) -> None:
        """Write the result for people to stdout (not with --json): text, or a Rich table as wide as the terminal."""
        if self.json or not self.speaks:
            return
        if isinstance(renderable, str):
            sys.stdout.write(renderable + "\n")
        else:
            from rich.console import Console

            width = None if sys.stdout.isatty() else FILE_WIDTH
            Console(highlight=False, width=width).print(renderable)
        sys.stdout.flush()

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str = "img") -> Iterator[Progress]:
        """Show progress inside the `with` block; `total` None means that the number of units is unknown."""
        if self.quiet:
            yield _SilentProgress()
        elif is_interactive(sys.stderr):
            with _make_bar() as bar:
                self._bar = bar
                try:
                    yield _BarProgress(bar, description, total, unit)
                finally:
                    self._bar = None
        else:
            lines = _LineProgress(self._stderr, description, total, unit)
            with _call_periodically(lines.write_if_due):  # also while nothing is counted for long
                yield lines
            if lines.rate.done > max(lines.written_count, lines.rate.skipped):
                lines.write_line()

    @contextmanager
    def waiting(self, label: str, text: str) -> Iterator[None]:
        """While something that cannot be counted runs, say what it is: after 2 seconds, then every 30 seconds."""
        started, due = time.monotonic(), time.monotonic() + SECONDS_BEFORE_WAITING_LINE

        def remind() -> float:
            nonlocal due
            if time.monotonic() >= due:
                self.line(label, f"{text} ({format_duration(time.monotonic() - started)} so far)")
                due = time.monotonic() + SECONDS_BETWEEN_LINES
            return due

        with _call_periodically(remind):
            yield

    def _stderr(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            STDERR.write(text + "\n")


class _Stderr:
    """stderr that ignores failures: a closed pipe or terminal, or a log on a full disk, must not stop the work."""

    @property
    def stream(self) -> Any:
        """The real stream: while a progress bar is shown, Rich replaces sys.stderr."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    @property
    def encoding(self) -> str:
        """Encoding of the stream."""
        return str(self.stream.encoding)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return bool(self.stream.isatty())

    def write(self, text: str) -> None:
        """Write; after a failure, discard all later output, or the flush at exit would fail again."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def flush(self) -> None:
        """Do nothing: `write` flushes."""


STDERR = _Stderr()


_kept_stdout: list[IO[str]] = []


@contextmanager
def keep_stdout_for_results() -> Iterator[None]:
    """Inside the block only `Reporter.result` writes to stdout; what libraries print goes to stderr."""
    _kept_stdout.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _kept_stdout.pop()


@contextmanager
def _call_periodically(function: Callable[[], float]) -> Iterator[None]:
    """Call `function` in a thread, now and at each time it returns (`time.monotonic`), until the block ends."""
    done = threading.Event()

    def remind() -> None:
        while not done.wait(max(0.0, function() - time.monotonic())):
            pass

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def is_interactive(stream: Any) -> bool:
    """Return whether a line can be redrawn: a capable terminal, and no setting against it."""
    calm = os.environ.get("TERM") == "dumb" or os.environ.get("TTY_INTERACTIVE") == "0" or "CI" in os.environ
    return bool(stream.isatty()) and not calm


def make_printable(text: str) -> str:
    """Escape what is not printable, such as line breaks and terminal codes in file names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _to_json_value(value: Any) -> Any:
    """Return the value for JSON, with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _to_json_value(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_value(v) for v in value]
    return value


class _SilentProgress:
    def advance(self, n: int, note: str = "") -> None:
        """Do nothing."""

    def skip(self, n: int) -> None:
        """Do nothing."""


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:<7}"), BarColumn(bar_width=8), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(file=cast("IO[str]", STDERR), highlight=False), transient=True)


class _Rate:
    """A count and the time since it started."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.done, self.skipped, self.started = total, unit, 0, 0, time.monotonic()

    def format_rate(self) -> str:
        """Return units per second and the time left."""
        rate = (self.done - self.skipped) / max(1e-9, time.monotonic() - self.started)
        left = (self.total - self.done) / rate if self.total is not None and rate else 0
        pace = format(rate, ",.0f" if rate >= 10 else ".2g")
        return f"{pace} {self.unit}/s" + (f"  eta {format_duration(left)}" if left > 0 else "")


class _BarProgress:
    """Rich's bar, with a note and the rate next to it."""

    def __init__(self, bar: Any, description: str, total: int | None, unit: str) -> None:
        self.bar, self.rate = bar, _Rate(total, unit)
        self.task = bar.add_task(description, total=total, note="")

    def advance(self, n: int, note: str = "") -> None:
        """Move the bar."""
        self.rate.done += n
        self.bar.update(self.task, advance=n, note=f"{note}{'  ' if note else ''}{self.rate.format_rate()}")

    def skip(self, n: int) -> None:
        """Move the bar without a note."""
        self.rate.done, self.rate.skipped = self.rate.done + n, self.rate.skipped + n
        self.bar.update(self.task, advance=n)


class _LineProgress:
    """A plain line every 30 seconds."""

    def __init__(self, write: Any, description: str, total: int | None, unit: str) -> None:
        self.write, self.description, self.rate, self.note = write, description, _Rate(total, unit), ""
        self.written_at, self.written_count = self.rate.started, 0  # of the last line
        self.lock = threading.Lock()

    def write_if_due(self) -> float:
        """Write a line if the last is 30 seconds old, and return when the next is due."""
        self.advance(0)
        return self.written_at + SECONDS_BETWEEN_LINES

    def advance(self, n: int, note: str = "") -> None:
        """Count, and write a line if the last is 30 seconds old."""
        with self.lock:
            self.rate.done, self.note = self.rate.done + n, note or self.note
            if time.monotonic() - self.written_at >= SECONDS_BETWEEN_LINES:
                self.write_line()

    def skip(self, n: int) -> None:
        """Count without writing."""
        self.rate.done, self.rate.skipped = self.rate.done + n, self.rate.skipped + n

    def write_line(self) -> None:
        """Write the line."""
        self.written_at, self.written_count = time.monotonic(), self.rate.done
        rate, note = self.rate, f"{self.note}  " if self.note else ""
        count = f"{rate.done:,}" if rate.total is None else f"{rate.done:,}/{rate.total:,}"
        self.write(f"{self.description:<7} {count} {rate.unit}  {note}{rate.format_rate()}")


def format_probabilities(labels: Iterable[tuple[str, float]]) -> list[str]:
    """Return a line for each name and probability, with a bar. Plain text, because loading Rich takes time."""
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    rows = [(make_printable(name), probability) for name, probability in labels]
    width = max([MIN_NAME_WIDTH, *(len(name) for name, _ in rows)])
    return [f"{name:<{width}}  {share:.2f}  {block * round(BAR_WIDTH * share)}".rstrip() for name, share in rows]


def format_duration(seconds: float) -> str:
    """Format a duration, such as 45s, 3m20s, 5h12m, 6d3h."""
    whole = round(seconds)
    for size, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // smaller}{small}"
    return f"{whole}s"
