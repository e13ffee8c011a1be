"""Starting one command as several processes on this machine, a rank each; torch's own process manager does it.

Each process runs the command line that was typed, with the variables set by which launchers number theirs; `ranks`
reads them. Whatever ends one of them ends all, and the command with it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from alexnet_cli.core.devices import cores
from alexnet_cli.core.ranks import LAUNCHER
from alexnet_cli.core.signals import EXIT_CODES, catch_stop_signals
from alexnet_cli.errors import AlexNetError, MissingError, Stopped

PERIOD = 0.1  # seconds between two looks at the processes
MERCY = 15  # seconds that the others have to end when one has failed
GRACE = 600  # seconds that all have to save when they are asked to stop
HURRY = 5  # seconds that they have when they are asked again


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `alexnet ARGUMENTS` as so many ranks. Returns the exit code of rank 0, who has said what there is to say.

    Raises:
        AlexNetError: a rank failed, with its message; where several did, the one that did not just lose another.
    """
    logging.disable(logging.ERROR)  # of the manager, which tells at length what we tell in two lines
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # its handlers raise, be the processes started or half of them
    store = meeting_place()
    ranks = range(processes)
    with tempfile.TemporaryDirectory(prefix="alexnet-") as folder, catch_stop_signals(None) as asked:
        safely = [] if os.getcwd() in sys.path else ["-P"]  # or -m would import what lies in the user's folder
        command = (*safely, "-m", "alexnet_cli.cli", *arguments)
        started = start_processes(
            "alexnet", sys.executable, dict.fromkeys(ranks, command),
            {rank: variables(rank, processes, store.port) for rank in ranks}, DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        assert isinstance(started, SubprocessContext)  # that of a command, not of a function
        try:
            failed = _wait(started, asked)
        except KeyboardInterrupt:  # the second Ctrl-C
            started.close(signal.SIGINT, HURRY)
            raise
        finally:
            started.close(signal.SIGKILL, HURRY)
        failures = [_failure(started, rank) for rank in sorted(failed)]
        reason = asked()
    if culprits := [found for found in failures if found]:
        error = min(culprits, key=lambda found: found[0])[1]
        if reason and isinstance(error, MissingError):  # ended by the signal before it could say so
            raise Stopped(f"stopped by {reason}", "", EXIT_CODES[reason])
        raise error
    return int(started.subprocess_handlers[0].proc.returncode)


def meeting_place() -> TCPStore:
    """Where the ranks find each other, on a free port; kept by this process, since it must outlive rank 0."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What tells a process who it is; the store is ours, so that it does not go with rank 0."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // size)),
    }  # fmt: skip


def _codes(started: SubprocessContext) -> list[int | None]:
    return [handler.proc.poll() for handler in started.subprocess_handlers.values()]


def _wait(started: SubprocessContext, asked: Callable[[], str | None]) -> set[int]:
    """Wait until all have ended, and help the others to end when one has failed. Returns those that failed first.

    What we are asked, we pass on, and wait until all have saved.
    """
    while None in (codes := _codes(started)) and not any(codes):
        if reason := asked():
            started.close(signal.SIGINT if reason == "Ctrl-C" else signal.Signals[reason], GRACE)
            return set(started.error_files)
        time.sleep(PERIOD)
    time.sleep(PERIOD)  # one that has lost another may have ended a moment before that other is seen to be gone
    # Who has said why will end, too: letting go of a device takes time.
    failed = {rank for rank, code in enumerate(_codes(started)) if code or _told(started.error_files[rank])}
    started.close(signal.SIGTERM, MERCY)
    return failed


def _failure(started: SubprocessContext, rank: int) -> tuple[tuple[bool, float], AlexNetError] | None:
    """How a rank failed, with what sorts the culprit first: it did not lose another, and it was the earliest."""
    code = started.subprocess_handlers[rank].proc.returncode
    told = _told(started.error_files[rank])
    if told:
        error = AlexNetError(f"{told['what']}", str(told["hint"]))
        error.exit_code = int(told["code"])
        return (bool(told["lost"]), float(told["time"])), error
    if code < 0:
        name = signal.Signals(-code).name
        what = f"rank {rank} was ended by {name}, and the others with it"
        hint = "memory may have run out, if nobody did that; --resume goes on from the last checkpoint, if any"
        return (code == -signal.SIGTERM, time.time()), MissingError(what, hint)
    if code > 0 and rank > 0:  # rank 0 is silent where nobody reads what it writes
        return (False, time.time()), MissingError(f"rank {rank} ended with exit code {code}, and the others with it")
    return None


def _told(path: str) -> dict[str, Any] | None:
    """What a rank has left in its error file (see cli.py), if it has."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file)["alexnet"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
