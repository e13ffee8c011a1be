"""The wait for data, on a GPU whose clock is played."""

from __future__ import annotations

import time

import pytest
import torch

from alexnet_cli.core.training.loop import DataTimer


def test_on_a_cpu_it_is_what_the_clock_says() -> None:
    waiting, started = DataTimer(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        with waiting:
            time.sleep(0.02)
    time.sleep(0.03)
    assert 0.04 <= waiting.read() <= time.perf_counter() - started - 0.03
    assert waiting.read() == 0


def test_on_a_gpu_it_is_the_time_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three batches the first two come while the device still works; before the third it has nothing left to do."""
    host, device = [0.0], [0.0]  # milliseconds: where the host is, and when the device will be done

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            assert stream == "the stream of cuda:1"
            device[0] = self.at = max(host[0], device[0])

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: f"the stream of {place}")
    waiting = DataTimer(torch.device("cuda", 1))
    device[0] = 10.0
    for until, work in ((4.0, 10.0), (15.0, 10.0), (37.0, 10.0)):
        with waiting:
            host[0] = until
        device[0] += work
    assert waiting.read() == pytest.approx(0.007)
    assert waiting.read() == 0
