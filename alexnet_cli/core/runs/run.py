"""The run directory: what a training writes. No torch.

runs/NAME/run.json            status, command line, versions, devices, data set, seed
          recipe.toml         the resolved recipe; `alexnet train --recipe` repeats the run with it
          metrics.jsonl       one record per line, appended;  metrics.csv: one row per epoch
          conv1/EPOCH.npy     the first-layer filters before the first step (0000) and after each epoch
          checkpoints/STEP/   one checkpoint each;  checkpoints/last, checkpoints/best link to two of them
          alexnet.onnx        the trained network, ready for `alexnet predict`
runs/latest                   points to the newest run
runs/tensorboard/NAME/        TensorBoard's files of a run, if it was trained with --tensorboard
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.devices import suggest_train_command
from alexnet_cli.core.files import (
    follow_text_links,
    lock_file,
    read_file,
    read_link,
    replace_file,
    replace_link,
    write_text,
)
from alexnet_cli.core.runs.records import Record, append_record, drop_later_records, format_csv, get_int, read_records
from alexnet_cli.errors import DataError, Stopped, StorageError, UsageError, format_error, suggest_name
from alexnet_cli.recipe import Recipe
from alexnet_cli.recipe_io import load_recipe

MODEL, ONNX = "model.safetensors", "alexnet.onnx"
RUNNING = {"status": "running", "reason": None, "error": None, "hint": None}
"""Entries of run.json while a training runs."""
LARGEST_JSON = 2**24  # bytes of run.json and meta.json, which have some thousands


def runs_root() -> Path:
    """The folder of all runs: ALEXNET_RUNS_DIR, or `runs` in the current folder."""
    return Path(os.environ.get("ALEXNET_RUNS_DIR") or "runs")


@dataclass(frozen=True)
class Run:
    """One run directory. Of several processes that train it, only the one with `writes` changes it."""

    path: Path
    writes: bool = True

    @classmethod
    def create(cls, name: str | None, recipe: Recipe, about: Mapping[str, Any], root: Path | None = None) -> Run:
        """Create the directory of a new run in `root` (default: `runs_root()`) and point `latest` to it.

        Raises:
            UsageError: the name is taken, or is not a plain folder name.
            StorageError: the directory cannot be created.
        """
        if name is not None and not is_plain_name(name):
            raise UsageError(
                f"--name {name!r} is not a plain folder name", "use at most 200 letters, digits, '-' and '_'"
            )
        root = root or runs_root()
        stem = name or f"{time.strftime('%Y-%m-%d_%H%M%S')}_{recipe.name}"
        path, number = root / stem, 1
        while name is None and path.exists():
            path = root / f"{stem}-{(number := number + 1)}"
        try:
            path.mkdir(parents=True, exist_ok=_is_abandoned(path))
            (path / "checkpoints").mkdir(exist_ok=True)
            write_text(path / "recipe.toml", recipe.to_toml())
            about = {"schema": "alexnet.run/1", "status": "running", **about}
            write_text(path / "run.json", json.dumps(about, indent=2) + "\n")
            replace_link(root / "latest", path)
        except FileExistsError as error:
            hint = f"continue it with --resume {shlex.quote(str(name))}, choose another --name, or delete the folder"
            raise UsageError(f"{path} already exists", hint) from error
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror}", "set ALEXNET_RUNS_DIR to a folder that can be written"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, name: str) -> Run:
        """The run with this name or path, or `latest`. Raises UsageError if there is none."""
        for path in (find_run(name), follow_text_links(Path(name))):
            if (path / "run.json").is_file():
                return cls(read_link(path) or path)
        raise UsageError(f"there is no run {name} in {runs_root()}", list_runs(name))

    @property
    def name(self) -> str:
        """The name, such as NAME or ABLATION/CELL; of a run outside the folder of runs, the name of its own folder."""
        path, root = self.path.resolve(), runs_root().resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else path.name

    @property
    def quoted(self) -> str:
        """What to give to -w and --resume, quoted for a shell: the name, or the path outside the folder of runs."""
        is_inside = self.path.resolve().is_relative_to(runs_root().resolve())
        return shlex.quote(self.name if is_inside else str(self.path))

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def kept_filters(self) -> dict[int, Path]:
        """The files of `keep_filters` by epoch, in order."""
        files = {int(p.stem): p for p in (self.path / "conv1").glob("*.npy") if p.stem.isascii() and p.stem.isdigit()}
        return dict(sorted(files.items()))

    @property
    def recipe(self) -> Recipe:
        """The recipe in recipe.toml."""
        return load_recipe(str(self.path / "recipe.toml"))

    @property
    def about(self) -> dict[str, Any]:
        """The content of run.json. Raises DataError if it cannot be read."""
        try:
            return dict(json.loads(read_file(self.path / "run.json", LARGEST_JSON)))
        except (OSError, ValueError, TypeError, RecursionError, DataError) as error:
            raise DataError(f"{self.path / 'run.json'} cannot be read: {error}", "start a new run") from error

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Turn an OSError inside the block into a StorageError that says how to continue."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror or error}", self.storage_hint()
            ) from error

    def storage_hint(self) -> str:
        """What to do after a disk error, depending on what is left of the run."""
        last = self.checkpoints / "last"
        last = read_link(last) or last
        if not self.path.is_dir():
            return "the run folder was deleted or renamed: start a new run, or give its new name to --resume"
        if last.exists():
            saved = f"last good checkpoint: {last.resolve()}"
        elif any(record.get("event") == "checkpoint" for record in self.records()):
            saved = "its checkpoints are missing"
        else:
            saved = "no checkpoint was saved yet"
        return f"{saved}; free some space or make it writable, then: alexnet train --resume {self.quoted}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process. The kernel releases the lock, however the process ends.

        Raises:
            DataError: another command is training it.
        """
        with ExitStack() as stack:
            if self.writes:
                with self.storing():
                    stack.enter_context(lock_file(self.path / ".lock", f"another command is training {self.path}"))
            yield

    def update(self, about: Mapping[str, Any]) -> None:
        """Change some entries of run.json. Raises StorageError if the file is missing."""
        if not self.writes:
            return
        if not (self.path / "run.json").exists():
            raise StorageError(f"{self.path / 'run.json'} is missing", self.storage_hint())
        with self.storing():
            write_text(self.path / "run.json", json.dumps({**self.about, **about}, indent=2) + "\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        if self.writes:
            with self.storing():
                append_record(self.path / "metrics.jsonl", record)

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line cut short by a crash is left out."""
        return read_records(self.path / "metrics.jsonl")

    def keep_filters(self, epoch: int, weight: npt.NDArray[np.float32]) -> None:
        """Write the first-layer filters after `epoch` (0: before the first step), all towers, atomically.

        A disk that is full or cannot be written costs this file alone: no training needs it.
        """
        file = self.path / "conv1" / f"{epoch:04}.npy"
        if self.writes:
            with suppress(OSError):
                file.parent.mkdir(exist_ok=True)
                with replace_file(file) as temporary:
                    np.save(temporary, weight)

    def begin(self, recipe: Recipe, step: int, epoch: int) -> None:
        """Prepare to train on from `step` in `epoch`: write the recipe, delete what is later and the ONNX file."""
        if not self.writes:
            return
        later = [file for number, file in self.kept_filters.items() if number >= epoch]
        with suppress(OSError):
            for file in (*later, *(self.path / "conv1").glob(".*.tmp.npy")):
                file.unlink()
        kept = drop_later_records(self.records(), step, epoch)
        lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in kept]
        with self.storing():
            for file in (self.path / ONNX, *self.path.glob(f".{Path(ONNX).stem}.*.tmp.onnx")):
                file.unlink(missing_ok=True)
            write_text(self.path / "recipe.toml", recipe.to_toml())
            write_text(self.path / "metrics.jsonl", "".join(lines))
        self.write_csv()

    def write_csv(self) -> None:
        """Write metrics.csv from the records: one row per epoch."""
        if self.writes:
            with self.storing():
                write_text(self.path / "metrics.csv", format_csv(self.records()))


def find_run(name: str) -> Path:
    """The folder that a run of this name has or would have. `latest` is the newest run if that link is missing."""
    path = follow_text_links(runs_root() / name)
    if name == "latest" and not path.exists():  # a link that was not copied along, or whose run was deleted
        path = next(iter(_sort_runs()[-1:]), path)
    return path


def _sort_runs() -> list[Path]:
    """The folders of the runs, the newest last, without `latest`."""
    files = [file for file in runs_root().glob("*/run.json") if file.parent.name != "latest"]
    return [file.parent for file in sorted(files, key=lambda file: (file.stat().st_mtime, file))]


def is_plain_name(name: str) -> bool:
    """Whether a run may have this name: a printable folder name without a path."""
    reserved = {"", ".", "..", "latest", "tensorboard"}
    is_plain = Path(name).name == name and name.isprintable() and name.lower() not in reserved
    return is_plain and len(os.fsencode(name)) <= 200


def _is_abandoned(path: Path) -> bool:
    """Whether `path` was left by a run that was killed while it was being created, and holds nothing else."""
    if not path.is_dir() or path.is_symlink() or any((path / "checkpoints").glob("*")):
        return False
    return all(
        entry.name in {"checkpoints", "recipe.toml", ".lock"}
        or re.fullmatch(r"\.(recipe\.toml|run\.json)\..*tmp(\.\w+)?", entry.name)
        for entry in path.iterdir()
    )


def list_runs(typed: str = "") -> str:
    """A hint that lists the newest runs, after the one that `typed` probably means."""
    names = [path.name for path in _sort_runs()]
    if not names:
        return f"train one first: {suggest_train_command()}"
    guess = suggest_name(typed, names, [name for name in names if name.endswith(f"_{typed}")][-1:])
    guess = guess or "did you mean latest? " * (typed in ("last", "best"))  # names of checkpoints
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{guess}existing runs: {', '.join(names[-5:])}{more}"


@contextmanager
def record_status(run: Run) -> Iterator[None]:
    """Lock the run for a training inside the block, and keep its status, also after an error or a Ctrl-C."""
    with run.locked():
        try:
            run.update(RUNNING)
            yield
            if run.about["status"] == "running":
                reason = run.records()[-1].get("reason")
                run.update({"status": "finished" if reason == "finished" else "interrupted", "reason": reason})
        except (GeneratorExit, KeyboardInterrupt) as stop:
            hint = f"alexnet train --resume {run.quoted}"
            stopped = Stopped("stopped: progress since the last checkpoint is lost", hint, 130)
            reason = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "stopped"
            record_failure(run, stopped, reason, "interrupted")
            raise
        except BaseException as error:
            record_failure(run, error)
            raise


def record_failure(run: Run, error: BaseException, reason: str = "error", status: str = "failed") -> Record | None:
    """Write an error's message and hint to run.json and to a last record, as far as the disk allows.

    Returns that record; None if the run is not running or already has an end record.
    """
    what, hint, _ = format_error(error)
    try:
        if run.about.get("status") != "running":
            return None
        records = run.records()
    except DataError:
        records = []
    with suppress(StorageError, DataError):  # the error that stopped the run matters more
        run.update({"status": status, "reason": reason, "error": what, "hint": hint})
    last = records[-1] if records else {}
    if last.get("event") == "end":
        return None
    epoch, step = max(1, get_int(last, "epoch")), get_int(last, "step")
    end = Record("end", epoch, step, path=str(run.path), reason=reason, text=what, hint=hint or None)
    with suppress(StorageError):
        run.log(end.as_dict())
    return end
