"""`alexnet benchmark parallel`: the same steps in one process and in several, and the bytes that these exchange.

Every contestant runs in processes of its own that are started once and wait for their turns.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Literal

from alexnet_cli.errors import AlexNetError, MissingError
from alexnet_cli.recipe import PAPER, Recipe

if TYPE_CHECKING:
    from alexnet_cli.core.stopwatch import Contest

RECIPE = PAPER
BATCH, STEPS_ON_GPU = 64, 20
PATIENCE = 10.0  # seconds that processes have to end


@dataclass(frozen=True)
class Task:
    """What processes do together: `processes` of them train on `batch` pictures a step, `steps` steps a pass."""

    recipe: Recipe
    batch: int
    steps: int
    processes: int
    threads: int
    """Of each process, where it computes on the CPU."""
    parallel: Literal["tower", "data", "hybrid"]
    gpus: str


def contests(gpus: str | None, batch: int | None, workers: int) -> Generator[Contest]:
    """One in float32, then one in bf16 where the device has it; on the CPU unless `gpus` names several."""
    from alexnet_cli.core import placement
    from alexnet_cli.core.devices import cpu_bf16, visible_gpus

    count = placement.processes(gpus, None)
    on_gpus = count > 1
    count = max(2, count)
    batch = -(-(batch or BATCH) // count) * count  # a share that comes out even is exact when scaled
    chosen = placement.local_gpus(gpus)
    ids = ",".join(map(str, chosen)) if on_gpus else "none"
    task = Task(RECIPE, batch, STEPS_ON_GPU if on_gpus else 1, count, max(1, workers // count), "tower", ids)
    yield from _contest(task, "fp32", workers)
    if all(gpu.bf16 for gpu in visible_gpus() if gpu.index in chosen) if on_gpus else cpu_bf16():
        yield from _contest(task, "bf16", workers)


def _contest(task: Task, precision: Literal["fp32", "bf16"], workers: int) -> Generator[Contest]:
    from alexnet_cli.core.stopwatch import Contest

    task = replace(task, recipe=replace(task.recipe, precision=precision))
    on_gpus = task.gpus != "none"
    where = f"GPUs {task.gpus}" if on_gpus else f"on the CPU, threads in each: {task.threads} (--gpus 0,1: on GPUs)"
    alone = replace(task, processes=1, threads=workers, gpus=task.gpus.partition(",")[0])
    name = "one process" if on_gpus else f"one process, {workers} threads"
    with ExitStack() as stack:
        towers, one, data, hybrid = (
            stack.enter_context(Team(each))
            for each in (task, alone, replace(task, parallel="data"), replace(task, parallel="hybrid"))
        )
        peers = {name: one.run, "data": data.run, "hybrid": hybrid.run}
        scaled = partial(at_batch, factor=task.recipe.batch_size / task.batch)
        sent = {name: scaled(team.ask("sent")[0]) for name, team in
                {"ours": towers, "data": data, "hybrid": hybrid}.items()}  # fmt: skip
        notes = [
            f"ours: a tower in each of {task.processes} processes; {where}",
            f"{task.batch} pictures a step: noise, in memory as it comes from the loader",
            f"sent: by each process in a step of {task.recipe.batch_size} pictures, counted in a step of {task.batch}; "
            "gradients do not grow with the batch, the rest in proportion",
        ]
        exchanges = {
            f"exchange for {layer} alone, there and back": max(towers.ask("exchange", layer))
            for layer in ("conv3", "fc6")
        }
        yield Contest(f"parallel {precision}", towers.run, peers, notes, extra=exchanges, sent=sent)


def at_batch(sent: Mapping[str, int], factor: float) -> dict[str, float]:
    """Bytes by layer, for `factor` times as many pictures."""
    layers: Counter[str] = Counter()
    for what, size in sorted(sent.items()):
        layer, _, kind = what.partition(" ")
        layers[layer] += round(size if kind == "gradients" else size * factor)
    return dict(layers)


class Team:
    """Processes that train together, each of which does what it is asked when all are."""

    def __init__(self, task: Task) -> None:
        from alexnet_cli.core.launch import rank_variables, start_store

        self.task, self.store = task, start_store()
        # Not forked from this one, whose settings they would inherit, but from one that has only loaded the code.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["alexnet_plugins.benchmark_rank", "torch._dynamo"])  # which replicas import
        self.pipes, self.processes = [], []
        for rank in range(task.processes):
            ours, theirs = context.Pipe()
            numbered = rank_variables(rank, task.processes, self.store.port)
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(task, numbered, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(PATIENCE)
            process.kill()

    def run(self) -> int:
        """A pass of all. Returns how many pictures that were."""
        self.ask("run")
        return self.task.steps * self.task.batch

    def ask(self, method: str, *arguments: str) -> list[Any]:
        """What a method of `Step` gives in every rank.

        Raises:
            AlexNetError: a process has failed or died; the others may wait for it and are not waited for.
        """
        answers: dict[Connection, Any] = {}
        try:
            for pipe in self.pipes:
                pipe.send((method, arguments))
            while waiting := [pipe for pipe in self.pipes if pipe not in answers]:
                ready = wait(waiting)
                for pipe in (pipe for pipe in waiting if pipe in ready):
                    answers[pipe] = pipe.recv()
                    if isinstance(answers[pipe], Failure):
                        raise AlexNetError(answers[pipe].what)
        except (EOFError, OSError) as error:
            what = f"a process of {self.task.processes} that train together has died"
            raise MissingError(what, "if memory ran out, a smaller batch needs less: -b 16") from error
        return [answers[pipe] for pipe in self.pipes]


@dataclass(frozen=True)
class Failure:
    """What went wrong in a rank."""

    what: str


def serve(task: Task, numbered: dict[str, str], pipe: Connection) -> None:
    """Be a rank: do what is asked until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us ends us
    os.environ.update(numbered)  # before torch is loaded, which reads how many threads to have
    import torch

    from alexnet_cli.core.placement import backend, place_ranks
    from alexnet_cli.core.process_group import join_process_group, read_rank_info
    from alexnet_plugins.benchmark_rank import Step

    recipe = task.recipe
    try:
        with join_process_group(read_rank_info(), backend(task.gpus)) as ranks:
            placed = place_ranks(ranks, task.gpus, recipe.precision, task.parallel, recipe.towers)
            if placed.device.type == "cpu":
                torch.set_num_threads(task.threads)
            step = Step(recipe, task.batch, task.steps, placed)
            while (asked := _next(pipe)) is not None:
                method, arguments = asked
                pipe.send(getattr(step, method)(*arguments))
    except Exception as error:  # whatever it is, it is told where somebody listens
        with suppress(OSError):
            pipe.send(Failure(f"rank {numbered['RANK']} of {task.processes}: {error or type(error).__name__}"))


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None
