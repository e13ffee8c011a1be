"""Old names of `classes`, until the last callers have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from alexnet_cli.core import classes

WNIDS_SHA256 = classes.WNIDS_SHA256


def is_ilsvrc(wnids: Sequence[str]) -> bool:
    """As in `classes`, but with the sum above, which a test replaces."""
    return len(wnids) == 1000 and hashlib.sha256("\n".join(sorted(wnids)).encode()).hexdigest() == WNIDS_SHA256


def sorted_classes() -> list[tuple[str, str]]:
    """Name and wnid of each class."""
    return [(name, wnid or "") for name, wnid in classes.ilsvrc_classes()]
