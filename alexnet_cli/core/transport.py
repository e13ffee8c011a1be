"""What carries messages between ranks, gloo and, between GPUs, NCCL: how long it waits, and how it complains."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from alexnet_cli.errors import UsageError

PATIENCE = "ALEXNET_TIMEOUT"  # seconds that a rank waits for the others
SECONDS = 600.0
LONGER = 2  # times as long as gloo, NCCL waits
SIGNS = ("gloo", "Dist", "NCCL", "Connection", "Timed out", "Broken pipe", "onnection reset")  # how they complain


def patience() -> timedelta:
    """How long a rank waits for the others. Raises UsageError if what the user set is no such time."""
    asked = os.environ.get(PATIENCE) or str(SECONDS)
    try:
        found = timedelta(seconds=float(asked))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{PATIENCE}={asked} is no number of seconds", f"such as {PATIENCE}=600") from error
    if found <= timedelta(0):
        raise UsageError(f"{PATIENCE}={asked} leaves no time at all", f"such as {PATIENCE}=600")
    return found


def complains(error: RuntimeError) -> bool:
    """Whether it is a transport that failed: as a rule, because another rank is gone."""
    return any(sign in f"{type(error).__name__} {error}" for sign in SIGNS)


def own_trouble(error: RuntimeError) -> str:
    """What NCCL says is wrong here, such as too little shared memory; "" where it only lost another rank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    here = any("NCCL error" in line for line in lines) and not any("ncclRemoteError" in line for line in lines)
    return lines[-1] if here else ""


def outlast(group: dist.ProcessGroup) -> None:
    """Have NCCL wait longer than gloo: who waits through gloo can say for whom, NCCL ends the process and says nothing.

    Groups without NCCL stay as they are.
    """
    with suppress(RuntimeError):  # there is no backend for GPUs
        backend = group._get_backend(torch.device("cuda"))
        if backend.name() == "nccl":
            backend._set_default_timeout(patience() * LONGER)
