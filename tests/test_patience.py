"""One budget for all parts, by the clock; and whoever asks to stop is heard at the next batch."""

from __future__ import annotations

import pytest

from alexnet_cli.core.patience import Patience, Spent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless it is moved."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def pictures(waits: Patience, clock: list[float], count: int, seconds: float, batch: int = 10) -> int:
    """Pass so many pictures, each in so many seconds. Returns how many were done."""
    done = 0
    try:
        advance = waits.part(count)
        for _ in range(count // batch):
            clock[0] += seconds * batch
            done += batch
            advance(batch)
    except Spent:
        pass
    return done


def test_without_a_limit_everything_is_done(clock: list[float]) -> None:
    assert pictures(Patience(), clock, 1000, 5) == 1000


def test_all_parts_share_one_budget(clock: list[float]) -> None:
    waits = Patience(10)
    assert pictures(waits, clock, 70, 0.1) == 70
    assert pictures(waits, clock, 20, 0.1) == 20
    assert pictures(waits, clock, 20, 0.1) < 20
    clock[0] = 10
    assert pictures(waits, clock, 10, 0) == 0


def test_what_would_take_too_long_is_given_up_early(clock: list[float]) -> None:
    waits = Patience(10)
    assert pictures(waits, clock, 100_000, 0.02) == 60  # at the first batch after a second
    assert clock[0] == pytest.approx(1.2)
    assert pictures(waits, clock, 256, 0.02) == 250, "what takes less is done all the same"


def test_what_is_done_is_not_thrown_away(clock: list[float]) -> None:
    assert pictures(Patience(10), clock, 10, 5) == 10


def test_somebody_asks_to_stop(clock: list[float]) -> None:
    waits = Patience(None, lambda: "Ctrl-C" if clock[0] >= 3 else None)
    assert pictures(waits, clock, 100, 0.1) == 30
    assert pictures(waits, clock, 100, 0.1) == 0
