"""How long a device waits for data: by the clock where the host computes, by the device's where it runs ahead."""

from __future__ import annotations

import time

import torch


class Waiting:
    """Sums up what happens inside its `with` blocks; of a GPU, only the time for which it had nothing else to do.

    A GPU works off what it was given before, while the host waits for the next batch: each block is two marks in its
    stream, and what lies between them is the wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter() if self.device.type == "cpu" else self._mark()

    def __exit__(self, *_: object) -> None:
        if isinstance(self._began, float):
            self._seconds += time.perf_counter() - self._began
        else:
            self._marks.append((self._began, self._mark()))

    def taken(self) -> float:
        """Seconds since the last time that this was asked, of a device that has done what it was given."""
        milliseconds = float(sum(before.elapsed_time(after) for before, after in self._marks))
        seconds = self._seconds + milliseconds / 1000
        self._seconds = 0.0
        self._marks.clear()
        return seconds

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
