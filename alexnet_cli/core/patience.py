"""How long somebody waits for a report: seconds by the clock, for all its parts together, or until told to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

GRACE = 1.0  # seconds before the pace of a part is judged: the first pictures take longest


class Spent(Exception):
    """Nobody waits any longer."""


class Patience:
    """`seconds` from now on, None for as long as it takes. `stop()` gives a reason to stop once there is one; `advance`
    is told how many pictures have gone through the network.
    """

    def __init__(
        self,
        seconds: float | None = None,
        stop: Callable[[], str | None] = lambda: None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._stop, self._advance = stop, advance

    def check(self) -> None:
        """Raise Spent if the time is over or somebody has asked to stop."""
        if self._stop() or (self._end is not None and time.monotonic() >= self._end):
            raise Spent

    def part(self, pictures: int) -> Callable[[int], None]:
        """Begin a part of so many pictures. Returns what counts them; it raises Spent as soon as its pace says that the
        rest will not be done in time, or somebody asks to stop.
        """
        self.check()
        started, done = time.monotonic(), 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            self._advance(n)
            left, now = pictures - done, time.monotonic()
            if left > 0 and (self._stop() or self._late(now, now - started, left / done)):
                raise Spent

        return count

    def _late(self, now: float, taken: float, more: float) -> bool:
        """Whether `more` times what a part has `taken` so far, in seconds, ends too late."""
        judged = taken * more if taken > GRACE else 0.0
        return self._end is not None and now + judged >= self._end
