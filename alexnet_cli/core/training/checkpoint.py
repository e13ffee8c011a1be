"""Checkpoints: the network in one file, and the state from which training continues bit by bit as if uninterrupted.

checkpoints/STEP/model.safetensors      the network in the one-device layout, with recipe, classes and mean image
                 optimizer.safetensors  the velocity of every parameter
                 meta.json              position, metrics and the checksums of the two files; written last
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from alexnet_cli.core.files import (
    hash_file,
    read_file,
    read_link,
    replace_link,
    sync_folder,
    write_and_verify,
    write_text,
)
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.network import Network, parameters_by_name
from alexnet_cli.core.runs.run import LARGEST_JSON, MODEL, Run
from alexnet_cli.core.training.optim import PaperSGD
from alexnet_cli.errors import DataError, StorageError, WeightsError

SCHEMA = "alexnet.checkpoint/2"
OPTIMIZER, META = "optimizer.safetensors", "meta.json"
OLD_STATE = "state.pt"  # of version 0.1.0
CHECKPOINT_FOLDER = re.compile(r"\d{8,}|\.\d{8,}\.(tmp|old)")  # complete, being written, being replaced
DAMAGED = "alexnet train --resume RUN continues from the newest complete checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk. `velocity` is by parameter name; `position` has step, epoch, schedule, metrics."""

    model: model_file.Model
    velocity: Mapping[str, Tensor]
    position: Mapping[str, Any]


def save(
    run: Run,
    step: int,
    tensors: Mapping[str, Tensor],
    velocity: Mapping[str, Tensor],
    position: Mapping[str, Any],
    metadata: Mapping[str, str],
    best: bool,
    keep: int = 1,
) -> Path:
    """Write a checkpoint, completely or not at all. All tensors are on the CPU; `tensors` includes the mean image.

    Then link `last` (and `best`) to it, and delete all but the newest `keep` checkpoints and the best.

    Raises:
        StorageError: the disk is full, cannot be written or reads back wrong data; the checkpoint before is intact.
    """
    final, temporary = run.checkpoints / f"{step:08d}", run.checkpoints / f".{step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _check_space(run.checkpoints, 4 * sum(t.numel() for t in (*tensors.values(), *velocity.values())))
        temporary.mkdir()
        model = safetensors.torch.save(dict(tensors), metadata=dict(metadata))
        sums = {MODEL: write_and_verify(temporary / MODEL, model)}
        del model  # 250 MB
        contiguous = {name: value.contiguous() for name, value in velocity.items()}
        sums[OPTIMIZER] = write_and_verify(temporary / OPTIMIZER, safetensors.torch.save(contiguous))
        meta = {"schema": SCHEMA, "step": step, "best": best, "sha256": sums, "position": dict(position)}
        write_text(temporary / META, json.dumps(meta, indent=2, allow_nan=False) + "\n")
        sync_folder(temporary)
        _replace(temporary, final)
        _link(final, best)
        _delete_old(run.checkpoints, step, keep)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        what = f"the checkpoint of step {step} cannot be written to {run.checkpoints}: {error}"
        raise StorageError(what, run.storage_hint()) from error
    return final


def find_newest(run: Run) -> tuple[Path | None, list[Path]]:
    """The newest complete checkpoint (None before the first), and damaged ones that are newer.

    Repairs what a crash left, or a copy that dropped the links: a folder that was being replaced, `last` and `best`.

    Raises:
        WeightsError: no checkpoint is complete though one was saved, or the newest is of version 0.1.0.
        StorageError: the links cannot be written.
    """
    for old in run.checkpoints.glob(".*.old"):
        final = run.checkpoints / old.name[1:].removesuffix(".old")
        if not final.exists():
            with run.storing():
                old.rename(final)
    damaged: list[Path] = []
    for folder in _list_folders(run):
        if (folder / OLD_STATE).is_file():
            raise _old_version(folder)
        try:
            best = _read_meta(folder)["best"]
        except WeightsError:
            damaged.append(folder)
        else:
            with run.storing():
                _link(folder, best)
                _restore_best(run, damaged)
            return folder, damaged
    if damaged or any(record.get("event") == "checkpoint" for record in run.records()):
        what = f"{run.path} has no complete checkpoint" + (f": {damaged[0]} is damaged" if damaged else "")
        raise WeightsError(what, "restore one from a backup, or start a new run")
    return None, []


def _restore_best(run: Run, damaged: Sequence[Path]) -> None:
    """Link `best` to the best complete checkpoint if it is missing or leads to a damaged one."""
    link = run.checkpoints / "best"
    target = read_link(link)
    if target and target.is_dir() and target not in damaged:
        return
    for folder in _list_folders(run):  # of several that were the best when they were saved, the newest is
        with suppress(WeightsError):
            if _read_meta(folder)["best"]:
                replace_link(link, folder)
                return
    if target:
        link.unlink()


def find_step_beyond(run: Run, step: int) -> int | None:
    """The step of the newest complete checkpoint if it is later than `step`, otherwise None."""
    for folder in _list_folders(run):
        if int(folder.name) <= step:
            return None
        with suppress(WeightsError):
            _read_meta(folder)
            return int(folder.name)
    return None


def load(directory: Path) -> Checkpoint:
    """Read a checkpoint and verify its checksums.

    Raises:
        WeightsError: it is incomplete, damaged, of version 0.1.0 or not a checkpoint.
    """
    meta = _read_meta(directory)
    path = directory / OPTIMIZER
    try:
        velocity = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", DAMAGED) from error
    for name, value in velocity.items():
        if value.dtype != torch.float32:
            raise WeightsError(f"{path}: the velocity of {name} is not float32", DAMAGED)
    return Checkpoint(model_file.read_model(directory / MODEL), velocity, meta["position"])


def restore(network: Network, optimizer: PaperSGD, saved: Checkpoint) -> None:
    """Copy the saved weights and velocity into a network and its optimizer.

    Raises:
        WeightsError: a shape differs.
    """
    for name, parameter in parameters_by_name(network):
        for tensor in (torch.from_numpy(saved.model.tensors[name]), saved.velocity.get(name)):
            if (
                tensor is None
                or tensor.dim() != parameter.dim()
                or network.slice_own(name, tensor).shape != parameter.shape
            ):
                there, here = "missing" if tensor is None else tuple(tensor.shape), tuple(parameter.shape)
                raise WeightsError(
                    f"{saved.model.path.parent} does not fit this network: {name} is {there}, not {here}",
                    f"start a new run from its weights: --init-from {saved.model.path.parent}",
                )
    with torch.no_grad():
        for name, parameter in parameters_by_name(network):
            parameter.copy_(network.slice_own(name, torch.from_numpy(saved.model.tensors[name])))
            optimizer.velocity[name].copy_(network.slice_own(name, saved.velocity[name]))


def _list_folders(run: Run) -> list[Path]:
    """Checkpoint folders, complete or not, newest first."""
    folders = [p for p in run.checkpoints.glob("*") if p.name.isdigit() and p.is_dir() and not p.is_symlink()]
    return sorted(folders, key=lambda folder: int(folder.name), reverse=True)


def _read_meta(directory: Path) -> dict[str, Any]:
    """Read meta.json and compare the checksums of the files. Raises WeightsError if the checkpoint is incomplete."""
    if (directory / OLD_STATE).is_file():
        raise _old_version(directory)
    try:
        meta = json.loads(read_file(directory / META, LARGEST_JSON))
        sums = {name: hash_file(directory / name) for name in (MODEL, OPTIMIZER)}
    except (OSError, ValueError, RecursionError, DataError) as error:
        raise WeightsError(f"{directory} is not a complete checkpoint: {error}", DAMAGED) from error
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA or meta.get("sha256") != sums:
        raise WeightsError(f"{directory} is damaged: its files do not match the checksums in {META}", DAMAGED)
    if not isinstance(meta.get("position"), dict):
        raise WeightsError(f"{directory / META} has no position", DAMAGED)
    if directory.name.isdigit() and meta.get("step") != int(directory.name):
        raise WeightsError(f"{directory} holds step {meta.get('step')}: it was renamed", DAMAGED)
    return {"best": False, **meta}


def _old_version(directory: Path) -> WeightsError:
    return WeightsError(f"{directory} was saved in an older format and cannot be resumed", "train again")


def _link(checkpoint: Path, best: bool) -> None:
    """Make `last` a link to a checkpoint, and `best` too if it is the best."""
    for name in ("last", "best") if best else ("last",):
        replace_link(checkpoint.parent / name, checkpoint)
    sync_folder(checkpoint.parent)


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed + (1 << 20):
        raise OSError(errno.ENOSPC, f"the disk is full ({needed / 1e6:,.0f} MB needed)")


def _replace(temporary: Path, final: Path) -> None:
    """Rename into place. A checkpoint of the same step is renamed first; after a crash, `find_newest` restores it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _delete_old(folder: Path, step: int, keep: int) -> None:
    """Delete all checkpoints but the best and the newest `keep` up to `step`."""
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and int(path.name) <= step)
    links = [link for name in ("last", "best") if (link := read_link(folder / name))]
    kept = {path.resolve() for path in (*links, *(folder / f"{number:08d}" for number in steps[-keep:]))}
    for path in folder.iterdir():
        if (
            CHECKPOINT_FOLDER.fullmatch(path.name)
            and path.is_dir()
            and not path.is_symlink()
            and path.resolve() not in kept
        ):
            shutil.rmtree(path, ignore_errors=True)
