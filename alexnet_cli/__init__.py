"""AlexNet (Krizhevsky, Sutskever, Hinton 2012): the faithful network in two towers, as a library and a command line.

    import alexnet_cli as alexnet
    net = alexnet.load("runs/mine")

The names below load torch when they are first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = (
    "AlexNet", "AlexNetError", "Recipe", "evaluate", "export", "load", "open_dataset", "prepare", "recipes", "train",
)  # fmt: skip

if TYPE_CHECKING:
    from alexnet_cli.api import (
        AlexNet,
        AlexNetError,
        Recipe,
        evaluate,
        export,
        load,
        open_dataset,
        prepare,
        recipes,
        train,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from alexnet_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
