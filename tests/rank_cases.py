"""Trainings in several processes, for the tests: the same small network, however it is placed."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch._C._distributed_c10d import TCPStore

from alexnet_cli.core.augment import Draws
from alexnet_cli.core.launch import rank_variables
from alexnet_cli.core.loader import Loader, epoch_order, training_batches
from alexnet_cli.core.network import parameters_by_name
from alexnet_cli.core.placement import backend, place_ranks
from alexnet_cli.core.process_group import Parallel, arrange_mesh, join_process_group, read_rank_info
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.core.train import fit
from alexnet_cli.core.training import Training
from alexnet_cli.recipe import Recipe

SECONDS = 120
Gpus = Literal["none", "one", "each"]  # all on the CPU, all on the first GPU, or one for each
VALIDATED = ("loss", "top1_error", "top5_error")
PLACES: dict[str, tuple[int, Parallel]] = {
    "one": (1, "auto"),
    "towers": (2, "tower"),
    "data": (2, "data"),
    "data x towers": (4, "tower"),
    "hybrid": (2, "hybrid"),
    "data of three": (3, "data"),
    "hybrid of four": (4, "hybrid"),
}
_CONTEXT = multiprocessing.get_context("forkserver")  # imports once, not once in each process
_CONTEXT.set_forkserver_preload(["alexnet_cli.core.train", "torch._dynamo"])  # tests/ is not on its path


def processes(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(*arguments)` as so many ranks; AssertionError unless all of them end well, in time."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [
        _CONTEXT.Process(target=_as_rank, args=(rank_variables(rank, count, store.port), work, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(SECONDS)
        assert [process.exitcode for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()


def _as_rank(numbered: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(numbered)
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        raise


def training(stack: ExitStack, place: str, recipe: Recipe, prepared: Path, folder: Path, gpus: Gpus) -> Training:
    """This process's part of a training, in touch with the others while `stack` is."""
    count = PLACES[place][0]
    ids = {"none": "none", "one": ",".join(["0"] * count), "each": ",".join(map(str, range(count)))}[gpus]
    ranks = stack.enter_context(join_process_group(read_rank_info(), backend(ids)))
    placed = place_ranks(ranks, ids, recipe.precision, PLACES[place][1], recipe.towers)
    return Training(recipe, open_dataset(prepared), Run(folder, writes=ranks.first), placed, threads=1, cache="none")


def first_gradient(trained: Training) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits of the first eight training pictures, and the whole gradient of the first batch."""
    recipe, ranks = trained.recipe, trained.placement.ranks
    trained.begin_epoch()
    order = epoch_order(trained.rows, recipe.seed, 1)
    draws = Draws.of_epoch(trained.rows, recipe, 1, order)
    plan = training_batches(trained.rows, recipe.batch_size, recipe.seed, 1, 0, ranks.replica, ranks.replicas)[:1]
    eight = [np.arange(8)[ranks.share(8)]]
    with Loader(trained.data.split("train"), 16, 1, trained.placement.device) as loader:
        for batch in loader.batches(eight):
            with torch.inference_mode():
                logits = trained.network.eval()(trained.pixels.centre_view(batch.images)).cpu().numpy()
            trained.network.train()
        for batch in loader.batches(plan):
            trained.gradient.compute(batch, draws, 0, 1)
    gradients = {}
    for name, parameter in parameters_by_name(trained.network):
        assert parameter.grad is not None
        whole = trained.network.whole(name, parameter.grad) if ranks.collects else None
        if whole is not None:
            gradients[name] = whole.numpy()
    every = ranks.gather_values(logits)
    each = ranks.size // ranks.replicas
    return np.concatenate(every[::each]), gradients


def record(
    place: str, recipe: Recipe, prepared: Path, folder: Path, steps: int, resume: Path | None, gpus: Gpus
) -> None:
    """Train, and have rank 0 write what came of it to `folder`/result.npz."""
    with ExitStack() as stack:
        trained = training(stack, place, recipe, prepared, folder, gpus)
        logits, gradients = first_gradient(trained)
        records = [r.as_dict() for r in fit(trained, resume, max_steps=steps, record_every=1)]
        weights, _ = trained.whole() if trained.placement.ranks.collects else ({}, {})
        if trained.placement.ranks.first:
            found: dict[str, Any] = {
                "logits": logits,
                "losses": [r["loss"] for r in records if r["event"] == "step"],
                "errors": [r["top1_error"] for r in records if r["event"] == "step"],
                "validation": [[r[key] for key in VALIDATED] for r in records if r["event"] == "validation"],
            }
            found |= {f"gradient {name}": value for name, value in gradients.items()}
            found |= {f"weight {name}": value.numpy() for name, value in weights.items()}
            np.savez(folder / "result.npz", **found)


def exchange(dtype: torch.dtype) -> None:
    """Share channels between two ranks, and check what each has then, and its gradient, against plain sums."""
    with join_process_group(read_rank_info(), "gloo") as met:
        towers = arrange_mesh(met, "tower", 2, torch.device("cpu")).towers
        assert towers is not None
        both = torch.arange(16.0).reshape(2, 4, 2)
        own = towers.own(both, 1).to(dtype).requires_grad_()
        shared = towers.share(own, "conv3")
        torch.testing.assert_close(shared, both.to(dtype))
        (shared * both * (met.rank + 1)).sum().backward()
        torch.testing.assert_close(own.grad, towers.own(both, 1).to(dtype) * 3)


def result(
    place: str,
    recipe: Recipe,
    prepared: Path,
    folder: Path,
    steps: int,
    resume: Path | None = None,
    gpus: Gpus = "none",
) -> Any:
    """What `record` wrote, having been run by as many processes as the place takes."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    processes(PLACES[place][0], record, place, recipe, prepared, folder, steps, resume, gpus)
    return dict(np.load(folder / "result.npz"))
