"""Old names of `files`, until the last callers have changed."""

from __future__ import annotations

from alexnet_cli.core.files import replace_file as replacing
from alexnet_cli.core.files import replace_link as point
from alexnet_cli.core.files import write_text

__all__ = ["point", "replacing", "write_text"]
