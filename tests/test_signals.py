"""Durations such as 1h30m."""

from __future__ import annotations

import pytest

from alexnet_cli.core import signals
from alexnet_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("30m", 1800), ("1h30m", 5400), ("90s", 90), (None, None)]
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert signals.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "soon", "-5", "1.5h", "5m1h", "h"])
def test_invalid_durations(text: str) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        signals.parse_duration(text)
