"""Room for decoded pixels, shared by the threads that decode: a large picture waits until there is enough. No torch."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from alexnet_cli.core import images

LARGE = 2**24  # pixels from which on the C library is told to give back what a picture took


class Memory:
    """Room for the pixels of the largest picture that is taken, or of many smaller ones, over all threads."""

    def __init__(self, most: int = images.MAX_PIXELS) -> None:
        self.most, self.used, self.changed = most, 0, threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait for so much room and hold it while inside."""
        with self.changed:
            self.changed.wait_for(lambda: self.used + pixels <= self.most or not self.used)
            self.used += pixels
        try:
            yield
        finally:
            if pixels >= LARGE:
                _give_back()
            with self.changed:
                self.used -= pixels
                self.changed.notify_all()


def _give_back() -> None:
    """Let glibc return what is freed to the system; each thread would keep as much as its largest picture took."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, or no name for it
        ctypes.CDLL(None).malloc_trim(0)
