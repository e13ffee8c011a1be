"""Old names of `loader`, until the last callers have changed."""

from __future__ import annotations

from alexnet_cli.core.loader import CachedLoader as Cache
from alexnet_cli.core.loader import CacheMode as Where
from alexnet_cli.core.loader import cache_decoded as remembering

__all__ = ["Cache", "Where", "remembering"]
