"""Checkpoints: the whole network in one file, and beside it what is needed to go on as if nothing had happened.

checkpoints/STEP/model.safetensors   the network in the one-device layout, with recipe, classes and mean
                 state.pt            velocity and position: tensors and primitives only
                 meta.json           checksums of the two; written last, it makes the checkpoint valid
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alexnet_cli.core import weights
from alexnet_cli.core.learning import Momentum
from alexnet_cli.core.network import Network, parameters_by_name
from alexnet_cli.core.runs import MODEL, Run, point, write_text
from alexnet_cli.errors import StorageError, WeightsError

SCHEMA = "alexnet.checkpoint/1"
STATE, META = "state.pt", "meta.json"
DAMAGED = "--resume goes on from the newest checkpoint that is whole"


@dataclass(frozen=True)
class Resumable:
    """A checkpoint read back: the model, the velocity by parameter name, and the position (primitives)."""

    model: weights.Model
    velocity: Mapping[str, Tensor]
    position: Mapping[str, Any]


def save(
    run: Run,
    step: int,
    network: Network,
    optimiser: Momentum,
    position: Mapping[str, Any],
    mean: Tensor,
    metadata: Mapping[str, str],
    best: bool,
) -> Path:
    """Write a checkpoint whole or not at all, point `last` (and `best`) to it, and drop those nobody points to.

    Raises:
        StorageError: the disk is full or cannot be written; the checkpoint before is untouched.
    """
    final, temporary = run.checkpoints / f"{step:08d}", run.checkpoints / f".{step:08d}.tmp"
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters_by_name(network)}
    velocity = {name: v.cpu().contiguous() for name, v in optimiser.velocity.items()}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _check_space(run.checkpoints, 4 * sum(t.numel() for t in (*tensors.values(), *velocity.values())))
        temporary.mkdir(parents=True)
        save_file({**tensors, "mean": mean.contiguous()}, temporary / MODEL, metadata=dict(metadata))
        torch.save({"velocity": velocity, "position": dict(position)}, temporary / STATE)
        sums = {name: _synced_sum(temporary / name) for name in (MODEL, STATE)}
        write_text(temporary / META, json.dumps({"schema": SCHEMA, "step": step, "sha256": sums}, indent=2) + "\n")
        _replace(temporary, final)
        point(run.checkpoints / "last", final)
        if best:
            point(run.checkpoints / "best", final)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(
            f"checkpoint of step {step} cannot be written to {run.checkpoints}: {error}",
            f"the one before is intact: free some space, then alexnet train --resume {run.path.name}",
        ) from error
    _drop_unpointed(run.checkpoints)
    return final


def newest(run: Run) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is whole (None before the first), and those after it that are not.

    Raises:
        WeightsError: there were checkpoints, and none is whole.
    """
    folders = [p for p in run.checkpoints.glob("*") if p.name.isdigit() and p.is_dir() and not p.is_symlink()]
    damaged: list[Path] = []
    for folder in sorted(folders, reverse=True):
        try:
            _check(folder)
        except WeightsError:
            damaged.append(folder)
        else:
            return folder, damaged
    if damaged or any(record.get("event") == "checkpoint" for record in run.records()):
        what = f"{run.path} has no whole checkpoint left" + (f": {damaged[0]} is damaged" if damaged else "")
        raise WeightsError(what, "put one back, or start a new run")
    return None, []


def load(directory: Path) -> Resumable:
    """Read a checkpoint and check its sums. Nothing in it can run code.

    Raises:
        WeightsError: it is incomplete, damaged or foreign.
    """
    _check(directory)
    try:
        state = torch.load(directory / STATE, map_location="cpu", weights_only=True)
        return Resumable(weights.read(directory / MODEL), state["velocity"], state["position"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise WeightsError(f"{directory / STATE} cannot be read: {error}", DAMAGED) from error


def _check(directory: Path) -> None:
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        sums = {name: _sum(directory / name) for name in (MODEL, STATE)}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{directory} is not a complete checkpoint: {error}", DAMAGED) from error
    if meta.get("schema") != SCHEMA or meta.get("sha256") != sums:
        raise WeightsError(f"{directory} is damaged: its files differ from the sums in {META}", DAMAGED)


def restore(network: Network, optimiser: Momentum, saved: Resumable) -> None:
    """Put the saved weights and velocity in place."""
    with torch.no_grad():
        for name, parameter in parameters_by_name(network):
            parameter.copy_(torch.from_numpy(saved.model.tensors[name]))
            optimiser.velocity[name].copy_(saved.velocity[name])


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed + (1 << 20):
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB needed, the disk is full")


def _replace(temporary: Path, final: Path) -> None:
    """Rename into place; a checkpoint of the same step, from before a resume, makes room first."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _drop_unpointed(folder: Path) -> None:
    kept = {(folder / name).resolve() for name in ("last", "best")}
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.resolve() not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _synced_sum(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sum(path)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
