"""The numbers of a run for TensorBoard, in runs/NAME/tensorboard; needs the extra `tensorboard`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from alexnet_cli.core.records import Record, count
from alexnet_cli.core.runs import Run
from alexnet_cli.errors import MissingError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

State = Literal["whole", "behind"]  # of a run's events; behind: some are missing
INSTALL = "pip install 'alexnet-cli[tensorboard]'"

SCALARS = {
    "step": ("loss", "top1_error", "top5_error", "lr", "images_per_second", "data_wait"),
    "validation": (
        "loss", "top1_error", "top5_error", "lr", "train_loss", "train_top1_error", "images_per_second",
        "specialisation", "chroma_tower1", "chroma_tower2",
    ),
}  # fmt: skip
GROUP = {"step": "train", "validation": "validation"}


def installed() -> bool:
    """Whether the package tensorboard is there."""
    return importlib.util.find_spec("tensorboard") is not None


def check_installed() -> None:
    """Raise MissingError where the package tensorboard is not installed."""
    if not installed():
        raise MissingError("--tensorboard needs the package tensorboard", INSTALL)


def states(run: Run | None, asked: bool) -> tuple[State | None, State | None]:
    """What the events are to become, and what run.json says of them: None if nobody asked for them, now or before."""
    before = run.about.get("tensorboard") if run else None
    if not asked and not before:
        return None, None
    return "whole" if installed() else "behind", before


def recorded(run: Run, records: Iterator[Record], before: State | None) -> Iterator[Record]:
    """The same records, each one's numbers being written on its way; those after the step of "start" are superseded.

    Where the events were not whole `before`, or are gone, those of the run's records are written first; only then
    does run.json call them whole.

    Raises:
        StorageError: they cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    start, folder = next(records), run.path / "tensorboard"
    missed = [] if before == "whole" and folder.is_dir() else run.records()
    with run.storing():
        writer = SummaryWriter(str(folder), purge_step=1 if missed else start.step + 1)
        for old in missed:
            _write(writer, old)
        writer.flush()
    run.update({"tensorboard": "whole"})
    yield start
    try:
        for record in records:
            with run.storing():
                _write(writer, record.as_dict())
                if record.event in {"validation", "checkpoint"}:
                    writer.flush()
            yield record
    finally:
        with run.storing():
            writer.close()


def _write(writer: SummaryWriter, record: Mapping[str, Any]) -> None:
    """The numbers of a record."""
    event = record.get("event")
    for name in SCALARS.get(str(event), ()):
        if isinstance(value := record.get(name), int | float):
            writer.add_scalar(f"{GROUP[str(event)]}/{name}", value, count(record, "step"))
