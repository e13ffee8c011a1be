"""The processes ("ranks") of one training: who is who, and what they tell each other beside the network's own traffic.

Ranks form a mesh of replicas and, within each replica, towers: rank 0 has replica 0's tower 1, rank 1 its tower 2, and
so on. A launcher tells each its number in environment variables; there are ours, torchrun's and Slurm's.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from alexnet_cli.core import transport
from alexnet_cli.core.heartbeat import Heartbeat, told
from alexnet_cli.core.towers import Towers
from alexnet_cli.errors import LostError, MissingError, UsageError

T = TypeVar("T")
Parallel = Literal["auto", "tower", "data", "hybrid"]
LAUNCHER = "ALEXNET_LAUNCHER"  # number of the process that started us, if that is one of ours


@dataclass(frozen=True)
class Numbers:
    """What a launcher says of this process: its rank among all, and its place on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def numbers() -> Numbers | None:
    """This process's numbers, or None where it is alone.

    Raises:
        UsageError: they are there in part, or are no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    if names[0] not in os.environ or names[1] not in os.environ:
        return None
    try:
        rank, size = (int(os.environ[name]) for name in names[:2])
        local_rank = int(os.environ.get(names[2], rank))
        found = Numbers(rank, size, local_rank, int(os.environ.get(names[3], size)))
    except ValueError as error:
        raise UsageError(f"the launcher's variables {', '.join(names)} are no numbers: {error}") from error
    if not (0 <= rank < size and 0 <= local_rank < found.local_size):
        what = f"the launcher numbers this rank {rank} of {size}, on this machine {local_rank} of {found.local_size}"
        raise UsageError(what, f"{', '.join(names)} count from 0")
    return found


def parent() -> int | None:
    """The process that started this one as one of several, if it was ours."""
    return int(os.environ[LAUNCHER]) if LAUNCHER in os.environ else None


@dataclass(frozen=True)
class Ranks:
    """The place of this process: rank of `size`, in `replica` of `replicas`; alone unless `arranged` says otherwise."""

    rank: int = 0
    size: int = 1
    replica: int = 0
    replicas: int = 1
    towers: Towers | None = None
    """Of the network's two, the tower this process holds; None if it holds all."""
    columns: Towers | None = None
    """Of layers 6 to 8, the units it holds, where that is otherwise split."""
    group: dist.ProcessGroup | None = None
    """The ranks that have what this one has, of other replicas."""
    heartbeat: Heartbeat | None = None
    traffic: Counter[str] = field(default_factory=Counter, compare=False)
    """Bytes that this rank has sent, by layer."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def collects(self) -> bool:
        """Whether rank 0 needs this rank's slices to have the whole network."""
        return self.replica == 0 or self.columns is not None

    def share(self, images: int) -> slice:
        """This rank's part of a batch."""
        return slice(self.replica * images // self.replicas, (self.replica + 1) * images // self.replicas)

    def broadcast(self, value: T, what: str) -> T:
        """Rank 0's value, for all."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with self.together(what):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        received: T = box[0]
        return received

    def everyone(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with self.together("counting who is there"):
                dist.all_gather_object(found, value)
        return found

    def agreed(self, stop: Callable[[], str | None], reasons: Sequence[str]) -> Callable[[], str | None]:
        """A `stop` that gives all ranks the same answer at the same call: that of any that has a reason."""
        if self.size == 1:
            return stop

        def together() -> str | None:
            reason = stop()
            code = torch.tensor([0 if reason is None else 1 + reasons.index(reason)])
            with self.together("agreeing whether to go on"):
                dist.all_reduce(code, dist.ReduceOp.MAX)
            return reasons[int(code) - 1] if int(code) else None

        return together

    def total(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum over replicas, each of which is counted once."""
        if self.group is None:
            return values
        sums = torch.from_numpy(np.array(values))
        with self.together("adding up counts"):
            dist.all_reduce(sums, group=self.group)
        return sums.numpy()

    def at(self, place: str) -> None:
        """Say what this rank is about to do, for the others to know should it come no further."""
        if self.heartbeat:
            self.heartbeat.at(place)

    @contextmanager
    def together(self, place: str) -> Iterator[None]:
        """While inside: the failure of another rank is said to be that.

        Raises:
            LostError: another rank is gone, or has not answered in time.
            MissingError: the GPUs of this machine cannot talk to each other.
        """
        self.at(place)
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not transport.complains(error):
                raise
            if trouble := transport.own_trouble(error):
                what = f"rank {self.rank}: NCCL, through which GPUs talk, fails at: {place}; {trouble}"
                hint = "NCCL_DEBUG=INFO tells more; --gpus 0 gives the same numbers on one, --gpus 0,0 in two processes"
                raise MissingError(what, hint) from error
            sign = self.heartbeat.behind() if self.heartbeat else None
            found = told(sign) if sign else str(error).partition("\n")[0]
            what = f"rank {self.rank} waited for the others in vain, at: {place}; {found}"
            raise LostError(what, "--resume goes on from the last checkpoint, if any") from error


ALONE = Ranks()


def arrangement(size: int, parallel: Parallel, towers: int) -> tuple[int, int]:
    """How many replicas, of how many ranks each. Raises UsageError where that does not come out even."""
    if size == 1 or parallel in ("data", "hybrid"):
        return size, 1
    if towers == 2 and size % 2 == 0:
        return size // 2, 2
    if parallel == "auto":
        return size, 1
    why = f"{size} is odd" if towers == 2 else "the recipe has one tower"
    raise UsageError(f"--parallel tower needs pairs of devices for two towers, and {why}", "--parallel data needs none")


@contextmanager
def meeting(mine: Numbers | None, backend: str) -> Iterator[Ranks]:
    """While inside: in touch with the other ranks, if there are any; what each of them has, `arranged` says later.

    Raises:
        MissingError: they cannot be met.
    """
    if mine is None or mine.size == 1:
        yield ALONE
        return
    patience = transport.patience()
    os.environ.update({"RANK": str(mine.rank), "WORLD_SIZE": str(mine.size)})
    try:
        store = next(rendezvous("env://", timeout=patience))[0]
        corner = _corner(store, mine, patience.total_seconds())
        dist.init_process_group(backend, store=corner, rank=mine.rank, world_size=mine.size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        what = f"rank {mine.rank} of {mine.size} cannot meet the others: {str(error).partition(chr(10))[0]}"
        raise MissingError(what, "MASTER_ADDR and MASTER_PORT must name the same machine for all ranks") from error
    beat = Heartbeat(mine.rank, mine.size, corner)
    try:
        yield Ranks(mine.rank, mine.size, heartbeat=beat)
    finally:
        beat.end()
    dist.destroy_process_group()  # not after an error: it would wait for those that have died of it


def _corner(store: Store, mine: Numbers, seconds: float) -> Store:
    """A part of the store that nobody has written to.

    An elastic launcher keeps its store over restarts, with the addresses of processes that are gone: who reads those
    before they are written anew waits in vain. So each process shows a name that it has just made up, and rank 0
    answers to that name.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"here/{mine.rank}", name)
    if mine.rank:
        store.wait([f"welcome/{name}"])
        corner = store.get(f"welcome/{name}").decode()
        store.set(f"thanks/{corner}/{mine.rank}", "")
        return PrefixStore(corner, store)
    missing = set(range(1, mine.size))
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no sign of rank {', '.join(str(rank) for rank in sorted(missing))}")
        for rank in [rank for rank in missing if store.check([f"here/{rank}"])]:
            store.set(f"welcome/{store.get(f'here/{rank}').decode()}", name)
        missing = {rank for rank in missing if not store.check([f"thanks/{name}/{rank}"])}
        time.sleep(0.02)
    return PrefixStore(name, store)


def arranged(ranks: Ranks, parallel: Parallel, towers: int, device: torch.device) -> Ranks:
    """The same ranks, knowing which of them has which tower of which replica. Raises UsageError if it cannot be."""
    if ranks.size == 1:
        return ranks
    replicas, each = arrangement(ranks.size, parallel, towers)
    replica, tower = ranks.rank // each, ranks.rank % each
    mesh = np.arange(ranks.size).reshape(replicas, each)
    tower_group = _group(mesh) if each == 2 else None
    data_group = _group(mesh.T) if replicas > 1 else None
    staged = device.type == "cuda" and "nccl" not in str(dist.get_backend_config())

    def part(total: int, first: int, group: dist.ProcessGroup | None) -> Towers:
        return Towers(total, 1, first, group, staged, ranks.heartbeat, ranks.traffic)

    return replace(
        ranks,
        replica=replica,
        replicas=replicas,
        towers=part(2, tower, tower_group) if tower_group else None,
        columns=part(ranks.size, ranks.rank, data_group) if parallel == "hybrid" else None,
        group=data_group,
    )


def _group(mesh: npt.NDArray[np.int64]) -> dist.ProcessGroup:
    """This rank's row of the mesh. Groups of torch's DeviceMesh wait for half an hour, whatever they are told."""
    group = dist.new_subgroups_by_enumeration(mesh.tolist(), timeout=transport.patience())[0]
    assert isinstance(group, dist.ProcessGroup)
    transport.outlast(group)
    return group
