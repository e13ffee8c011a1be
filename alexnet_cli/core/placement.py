"""Which device computes, and with what arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass

import torch

from alexnet_cli.core.devices import cores, cpu_bf16, visible_gpus
from alexnet_cli.errors import MissingError, UsageError


@dataclass(frozen=True)
class Placement:
    """One device for both towers. `precision` is what it really computes with; `notes` is what the user should know."""

    device: torch.device
    name: str
    precision: str
    notes: tuple[str, ...] = ()

    def arithmetic(self) -> contextlib.AbstractContextManager[object]:
        """The context to run the network in."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def place(gpus: str | None, precision: str) -> Placement:
    """Choose the device: `gpus` is an id, "all", "none", or None for the first GPU if there is one.

    Raises:
        MissingError: a GPU was asked for that is not there.
        UsageError: `gpus` is something else.
    """
    visible = visible_gpus()
    wanted = _wanted(gpus, [gpu.index for gpu in visible])
    notes = []
    if wanted is None:
        if gpus is None:
            notes.append("no GPU found: training on the CPU")
        return _on_cpu(precision, notes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = True
    gpu = visible[wanted]
    from alexnet_cli.core import response_norm_gpu  # which imports Triton, that nobody else needs

    if reason := response_norm_gpu.why_not(gpu.index):
        notes.append(f"response normalisation runs without its GPU kernel, more slowly: {reason}")
    return Placement(torch.device("cuda", gpu.index), f"GPU {gpu.index} {gpu.name}", precision, tuple(notes))


def _wanted(gpus: str | None, visible: list[int]) -> int | None:
    if gpus == "none":
        return None
    if gpus is None:
        return visible[0] if visible else None
    if gpus == "all":
        ids = visible
    else:
        try:
            ids = [int(word) for word in gpus.split(",")]
        except ValueError as error:
            raise UsageError(f"--gpus {gpus} is not a GPU id", "such as --gpus 0, --gpus all or --gpus none") from error
    missing = [i for i in ids if i not in visible]
    if missing or not ids:
        seen = ", ".join(str(i) for i in visible) or "none"
        raise MissingError(
            f"--gpus {gpus}: GPUs visible here: {seen}",
            "--gpus none trains on the CPU; alexnet doctor shows the devices",
        )
    if len(ids) > 1:
        raise UsageError(
            f"--gpus {gpus}: training uses one device, both towers on it",
            f"--gpus {ids[0]} gives the same numbers",
        )
    return ids[0]


def _on_cpu(precision: str, notes: list[str]) -> Placement:
    keep_memory()
    if precision == "bf16" and not cpu_bf16():
        notes.append("this CPU has no bf16 arithmetic: training in fp32")
        precision = "fp32"
    if precision == "tf32":
        precision = "fp32"
    cores = torch.get_num_threads()
    return Placement(torch.device("cpu"), f"CPU, {cores} threads", precision, tuple(notes))


def keep_memory() -> None:
    """Have the C library keep freed memory instead of giving it back to the system.

    A training step frees and takes gigabytes; fresh pages have to be zeroed by the kernel each time, which costs a
    quarter of the step. Only glibc knows these settings; elsewhere nothing happens.
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


def threads_for_decoding(asked: int | None) -> int:
    """How many threads decode pictures: what was asked, or one per core, at most eight."""
    return asked or min(8, cores())
