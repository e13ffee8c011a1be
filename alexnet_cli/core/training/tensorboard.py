"""Write a run's metrics for TensorBoard to runs/tensorboard/NAME; needs the extra `tensorboard`.

Not into the run: TensorBoard follows links, so that it would show the newest run a second time as runs/latest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import MissingError

INSTALL = "pip install 'alexnet-cli[tensorboard]'"
SCALARS = {
    "step": ("loss", "top1_error", "top5_error", "lr", "images_per_second", "data_wait"),
    "validation": (
        "loss", "top1_error", "top5_error", "lr", "train_loss", "train_top1_error", "images_per_second",
        "specialization", "chroma_tower1", "chroma_tower2",
    ),
}  # fmt: skip
GROUP = {"step": "train", "validation": "validation"}


def is_installed() -> bool:
    """Whether the package tensorboard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def check_installed() -> None:
    """Raise MissingError if the package tensorboard is not installed."""
    if not is_installed():
        raise MissingError("--tensorboard needs the package tensorboard", INSTALL)


def events_folder(run: Run) -> Path:
    """The folder of a run's event files."""
    return run.path.parent / "tensorboard" / run.path.name


def write_scalars(run: Run, records: Iterator[Record]) -> Iterator[Record]:
    """Write the metrics of each record and pass it on. Points after the step of the first record are overwritten.

    Raises:
        StorageError: the files cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    start = next(records)
    with run.storing():
        writer = SummaryWriter(str(events_folder(run)), purge_step=start.step + 1)
    yield start
    try:
        for record in records:
            with run.storing():
                for name in SCALARS.get(record.event, ()):
                    if (value := getattr(record, name)) is not None:
                        writer.add_scalar(f"{GROUP[record.event]}/{name}", value, record.step)
                if record.event in {"validation", "checkpoint"}:
                    writer.flush()
            yield record
    finally:
        with run.storing():
            writer.close()
