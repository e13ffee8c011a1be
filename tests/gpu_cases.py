"""What the tests of a GPU share: small trainings, on it and on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainings import new_loop

from alexnet_cli.core.devices import visible_gpus
from alexnet_cli.core.loader import Loader, training_batches
from alexnet_cli.core.loop import TrainingLoop
from alexnet_cli.core.placement import place
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.recipe import TINY, Recipe

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not visible_gpus(), reason="no CUDA device"),
    pytest.mark.usefixtures("own_runs_and_settings"),
]
several = pytest.mark.skipif(len(visible_gpus()) < 2, reason="one CUDA device")
has_bf16 = pytest.mark.skipif(not all(gpu.bf16 for gpu in visible_gpus()), reason="no bf16 arithmetic")
GPU = torch.device("cuda", 0)
SMALL = replace(TINY, width=1 / 8, batch_size=16, epochs=2, dropout=0.5, precision="fp32")


def training(
    prepared: Path,
    name: str,
    gpus: str,
    recipe: Recipe = SMALL,
    *,
    compile: bool = False,
    micro_batch: int | None = None,
) -> TrainingLoop:
    """One that has not begun, in a run of that name."""
    run, placed = Run.create(name, recipe, {}), place(gpus, recipe.precision)
    return new_loop(recipe, open_dataset(prepared), run, placed, 2, compile=compile, micro_batch=micro_batch)


def losses(training: TrainingLoop, steps: int) -> list[float]:
    """Of the first steps; leaves the gradients of the last."""
    trainer, recipe = training.trainer, training.trainer.recipe
    trainer.begin_epoch()
    plan = training_batches(trainer.rows, recipe.batch_size, recipe.seed, 1)[:steps]
    with Loader(training.data.split("train"), recipe.batch_size, 2, trainer.placement.device) as loader:
        return [float(trainer.step(batch).loss) for batch in loader.batches(plan)]
