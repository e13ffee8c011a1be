"""How tests build a training."""

from __future__ import annotations

from alexnet_cli.core.fine_tuning import Transfer
from alexnet_cli.core.loader import CacheMode
from alexnet_cli.core.loop import TrainingLoop
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import Dataset
from alexnet_cli.core.trainer import Trainer
from alexnet_cli.recipe import Recipe


def new_loop(
    recipe: Recipe,
    data: Dataset,
    run: Run,
    placement: Placement,
    threads: int = 1,
    cache: CacheMode = "auto",
    *,
    micro_batch: int | None = None,
    compile: bool = False,
    transfer: Transfer | None = None,
    keep: int = 1,
) -> TrainingLoop:
    """A training that has not begun."""
    trainer = Trainer.for_dataset(recipe, data, placement, micro_batch=micro_batch, compile=compile)
    if transfer:
        transfer = transfer.apply(trainer.network)
    return TrainingLoop(trainer, data, run, threads, cache, keep, transfer)
