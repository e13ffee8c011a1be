"""`alexnet benchmark parallel`: the same steps in one process and in several, and the bytes these exchange.

Every contestant runs in processes of its own that are started once and wait for their turns. Their images are noise,
decoded already; crops, color, exchange and update are what `alexnet train` does.

The second half computes what a step costs over several devices, without running it; docs/parallel.md shows its tables.
There a step is computing, plus exchanging activations, during which nothing else is done, plus that part of the
exchange of gradients that outlasts the backward pass. Towers of more than two devices are replicas of pairs.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import numpy as np
import torch

from alexnet_cli.core import devices
from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.loader import Batch
from alexnet_cli.core.model.architecture import layer_specs, layer_widths
from alexnet_cli.core.parallel import placement
from alexnet_cli.core.parallel.launch import rank_variables, start_store
from alexnet_cli.core.parallel.process_group import join_process_group, read_rank_info
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.errors import AlexNetError, MissingError
from alexnet_cli.recipe import PAPER, SIDE, Recipe
from alexnet_plugins.benchmark.stopwatch import Contest, least_seconds
from alexnet_plugins.benchmark.training import CLASSES, RATE, wait_for_device

Way = Literal["tower", "data", "hybrid"]
WAYS: tuple[Way, ...] = ("tower", "data", "hybrid")
RECIPE = PAPER
BATCH, STEPS_ON_GPU = 64, 20
END_SECONDS = 10.0  # for processes to end
POOLED = {"conv3": 13 * 13, "fc6": 6 * 6}  # pixels of the maps that towers share before these layers
COUNTS = (2, 4, 8, 16, 32, 64)  # devices, in the tables
FLOAT, HALF = 4, 2  # bytes
CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
LAYERS = (*CONVOLUTIONS, "fc6", "fc7", "fc8")
FLOP = 4.35e9  # to train on an image, as `alexnet benchmark train` counts


@dataclass(frozen=True)
class Task:
    """What processes do together: `processes` of them train on `batch` pictures a step, `steps` steps a pass."""

    recipe: Recipe
    batch: int
    steps: int
    processes: int
    threads: int
    """Of each process, where it computes on the CPU."""
    parallel: Way
    gpus: str


def compare_parallel(gpus: str | None, batch: int | None, workers: int) -> Generator[Contest]:
    """One in float32, then one in bf16 where the device has it; on the CPU unless `gpus` names several."""
    count = placement.count_processes(gpus, None)
    on_gpus = count > 1
    count = max(2, count)
    batch = -(-(batch or BATCH) // count) * count  # a share that comes out even is exact when scaled
    chosen = placement.local_gpus(gpus)
    ids = ",".join(map(str, chosen)) if on_gpus else "none"
    task = Task(RECIPE, batch, STEPS_ON_GPU if on_gpus else 1, count, max(1, workers // count), "tower", ids)
    yield from _contest(task, "fp32", workers)
    if (
        all(gpu.has_bf16 for gpu in devices.visible_gpus() if gpu.index in chosen)
        if on_gpus
        else devices.has_cpu_bf16()
    ):
        yield from _contest(task, "bf16", workers)


def _contest(task: Task, precision: Literal["fp32", "bf16"], workers: int) -> Generator[Contest]:
    task = replace(task, recipe=replace(task.recipe, precision=precision))
    on_gpus = task.gpus != "none"
    where = f"GPUs {task.gpus}" if on_gpus else f"on the CPU, threads in each: {task.threads} (--gpus 0,1: on GPUs)"
    alone = replace(task, processes=1, threads=workers, gpus=task.gpus.partition(",")[0])
    name = "one process" if on_gpus else f"one process, {workers} threads"
    with ExitStack() as stack:
        towers, one, data, hybrid = (
            stack.enter_context(RankTeam(each))
            for each in (task, alone, replace(task, parallel="data"), replace(task, parallel="hybrid"))
        )
        peers = {name: one.run, "data": data.run, "hybrid": hybrid.run}
        scaled = partial(scale_to_batch, factor=task.recipe.batch_size / task.batch)
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


def scale_to_batch(sent: Mapping[str, int], factor: float) -> dict[str, float]:
    """Bytes by layer, for `factor` times as many pictures."""
    layers: Counter[str] = Counter()
    for what, size in sorted(sent.items()):
        layer, _, kind = what.partition(" ")
        layers[layer] += round(size if kind == "gradients" else size * factor)
    return dict(layers)


class RankTeam:
    """Processes that train together, each of which does what it is asked when all are."""

    def __init__(self, task: Task) -> None:
        self.task, self.store = task, start_store()
        # Not forked from this one, whose settings they would inherit, but from one that has only loaded the code.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["alexnet_plugins.benchmark.parallel", "torch._dynamo"])  # which replicas import
        self.pipes, self.processes = [], []
        for rank in range(task.processes):
            ours, theirs = context.Pipe()
            numbered = rank_variables(rank, task.processes, self.store.port)
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(task, numbered, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()

    def __enter__(self) -> RankTeam:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(END_SECONDS)
            process.kill()

    def run(self) -> int:
        """A pass of all. Returns how many pictures that were."""
        self.ask("run")
        return self.task.steps * self.task.batch

    def ask(self, method: str, *arguments: str) -> list[Any]:
        """What a method of `RankStep` gives in every rank.

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
    os.environ.update(numbered)
    recipe = task.recipe
    try:
        with join_process_group(read_rank_info(), placement.choose_backend(task.gpus)) as ranks:
            placed = placement.place_ranks(ranks, task.gpus, recipe.precision, task.parallel, recipe.towers)
            if placed.device.type == "cpu":
                torch.set_num_threads(task.threads)
            step = RankStep(recipe, task.batch, task.steps, placed)
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


class RankStep:
    """One rank's part of the steps."""

    def __init__(self, recipe: Recipe, images: int, steps: int, placed: placement.Placement) -> None:
        """Of a batch of so many images over all ranks; `steps` steps are a pass."""
        ranks, device = placed.ranks, placed.device
        self.images, self.steps, self.placed = images, steps, placed
        generator, share = np.random.default_rng(0), ranks.batch_slice(images)
        pictures = generator.integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)[share]
        labels = generator.integers(0, CLASSES, images)[share]
        rows = np.arange(images)[share]
        self.batch = Batch(torch.from_numpy(pictures).to(device), torch.from_numpy(labels), rows)
        mean = np.full((3, SIDE, SIDE), 128, np.float32)
        pixels = Augment(recipe, mean, np.ones(3, np.float32), np.eye(3, dtype=np.float32), device, placed.dtype)
        recipe = replace(recipe, batch_size=images, learning_rate=RATE)
        self.trainer = Trainer(recipe, CLASSES, images, pixels, placed)
        self.trainer.begin_epoch()

    def run(self) -> None:
        """A pass; the device is done with it when this returns."""
        for _ in range(self.steps):
            self.trainer.step(self.batch)
        wait_for_device(str(self.placed.device))

    def sent(self) -> dict[str, int]:
        """The bytes that this rank sends in a step, by what for."""
        traffic = self.placed.ranks.traffic
        traffic.clear()
        self.trainer.step(self.batch)
        return dict(traffic)

    def exchange(self, layer: str) -> float:
        """Seconds that it takes to share what comes before a layer, and to send back its gradient."""
        network, side = self.trainer.network, int(POOLED[layer] ** 0.5)
        before = {"conv3": "conv2", "fc6": "conv5"}[layer]
        channels = network.get_submodule(before).get_parameter("bias").numel()
        dtype = torch.bfloat16 if self.placed.precision == "bf16" else torch.float32
        own = torch.zeros(self.images, channels, side, side, dtype=dtype, device=self.placed.device)
        own = own.contiguous(memory_format=torch.channels_last).requires_grad_()

        def both_ways() -> None:
            shared = network.towers.share(own, layer)
            shared.backward(shared.detach())
            wait_for_device(str(self.placed.device))

        both_ways()
        return least_seconds(both_ways, 5)


@dataclass(frozen=True)
class Link:
    """What lies between devices: bytes a second that each sends while it receives as many, seconds before the first."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Device:
    """Floating-point operations a second that it keeps up, and seconds a step that it takes besides.

    A CPU moves what it sends itself, and does not compute meanwhile.
    """

    speed: float
    besides: float
    overlaps: bool = True


LINKS = (Link("NVLink", 200e9, 10e-6), Link("PCIe 4", 20e9, 15e-6), Link("Ethernet, 25 Gbit/s", 2.8e9, 50e-6))
GPU = Device(50e12, 1e-3)


def count_parameters(recipe: Recipe) -> dict[str, int]:
    """Layer -> parameters of the whole network."""
    return {spec.name: spec.parameters for spec in layer_specs(recipe, CLASSES)}


def activation_bytes(recipe: Recipe, batch: int, devices: int, way: Way, size: int = FLOAT) -> dict[str, float]:
    """Layer -> bytes that each device sends of what the network computes, forward and back; `size` is of a number.

    The logits and their gradients are float32 in any case.
    """
    c = {layer: recipe.towers * n for layer, n in layer_widths(recipe).items()}
    if way == "tower":
        images = batch / (devices / 2)  # of a pair
        halves = {"conv3": 13 * 13 * c["conv2"] / 2, "fc6": 6 * 6 * c["conv5"] / 2, "fc7": c["fc6"] / 2}
        return {layer: 2 * images * n * size for layer, n in halves.items()} | {"fc8": images * CLASSES * FLOAT}
    if way == "hybrid":
        others, images = devices - 1, batch / devices  # of one
        return {
            "fc6": 2 * others * images * 6 * 6 * c["conv5"] * size,
            "fc7": 2 * others * batch * c["fc6"] / devices * size,
            "fc8": others / devices * 2 * batch * CLASSES * FLOAT + others * images * CLASSES * FLOAT,
        }
    return {}


def gradient_bytes(recipe: Recipe, devices: int, way: Way, size: int = FLOAT) -> dict[str, float]:
    """Layer -> bytes of gradients that each device sends, around a ring; `size` is of a number."""
    counts = count_parameters(recipe)
    replicas, split = (devices // 2, 2) if way == "tower" else (devices, 1)
    kept = CONVOLUTIONS if way == "hybrid" else tuple(counts)
    ring = 2 * (replicas - 1) / replicas
    sent = {layer: ring * counts[layer] / split * size for layer in kept}
    if way == "tower":
        sent["fc8"] += ring * CLASSES / 2 * size  # both towers hold the whole bias
    return sent if ring else {}


def sent_bytes(recipe: Recipe, batch: int, devices: int, way: Way, size: int = FLOAT) -> dict[str, float]:
    """Layer -> bytes that each device sends in a step; activations have `size` bytes, gradients are float32."""
    found = Counter(activation_bytes(recipe, batch, devices, way, size))
    for layer, count in gradient_bytes(recipe, devices, way).items():
        found[layer] += count  # type: ignore[assignment]  # counts of bytes need not be whole
    return dict(found)


def count_messages(devices: int, way: Way) -> tuple[int, int]:
    """How many messages follow one another, of activations and of gradients; each exchange goes along a tree.

    The gradients of a layer go together.
    """
    deep = math.ceil(math.log2(devices))
    if way == "tower":  # fc8 is a sum, which goes up the tree and down
        return 3 * 2 + 2, len(LAYERS) * 2 * (deep - 1)
    if way == "hybrid":  # two to say how many images each has; fc6 and fc7 both ways; the sum; the logits' gradient
        return (2 + 4 + 2 + 1) * deep, len(CONVOLUTIONS) * 2 * deep
    return 0, len(LAYERS) * 2 * deep


def step_seconds(
    device: Device, link: Link, batch: int, devices: int, way: Way, size: int = HALF, gradient_size: int = FLOAT
) -> float:
    """Seconds of a step of recipe `paper` on a batch over all devices."""
    computing = batch * FLOP / device.speed / devices
    waiting = sum(activation_bytes(PAPER, batch, devices, way, size).values()) / link.bandwidth
    behind = sum(gradient_bytes(PAPER, devices, way, gradient_size).values()) / link.bandwidth
    before, after = (count * link.latency for count in count_messages(devices, way))
    backward = computing * 2 / 3
    late = max(0.0, behind + after - backward) if device.overlaps else behind + after
    return device.besides + computing + waiting + before + late


def step_seconds_alone(device: Device, batch: int) -> float:
    """Seconds of a step on one device."""
    return device.besides + batch * FLOP / device.speed


def expected_rate(rate: float, exchange: float, way: Way, size: int, batch: int = 64) -> float:
    """Images per second to expect of two processes on the CPU that computes `rate` of them in one process.

    `exchange` is the seconds that it takes to send what conv3 needs, there and back, which tells the bandwidth.
    """
    link = Link("between processes", activation_bytes(PAPER, batch, 2, "tower", size)["conv3"] / exchange, 0.0)
    return batch / step_seconds(Device(rate / 2 * FLOP, 0.0, overlaps=False), link, batch, 2, way, size)


def bytes_table(batch: int = PAPER.batch_size) -> str:
    """MB that each device sends in a step of recipe `paper` in float32, by layer, as Markdown."""
    columns = {f"{way}, {n}": sent_bytes(PAPER, batch, n, way) for n in (2, 8, 64) for way in WAYS}
    rows = [
        [layer, *(f"{found[layer] / 1e6:.2f}" if layer in found else "" for found in columns.values())]
        for layer in LAYERS
    ]
    rows.append(["all", *(f"{sum(found.values()) / 1e6:.1f}" for found in columns.values())])
    low = [sum(sent_bytes(PAPER, batch, n, way, HALF).values()) / 1e6 for n in (2, 8, 64) for way in WAYS]
    rows.append(["all, bf16", *(f"{total:.1f}" for total in low)])
    return _markdown(["MB", *columns], rows)


def speed_table(each: int | None = None) -> str:
    """How many times as fast as one device, on each link, as Markdown; `each`: images of a device, else 128 in all."""
    rows = []
    for link in LINKS:
        for way, gradient_size, name in [*((way, FLOAT, way) for way in WAYS), ("data", HALF, "data, `--compress`")]:
            cells = []
            for count in COUNTS:
                images = each * count if each else PAPER.batch_size
                many = step_seconds(GPU, link, images, count, way, HALF, gradient_size)
                cells.append(f"{step_seconds_alone(GPU, PAPER.batch_size) * images / PAPER.batch_size / many:.1f}")
            rows.append([link.name, name, *cells])
    return _markdown(["link", "way", *(str(n) for n in COUNTS)], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table as text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)
