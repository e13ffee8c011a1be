"""What a training run tells: its records, and the sums that they are made from. No torch."""

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
COLUMNS = (
    "epoch", "step", "lr", "train_loss", "train_top1_error", "loss", "top1_error", "top5_error", "images_per_second",
    "specialization", "chroma_tower1", "chroma_tower2",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What happened: a line of metrics.jsonl. Epochs count from 1; `step` is the steps done; errors are shares."""

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
    afresh: list[str] | None = None
    text: str | None = None
    hint: str | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class RunningMetrics:
    """Sums over training images; `seconds` and `waited` (for data) are wall time."""

    images: int = 0
    loss: float = 0.0
    errors: int = 0
    top5_errors: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, other: RunningMetrics) -> None:
        """Add the sums of another."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a metrics.jsonl, after the end of one that a full disk has cut short. Raises OSError."""
    line = json.dumps(dict(record), separators=(",", ":")) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, none if it is not there; what is no record, such as a line cut short, is left out.

    Raises:
        DataError: it is larger than any training's, or no regular file.
    """
    try:
        content = read_file(path) if path.exists() else b""
    except DataError as error:
        raise DataError(f"{path} cannot be read: {error}", "move it away") from error
    found = []
    for line in content.decode("utf-8", "replace").splitlines():
        with suppress(ValueError, TypeError, RecursionError):
            found.append(dict(json.loads(line)))
    return found


def until(records: Iterable[Mapping[str, Any]], step: int, epoch: int) -> list[Mapping[str, Any]]:
    """Those that stay when a training goes on after `step`, in `epoch`, whose validation may have been cut short."""
    kept = [r for r in records if count(r, "step") <= step and r.get("event") != "end"]
    return [r for r in kept if r.get("event") != "validation" or count(r, "epoch") < epoch]


def failure(about: Mapping[str, Any]) -> tuple[str, str]:
    """Why a run failed, and what to do about it, as its run.json has them; empty where it did not fail or say why."""
    found = [about.get(key) if about.get("status") == "failed" else None for key in ("error", "hint")]
    what, hint = (value if isinstance(value, str) else "" for value in found)
    return what, hint


def unsaved(path: Path, about: Mapping[str, Any], name: str) -> tuple[str, str]:
    """What to say where a run of that name has no checkpoint, and what to do about it."""
    what, hint = failure(about)
    if what:
        return f"{path} has no checkpoint, since the run failed: {what}", hint
    going_on = f"alexnet train --resume {name}"
    ways = {"failed": f"the run failed; {going_on} begins it anew", "interrupted": f"the run was stopped; {going_on}"}
    return f"{path} holds no checkpoint yet", ways.get(
        str(about.get("status")), "let it train until the first one is saved"
    )


def epochs_done(records: Iterable[Mapping[str, Any]]) -> int:
    """How many epochs have been validated."""
    return max((count(r, "epoch") for r in records if r.get("event") == "validation"), default=0)


def count(record: Mapping[str, Any], key: str) -> int:
    """A whole number out of a record, or 0 where it has none: a file can hold anything."""
    value = record.get(key)
    return value if type(value) is int else 0


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """What metrics.csv holds: a row per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(r for r in records if r.get("event") == "validation")
    return text.getvalue()
