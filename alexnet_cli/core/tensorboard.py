"""The numbers of a run for TensorBoard, in runs/NAME/tensorboard; needs the extra `tensorboard`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from alexnet_cli.core.records import Record
from alexnet_cli.core.runs import Run
from alexnet_cli.errors import MissingError

SCALARS = {
    "step": ("loss", "top1_error", "top5_error", "lr", "images_per_second", "data_wait"),
    "validation": (
        "loss", "top1_error", "top5_error", "lr", "train_loss", "train_top1_error", "images_per_second",
        "specialisation", "chroma_tower1", "chroma_tower2",
    ),
}  # fmt: skip
GROUP = {"step": "train", "validation": "validation"}


def check_installed() -> None:
    """Raise MissingError where the package tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingError("--tensorboard needs the package tensorboard", "pip install 'alexnet-cli[tensorboard]'")


def recorded(run: Run, records: Iterator[Record]) -> Iterator[Record]:
    """The same records, each one's numbers being written on its way; those after the step of "start" are superseded.

    Raises:
        StorageError: they cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    start = next(records)
    with run.storing():
        writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=start.step + 1)
    yield start
    try:
        for record in records:
            with run.storing():
                for name in SCALARS.get(record.event, ()):
                    if (value := getattr(record, name)) is not None:
                        writer.add_scalar(f"{GROUP[record.event]}/{name}", value, record.step)
                if record.event == "validation":
                    writer.flush()
            yield record
    finally:
        with run.storing():
            writer.close()
