"""The pictures that excite each unit of a layer most, and where in them (section 6.1), found in one pass. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.responses import Responses


@dataclass(frozen=True)
class Stimuli:
    """For every unit the `k` pictures with its highest responses, highest first; each picture counts once.

    `places` (row, column) are where in the unit's map the response is; 0, 0 in layers without maps.
    """

    responses: npt.NDArray[np.float32]
    """U x k: of a convolution before its nonlinearity, of layers 6 and 7 as the next layer sees them."""
    rows: npt.NDArray[np.int64]
    """U x k: the pictures' rows in the split."""
    places: npt.NDArray[np.int64]
    """U x k x 2."""

    def strongest(self, units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The same units by their highest response, strongest first; equal ones in their order."""
        order: npt.NDArray[np.int64] = units[np.argsort(-self.responses[units, 0], kind="stable")]
        return order


def stimuli(batches: Iterable[Responses], k: int) -> Stimuli | None:
    """Go through the responses once; what is kept is k pictures a unit. None if there is no picture."""
    best: Stimuli | None = None
    for rows, values in batches:
        found = _of_batch(rows, values)
        best = _merged(best, found, k) if best else _merged(found, None, k)
    return best


def _of_batch(rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> Stimuli:
    """Every picture of a batch with the place of each unit's highest response."""
    width = values.shape[3] if values.ndim == 4 else 1
    maps = values.reshape(*values.shape[:2], -1)
    where = maps.argmax(axis=2)
    highest = np.take_along_axis(maps, where[:, :, None], axis=2)[:, :, 0]
    places = np.stack(np.divmod(where.T, width), axis=-1)
    return Stimuli(highest.T, np.broadcast_to(rows, highest.T.shape), places)


def _merged(first: Stimuli, second: Stimuli | None, k: int) -> Stimuli:
    parts = [first] if second is None else [first, second]
    responses, rows, places = (
        np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("responses", "rows", "places")
    )
    order = np.argsort(-responses, axis=1, kind="stable")[:, :k]
    return Stimuli(
        np.take_along_axis(responses, order, 1),
        np.take_along_axis(rows, order, 1),
        np.take_along_axis(places, order[:, :, None], 1),
    )
