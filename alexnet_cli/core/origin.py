"""What opened weights are: which checkpoint of which run, and whether that run has come to its end. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alexnet_cli.core.records import failure
from alexnet_cli.core.runs import Run, run_of
from alexnet_cli.core.shards import Dataset
from alexnet_cli.errors import AlexNetError


def told(path: Path, info: Mapping[str, Any]) -> str:
    """A weights file and the epoch it is of, with best or last if it is its run's: "runs/a/alexnet.onnx · epoch 15
    (best)". `info` is what the file says of itself; a file outside of a run may name the one it came from.
    """
    run, words = run_of(path), [str(path)]
    if run is None and info.get("run"):
        words.append(f"run {info['run']}")
    if "epoch" in info:
        words.append(f"epoch {info['epoch']}{_rank(run, info.get('step')) if run else ''}")
    return " · ".join(words)


def _rank(run: Path, step: Any) -> str:
    """Whether the run's best or last checkpoint is of that step; best comes first, if it is both."""
    for name in ("best", "last"):
        checkpoint = run / "checkpoints" / name
        if isinstance(step, int) and checkpoint.exists() and checkpoint.resolve().name == f"{step:08}":
            return f" ({name})"
    return ""


def is_best(path: Path) -> bool:
    """Whether a weights file is what its run stands for: its best checkpoint, or the only file that it has."""
    run = run_of(path)
    best = run / "checkpoints" / "best" if run else None
    return best is None or not best.exists() or path.resolve().parent == best.resolve()


def own_data(path: Path, dataset: Dataset) -> bool:
    """Whether a prepared set is the one that the run of a weights file was trained on; any is where there is no run."""
    run = run_of(path)
    about = Run(run).about if run else {"data_hash": dataset.hash}
    return about.get("data_hash") == dataset.hash or about.get("data_path") == str(dataset.path.resolve())


def unfinished(path: Path) -> str:
    """What to say where the run of a weights file has not come to its end; nothing where it has, or there is none."""
    folder = run_of(path)
    try:
        run = Run(folder) if folder else None
        if run is None or run.about.get("status", "finished") == "finished":
            return ""
        epochs, records, (what, _) = run.recipe.epochs, run.records(), failure(run.about)
    except AlexNetError:  # what is wrong there is no affair of its weights
        return ""
    begun = (record.get("epoch") for record in records if record.get("event") != "start")
    done = max((epoch for epoch in begun if type(epoch) is int), default=0)
    ended = f"failed ({what})" if what else "has not finished"
    return f"the run {ended}: epoch {done} of {epochs} so far; alexnet train --resume {run.quoted} goes on"
