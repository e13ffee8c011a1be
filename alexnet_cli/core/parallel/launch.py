"""Start one command as several ranks on this machine, and end all of them when one fails or the user stops it.

torch's process manager starts the ranks; each runs the command line that was typed, with torchrun's variables set.

torch.distributed.launcher.elastic_launch is not used, although it would save half of this file. It starts as fast
(0.48 s against 0.41 s for two ranks that do nothing), but its signal handlers raise wherever the launcher is: a second
Ctrl-C interrupts its own cleanup and leaves the ranks running.
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
from pathlib import Path
from typing import NamedTuple

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from alexnet_cli.core.devices import count_cores
from alexnet_cli.core.parallel.process_group import LAUNCHER_VARIABLE
from alexnet_cli.core.signals import EXIT_CODES, catch_stop_signals
from alexnet_cli.errors import AlexNetError, MissingError, Stopped

POLL_SECONDS = 0.1
SAVE_SECONDS = 600  # for the ranks to save and end, when the user stops them
FAILURE_SECONDS = 15  # for the other ranks to end, when one has failed
KILL_SECONDS = 5  # for the ranks to end, after a second Ctrl-C or SIGKILL


class Failure(NamedTuple):
    """How a rank failed. The smallest of several failures is the cause of the others."""

    lost_another: bool
    """Whether it failed because another rank was lost."""
    time: float
    error: AlexNetError


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `alexnet ARGUMENTS` as `processes` ranks. Returns the exit code of rank 0, which prints the messages.

    Raises:
        AlexNetError: a rank failed. If several failed, the error of the first that did not just lose another rank.
    """
    logging.disable(logging.ERROR)  # torch's process manager logs pages about an error that we report in two lines
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # keep our handlers: torch's raise, even between two starts
    store = start_store()
    isolated = [] if os.getcwd() in sys.path else ["-P"]  # -m alone would import modules from the user's folder
    command = (*isolated, "-m", "alexnet_cli", *arguments)
    ranks = range(processes)
    variables = {rank: rank_variables(rank, processes, store.port) for rank in ranks}
    with tempfile.TemporaryDirectory(prefix="alexnet-") as folder, catch_stop_signals(None) as stop_reason:
        logs = DefaultLogsSpecs(log_dir=folder)
        context = start_processes("alexnet", sys.executable, dict.fromkeys(ranks, command), variables, logs)
        assert isinstance(context, SubprocessContext)  # it runs a command, not a function
        try:
            failed_ranks = _wait(context, stop_reason)
        except KeyboardInterrupt:  # the second Ctrl-C
            context.close(signal.SIGINT, KILL_SECONDS)
            raise
        finally:
            context.close(getattr(signal, "SIGKILL", signal.SIGTERM), KILL_SECONDS)  # Windows has no SIGKILL
        failures = [failure for rank in failed_ranks if (failure := _read_failure(context, rank))]
        reason = stop_reason()
    if failures:
        error = min(failures, key=lambda failure: (failure.lost_another, failure.time)).error
        if reason and isinstance(error, MissingError):  # the signal killed a rank that could not handle it yet
            raise Stopped(f"stopped by {reason}", "", EXIT_CODES[reason])
        raise error
    return int(context.subprocess_handlers[0].proc.returncode)


def start_store() -> TCPStore:
    """Start the store through which ranks find each other, on a free port. It lives here because rank 0 may end."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment variables of one rank, as torchrun sets them; the store is the launcher's."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", LAUNCHER_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // size)),
    }  # fmt: skip


def _wait(context: SubprocessContext, stop_reason: Callable[[], str | None]) -> list[int]:
    """Wait until all ranks have ended. Forwards signals; ends the others if one fails. Returns the failed ranks."""
    processes = [handler.proc for handler in context.subprocess_handlers.values()]
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        if reason := stop_reason():
            context.close(signal.SIGINT if reason == "Ctrl-C" else signal.Signals[reason], SAVE_SECONDS)
            return list(context.error_files)
        time.sleep(POLL_SECONDS)
    time.sleep(POLL_SECONDS)  # a rank may end just before we see the end of the rank that it lost
    # A rank that has written its error has failed too; releasing a GPU takes time.
    failed = [r for r, process in enumerate(processes) if process.poll() or _read_error(context.error_files[r])]
    context.close(signal.SIGTERM, FAILURE_SECONDS)
    return failed


def _read_failure(context: SubprocessContext, rank: int) -> Failure | None:
    """How a rank failed; None if it did not."""
    if failure := _read_error(context.error_files[rank]):
        return failure
    code = context.subprocess_handlers[rank].proc.returncode
    if code < 0:
        what = f"rank {rank} was killed by {signal.Signals(-code).name}; all other ranks were stopped"
        hint = "the system kills a process that runs out of memory; continue from the last checkpoint with --resume"
        return Failure(code == -signal.SIGTERM, time.time(), MissingError(what, hint))
    if code > 0 and rank > 0:  # rank 0 exits without a message if its output is closed
        what = f"rank {rank} ended with exit code {code}; all other ranks were stopped"
        return Failure(False, time.time(), MissingError(what))
    return None


def _read_error(path: str) -> Failure | None:
    """The error that a rank has written to its error file (see cli.py), if any."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))["alexnet"]
        error = AlexNetError(str(fields["what"]), str(fields["hint"]))
        error.exit_code = int(fields["code"])
        return Failure(bool(fields["lost"]), float(fields["time"]), error)
    except (OSError, ValueError, KeyError, TypeError):
        return None
