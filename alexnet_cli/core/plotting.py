"""Whether charts can be drawn: the plotting library is an extra. Imports none of it."""

from __future__ import annotations

import importlib.util

HINT = "pip install 'alexnet-cli[charts]'"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None
