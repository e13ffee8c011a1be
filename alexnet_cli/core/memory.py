"""Old names of `images`, until the last callers have changed."""

from __future__ import annotations

from alexnet_cli.core.images import PixelBudget as Memory

__all__ = ["Memory"]
