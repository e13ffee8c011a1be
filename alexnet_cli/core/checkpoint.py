"""Checkpoints: the whole network in one file, and beside it what is needed to go on as if nothing had happened.

checkpoints/STEP/model.safetensors   the network in the one-device layout, with recipe, classes and mean
                 state.pt            velocity and position: tensors and primitives only
                 meta.json           checksums of the two; written last, it makes the checkpoint valid
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from alexnet_cli.core import weights
from alexnet_cli.core.atomic import point, write_text
from alexnet_cli.core.learning import Momentum
from alexnet_cli.core.listing import read_file
from alexnet_cli.core.network import Network, parameters_by_name
from alexnet_cli.core.runs import LARGEST, MODEL, Run
from alexnet_cli.errors import DataError, StorageError, WeightsError

SCHEMA = "alexnet.checkpoint/1"
STATE, META = "state.pt", "meta.json"
OURS = re.compile(r"\d{8,}|\.\d{8,}\.(tmp|old)")  # folders of checkpoints, whole or on their way
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
    tensors: Mapping[str, Tensor],
    velocity: Mapping[str, Tensor],
    position: Mapping[str, Any],
    mean: Tensor,
    metadata: Mapping[str, str],
    best: bool,
    keep: int = 1,
) -> Path:
    """Write a checkpoint of the whole network, its tensors being on the CPU, whole or not at all.

    Point `last` (and `best`) to it, and drop all but `keep` and the best.

    Raises:
        StorageError: the disk is full, cannot be written or reads back otherwise; the checkpoint before is untouched.
    """
    final, temporary = run.checkpoints / f"{step:08d}", run.checkpoints / f".{step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _check_space(run.checkpoints, 4 * sum(t.numel() for t in (*tensors.values(), *velocity.values())))
        temporary.mkdir()
        model = safetensors.torch.save({**tensors, "mean": mean.contiguous()}, metadata=dict(metadata))
        sums = {MODEL: _write(temporary / MODEL, model)}
        del model
        buffer = io.BytesIO()
        torch.save({"velocity": dict(velocity), "position": dict(position)}, buffer)
        sums[STATE] = _write(temporary / STATE, buffer.getbuffer())
        meta = {"schema": SCHEMA, "step": step, "best": best, "sha256": sums}
        write_text(temporary / META, json.dumps(meta, indent=2) + "\n")
        _sync(temporary)
        _replace(temporary, final)
        _point(final, best)
        _drop(run.checkpoints, step, keep)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        what = f"checkpoint of step {step} cannot be written to {run.checkpoints}: {error}"
        raise StorageError(what, run.way_on()) from error
    return final


def newest(run: Run) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is whole (None before the first), and those after it that are not.

    Finishes what a crash left unfinished: names that were on their way, and pointers to what has been found.

    Raises:
        WeightsError: there were checkpoints, and none is whole.
        StorageError: the pointers cannot be written.
    """
    for old in run.checkpoints.glob(".*.old"):
        final = run.checkpoints / old.name[1:].removesuffix(".old")
        if not final.exists():
            with run.storing():
                old.rename(final)
    damaged: list[Path] = []
    for folder in _folders(run):
        try:
            best = _check(folder)["best"]
        except WeightsError:
            damaged.append(folder)
        else:
            with run.storing():
                _point(folder, best)
            return folder, damaged
    if damaged or any(record.get("event") == "checkpoint" for record in run.records()):
        what = f"{run.path} has no whole checkpoint left" + (f": {damaged[0]} is damaged" if damaged else "")
        raise WeightsError(what, "put one back, or start a new run")
    return None, []


def step_beyond(run: Run, step: int) -> int | None:
    """The step of the newest whole checkpoint, if that is more than `step`; only then are its sums checked."""
    for folder in _folders(run):
        if int(folder.name) <= step:
            return None
        with suppress(WeightsError):
            _check(folder)
            return int(folder.name)
    return None


def _folders(run: Run) -> list[Path]:
    """Those of checkpoints, whole or not, the newest first."""
    folders = [p for p in run.checkpoints.glob("*") if p.name.isdigit() and p.is_dir() and not p.is_symlink()]
    return sorted(folders, key=lambda folder: int(folder.name), reverse=True)


def load(directory: Path) -> Resumable:
    """Read a checkpoint and check its sums. Nothing in it can run code.

    Raises:
        WeightsError: it is incomplete, damaged or foreign.
    """
    _check(directory)
    model = weights.read(directory / MODEL)
    try:
        _check_stored(directory / STATE)
        state = torch.load(directory / STATE, map_location="cpu", weights_only=True)
        velocity, position = dict(state["velocity"]), dict(state["position"])
        for name, value in velocity.items():
            if not isinstance(value, Tensor) or (value.dtype, value.device.type) != (torch.float32, "cpu"):
                raise ValueError(f"the velocity of {name} is no float32 tensor")
        return Resumable(model, velocity, position)
    except Exception as error:  # torch's reader raises nearly anything on damaged files
        what = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{directory / STATE} cannot be read: {what}", DAMAGED) from error


def _check_stored(path: Path) -> None:
    """Raise ValueError unless the file is an archive as torch writes it, which holds no more than its own size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which ours never are")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its parts are larger than the whole")


def _check(directory: Path) -> Mapping[str, Any]:
    """What a checkpoint says of itself, if it is whole; WeightsError otherwise."""
    try:
        meta = json.loads(read_file(directory / META, LARGEST))
        sums = {name: _sum(directory / name) for name in (MODEL, STATE)}
    except (OSError, ValueError, RecursionError, DataError) as error:
        raise WeightsError(f"{directory} is not a complete checkpoint: {error}", DAMAGED) from error
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA or meta.get("sha256") != sums:
        raise WeightsError(f"{directory} is damaged: its files differ from the sums in {META}", DAMAGED)
    if directory.name.isdigit() and meta.get("step") != int(directory.name):
        raise WeightsError(f"{directory} is of step {meta.get('step')}, not of its name", DAMAGED)
    return {"best": False, **meta}


def _point(checkpoint: Path, best: bool) -> None:
    """Make `last`, and `best` if it is that, point to a checkpoint."""
    for name in ("last", "best") if best else ("last",):
        point(checkpoint.parent / name, checkpoint)
    _sync(checkpoint.parent)


def restore(network: Network, optimiser: Momentum, saved: Resumable) -> None:
    """Put the saved weights and velocity in place.

    Raises:
        WeightsError: they are those of another network.
    """
    for name, parameter in parameters_by_name(network):
        whole = [torch.from_numpy(saved.model.tensors[name]), saved.velocity.get(name)]
        found = {
            tuple(network.own(name, t).shape) if isinstance(t, Tensor) and t.dim() == parameter.dim() else ()
            for t in whole
        }
        if found != {tuple(parameter.shape)}:
            what = (
                f"{saved.model.path} does not fit: {name} is {tuple(parameter.shape)} here, there or its velocity not"
            )
            raise WeightsError(what, "it is of another network: start a run of its own with --init-from")
    with torch.no_grad():
        for name, parameter in parameters_by_name(network):
            parameter.copy_(network.own(name, torch.from_numpy(saved.model.tensors[name])))
            optimiser.velocity[name].copy_(network.own(name, saved.velocity[name]))


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed + (1 << 20):
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB needed, the disk is full")


def _replace(temporary: Path, final: Path) -> None:
    """Rename into place; a checkpoint of the same step makes room first, and `newest` brings it back if need be."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _drop(folder: Path, step: int, keep: int) -> None:
    """Remove what is neither the best, nor among the `keep` newest up to `step`."""
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and int(path.name) <= step)
    names = [f"{number:08d}" for number in steps[-keep:]] + ["last", "best"]
    kept = {(folder / name).resolve() for name in names}
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and path.resolve() not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, content: bytes | memoryview) -> str:
    """Write and sync a file, and read it back from the disk. Returns its sum; OSError if it is not as it was meant."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # or what is read back is what the kernel still holds in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = _sum(path)
    if found != hashlib.sha256(content).hexdigest():
        raise OSError(errno.EIO, f"{path.name} reads back otherwise than it was written")
    return found


def _sync(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
