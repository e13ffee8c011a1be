"""Times contestants in turn, A B C A B C ..., so that a busy moment of the machine slows all of them alike."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

Pass = Callable[[], int]
"""Does the work once and returns how many images that were."""


@dataclass(frozen=True)
class Contest:
    """What one topic of `alexnet benchmark` compares: ours, the others by name, and what a reader should know."""

    name: str
    ours: Pass
    peers: Mapping[str, Pass]
    notes: Sequence[str] = ()
    missing: Sequence[str] = ()
    """Peers that are not installed."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further measurements, in seconds, by name."""
    operations: float | None = None
    """Floating-point operations that ours takes an image, if that says how well it does."""
    unit: Literal["img/s", "s"] = "img/s"
    """How the figures are given: images per second, or seconds for an image."""
    sent: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Bytes that each process of a contestant sends in a step, by layer."""


@dataclass
class Times:
    """Images per second of every contestant, one value a round."""

    contest: Contest
    ours: list[float]
    peers: dict[str, list[float]]

    @classmethod
    def of(cls, contest: Contest) -> Times:
        """Before the first round."""
        return cls(contest, [], {name: [] for name in contest.peers})

    def ratio(self, peer: str) -> float:
        """How many times as fast ours is: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.ours, self.peers[peer], strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Medians, spreads (lowest and highest of the rounds) and ratios."""
        every, operations = {"ours": self.ours, **self.peers}, self.contest.operations
        ours, sent = statistics.median(self.ours), self.contest.sent
        figures = {name: [self._figure(rate) for rate in rates] for name, rates in every.items()}
        return {
            "name": self.contest.name,
            "ours": statistics.median(figures["ours"]),
            "peers": {name: statistics.median(figures[name]) for name in self.peers},
            "ratio": {name: self.ratio(name) for name in self.peers},
            "spread": {name: [min(found), max(found)] for name, found in figures.items()},
            "unit": self.contest.unit,
            "rounds": len(self.ours),
            **({"gflop_per_image": operations / 1e9, "tflops": ours * operations / 1e12} if operations else {}),
            "seconds": dict(self.contest.extra),
            **({"sent_bytes": {name: dict(layers) for name, layers in sent.items()}} if sent else {}),
            "notes": list(self.contest.notes),
            "missing": list(self.contest.missing),
        }

    def _figure(self, rate: float) -> float:
        return rate if self.contest.unit == "img/s" else 1 / rate


def run_rounds(times: Times, count: int, seconds: float) -> Iterator[int]:
    """Time every contestant `count` times for at least so many seconds each; yields the number of each round.

    A pass of each before the first round, which does not count, loads code and files.
    """
    contest = times.contest
    for work in (contest.ours, *contest.peers.values()):
        work()
    for number in range(count):
        times.ours.append(measure_rate(contest.ours, seconds))
        for name, work in contest.peers.items():
            times.peers[name].append(measure_rate(work, seconds))
        yield number


def measure_rate(work: Pass, seconds: float) -> float:
    """Images per second over as many passes as last so long."""
    images, start = 0, time.perf_counter()
    while True:
        images += work()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return images / elapsed


def least_seconds(work: Callable[[], object], tries: int = 3) -> float:
    """The shortest of some tries: what the work costs where nothing disturbs it."""
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def fresh_process() -> ProcessPoolExecutor:
    """A process with threads and memory as any script has them: started fresh, without the settings of this one."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_forget_thread_settings)


def _forget_thread_settings() -> None:
    """Runs before torch is imported: let waiting threads of OpenMP behave as by default."""
    os.environ.pop("GOMP_SPINCOUNT", None)


def describe_hardware(workers: int) -> dict[str, Any]:
    """The processor, its cores, the workers used, and how busy the machine was already."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": _processor(), "cores": os.cpu_count(), "workers": workers, "load_before": load}


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Python's version, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
