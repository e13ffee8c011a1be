"""The process group of one training: joining it, the mesh of ranks, timeouts, and errors that name a missing rank.

Ranks form a mesh of replicas and, within each replica, towers: rank 0 holds tower 1 of replica 0, rank 1 its tower 2,
and so on. A launcher passes each process its rank in environment variables: torchrun's (ours sets the same) or Slurm's.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from alexnet_cli.core.model.towers import TowerGroup
from alexnet_cli.errors import LostError, MissingError, UsageError

T = TypeVar("T")
Parallel = Literal["auto", "tower", "data", "hybrid"]
LAUNCHER_VARIABLE = "ALEXNET_LAUNCHER"  # process id of the `alexnet` command that started this rank
TIMEOUT_VARIABLE = "ALEXNET_TIMEOUT"  # seconds that a rank waits for the others
DEFAULT_TIMEOUT = 600.0
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"  # gloo's own: the network interface it listens on
ELSEWHERE = "192.0.2.1"  # an address for documentation (RFC 5737): it has the default route, and nothing is sent to it
NCCL_TIMEOUT_FACTOR = 2  # NCCL waits this many times longer than gloo
CHECKED_BYTES = 1 << 20  # that each pair of ranks exchanges before a training on GPUs
REPORT_SECONDS = 3.0  # after a failure, how long the other ranks have to report that they see it too
# Words in the errors of gloo, NCCL and the store, which share no exception class.
TRANSPORT_WORDS = ("gloo", "Dist", "NCCL", "Connection", "Timed out", "Broken pipe", "onnection reset")


@dataclass(frozen=True)
class RankInfo:
    """What a launcher tells this process: its rank among all processes, and its rank on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_rank_info() -> RankInfo | None:
    """Read this process's rank from the launcher's variables. Returns None if it was started alone.

    Raises:
        UsageError: the variables are not whole numbers, or out of range.
    """
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        # SLURM_NTASKS counts the tasks of the job: in a shell of `salloc` it can be 2 where only one process runs
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        variables = ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    if variables[0] not in os.environ or variables[1] not in os.environ:
        return None
    try:
        rank, size = (int(os.environ[variable]) for variable in variables[:2])
        local_rank = int(os.environ.get(variables[2], rank))
        local_size = min(size, int(os.environ.get(variables[3], size)))
    except ValueError as error:
        what = f"the launcher's variables {', '.join(variables)} are not numbers: {error}"
        raise UsageError(what, "start through torchrun or srun, or unset them") from error
    if not (0 <= rank < size and 0 <= local_rank < local_size):
        what = f"the launcher calls this process rank {rank} of {size}, local rank {local_rank} of {local_size}"
        raise UsageError(what, f"{', '.join(variables)} count from 0")
    return RankInfo(rank, size, local_rank, local_size)


def launcher_pid() -> int | None:
    """The process id of the `alexnet` command that started this rank; None under another launcher."""
    return int(os.environ[LAUNCHER_VARIABLE]) if LAUNCHER_VARIABLE in os.environ else None


def read_timeout() -> timedelta:
    """How long a rank waits for the others. Raises UsageError if ALEXNET_TIMEOUT is not a positive number."""
    text = os.environ.get(TIMEOUT_VARIABLE) or str(DEFAULT_TIMEOUT)
    try:
        timeout = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        what = f"{TIMEOUT_VARIABLE}={text} is not a positive number of seconds"
        raise UsageError(what, f"for example {TIMEOUT_VARIABLE}=600")
    return timeout


@dataclass(frozen=True)
class ProcessMesh:
    """This process's position: rank of `size`, in `replica` of `replicas`. The default is a single process."""

    rank: int = 0
    size: int = 1
    replica: int = 0
    replicas: int = 1
    towers: TowerGroup | None = None
    """The tower this process holds; None if it holds both."""
    columns: TowerGroup | None = None
    """The units of layers 6 to 8 this process holds, in hybrid parallelism; otherwise None."""
    group: dist.ProcessGroup | None = None
    """The ranks of all replicas that hold the same part of the network."""
    store: Store | None = field(default=None, compare=False)
    traffic: Counter[str] = field(default_factory=Counter, compare=False)
    """Bytes that this rank has sent, by layer."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and messages."""
        return self.rank == 0

    @property
    def is_collecting(self) -> bool:
        """Whether this rank takes part when rank 0 gathers the whole network."""
        return self.replica == 0 or self.columns is not None

    def batch_slice(self, images: int) -> slice:
        """Return the slice of a batch of `images` that this rank trains on."""
        return slice(self.replica * images // self.replicas, (self.replica + 1) * images // self.replicas)

    def broadcast(self, value: T, what: str) -> T:
        """Send rank 0's value to all ranks and return it. `what` names the operation in errors."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with self.name_errors(what):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        received: T = box[0]
        return received

    def gather_values(self, value: T) -> list[T]:
        """Gather one value from each rank, in rank order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self.name_errors("gathering the devices of all ranks"):
                dist.all_gather_object(values, value)
        return values

    def agree_on_stop(self, stop: Callable[[], str | None], reasons: Sequence[str]) -> Callable[[], str | None]:
        """Wrap `stop` so that all ranks return the same reason at the same call: that of any rank that has one.

        A reason is returned one call later, so that no rank waits for the others: they agree during the step between.
        """
        if self.size == 1:
            return stop
        pending: tuple[dist.Work, torch.Tensor] | None = None

        def stop_reason() -> str | None:
            nonlocal pending
            reason, last = stop(), pending
            code = torch.tensor([0 if reason is None else 1 + reasons.index(reason)])
            with self.name_errors("agreeing whether to stop"):
                pending = dist.all_reduce(code, dist.ReduceOp.MAX, async_op=True), code
                if last is None:
                    return None
                last[0].wait()
            return reasons[int(last[1]) - 1] if int(last[1]) else None

        return stop_reason

    def sum_over_replicas(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Sum an array over all replicas."""
        if self.group is None:
            return values
        sums = torch.from_numpy(np.array(values))
        with self.name_errors("adding up counts"):
            dist.all_reduce(sums, group=self.group)
        return sums.numpy()

    @contextmanager
    def name_errors(self, operation: str) -> Iterator[None]:
        """While inside, replace errors of gloo and NCCL by errors that name the operation and the missing rank.

        Raises:
            LostError: another rank has ended, or did not arrive in time.
            MissingError: the GPUs of this machine cannot exchange data.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_transport_error(error):
                raise
            if reason := _nccl_failure(error):
                what = f"rank {self.rank}: NCCL (GPU communication) failed in {operation}: {reason}"
                hint = "set NCCL_DEBUG=INFO for details; --gpus 0 trains on one GPU, --gpus 0,0 without NCCL"
                raise MissingError(what, hint) from error
            hint = "continue from the last checkpoint with --resume"
            raise LostError(f"rank {self.rank} {self._describe_loss(error, operation)}", hint) from error

    def _describe_loss(self, error: RuntimeError, operation: str) -> str:
        """Say which rank is missing. Every rank that sees the failure reports in the store; the missing one does not.

        torch.distributed.monitored_barrier would tell only rank 0 who is missing, and prints to stderr by itself.
        """
        assert self.store is not None
        self.store.set_timeout(timedelta(seconds=REPORT_SECONDS))
        try:
            missing = _missing_ranks(self.store, "lost", self.rank, self.size, REPORT_SECONDS)
        except RuntimeError:
            missing = [0]  # the store does not answer: rank 0 keeps it, unless a launcher does
        event = "timed out" if "timed out" in str(error).lower() else "lost its connection"
        reason = f"{_format_ranks(missing)} did not arrive" if missing else "all ranks respond; check the network"
        return f"{event} in {operation}: {reason}"


SINGLE_PROCESS = ProcessMesh()


def _is_transport_error(error: RuntimeError) -> bool:
    """Whether gloo, NCCL or the store failed, usually because another rank is gone."""
    return any(word in f"{type(error).__name__} {error}" for word in TRANSPORT_WORDS)


def _nccl_failure(error: RuntimeError) -> str:
    """What NCCL reports as wrong on this machine, such as too little shared memory; "" if it only lost a rank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    local = any("NCCL error" in line for line in lines) and not any("ncclRemoteError" in line for line in lines)
    return lines[-1] if local else ""


def _missing_ranks(store: Store, event: str, rank: int, size: int, seconds: float) -> list[int]:
    """Report this rank in the store and wait for the others. Returns those that have not reported in time."""
    store.set(f"{event}/{rank}", "")
    deadline = time.monotonic() + seconds
    while missing := [other for other in range(size) if not store.check([f"{event}/{other}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return missing


def _format_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def mesh_shape(size: int, parallel: Parallel, towers: int) -> tuple[int, int]:
    """Return the number of replicas and of ranks in each. Raises UsageError if `size` ranks cannot be divided so."""
    if size == 1 or parallel in ("data", "hybrid"):
        return size, 1
    if towers == 2 and size % 2 == 0:
        return size // 2, 2
    if parallel == "auto":
        return size, 1
    reason = f"the number of devices is odd ({size})" if towers == 2 else "the recipe has one tower"
    raise UsageError(f"--parallel tower places two towers on two devices: {reason}", "use --parallel data")


@contextmanager
def join_process_group(info: RankInfo | None, backend: str) -> Iterator[ProcessMesh]:
    """While inside, this process is a rank of a process group, if there are several. See `arrange_mesh` for the rest.

    torchrun keeps its store over restarts. The prefix keeps restarted ranks from reading the addresses of the old ones.

    Raises:
        MissingError: another rank did not arrive.
    """
    if info is None or info.size == 1:
        yield SINGLE_PROCESS
        return
    timeout = read_timeout()
    if info.local_size < info.size:
        _set_gloo_interface()
    os.environ.update({"RANK": str(info.rank), "WORLD_SIZE": str(info.size)})
    try:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"attempt {attempt}", next(rendezvous("env://", timeout=timeout))[0])
        if missing := _missing_ranks(store, "joined", info.rank, info.size, timeout.total_seconds()):
            raise RuntimeError(f"{_format_ranks(missing)} did not arrive")
        dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        what = f"rank {info.rank} of {info.size} cannot join the process group: {reason}"
        hint = (
            "MASTER_ADDR and MASTER_PORT must name the same machine for all ranks; on several machines, "
            f"{INTERFACE_VARIABLE}=eth0 and NCCL_SOCKET_IFNAME=eth0 choose the network interface"
        )
        raise MissingError(what, hint) from error
    yield ProcessMesh(info.rank, info.size, store=store)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that have ended


def _set_gloo_interface() -> None:
    """Let other machines reach gloo where the name of this host is a loopback address, as on Debian and Ubuntu.

    gloo listens on the address of that name, unless its variable says otherwise.
    """
    with suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    for address in (os.environ.get("MASTER_ADDR", ""), ELSEWHERE):
        if (name := _find_interface(address)) not in ("", "lo"):
            os.environ.setdefault(INTERFACE_VARIABLE, name)


def _find_interface(address: str) -> str:
    """The network interface through which this machine reaches an address; "" if unknown. Linux only."""
    if sys.platform != "linux":
        return ""
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # UDP: chooses the way, sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                if fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24] == own:  # SIOCGIFADDR
                    return name
    return ""


def arrange_mesh(ranks: ProcessMesh, parallel: Parallel, towers: int, device: torch.device) -> ProcessMesh:
    """Assign a replica and a tower to each rank. Raises UsageError if they cannot be divided that way."""
    if ranks.size == 1:
        return ranks
    replicas, ranks_per_replica = mesh_shape(ranks.size, parallel, towers)
    replica, tower = divmod(ranks.rank, ranks_per_replica)
    mesh = np.arange(ranks.size).reshape(replicas, ranks_per_replica)
    with ranks.name_errors("connecting towers and replicas"):
        tower_group = _new_subgroup(mesh) if ranks_per_replica == 2 else None
        data_group = _new_subgroup(mesh.T) if replicas > 1 else None
    staged = device.type == "cuda" and "nccl" not in str(dist.get_backend_config())
    columns = TowerGroup(ranks.size, 1, ranks.rank, data_group, staged, ranks.traffic)
    return replace(
        ranks,
        replica=replica,
        replicas=replicas,
        towers=TowerGroup(2, 1, tower, tower_group, staged, ranks.traffic) if tower_group else None,
        columns=columns if parallel == "hybrid" else None,
        group=data_group,
    )


def check_peers(ranks: ProcessMesh, device: torch.device, names: Sequence[str]) -> None:
    """Exchange random bytes between all ranks of this rank's groups, and compare them with what was sent.

    On some boards copies between GPUs arrive as zeros, without an error. `names` are the devices of all ranks.

    Raises:
        MissingError: bytes arrived changed.
    """
    groups = [group for group in (ranks.towers and ranks.towers.group, ranks.group) if group]
    corrupt: list[str] = []
    with ranks.name_errors("comparing exchanged bytes"):
        for group in groups:
            peers = dist.get_process_group_ranks(group)
            sent = torch.stack([_draw_bytes(ranks.rank, peer) for peer in peers]).to(device)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=group)
            pairs = zip(peers, received.cpu(), strict=True)
            corrupt += [names[peer] for peer, part in pairs if not torch.equal(part, _draw_bytes(peer, ranks.rank))]
    if corrupt:
        what = f"data sent from {', '.join(corrupt)} to {names[ranks.rank]} arrives corrupted"
        raise MissingError(what, "NCCL_P2P_DISABLE=1 sends it through main memory; --gpus 0 trains on one GPU")


def _draw_bytes(sender: int, receiver: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sender << 32 | receiver)
    return torch.randint(256, (CHECKED_BYTES,), dtype=torch.uint8, generator=generator)


def _new_subgroup(mesh: npt.NDArray[np.int64]) -> dist.ProcessGroup:
    """Make a group of each row; return this rank's. torch's DeviceMesh is not used: it ignores the timeout."""
    group = dist.new_subgroups_by_enumeration(mesh.tolist(), timeout=read_timeout())[0]
    assert isinstance(group, dist.ProcessGroup)
    _lengthen_nccl_timeout(group)
    return group


def _lengthen_nccl_timeout(group: dist.ProcessGroup) -> None:
    """Let NCCL wait longer than gloo, whose timeout is an error with a message; that of NCCL kills the process.

    Groups without NCCL stay as they are.
    """
    with suppress(RuntimeError):  # no backend for GPUs
        backend = group._get_backend(torch.device("cuda"))
        if backend.name() == "nccl":
            backend._set_default_timeout(read_timeout() * NCCL_TIMEOUT_FACTOR)
