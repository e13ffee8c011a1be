"""What a command says: the result on stdout, everything else on stderr.

On a terminal progress is one moving line; elsewhere a plain line every half minute, so that a log never stays empty.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS_BETWEEN_LINES = 30.0
SECONDS_OF_PATIENCE = 2.0
WIDTH_OF_FILES = 160  # columns of a table that goes to a file or a pipe


class Progress(Protocol):
    """A count that grows."""

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more; show `note` beside the count."""

    def skip(self, n: int) -> None:
        """Count `n` that were done before: they say nothing of the pace."""


class Reporter:
    """The voice of one command."""

    def __init__(self, command: str, *, json: bool = False, quiet: bool = False, speaks: bool = True) -> None:
        """Of several processes that run one command, only one `speaks`."""
        self.command, self.json, self.quiet, self.speaks = command, json and speaks, quiet or not speaks, speaks
        self._bar: Any = None

    def line(self, label: str, text: str) -> None:
        """A labelled line on stderr; nothing when quiet."""
        if not self.quiet:
            self._stderr(f"{label:<7} {visible(text)}")

    def warn(self, text: str, hint: str = "") -> None:
        """A warning on stderr, and what to do about it."""
        if not self.speaks:
            return
        self._stderr(f"warn    {visible(text)}")
        if hint:
            self._stderr(f"hint    {visible(hint)}")

    def result(self, record: Mapping[str, Any]) -> None:
        """The result as one line of JSON, if that is what was asked for."""
        if self.json:
            line = {"schema": f"alexnet.{self.command}/1", **record}
            sys.stdout.write(json.dumps(_plain(line), separators=(",", ":"), allow_nan=False) + "\n")
            sys.stdout.flush()

    def show(self, renderable: RenderableType) -> None:
        """The result for people: text is printed as it is, tables and the like as wide as the terminal."""
        if self.json or not self.speaks:
            return
        if isinstance(renderable, str):
            sys.stdout.write(renderable + "\n")
        else:
            from rich.console import Console

            width = None if sys.stdout.isatty() else WIDTH_OF_FILES
            Console(highlight=False, width=width).print(renderable)
        sys.stdout.flush()

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str = "img") -> Iterator[Progress]:
        """Show how far the work is while inside."""
        if self.quiet:
            yield _Silent()
        elif moving(sys.stderr):
            with _bar() as bar:
                self._bar = bar
                try:
                    yield _Moving(bar, description, total, unit)
                finally:
                    self._bar = None
        else:
            lines = _Lines(self._stderr, description, total, unit)
            with _reminding(lines.due):  # even where nothing is counted for long
                yield lines
            if lines.pace.done > max(lines.told, lines.pace.skipped):
                lines.say()

    @contextmanager
    def waiting(self, label: str, text: str) -> Iterator[None]:
        """Where nothing can be counted: say what takes so long, after two seconds and then every half minute."""
        started, due = time.monotonic(), time.monotonic() + SECONDS_OF_PATIENCE

        def remind() -> float:
            nonlocal due
            if time.monotonic() >= due:
                self.line(label, f"{text} ({duration(time.monotonic() - started)} so far)")
                due = time.monotonic() + SECONDS_BETWEEN_LINES
            return due

        with _reminding(remind):
            yield

    def _stderr(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            STDERR.write(text + "\n")


class _Stderr:
    """stderr, where nobody need listen: a pipe without a reader, a terminal that was closed and a log on a full disk
    are no reasons to stop working.
    """

    @property
    def stream(self) -> Any:
        """The stream itself: while a bar moves, Rich puts one of its own in place of it."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    @property
    def encoding(self) -> str:
        """What the stream can show."""
        return str(self.stream.encoding)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return bool(self.stream.isatty())

    def write(self, text: str) -> None:
        """Write; where that fails, what comes later is thrown away, or the end of the program would fail over it."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def flush(self) -> None:
        """Nothing waits."""


STDERR = _Stderr()


@contextmanager
def _reminding(due: Callable[[], float]) -> Iterator[None]:
    """While inside: call `due` now and whenever the moment comes that it returned (`time.monotonic`)."""
    done = threading.Event()

    def remind() -> None:
        while not done.wait(max(0.0, due() - time.monotonic())):
            pass

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def moving(stream: Any) -> bool:
    """Whether a line may be drawn over again: a capable terminal, and no setting against it."""
    calm = os.environ.get("TERM") == "dumb" or os.environ.get("TTY_INTERACTIVE") == "0" or "CI" in os.environ
    return bool(stream.isatty()) and not calm


def visible(text: str) -> str:
    """Names of files can hold anything; a line of ours stays one line and moves no cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _plain(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class _Silent:
    def advance(self, n: int, note: str = "") -> None:
        """Say nothing."""

    def skip(self, n: int) -> None:
        """Say nothing."""


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:<7}"), BarColumn(bar_width=8), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(file=cast("IO[str]", STDERR), highlight=False), transient=True)


class _Pace:
    """A count against the clock."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.done, self.skipped, self.started = total, unit, 0, 0, time.monotonic()

    def told(self) -> str:
        """Images a second and the time that is left."""
        rate = (self.done - self.skipped) / max(1e-9, time.monotonic() - self.started)
        left = (self.total - self.done) / rate if self.total is not None and rate else 0
        pace = format(rate, ",.0f" if rate >= 10 else ".2g")
        return f"{pace} {self.unit}/s" + (f"  eta {duration(left)}" if left > 0 else "")


class _Moving:
    """Rich's bar, with a note and the pace beside it."""

    def __init__(self, bar: Any, description: str, total: int | None, unit: str) -> None:
        self.bar, self.pace = bar, _Pace(total, unit)
        self.task = bar.add_task(description, total=total, note="")

    def advance(self, n: int, note: str = "") -> None:
        """Move the bar."""
        self.pace.done += n
        self.bar.update(self.task, advance=n, note=f"{note}{'  ' if note else ''}{self.pace.told()}")

    def skip(self, n: int) -> None:
        """Move the bar without a word."""
        self.pace.done, self.pace.skipped = self.pace.done + n, self.pace.skipped + n
        self.bar.update(self.task, advance=n)


class _Lines:
    """A plain line now and then."""

    def __init__(self, write: Any, description: str, total: int | None, unit: str) -> None:
        self.write, self.description, self.pace, self.note = write, description, _Pace(total, unit), ""
        self.said, self.told = self.pace.started, 0  # when, and how many
        self.saying = threading.Lock()

    def due(self) -> float:
        """Say how far it is if the last line is half a minute old. Returns when the next is due."""
        self.advance(0)
        return self.said + SECONDS_BETWEEN_LINES

    def advance(self, n: int, note: str = "") -> None:
        """Count, and say so if the last line is half a minute old."""
        with self.saying:
            self.pace.done, self.note = self.pace.done + n, note or self.note
            if time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
                self.say()

    def skip(self, n: int) -> None:
        """Count without a word."""
        self.pace.done, self.pace.skipped = self.pace.done + n, self.pace.skipped + n

    def say(self) -> None:
        """Write the line."""
        self.said, self.told = time.monotonic(), self.pace.done
        pace, note = self.pace, f"{self.note}  " if self.note else ""
        count = f"{pace.done:,}" if pace.total is None else f"{pace.done:,}/{pace.total:,}"
        self.write(f"{self.description:<7} {count} {pace.unit}  {note}{pace.told()}")


def duration(seconds: float) -> str:
    """Such as 45s, 3m20s, 5h12m, 6d3h."""
    whole = round(seconds)
    for size, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // smaller}{small}"
    return f"{whole}s"
