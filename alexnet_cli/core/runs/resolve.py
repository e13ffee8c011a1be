"""Resolve `-w` to a file, and find the run, epoch and training data of that file. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_cli.core.data.shards import RECORD, ROOT, Dataset, list_datasets
from alexnet_cli.core.files import follow_text_links, hash_file, read_link
from alexnet_cli.core.runs.records import explain_missing_checkpoint, get_failure, get_int
from alexnet_cli.core.runs.run import MODEL, ONNX, Run, find_run, list_runs, runs_root
from alexnet_cli.errors import AlexNetError, WeightsError


def find_weights(spec: str | None, suffixes: Sequence[str] = (".safetensors",)) -> Path:
    """The file that -w means. `spec` is a run's name or directory, a checkpoint directory, or a model file.

    A run means its best checkpoint, before the first validation its last one; if `suffixes` lists ".onnx" first, its
    alexnet.onnx. None means runs/latest.

    Raises:
        WeightsError: there is no such file, or the command cannot use this kind of file.
    """
    if spec == "":
        raise WeightsError("-w is empty", list_runs())
    path = find_run(spec or "latest")
    path = read_link(path) or path
    typed = follow_text_links(Path(spec or ""))
    if spec is not None and not (path / "run.json").is_file() and typed.exists():
        path = typed
    if path.is_file():
        if path.suffix not in suffixes:
            hint = f"give a run, a checkpoint folder or a {' or '.join(suffixes)} file"
            if path.suffix != ".onnx":
                hint += "; to convert weights of another program: alexnet import-weights"
            elif run := find_run_folder(path):
                hint += f": -w {Run(run).quoted}"
            raise WeightsError(f"{path} is not a {' or '.join(suffixes)} file", hint)
        return path
    if spec is None and not path.exists():
        raise WeightsError(f"there is no run in {runs_root().absolute()}", list_runs())
    checkpoints = [f"checkpoints/{name}/{MODEL}" for name in ("best", "last")]
    inside = {".onnx": (ONNX,), ".safetensors": (MODEL, *checkpoints)}
    for suffix in suffixes:
        for name in inside[suffix]:
            if (file := follow_text_links(path / name)).is_file():
                return file
    if (path / "run.json").is_file():
        raise WeightsError(*explain_missing_checkpoint(path, Run(path).about, Run(path).quoted))
    if path.exists():
        raise WeightsError(f"{path} is not a run, checkpoint folder or model file", list_runs(spec or ""))
    raise WeightsError(f"there is no run, folder or file named {spec}", list_runs(spec or ""))


def find_training_data(path: Path) -> str | None:
    """The prepared data set on which the run of a weights file was trained; None if it no longer exists."""
    run = find_run_folder(path)
    data = find_recorded_data(Run(run)) if run else None
    return str(data) if data else None


def find_recorded_data(run: Run) -> Path | None:
    """The prepared data set that run.json names. None if it is neither there nor, with the same hash, under prepared/.

    It is under prepared/, here or in a folder that the run is in, if the whole project was moved.
    """
    data = run.about.get("data_path")
    if isinstance(data, str) and os.path.isdir(data):
        return shorten_path(Path(data))
    roots = (ROOT, *(shorten_path(parent / ROOT) for parent in run.path.absolute().parents))
    moved = (root / name for root in roots for name in list_datasets(root))
    return next((path for path in moved if hash_file(path / RECORD) == run.about.get("data_hash")), None)


def shorten_path(path: Path) -> Path:
    """The path relative to the current folder if it is inside it, otherwise the path unchanged."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def find_run_folder(path: Path) -> Path | None:
    """The run directory that contains a weights file, or None."""
    for parent in path.parents:
        if (parent / "run.json").is_file():
            return parent
    return None


def describe_weights(path: Path, info: Mapping[str, Any]) -> str:
    """Describe a weights file in a line such as "runs/a/alexnet.onnx · epoch 15 (best)".

    `info` is the file's metadata, which names its run if the file was moved out of the run folder.
    """
    run, parts = find_run_folder(path), [str(path)]
    if run is None and info.get("run"):
        parts.append(f"run {info['run']}")
    if "epoch" in info:
        parts.append(f"epoch {info['epoch']}{_best_or_last(run, info.get('step')) if run else ''}")
    if "without_tower" in info:
        parts.append(f"without tower {info['without_tower']}")
    return " · ".join(parts)


def _best_or_last(run: Path, step: Any) -> str:
    """Return " (best)" or " (last)" if that checkpoint of the run is of this step, otherwise ""."""
    for name in ("best", "last"):
        checkpoint = read_link(run / "checkpoints" / name)
        if isinstance(step, int) and checkpoint and checkpoint.name == f"{step:08}":
            return f" ({name})"
    return ""


def is_best(path: Path) -> bool:
    """Whether a weights file is the best checkpoint of its run. True if there is no run or no best checkpoint yet."""
    run = find_run_folder(path)
    if run is None:
        return True
    link = run / "checkpoints" / "best"
    best = read_link(link) or link  # a folder, where a program that copied the run has followed the link
    return not best.exists() or path.resolve().parent == best.resolve()


def choose_figure_path(weights: Path, *parts: str, dataset: Dataset | None = None) -> Path:
    """The file of a figure in figures/ of the run of a weights file, or in the current folder if there is no run.

    Its name is made of `parts`, the data set if not that of the run, and the checkpoint if not the best of the run.
    """
    run = find_run_folder(weights)
    data_name = "" if dataset is None or (run and is_training_data(weights, dataset)) else dataset.path.resolve().name
    is_usual = run and (is_best(weights) or weights.name == ONNX)
    weights_name = "" if is_usual else weights.resolve().parent.name if weights.name == MODEL else weights.stem
    name = "-".join(filter(None, (*parts, data_name, weights_name)))
    return (run / "figures" if run else Path()) / f"{name}.png"


def is_training_data(path: Path, dataset: Dataset) -> bool:
    """Whether the run of a weights file was trained on `dataset`. True if there is no run."""
    run = find_run_folder(path)
    about = Run(run).about if run else {"data_hash": dataset.hash}
    return about.get("data_hash") == dataset.hash or about.get("data_path") == str(dataset.path.resolve())


def describe_unfinished_run(path: Path) -> str:
    """A note if the run of a weights file has not finished, otherwise ""."""
    folder = find_run_folder(path)
    try:
        run = Run(folder) if folder else None
        if run is None or run.about.get("status", "finished") == "finished":
            return ""
        epochs, records = run.recipe.epochs, run.records()
        error, _ = get_failure(run.about)
    except AlexNetError:  # a damaged run.json does not make the weights unusable
        return ""
    epoch = max((get_int(record, "epoch") for record in records if record.get("event") != "start"), default=0)
    state = f"failed ({error})" if error else "has not finished"
    return f"the run {state}: epoch {epoch} of {epochs} so far; to continue: alexnet train --resume {run.quoted}"
