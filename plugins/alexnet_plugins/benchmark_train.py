"""`alexnet benchmark train`: a training step of ours, of the same network from torch's own parts, and of the bound.

What others have runs in a process of its own, with threads and memory as any script has them: to keep what is freed is
a good part of what ours gains on a CPU, and holds for a whole process.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from alexnet_cli.recipe import PAPER

if TYPE_CHECKING:
    from alexnet_cli.core.placement import Placement
    from alexnet_cli.core.shards import Dataset
    from alexnet_cli.core.stopwatch import Contest, Pass
    from alexnet_plugins.benchmark_step import Conditions, Kind, Layout, Learner

RECIPE = PAPER
BATCH, BATCH_ON_GPU = 64, 128
STEPS_ON_GPU = 20  # a pass: to wait for the device after every step would undo what overlaps
FED_BATCHES = 64  # a pass of the loader: enough that the first batch, which nothing hides, does not decide

Data = Callable[[], tuple["Dataset", str]]


def contests(gpus: str | None, batch: int | None, workers: int, data: Data) -> Generator[Contest]:
    """One in float32, then one in bf16, where the CPU has it. `data` is asked for where there is a GPU to feed."""
    import torch

    from alexnet_cli.core.placement import place
    from alexnet_plugins.benchmark_step import Conditions

    torch.set_num_threads(workers)
    placement = place(gpus, "fp32")
    on_gpu = placement.device.type == "cuda"
    batch = batch or (BATCH_ON_GPU if on_gpu else BATCH)
    conditions = Conditions(RECIPE, batch, STEPS_ON_GPU if on_gpu else 1, str(placement.device), workers)
    notes = [f"{placement.name}, {batch} pictures a step: noise, already on the device"]
    low = place(gpus, "bf16")
    if low.precision != "bf16":
        notes.append(f"this {'GPU' if on_gpu else 'CPU'} has no bf16 arithmetic: bf16 is left out")
    with ExitStack() as stack:
        field = Field(conditions, data if on_gpu else None, stack)
        yield field.contest(placement, notes)
        if low.precision == "bf16":
            yield field.contest(low, notes)


class Field:
    """The networks that compete, built once; both contests train the same ones further."""

    def __init__(self, conditions: Conditions, data: Data | None, stack: ExitStack) -> None:
        from alexnet_plugins import benchmark_step

        self.conditions, self.stack = conditions, stack
        # A process that is started fresh: a forked one would inherit the settings of this one.
        context = multiprocessing.get_context("spawn")
        self.process = stack.enter_context(ProcessPoolExecutor(1, context, initializer=_as_any_script))
        self.ours, self.bound = benchmark_step.ours(conditions), benchmark_step.ours(conditions, norm=False)
        self.kept = None if data else benchmark_step.other("stock", conditions, "contiguous")
        self.data = data() if data else None

    def contest(self, placement: Placement, notes: list[str]) -> Contest:
        """Everything in the placement's arithmetic, and stock in float32 in any case."""
        from alexnet_cli.core.stopwatch import Contest
        from alexnet_plugins.benchmark_step import operations

        low = placement.precision == "bf16"
        peers = {"stock: contiguous, float32": self._apart("stock", "contiguous", bf16=False)}
        if self.kept:
            peers["the same, memory kept as ours"] = partial(self.kept.run, nullcontext)
        if low:
            peers["stock: channels-last, bf16"] = self._apart("stock", "channels-last", bf16=True)
        peers["limit: ours without normalisation"] = partial(self.bound.run, placement.arithmetic)
        peers["torchvision's AlexNet"] = self._apart("torchvision", "channels-last", bf16=low)
        notes = [
            *notes,
            "stock and torchvision's run in a process of their own, with memory as any script has it",
            "torchvision's AlexNet is another, simpler network: one tower, fewer maps, no normalisation",
        ]
        if self.data:
            dataset, note = self.data
            peers["ours, fed from shards"] = fed(self.ours, dataset, placement, self.stack)
            notes.append(f"fed from shards: {note}")
        return Contest(
            f"train {placement.precision}", partial(self.ours.run, placement.arithmetic), peers, notes,
            operations=operations(self.ours.network),
        )  # fmt: skip

    def _apart(self, kind: Kind, layout: Layout, *, bf16: bool) -> Pass:
        from alexnet_plugins import benchmark_step

        return lambda: self.process.submit(benchmark_step.apart, kind, self.conditions, layout, bf16).result()


def _as_any_script() -> None:
    """Before torch is loaded: threads that wait do so as they do where nobody has told them otherwise."""
    os.environ.pop("GOMP_SPINCOUNT", None)


def fed(learner: Learner, dataset: Dataset, placement: Placement, stack: ExitStack) -> Pass:
    """Ours from the loader on: decoding, the bus, crops and colour on the device, the step."""
    from alexnet_cli.core.augment import Draws, Pixels
    from alexnet_cli.core.loader import Loader
    from alexnet_plugins.benchmark_step import finish

    conditions, split = learner.conditions, dataset.split("train")
    recipe, device, count = conditions.recipe, placement.device, FED_BATCHES * conditions.batch
    loader = stack.enter_context(Loader(split, conditions.batch, conditions.threads, device))
    colours = dataset.mean_image(), dataset.colour_std, dataset.colour_axes
    pixels = Pixels(recipe, *colours, device, placement.dtype)
    draws = Draws.of_epoch(len(split), recipe, 1)
    plan = np.split(np.resize(np.random.default_rng(0).permutation(len(split)), count), FED_BATCHES)

    def run() -> int:
        for batch in loader.batches(plan):
            views = pixels.train(batch.images, batch.rows, draws, 1)
            learner.step(views, batch.labels.to(device, non_blocking=True), placement.arithmetic)
        finish(conditions.device)
        return count

    return run
