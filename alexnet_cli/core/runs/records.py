"""The records of a training run (metrics.jsonl, metrics.csv) and the sums that they are made from. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from alexnet_cli.core.files import read_file
from alexnet_cli.errors import DataError

Event = Literal["start", "step", "validation", "checkpoint", "warning", "end"]
CSV_COLUMNS = (
    "epoch", "step", "lr", "train_loss", "train_top1_error", "loss", "top1_error", "top5_error", "images_per_second",
    "specialization", "chroma_tower1", "chroma_tower2",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One event: a line of metrics.jsonl. `epoch` counts from 1, `step` is the number of steps done, errors are 0..1.

    `data_wait` is the share of the time spent waiting for images; `loaded` and `initialized` are names of parameters.
    """

    event: Event
    epoch: int
    step: int
    loss: float | None = None
    lr: float | None = None
    top1_error: float | None = None
    top5_error: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    train_loss: float | None = None
    train_top1_error: float | None = None
    specialization: float | None = None
    chroma_tower1: float | None = None
    chroma_tower2: float | None = None
    data: str | None = None
    recipe: str | None = None
    classes: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    best: bool | None = None
    path: str | None = None
    loaded: list[str] | None = None
    initialized: list[str] | None = None
    text: str | None = None
    hint: str | None = None
    reason: str | None = None

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{key}={value!r}' for key, value in self.as_dict().items())})"

    def as_dict(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class RunningMetrics:
    """Sums over training images. `seconds` is wall time, `waited` the part of it spent waiting for data."""

    images: int = 0
    loss: float = 0.0
    errors: int = 0
    top5_errors: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, other: RunningMetrics) -> None:
        """Add the sums of `other` to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def images_per_second(self) -> float:
        """Training speed; 0 before the first step."""
        return self.images / self.seconds if self.seconds else 0.0


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to metrics.jsonl; a last line cut short by a full disk is ended first. Raises OSError."""
    line = json.dumps(dict(record), separators=(",", ":")) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without lines that are no JSON object. A missing file has no records.

    Raises:
        DataError: the file is too large or not a regular file.
    """
    try:
        content = read_file(path) if path.exists() else b""
    except DataError as error:
        raise DataError(f"{path} cannot be read: {error}", "move it away") from error
    records = []
    for line in content.decode("utf-8", "replace").splitlines():
        with suppress(ValueError, TypeError, RecursionError):
            records.append(dict(json.loads(line)))
    return records


def drop_later_records(records: Iterable[Mapping[str, Any]], step: int, epoch: int) -> list[Mapping[str, Any]]:
    """The records to keep when a training resumes after `step` in `epoch`, which will be validated again."""
    kept = [r for r in records if get_int(r, "step") <= step and r.get("event") != "end"]
    return [r for r in kept if r.get("event") != "validation" or get_int(r, "epoch") < epoch]


def get_failure(about: Mapping[str, Any]) -> tuple[str, str]:
    """Error and hint of a failed run, from its run.json; both are empty if it did not fail or has no message."""
    if about.get("status") != "failed":
        return "", ""
    what, hint = (value if isinstance(value, str) else "" for value in (about.get("error"), about.get("hint")))
    return what, hint


def explain_missing_checkpoint(path: Path, about: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Error and hint for a run that has no checkpoint. `name` is quoted for a shell."""
    error, hint = get_failure(about)
    if error:
        return f"{path} has no checkpoint because the run failed: {error}", hint
    resume = f"alexnet train --resume {name}"
    if about.get("status") == "finished":
        return f"{path} has lost its links checkpoints/best and checkpoints/last", f"restore them with: {resume}"
    hints = {"failed": f"the run failed; start it again: {resume}", "interrupted": f"the run was stopped; {resume}"}
    return f"{path} has no checkpoint yet", hints.get(str(about.get("status")), "wait until the first one is saved")


def epochs_begun(records: Iterable[Mapping[str, Any]]) -> int:
    """The number of epochs that have been begun and saved or validated."""
    return max((get_int(r, "epoch") for r in records if r.get("event") in ("validation", "checkpoint")), default=0)


def get_int(record: Mapping[str, Any], key: str) -> int:
    """An integer of a record read from a file; 0 if it is missing or something else."""
    value = record.get(key)
    return value if type(value) is int else 0


def format_csv(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of metrics.csv: one row per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(r for r in records if r.get("event") == "validation")
    return text.getvalue()
