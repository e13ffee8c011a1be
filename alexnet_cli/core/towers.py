"""Where two towers meet (section 3.2): how many this process holds, and the two verbs between them.

A network is written once, with channel counts per tower times `held`. What crosses between towers does so through
`share` and `sum` alone; where both towers are held in one process there is nothing to send and both are identities.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Towers:
    """The towers this process holds: `held` of the network's `total`."""

    total: int
    held: int

    def share(self, x: Tensor) -> Tensor:
        """Every tower's channels side by side, tower 1 first: N x held*C x ... -> N x total*C x ..."""
        assert self.held == self.total, "this process holds every tower"
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Add up what each tower contributes to the same values: N x K -> N x K."""
        assert self.held == self.total, "this process holds every tower"
        return x
