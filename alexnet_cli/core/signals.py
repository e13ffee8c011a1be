"""Reasons to stop early: signals, a time limit, the end of the parent process. No torch."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from alexnet_cli.errors import UsageError

EXIT_CODES = {"Ctrl-C": 130, "SIGTERM": 143, "SIGUSR1": 143, "SIGHUP": 129, "time is up": 75}
"""Reason to stop -> exit code."""


def parse_duration(text: str | None) -> float | None:
    """Seconds of a duration such as 8h, 30m, 45s or 1h30m. Raises UsageError for anything else, even a bare number."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not any(match.groups()):
        raise UsageError(f"--max-time {text} is not a duration", "such as 8h, 30m, 1h30m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


@contextmanager
def catch_stop_signals(limit: float | None, parent: int | None = None) -> Iterator[Callable[[], str | None]]:
    """Catch stop signals. Yields a function that returns the reason to stop (a key of EXIT_CODES), or None.

    Reasons are Ctrl-C, SIGTERM, SIGUSR1, a closed terminal, `limit` seconds, and the death of the process `parent`,
    which forwards signals while it lives. A second Ctrl-C raises KeyboardInterrupt.
    """
    reasons: list[str] = []
    deadline = time.monotonic() + limit if limit is not None else None

    def handle(number: int, _frame: object) -> None:
        if reasons and number == signal.SIGINT:
            raise KeyboardInterrupt
        reasons.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def stop() -> str | None:
        if deadline is not None and time.monotonic() >= deadline:
            reasons.append("time is up")
        if parent is not None and os.getppid() != parent:
            reasons.append("SIGTERM")
        return reasons[0] if reasons else None

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
