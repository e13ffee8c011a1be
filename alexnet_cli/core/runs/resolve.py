"""Which file `-w` means, and what is known about it: its run, its epoch, its training data. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.runs.records import failure, unsaved
from alexnet_cli.core.runs.run import MODEL, ONNX, Run, follow_latest, list_runs, runs_root
from alexnet_cli.errors import AlexNetError, WeightsError


def find_weights(spec: str | None, suffixes: Sequence[str] = (".safetensors",)) -> Path:
    """The file that -w means: a run's name or directory, a checkpoint directory, or a model file.

    A run stands for its best checkpoint (the last one before the first validation); where `suffixes` lists
    ".onnx" before ".safetensors", for its alexnet.onnx. None stands for runs/latest.

    Raises:
        WeightsError: there is no such file, or it is of a kind this command cannot use.
    """
    if spec == "":
        raise WeightsError("-w is empty", list_runs())
    path = follow_latest(runs_root() / (spec or "latest"))
    if spec is not None and not (path / "run.json").is_file() and Path(spec).exists():
        path = Path(spec)
    if path.is_file():
        if path.suffix not in suffixes:
            hint = f"this takes a run, a checkpoint folder or a {' or '.join(suffixes)} file"
            if path.suffix != ".onnx":
                hint += "; weights of another program: alexnet import-weights"
            elif run := find_run_folder(path):
                hint += f": -w {Run(run).quoted}"
            raise WeightsError(f"{path} is not a {' or '.join(suffixes)} file", hint)
        return path
    if spec is None and not path.exists():
        which = "no newest run" if any(runs_root().glob("*/run.json")) else "no run yet"
        raise WeightsError(f"there is {which} in {runs_root().absolute()} to take weights from", list_runs())
    checkpoints = [f"checkpoints/{name}/{MODEL}" for name in ("best", "last")]
    inside = {".onnx": (ONNX,), ".safetensors": (MODEL, *checkpoints)}
    for suffix in suffixes:
        for name in inside[suffix]:
            if (path / name).is_file():
                return path / name
    if (path / "run.json").is_file():
        raise WeightsError(*unsaved(path, Run(path).about, Run(path).quoted))
    none = f"{path} is no run, checkpoint folder or model file"
    raise WeightsError(none if path.exists() else f"no run, folder or file is called {spec}", list_runs(spec or ""))


def find_training_data(path: Path) -> str | None:
    """The prepared data set that the run of a weights file was trained on, if it still exists."""
    run = find_run_folder(path)
    data = Run(run).about.get("data_path") if run else None
    return str(shorten_path(Path(data))) if isinstance(data, str) and os.path.isdir(data) else None


def shorten_path(path: Path) -> Path:
    """A path relative to the current folder if it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def find_run_folder(path: Path) -> Path | None:
    """The run directory that contains a weights file, or None."""
    for parent in path.parents:
        if (parent / "run.json").is_file():
            return parent
    return None


def describe_weights(path: Path, info: Mapping[str, Any]) -> str:
    """A line such as "runs/a/alexnet.onnx · epoch 15 (best)".

    `info` is the metadata of the file; outside a run folder it may name the run that it came from.
    """
    run, words = find_run_folder(path), [str(path)]
    if run is None and info.get("run"):
        words.append(f"run {info['run']}")
    if "epoch" in info:
        words.append(f"epoch {info['epoch']}{_best_or_last(run, info.get('step')) if run else ''}")
    return " · ".join(words)


def _best_or_last(run: Path, step: Any) -> str:
    """Returns " (best)" or " (last)" if that checkpoint of the run has this step, otherwise ""."""
    for name in ("best", "last"):
        checkpoint = run / "checkpoints" / name
        if isinstance(step, int) and checkpoint.exists() and checkpoint.resolve().name == f"{step:08}":
            return f" ({name})"
    return ""


def is_best(path: Path) -> bool:
    """Whether a weights file is the best checkpoint of its run; true if there is no run or no best one yet."""
    run = find_run_folder(path)
    best = run / "checkpoints" / "best" if run else None
    return best is None or not best.exists() or path.resolve().parent == best.resolve()


def is_training_data(path: Path, dataset: Dataset) -> bool:
    """Whether the run of a weights file was trained on a prepared data set; true if there is no run."""
    run = find_run_folder(path)
    about = Run(run).about if run else {"data_hash": dataset.hash}
    return about.get("data_hash") == dataset.hash or about.get("data_path") == str(dataset.path.resolve())


def describe_unfinished_run(path: Path) -> str:
    """A sentence if the run of a weights file has not finished, otherwise ""."""
    folder = find_run_folder(path)
    try:
        run = Run(folder) if folder else None
        if run is None or run.about.get("status", "finished") == "finished":
            return ""
        epochs, records, (what, _) = run.recipe.epochs, run.records(), failure(run.about)
    except AlexNetError:  # a damaged run.json does not concern its weights
        return ""
    begun = (record.get("epoch") for record in records if record.get("event") != "start")
    done = max((epoch for epoch in begun if type(epoch) is int), default=0)
    ended = f"failed ({what})" if what else "has not finished"
    return f"the run {ended}: epoch {done} of {epochs} so far; alexnet train --resume {run.quoted} goes on"
