"""Choose devices and precision: one device for both towers, or several ranks with a part of the network each."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import sys
from dataclasses import dataclass, replace

import torch

from alexnet_cli.core.devices import Gpu, count_cores, has_cpu_bf16, list_gpus, suggest_gpus, try_gpu
from alexnet_cli.core.parallel.process_group import (
    SINGLE_PROCESS,
    Parallel,
    ProcessMesh,
    RankInfo,
    arrange_mesh,
    check_peers,
    launcher_pid,
    read_rank_info,
)
from alexnet_cli.errors import MissingError, UsageError

DEVICES_HINT = "--gpus none uses the CPU; `alexnet doctor` lists the devices"
COUNT_HINT = "start one process per GPU, or name a GPU for each process: --gpus 0,0"


@dataclass(frozen=True)
class Placement:
    """The device of this process and its position in the mesh."""

    device: torch.device
    name: str
    precision: str
    """The precision it computes in: that of the recipe, or fp32 if the device lacks it."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""
    ranks: ProcessMesh = SINGLE_PROCESS
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
        ranks_per_replica = self.ranks.size // self.ranks.replicas
        return list(self.names[tower % ranks_per_replica :: ranks_per_replica]) or [self.name]


def place(gpus: str | None, precision: str) -> Placement:
    """Choose one device: `gpus` is an id, "all" (the first is used), "none", or None for the first GPU if there is one.

    Raises:
        MissingError: the GPU that `gpus` names does not exist or does not work.
        UsageError: `gpus` is not a GPU id, or names several.
    """
    return _place_on(single_gpu(gpus), gpus, precision)


def single_gpu(gpus: str | None) -> int | None:
    """Return the id of the GPU that `place` would choose; None for the CPU. Raises the same errors."""
    ids = _parse_gpus(gpus)
    if len(ids) > 1 and gpus != "all":
        raise UsageError(f"--gpus {gpus}: this command uses one device", f"--gpus {ids[0]} gives the same numbers")
    return ids[0] if ids else None


def count_processes(gpus: str | None, processes: int | None) -> int:
    """How many processes to start: one per GPU, or `processes` on the CPU; 1 if a launcher has started this one.

    Raises:
        MissingError: a GPU does not exist.
        UsageError: `processes` does not fit `gpus` or the launcher.
    """
    if processes is not None and (gpus or "none") != "none":
        raise UsageError("--processes works only on the CPU", "--gpus 0,1 starts one process per GPU")
    if (info := read_rank_info()) is not None:
        if processes not in (None, info.size):
            what = f"--processes {processes}: a launcher has started this process as rank {info.rank} of {info.size}"
            raise UsageError(what, "remove --processes, or unset WORLD_SIZE and RANK (SLURM_STEP_ID)")
        return 1
    if processes is not None:
        return processes
    return max(1, len(_parse_gpus(gpus)))


def local_gpus(gpus: str | None) -> list[int]:
    """The GPU ids of the processes on this machine, one per process; empty on the CPU."""
    if gpus is None and read_rank_info() is not None:  # a launcher's processes use all GPUs
        gpus = "all" if list_gpus() else "none"
    return _parse_gpus(gpus)


def choose_backend(gpus: str | None) -> str:
    """Choose the backend of the process group: gloo if two processes share a GPU, since NCCL does not allow that."""
    ids = local_gpus(gpus)
    return "cuda:nccl,cpu:gloo" if ids and len(set(ids)) == len(ids) else "gloo"


def place_ranks(ranks: ProcessMesh, gpus: str | None, precision: str, parallel: Parallel, towers: int) -> Placement:
    """Choose this rank's device, and arrange the mesh of ranks.

    Raises:
        MissingError: a GPU does not exist or does not work, there are fewer GPUs than processes, or data that GPUs
            send each other arrives corrupted.
        UsageError: the ranks cannot be divided as `parallel` says.
    """
    info, ids = read_rank_info(), local_gpus(gpus)
    if info is None or ranks.size == 1:
        return _place_on(ids[0] if ids else None, gpus, precision)
    gpu_id = _choose_own_gpu(ids, info, gpus)
    placed = _place_on(gpu_id, gpus or "none", precision)
    if placed.device.type == "cpu":
        if launcher_pid() is None:  # our own launcher has set OMP_NUM_THREADS
            torch.set_num_threads(max(1, count_cores() // info.local_size))
        placed = replace(placed, name=f"CPU process {info.rank}")
    name = placed.name if info.local_size == ranks.size else f"{placed.name} of {socket.gethostname()}"
    uuid = "" if gpu_id is None else _find_gpu(gpu_id).uuid
    names, precisions, uuids = zip(*ranks.gather_values((name, placed.precision, uuid)), strict=True)
    if len(set(zip(names, uuids, strict=True))) > len(set(names)):  # each process sees one GPU, and calls it GPU 0
        names = tuple(f"{name} ({uuid[:8]})" for name, uuid in zip(names, uuids, strict=True))
    uses_nccl = "nccl" in choose_backend(gpus)
    if uses_nccl and len(set(uuids)) < ranks.size:
        raise MissingError(f"{ranks.size} processes need a GPU each, but only {len(set(uuids))} found", COUNT_HINT)
    if len(set(precisions)) > 1:  # ranks must send each other the same dtype
        note = f"not every device supports {precision}: using fp32"
        placed = replace(placed, precision="fp32", notes=(*placed.notes, note))
    mesh = arrange_mesh(ranks, parallel, towers, placed.device)
    if uses_nccl:
        check_peers(mesh, placed.device, names)
    return replace(placed, ranks=mesh, names=names)


def _choose_own_gpu(ids: list[int], info: RankInfo, gpus: str | None) -> int | None:
    """This rank's GPU: by its local rank, or the only one that the launcher makes visible. Raises MissingError."""
    if not ids:
        return None
    if info.local_rank < len(ids):
        return ids[info.local_rank]
    if gpus in (None, "all") and len(ids) == 1:
        return ids[0]
    what = f"--gpus {gpus or 'all'} names {len(ids)} for {info.local_rank + 1} or more processes on this machine"
    raise MissingError(what, COUNT_HINT)


def _place_on(gpu_id: int | None, gpus: str | None, precision: str) -> Placement:
    """Place this process on a GPU, or on the CPU if `gpu_id` is None, or if the GPU fails and `gpus` names none.

    Raises:
        MissingError: the GPU was asked for and does not work.
    """
    if gpu_id is None:
        return _place_on_cpu(precision, [] if gpus else ["no GPU found: using the CPU"])
    gpu, notes = _find_gpu(gpu_id), list[str]()
    name = f"GPU {gpu.index} {gpu.name}"
    if reason := try_gpu(gpu.index):
        if gpus is None:
            return _place_on_cpu(precision, [f"{name} cannot be used: {reason}; using the CPU"])
        raise MissingError(f"{name} cannot be used: {reason}", DEVICES_HINT)
    if precision != "fp32" and not gpu.has_bf16:
        if precision == "bf16":
            notes.append(f"{name} does not support bf16: using fp32")
        precision = "fp32"
    _allow_tf32(precision != "fp32")
    from alexnet_cli.core.model import triton_kernels  # imports Triton, which takes a second

    if reason := triton_kernels.unavailable_reason(gpu.index):
        notes.append(f"normalization, dropout and weight updates are slower without the Triton kernels: {reason}")
    return Placement(torch.device("cuda", gpu.index), name, precision, tuple(notes))


def _find_gpu(index: int) -> Gpu:
    return next(gpu for gpu in list_gpus() if gpu.index == index)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _parse_gpus(gpus: str | None) -> list[int]:
    """The ids of the GPUs that `--gpus` names; empty for the CPU. Raises UsageError, or MissingError for other ids."""
    if gpus == "none":
        return []
    visible = [gpu.index for gpu in list_gpus()]
    if gpus is None:
        return visible[:1]
    try:
        ids = visible if gpus == "all" else [int(word) for word in gpus.split(",")]
    except ValueError as error:
        guess = f"did you mean --gpus {meant}? " if (meant := suggest_gpus(str(gpus))) else ""
        hint = f"{guess}GPU ids are such as --gpus 0, 0,1, all or none"
        raise UsageError(f"--gpus {gpus} is not a list of GPU ids", hint) from error
    if not ids or not set(ids) <= set(visible):
        available = ", ".join(map(str, visible)) or "none"
        one_gpu = f"--gpus {visible[0]} computes both towers on one GPU, with the same numbers; " if visible else ""
        raise MissingError(f"--gpus {gpus}: GPUs available here: {available}", one_gpu + DEVICES_HINT)
    return ids


def _place_on_cpu(precision: str, notes: list[str]) -> Placement:
    keep_freed_memory()
    if precision == "bf16" and not has_cpu_bf16():
        notes.append("this CPU does not support bf16: using fp32")
        precision = "fp32"
    if precision == "tf32":
        precision = "fp32"
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Placement(torch.device("cpu"), name, precision, tuple(notes))


def keep_freed_memory() -> None:
    """Make the C library keep freed memory instead of returning it to the system.

    A training step frees and allocates gigabytes. The kernel zeroes new pages each time, which takes a quarter of the
    step. Only glibc has these settings; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def choose_decode_threads(threads: int | None) -> int:
    """How many threads decode images: `threads` if given, otherwise one per core of this process."""
    info = read_rank_info()
    return threads or max(1, count_cores() // (info.local_size if info else 1))
