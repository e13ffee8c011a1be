"""Old names of `classes`, until the last callers have changed."""

from __future__ import annotations

from alexnet_cli.core.classes import ilsvrc_classes


def sorted_classes() -> list[tuple[str, str]]:
    """Name and wnid of each class."""
    return [(name, wnid or "") for name, wnid in ilsvrc_classes()]
