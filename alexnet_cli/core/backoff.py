"""Batches that shrink by themselves where the memory does not suffice, on any device. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.errors import MissingError, is_out_of_memory


class Backoff:
    """A function from images to results, row by row, that tries half as many at once when memory ends.

    `tell` is called with the number of images that fit, when that has been found.
    """

    def __init__(self, function: Callable[[Any], npt.NDArray[np.float32]], tell: Callable[[int], None]) -> None:
        self.function, self.tell = function, tell
        self.most: int | None = None
        self.told: int | None = None

    def __call__(self, images: Any) -> npt.NDArray[np.float32]:
        """As the function, in pieces if need be.

        Raises:
            MissingError: not even one image fits.
        """
        while (result := self._attempt(images)) is None:  # what the failed one held is free by now
            at_once = min(self.most or len(images), len(images))
            if at_once == 1:
                raise MissingError("the memory is too small for this network, one image at a time", "--gpus none")
            self.most = (at_once + 1) // 2
        if self.most is not None and self.most != self.told:
            self.told = self.most
            self.tell(self.most)
        return result

    def _attempt(self, images: Any) -> npt.NDArray[np.float32] | None:
        """The result, or None where the memory did not suffice."""
        at_once = self.most or len(images)
        try:
            return np.concatenate([self.function(images[i : i + at_once]) for i in range(0, len(images), at_once)])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
