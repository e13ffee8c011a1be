"""Options that several commands share, each said once."""

from typing import Annotated, Literal

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.", show_default=False)]
QuietFlag = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing on stderr but warnings and errors.", show_default=False)
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", "-w", metavar="W", help="A run, a checkpoint folder or a model file. [default: the newest run]"
    ),
]
_PREPARED = "A prepared data set: its folder, or its name under prepared/."
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="D", help=f"{_PREPARED} [default: the only one, or the newest]")
]
OwnDataOption = Annotated[  # of commands that take weights
    str | None,
    typer.Option(
        "--data",
        metavar="D",
        help=f"{_PREPARED} [default: the one that the weights were trained on; else the only one, or the newest]",
    ),
]
BatchOption = Annotated[int | None, typer.Option("--batch-size", "-b", min=1, help="Images at a time.")]
GpusOption = Annotated[
    str | None, typer.Option("--gpus", metavar="IDS", help="0, all or none. [default: the first GPU, if there is one]")
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="IDS",
        help="0; or 0,1 for a tower each; 0,1,2,3 for two pairs; all; none. [default: the first GPU, if there is one]",
    ),
]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Threads that decode pictures. [default: one per core]")
]


def _one_or_ten(views: int) -> int:
    if views not in (1, 10):
        raise typer.BadParameter("there are 1, the centre, and 10, the paper's")
    return views


ViewsOption = Annotated[
    int, typer.Option("--views", callback=_one_or_ten, help="1: the centre; 10: corners, centre and their mirrors.")
]
Parallel = Literal["auto", "tower", "data", "hybrid"]
Precision = Literal["fp32", "tf32", "bf16"]
