"""Time competing implementations in turn, A B C A B C ..., so that a busy moment of the machine slows all alike."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Work = Callable[[], int]
"""Does the work once and returns the number of images processed."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command that the topics read; `scratch` is an empty temporary folder."""

    scratch: Path
    pictures: Path | None
    data: str | None
    images: int
    workers: int
    batch_size: int | None
    gpus: str | None


@dataclass(frozen=True)
class BenchmarkCase:
    """One table of `alexnet benchmark`: ours and its peers by name, with notes for the reader."""

    name: str
    ours: Work
    peers: Mapping[str, Work]
    notes: Sequence[str] = ()
    missing: Sequence[str] = ()
    """Peers that are not installed."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Further measurements by name."""
    flop_per_image: float | None = None
    """Floating-point operations of ours for one image, if they tell how efficient it is."""
    unit: Literal["img/s", "s"] = "img/s"
    """Unit of the figures: images per second, or seconds per image."""
    sent_bytes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Bytes that each process sends in a step: name -> layer -> bytes."""


class Timings:
    """Images per second of ours and of every peer, one value per round."""

    def __init__(self, case: BenchmarkCase) -> None:
        self.case = case
        self.works = {"ours": case.ours, **case.peers}
        self.rates: dict[str, list[float]] = {name: [] for name in self.works}

    def run_rounds(self, count: int, seconds: float) -> Iterator[int]:
        """Time everything `count` times, each for at least so many seconds; yields the number of each round.

        One pass of each before the first round loads code and files.
        """
        for work in self.works.values():
            work()
        for number in range(count):
            for name, work in self.works.items():
                self.rates[name].append(measure_rate(work, seconds))
            yield number

    def compute_ratio(self, peer: str) -> float:
        """Return how many times as fast ours is: the median of the ratios of all rounds."""
        return statistics.median(a / b for a, b in zip(self.rates["ours"], self.rates[peer], strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return medians, spreads (lowest and highest round) and ratios for JSON."""
        case = self.case
        figures = {
            name: rates if case.unit == "img/s" else [1 / rate for rate in rates] for name, rates in self.rates.items()
        }
        medians = {name: statistics.median(values) for name, values in figures.items()}
        result: dict[str, Any] = {
            "name": case.name,
            "ours": medians["ours"],
            "peers": {name: medians[name] for name in case.peers},
            "ratio": {name: self.compute_ratio(name) for name in case.peers},
            "spread": {name: [min(values), max(values)] for name, values in figures.items()},
            "unit": case.unit,
            "rounds": len(self.rates["ours"]),
            "seconds": dict(case.seconds),
            "notes": list(case.notes),
            "missing": list(case.missing),
        }
        if case.flop_per_image:
            tflops = statistics.median(self.rates["ours"]) * case.flop_per_image / 1e12
            result |= {"gflop_per_image": case.flop_per_image / 1e9, "tflops": tflops}
        if case.sent_bytes:
            result["sent_bytes"] = {name: dict(layers) for name, layers in case.sent_bytes.items()}
        return result


def measure_rate(work: Work, seconds: float) -> float:
    """Return images per second over enough passes to last so many seconds."""
    images, start = 0, time.perf_counter()
    while True:
        images += work()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return images / elapsed


def measure_least_seconds(work: Callable[[], object], tries: int = 3) -> float:
    """Return the shortest time of some tries: the cost where nothing disturbs it."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def start_script_process() -> ProcessPoolExecutor:
    """Return a worker process with threads and memory as in a user's own script: without our settings."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_forget_thread_settings)


def _forget_thread_settings() -> None:
    """Let waiting threads of OpenMP behave as by default; runs before torch is imported."""
    os.environ.pop("GOMP_SPINCOUNT", None)
