"""Choose devices and precision: one device for both towers, or several ranks with a part of the network each."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import sys
from dataclasses import dataclass, replace

import torch

from alexnet_cli.core.devices import Gpu, count_cores, has_cpu_bf16, try_gpu, visible_gpus
from alexnet_cli.core.parallel.process_group import (
    ALONE,
    Parallel,
    ProcessMesh,
    RankInfo,
    arrange_mesh,
    launcher_pid,
    read_rank_info,
)
from alexnet_cli.errors import MissingError, UsageError


@dataclass(frozen=True)
class Placement:
    """The device of this process and its position in the mesh.

    `precision` is what it really computes with; `notes` are messages for the user.
    """

    device: torch.device
    name: str
    precision: str
    notes: tuple[str, ...] = ()
    ranks: ProcessMesh = ALONE
    names: tuple[str, ...] = ()
    """The devices of all ranks, in rank order; empty for a single process."""

    def precision_context(self) -> contextlib.AbstractContextManager[object]:
        """Return the context to run the network in. On a GPU this also sets TF32 for the backward pass."""
        if self.device.type == "cuda":
            _allow_tf32(self.precision != "fp32")
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def processes_per_device(self) -> int:
        """How many processes share the memory of this device; on a CPU, an upper bound."""
        if self.device.type == "cpu" or not self.names:
            return self.ranks.size
        return self.names.count(self.names[self.ranks.rank])

    def tower_devices(self, tower: int) -> list[str]:
        """The names of the devices that compute a tower (counted from 0), one per replica."""
        each = self.ranks.size // self.ranks.replicas
        return list(self.names[tower % each :: each]) or [self.name]


def place(gpus: str | None, precision: str) -> Placement:
    """Choose one device: `gpus` is an id, "all" (their first), "none", or None for the first GPU if there is one.

    Raises:
        MissingError: a GPU was asked for that is not there.
        UsageError: `gpus` is something else, or several.
    """
    return _on(single_gpu(gpus), gpus, precision)


def single_gpu(gpus: str | None) -> int | None:
    """The id of the GPU that `place` would choose; None for the CPU. Raises the same errors."""
    wanted = _wanted(gpus)
    if len(wanted) > 1 and gpus != "all":
        raise UsageError(f"--gpus {gpus}: this uses one device", f"--gpus {wanted[0]} gives the same numbers")
    return wanted[0] if wanted else None


def count_processes(gpus: str | None, asked: int | None) -> int:
    """How many processes to start: one per GPU listed, or `asked` on the CPU; 1 if a launcher has started several.

    Raises:
        MissingError: a GPU was asked for that is not there.
        UsageError: the two do not go together.
    """
    if asked is not None and (gpus or "none") != "none":
        raise UsageError("--processes is for the CPU", "--gpus 0,1 starts a process for each GPU named")
    if (joined := read_rank_info()) is not None:
        if asked not in (None, joined.size):
            what = f"--processes {asked}: a launcher has started this one as {joined.rank + 1} of {joined.size}"
            raise UsageError(what, "leave --processes to it, or unset WORLD_SIZE and RANK (SLURM_STEP_ID)")
        return 1
    if asked is not None:
        return asked
    return max(1, len(_wanted(gpus)))


def local_gpus(gpus: str | None) -> list[int]:
    """The GPU ids of the processes on this machine, one per process; empty on the CPU."""
    joined = read_rank_info() is not None
    return _wanted(("all" if visible_gpus() else "none") if joined and gpus is None else gpus)


def choose_backend(gpus: str | None) -> str:
    """The backend of the process group: gloo if two processes share a GPU, which NCCL does not allow."""
    ids = local_gpus(gpus)
    return "cuda:nccl,cpu:gloo" if ids and len(set(ids)) == len(ids) else "gloo"


def place_ranks(ranks: ProcessMesh, gpus: str | None, precision: str, parallel: Parallel, towers: int) -> Placement:
    """Choose this rank's device, and arrange the mesh of ranks.

    Raises:
        MissingError: a GPU was asked for that is not there.
        UsageError: the devices cannot be used in the way of `parallel`.
    """
    mine, ids = read_rank_info(), local_gpus(gpus)
    if mine is None or ranks.size == 1:
        return _on(ids[0] if ids else None, gpus, precision)
    own = _own(ids, mine, gpus)
    found = _on(own, gpus or "none", precision)
    if found.device.type == "cpu":
        if launcher_pid() is None:  # our launcher has done so, or has been told otherwise
            torch.set_num_threads(max(1, count_cores() // mine.local_size))
        found = replace(found, name=f"CPU process {mine.rank}")
    name = found.name if mine.local_size == ranks.size else f"{found.name} of {socket.gethostname()}"
    told = ranks.gather_values((name, found.precision, "" if own is None else _gpu(own).uuid))
    names, precisions, uuids = zip(*told, strict=True)
    if ids and "nccl" in choose_backend(gpus) and len(set(uuids)) < ranks.size:
        what = f"each process needs its own GPU: processes {ranks.size}, GPUs {len(set(uuids))}"
        raise MissingError(what, "start as many as there are GPUs, or name one for each: --gpus 0,0")
    if len(set(precisions)) > 1:  # or they would send each other what the other does not expect
        note = f"not every device has {precision} arithmetic: training in fp32"
        found = replace(found, precision="fp32", notes=(*found.notes, note))
    return replace(found, ranks=arrange_mesh(ranks, parallel, towers, found.device), names=names)


def _own(ids: list[int], mine: RankInfo, gpus: str | None) -> int | None:
    """This rank's GPU: by its local rank, or the only one the launcher makes visible. Raises MissingError."""
    if not ids or mine.local_rank < len(ids):
        return ids[mine.local_rank] if ids else None
    if gpus in (None, "all") and len(ids) == 1:
        return ids[0]
    what = f"--gpus {gpus or 'all'} names {len(ids)} for {mine.local_rank + 1} processes or more on this machine"
    raise MissingError(what, "start as many as there are GPUs, or name one for each: --gpus 0,0")


def _on(gpu_id: int | None, gpus: str | None, precision: str) -> Placement:
    notes: list[str] = []
    if gpu_id is None:
        if gpus is None:
            notes.append("no GPU found: training on the CPU")
        return _on_cpu(precision, notes)
    gpu = _gpu(gpu_id)
    name = f"GPU {gpu.index} {gpu.name}"
    if reason := try_gpu(gpu.index):
        raise MissingError(
            f"{name} cannot be used: {reason}", "--gpus none uses the CPU; alexnet doctor shows the devices"
        )
    if precision != "fp32" and not gpu.has_bf16:
        notes += [f"{name} has no bf16 arithmetic: training in fp32"] * (precision == "bf16")
        precision = "fp32"
    _allow_tf32(precision != "fp32")
    torch.backends.cudnn.benchmark = True
    from alexnet_cli.core.model import triton_kernels  # which imports Triton, that nobody else needs

    if reason := triton_kernels.unavailable_reason(gpu.index):
        notes.append(f"response normalization runs without its GPU kernel, more slowly: {reason}")
    return Placement(torch.device("cuda", gpu.index), name, precision, tuple(notes))


def _gpu(index: int) -> Gpu:
    return next(gpu for gpu in visible_gpus() if gpu.index == index)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _wanted(gpus: str | None) -> list[int]:
    """The GPU ids that `--gpus` asks for, all of which exist; empty for the CPU."""
    if gpus == "none":
        return []
    visible = [gpu.index for gpu in visible_gpus()]
    if gpus is None:
        return visible[:1]
    try:
        ids = visible if gpus == "all" else [int(word) for word in gpus.split(",")]
    except ValueError as error:
        raise UsageError(f"--gpus {gpus} is no list of GPU ids", "such as --gpus 0, 0,1, all or none") from error
    missing = [i for i in ids if i not in visible]
    if missing or not ids:
        seen = ", ".join(str(i) for i in visible) or "none"
        way = f"--gpus {visible[0]} has both towers on one and gives the same numbers; " if visible else ""
        hint = f"{way}--gpus none uses the CPU; alexnet doctor shows the devices"
        raise MissingError(f"--gpus {gpus}: GPUs visible here: {seen}", hint)
    return ids


def _on_cpu(precision: str, notes: list[str]) -> Placement:
    keep_freed_memory()
    if precision == "bf16" and not has_cpu_bf16():
        notes.append("this CPU has no bf16 arithmetic: training in fp32")
        precision = "fp32"
    if precision == "tf32":
        precision = "fp32"
    cores = torch.get_num_threads()
    return Placement(torch.device("cpu"), f"CPU, {cores} threads", precision, tuple(notes))


def keep_freed_memory() -> None:
    """Make the C library keep freed memory instead of returning it to the system.

    A training step frees and allocates gigabytes. The kernel zeroes new pages each time, which costs a quarter of the
    step. Only glibc has these settings; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        library = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        return


def choose_decode_threads(asked: int | None) -> int:
    """How many threads decode images: as asked, or one per core of this process, at most 8."""
    mine = read_rank_info()
    return asked or min(8, max(1, count_cores() // (mine.local_size if mine else 1)))
