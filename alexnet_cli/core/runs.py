"""The run directory: what a training run leaves on disk, and how `-w` finds weights in it. No torch.

runs/NAME/run.json            status, command line, versions, devices, data set, seed
          recipe.toml         the resolved recipe; `alexnet train --recipe` repeats the run with it
          metrics.jsonl       every record, appended;  metrics.csv: one row per epoch
          checkpoints/STEP/   one checkpoint each;  checkpoints/last, checkpoints/best point to two of them
          alexnet.onnx        the trained network, ready for `alexnet predict`
runs/latest                   points to the newest run
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_cli.core.atomic import point, write_text
from alexnet_cli.core.devices import train_command
from alexnet_cli.core.listing import read_file
from alexnet_cli.core.records import append, read_records, table, unsaved, until
from alexnet_cli.errors import DataError, StorageError, UsageError, WeightsError
from alexnet_cli.recipe import Recipe
from alexnet_cli.recipe_io import load_recipe

MODEL, ONNX = "model.safetensors", "alexnet.onnx"
LARGEST = 2**24  # bytes of run.json and of meta.json, which have some thousands


def runs_root() -> Path:
    """Where runs are kept: ALEXNET_RUNS_DIR, or `runs` in the current folder."""
    return Path(os.environ.get("ALEXNET_RUNS_DIR") or "runs")


@dataclass(frozen=True)
class Run:
    """One run directory. Of several processes that train it, only one `writes`; the others only read."""

    path: Path
    writes: bool = True

    @classmethod
    def create(cls, name: str | None, recipe: Recipe, about: Mapping[str, Any], root: Path | None = None) -> Run:
        """Make the directory of a new run, in `root` or where runs are kept, and point its `latest` to it.

        Raises:
            UsageError: a run of that name is there already, or it is no plain name.
            StorageError: the directory cannot be made.
        """
        if name is not None and not is_plain(name):
            raise UsageError(f"--name {name!r} is not a plain name", "letters, digits, '-' and '_' do well, up to 200")
        root = root or runs_root()
        stem = name or f"{time.strftime('%Y-%m-%d_%H%M%S')}_{recipe.name}"
        path, count = root / stem, 1
        while name is None and path.exists():
            path = root / f"{stem}-{(count := count + 1)}"
        try:
            path.mkdir(parents=True, exist_ok=_unborn(path))
            (path / "checkpoints").mkdir(exist_ok=True)
            write_text(path / "recipe.toml", recipe.to_toml())
            about = {"schema": "alexnet.run/1", "status": "running", **about}
            write_text(path / "run.json", json.dumps(about, indent=2) + "\n")
            point(root / "latest", path)
        except FileExistsError as error:
            way_on = f"continue it with --resume {shlex.quote(str(name))}, choose another --name, or delete the folder"
            raise UsageError(f"a run called {name} is there already: {path}", way_on) from error
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", "set ALEXNET_RUNS_DIR elsewhere") from error
        return cls(path)

    @classmethod
    def open(cls, name: str) -> Run:
        """The run of that name, directory or `latest`; UsageError where there is none."""
        for path in (runs_root() / name, Path(name)):
            if (path / "run.json").is_file():
                return cls(_named(path))
        raise UsageError(f"no run is called {name} in {runs_root()}", _known_runs(name))

    @property
    def name(self) -> str:
        """What -w and --resume call it: such as NAME, or ABLATION/CELL."""
        path, root = self.path.resolve(), runs_root().resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else path.name

    @property
    def quoted(self) -> str:
        """The same for a shell."""
        return shlex.quote(self.name)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return load_recipe(str(self.path / "recipe.toml"))

    @property
    def about(self) -> dict[str, Any]:
        """What run.json says."""
        try:
            return dict(json.loads(read_file(self.path / "run.json", LARGEST)))
        except (OSError, ValueError, TypeError, RecursionError, DataError) as error:
            raise DataError(f"{self.path / 'run.json'} cannot be read: {error}", "start a new run") from error

    @contextmanager
    def storing(self) -> Iterator[None]:
        """While inside: an error of the disk becomes a StorageError with the way on."""
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}", self.way_on()) from error

    def way_on(self) -> str:
        """What to do when the disk fails: it depends on what is left."""
        last = self.checkpoints / "last"
        if not self.path.is_dir():
            return "the folder of the run is gone, or has another name now: start a new run, or --resume that name"
        due = any(record.get("event") == "checkpoint" for record in self.records())
        none = "its checkpoints are gone" if due else "no checkpoint was due yet"
        saved = f"last good checkpoint: {last.resolve()}" if last.exists() else none
        return f"{saved}; free some space, or make it writable, then: alexnet train --resume {self.quoted}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process alone; the kernel lets go however the process ends.

        Raises:
            DataError: another command is training it.
        """
        if not self.writes:
            yield
            return
        with self.storing():
            file = (self.path / ".lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another command is training {self.path}", "wait until it is done") from None
            yield

    def update(self, about: Mapping[str, Any]) -> None:
        """Change some entries of run.json. StorageError where it is gone: what is left then is no run any more."""
        if not self.writes:
            return
        if not (self.path / "run.json").exists():
            raise StorageError(f"{self.path / 'run.json'} is gone", self.way_on())
        with self.storing():
            write_text(self.path / "run.json", json.dumps({**self.about, **about}, indent=2) + "\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        if self.writes:
            with self.storing():
                append(self.path / "metrics.jsonl", record)

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line that a crash cut short is left out."""
        return read_records(self.path / "metrics.jsonl")

    def begin(self, recipe: Recipe, step: int, epoch: int) -> None:
        """Make ready to go on after `step`, in `epoch`: what comes then, and the ONNX file, will be made anew."""
        if not self.writes:
            return
        kept = [json.dumps(r, separators=(",", ":")) + "\n" for r in until(self.records(), step, epoch)]
        with self.storing():
            for file in (self.path / ONNX, *self.path.glob(f".{Path(ONNX).stem}.*.tmp.onnx")):
                file.unlink(missing_ok=True)
            write_text(self.path / "recipe.toml", recipe.to_toml())
            write_text(self.path / "metrics.jsonl", "".join(kept))
        self.write_csv()

    def write_csv(self) -> None:
        """Write metrics.csv anew from the records: one row per epoch."""
        if not self.writes:
            return
        temporary = self.path / ".metrics.csv.tmp"
        with self.storing():
            temporary.write_text(table(self.records()), encoding="utf-8")
            temporary.replace(self.path / "metrics.csv")


def is_plain(name: str) -> bool:
    """Whether a name can be that of a folder on any disk, and be read in a message."""
    odd = {"", ".", "..", "latest"}
    return name not in odd and Path(name).name == name and name.isprintable() and len(os.fsencode(name)) <= 200


def _unborn(path: Path) -> bool:
    """Whether a folder is what a run leaves that was killed while it was being made."""
    own = path.is_dir() and not path.is_symlink() and not any((path / "checkpoints").glob("*"))
    return own and all(
        entry.name in {"checkpoints", "recipe.toml", ".lock"}
        or re.fullmatch(r"\.(recipe\.toml|run\.json)\..*tmp(\.\w+)?", entry.name)
        for entry in path.iterdir()
    )


def _known_runs(typed: str = "") -> str:
    """What runs there are, after the one that was likely meant: the newest of that recipe, or a name much like it."""
    from difflib import get_close_matches  # which only an error needs

    names = sorted(p.parent.name for p in runs_root().glob("*/run.json") if p.parent.name != "latest")
    if not names:
        return f"train one first: {train_command()}"
    near = [name for name in names if name.endswith(f"_{typed}")][-1:] or get_close_matches(typed, names, 1)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{f'did you mean {near[0]}? ' if near else ''}there are: {', '.join(names[-5:])}{more}"


def _named(path: Path) -> Path:
    """The run that a pointer such as runs/latest means at this moment."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def find_weights(spec: str | None, suffixes: Sequence[str] = (".safetensors",)) -> Path:
    """The file that -w means: a run's name or directory, a checkpoint directory, or a model file.

    A run stands for its best checkpoint (the last one before the first validation); where `suffixes` lists
    ".onnx" before ".safetensors", for its alexnet.onnx. None stands for runs/latest.

    Raises:
        WeightsError: there is no such file, or it is of a kind this command cannot use.
    """
    if spec == "":
        raise WeightsError("-w names nothing", _known_runs())
    path = _named(runs_root() / (spec or "latest"))
    if spec is not None and not (path / "run.json").is_file() and Path(spec).exists():
        path = Path(spec)
    if path.is_file():
        if path.suffix not in suffixes:
            hint = f"this takes a run, a checkpoint folder or a {' or '.join(suffixes)} file"
            if path.suffix != ".onnx":
                hint += "; another program's network: alexnet import-weights"
            elif run := run_of(path):
                hint += f": -w {Run(run).quoted}"
            raise WeightsError(f"{path} is not a {' or '.join(suffixes)} file", hint)
        return path
    if spec is None and not path.exists():
        which = "no newest run" if any(runs_root().glob("*/run.json")) else "no run yet"
        raise WeightsError(f"there is {which} in {runs_root().absolute()} to take weights from", _known_runs())
    checkpoints = [f"checkpoints/{name}/{MODEL}" for name in ("best", "last")]
    inside = {".onnx": (ONNX,), ".safetensors": (MODEL, *checkpoints)}
    for suffix in suffixes:
        for name in inside[suffix]:
            if (path / name).is_file():
                return path / name
    if (path / "run.json").is_file():
        raise WeightsError(*unsaved(path, Run(path).about, Run(path).quoted))
    none = f"{path} is no run, checkpoint folder or model file"
    raise WeightsError(none if path.exists() else f"no run, folder or file is called {spec}", _known_runs(spec or ""))


def trained_on(path: Path) -> str | None:
    """The prepared data set that the run of a weights file was trained on, if it is still there."""
    run = run_of(path)
    data = Run(run).about.get("data_path") if run else None
    return str(typed(Path(data))) if isinstance(data, str) and os.path.isdir(data) else None  # whatever it is


def typed(path: Path) -> Path:
    """A path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_of(path: Path) -> Path | None:
    """The run directory that a weights file lies in, or None."""
    for parent in path.parents:
        if (parent / "run.json").is_file():
            return parent
    return None
