"""Old names of `prepare`, until the last callers have changed."""

from __future__ import annotations

from alexnet_cli.core.prepare import pack

__all__ = ["pack"]
