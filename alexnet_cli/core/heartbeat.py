"""Signs of life: each rank tells the others once a second what it does, so that one that hangs can be named."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import Protocol

SECONDS = 1.0  # between two signs


class Store(Protocol):
    """What all ranks can read and write, as torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def get(self, key: str) -> bytes:
        """Read; waits for what is not there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""


@dataclass(frozen=True)
class Sign:
    """When a rank said what it was about to do, and the how manieth thing that was."""

    rank: int
    when: float
    count: int
    place: str


class Heartbeat:
    """This rank's signs, and those of the others."""

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.count, self.place = 0, "starting"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def at(self, place: str) -> None:
        """Say what this rank is about to do; all ranks do the same things in the same order."""
        self.count, self.place = self.count + 1, place

    def end(self) -> None:
        """No more signs."""
        self._ended.set()
        self._thread.join()

    def behind(self) -> Sign | None:
        """The last sign of the other rank that has come least far, if any can be read."""
        signs = []
        for rank in range(self.size):
            key = f"alive/{rank}"
            try:
                if rank != self.rank and self.store.check([key]):
                    when, count, place = self.store.get(key).decode().split(" ", 2)
                    signs.append(Sign(rank, float(when), int(count), place))
            except RuntimeError:  # who keeps the store is gone
                return None
        return min(signs, key=lambda sign: (sign.count, sign.when), default=None)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # who keeps the store is gone, and so are we, soon
            while True:
                self.store.set(f"alive/{self.rank}", f"{time.time():.3f} {self.count} {self.place}")
                if self._ended.wait(SECONDS):
                    return


def told(sign: Sign) -> str:
    """Where a rank was, in words."""
    return f"rank {sign.rank}, last heard of {time.time() - sign.when:.0f} s ago, is behind at: {sign.place}"
