"""`alexnet benchmark parallel`: the same steps in one process and in several, and the bytes that these exchange.

Everything runs in processes that are started once and wait for their turn. Their images are noise, already decoded;
augmentation, exchange and update are those of `alexnet train`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import numpy as np
import torch

from alexnet_cli.core import devices
from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.loader import Batch
from alexnet_cli.core.model.architecture import layer_specs
from alexnet_cli.core.parallel import placement
from alexnet_cli.core.parallel.launch import rank_variables, start_store
from alexnet_cli.core.parallel.process_group import join_process_group, read_rank_info
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.errors import AlexNetError, MissingError
from alexnet_cli.recipe import PAPER, SIDE, Recipe
from alexnet_plugins.benchmark.timing import BenchmarkCase, BenchmarkOptions, measure_least_seconds
from alexnet_plugins.benchmark.training import CLASSES, RATE, STEPS_ON_GPU, wait_for_device

Strategy = Literal["tower", "data", "hybrid"]
RECIPE = PAPER
BATCH = 64
END_SECONDS = 10.0  # for processes to end
BEFORE_EXCHANGE = {"conv3": "conv2", "fc6": "conv5"}  # layers whose pooled maps the towers share for the next layer


@dataclass(frozen=True)
class Job:
    """What a group of processes does together: `steps` steps per pass, `batch` images per step over all of them."""

    recipe: Recipe
    batch: int
    steps: int
    processes: int
    threads: int
    """Of each process on a CPU."""
    parallel: Strategy
    gpus: str


def compare_parallel(options: BenchmarkOptions) -> Generator[BenchmarkCase]:
    """Yield a case in float32, and one in bf16 if the devices have it; on the CPU unless --gpus names several."""
    workers = options.workers
    gpu_count = placement.count_processes(options.gpus, None)
    on_gpus = gpu_count > 1
    count = max(2, gpu_count)
    batch = -(-(options.batch_size or BATCH) // count) * count  # equal shares make scaled byte counts exact
    gpu_ids = placement.local_gpus(options.gpus)
    gpus = ",".join(map(str, gpu_ids)) if on_gpus else "none"
    job = Job(RECIPE, batch, STEPS_ON_GPU if on_gpus else 1, count, max(1, workers // count), "tower", gpus)
    yield from _compare_strategies(job, "fp32", workers)
    if on_gpus:
        has_bf16 = all(gpu.has_bf16 for gpu in devices.list_gpus() if gpu.index in gpu_ids)
    else:
        has_bf16 = devices.has_cpu_bf16()
    if has_bf16:
        yield from _compare_strategies(job, "bf16", workers)


def _compare_strategies(job: Job, precision: Literal["fp32", "bf16"], workers: int) -> Generator[BenchmarkCase]:
    job = replace(job, recipe=replace(job.recipe, precision=precision))
    on_gpus = job.gpus != "none"
    where = f"GPUs {job.gpus}" if on_gpus else f"on the CPU, {job.threads} threads each (--gpus 0,1: on GPUs)"
    single = replace(job, processes=1, threads=workers, gpus=job.gpus.partition(",")[0])
    with ExitStack() as stack:
        towers, one, data, hybrid = (
            stack.enter_context(RankGroup(each))
            for each in (job, single, replace(job, parallel="data"), replace(job, parallel="hybrid"))
        )
        factor = job.recipe.batch_size / job.batch
        sent_bytes = {
            name: scale_to_batch(group.call("count_sent_bytes")[0], factor)
            for name, group in {"ours": towers, "data": data, "hybrid": hybrid}.items()
        }
        exchanges = {
            f"exchange for {layer} alone, there and back": max(towers.call("measure_exchange", layer))
            for layer in BEFORE_EXCHANGE
        }
        notes = [
            f"ours: a tower in each of {job.processes} processes; {where}",
            f"{job.batch} images per step: noise, in memory as it comes from the loader",
            f"sent: by each process in a step of {job.recipe.batch_size} images, computed from a step of {job.batch}",
        ]
        name = "one process" if on_gpus else f"one process, {workers} threads"
        peers = {name: one.run, "data": data.run, "hybrid": hybrid.run}
        yield BenchmarkCase(f"parallel {precision}", towers.run, peers, notes, seconds=exchanges, sent_bytes=sent_bytes)


def scale_to_batch(sent: Mapping[str, int], factor: float) -> dict[str, float]:
    """Return bytes by layer for a batch `factor` times as large; gradients do not grow with the batch."""
    layers: Counter[str] = Counter()
    for what, size in sorted(sent.items()):
        layer, _, kind = what.partition(" ")
        layers[layer] += round(size if kind == "gradients" else size * factor)
    return dict(layers)


class RankGroup:
    """Processes that train together. Each runs a method of `RankStep` when all are asked to."""

    def __init__(self, job: Job) -> None:
        self.job, self.store = job, start_store()
        # Forked from a server that has only loaded the code: this process has settings that they must not inherit.
        is_windows = sys.platform == "win32"
        context = multiprocessing.get_context("spawn") if is_windows else multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["alexnet_plugins.benchmark.parallel", "torch._dynamo"])  # DDP imports dynamo
        self.pipes, self.processes = [], []
        for rank in range(job.processes):
            pipe, child_pipe = context.Pipe()
            variables = rank_variables(rank, job.processes, self.store.port)
            process = context.Process(target=serve_rank, args=(job, variables, child_pipe), daemon=True)
            process.start()
            child_pipe.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(END_SECONDS)
            process.kill()

    def run(self) -> int:
        """Run a pass in all processes. Returns the number of images."""
        self.call("run")
        return self.job.steps * self.job.batch

    def call(self, method: str, *arguments: str) -> list[Any]:
        """Return what a method of `RankStep` returns in every rank.

        Raises:
            AlexNetError: a process failed or died; the others, which may wait for it, are not waited for.
        """
        answers: dict[Connection, Any] = {}
        try:
            for pipe in self.pipes:
                pipe.send((method, arguments))
            while pending := [pipe for pipe in self.pipes if pipe not in answers]:
                ready = wait(pending)
                for pipe in (pipe for pipe in pending if pipe in ready):
                    answers[pipe] = pipe.recv()
                    if isinstance(answers[pipe], RankFailure):
                        raise AlexNetError(answers[pipe].message)
        except (EOFError, OSError) as error:
            what = f"one of {self.job.processes} processes that train together died"
            raise MissingError(what, "if memory ran out, use a smaller batch: -b 16") from error
        return [answers[pipe] for pipe in self.pipes]


@dataclass(frozen=True)
class RankFailure:
    """The error of a rank."""

    message: str


def serve_rank(job: Job, variables: dict[str, str], pipe: Connection) -> None:
    """Be a rank: run the methods that the pipe names until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    os.environ.update(variables)
    recipe = job.recipe
    try:
        with join_process_group(read_rank_info(), placement.choose_backend(job.gpus)) as ranks:
            rank_placement = placement.place_ranks(ranks, job.gpus, recipe.precision, job.parallel, recipe.towers)
            if rank_placement.device.type == "cpu":
                torch.set_num_threads(job.threads)
            step = RankStep(recipe, job.batch, job.steps, rank_placement)
            with suppress(EOFError):
                while True:
                    method, arguments = pipe.recv()
                    pipe.send(getattr(step, method)(*arguments))
    except Exception as error:
        with suppress(OSError):
            pipe.send(RankFailure(f"rank {variables['RANK']} of {job.processes}: {error or type(error).__name__}"))


class RankStep:
    """The training steps of one rank."""

    def __init__(self, recipe: Recipe, batch: int, steps: int, rank_placement: placement.Placement) -> None:
        """`batch` is the number of images over all ranks; a pass has `steps` steps."""
        ranks, device = rank_placement.ranks, rank_placement.device
        self.batch_size, self.steps, self.placement = batch, steps, rank_placement
        generator, share = np.random.default_rng(0), ranks.batch_slice(batch)
        images = generator.integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)[share]
        labels = generator.integers(0, CLASSES, batch)[share]
        self.batch = Batch(torch.from_numpy(images).to(device), torch.from_numpy(labels), np.arange(batch)[share])
        mean, axes = np.full((3, SIDE, SIDE), 128, np.float32), np.eye(3, dtype=np.float32)
        augment = Augment(recipe, mean, np.ones(3, np.float32), axes, device, rank_placement.dtype)
        recipe = replace(recipe, batch_size=batch, learning_rate=RATE)
        self.trainer = Trainer(recipe, CLASSES, batch, augment, rank_placement)
        self.trainer.begin_epoch()

    def run(self) -> None:
        """Run a pass and wait for the device."""
        for _ in range(self.steps):
            self.trainer.step(self.batch)
        wait_for_device(str(self.placement.device))

    def count_sent_bytes(self) -> dict[str, int]:
        """Return the bytes that this rank sends in a step, by purpose."""
        traffic = self.placement.ranks.traffic
        traffic.clear()
        self.trainer.step(self.batch)
        return dict(traffic)

    def measure_exchange(self, layer: str) -> float:
        """Return the seconds to share the maps before a layer and to send back their gradient."""
        network, before = self.trainer.network, BEFORE_EXCHANGE[layer]
        side = next(spec.pooled_side or spec.side for spec in layer_specs(RECIPE, CLASSES) if spec.name == before)
        channels = network.get_submodule(before).get_parameter("bias").numel()
        dtype = torch.bfloat16 if self.placement.precision == "bf16" else torch.float32
        maps = torch.zeros(self.batch_size, channels, side, side, dtype=dtype, device=self.placement.device)
        maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()

        def exchange() -> None:
            shared = network.towers.share(maps, layer)
            shared.backward(shared.detach())
            wait_for_device(str(self.placement.device))

        exchange()
        return measure_least_seconds(exchange, 5)
