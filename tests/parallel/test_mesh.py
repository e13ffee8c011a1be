"""Placement changes the speed, never the numbers: one table over all ways to place the network."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.loader import Batch, training_batches
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.model.network import Network
from alexnet_cli.core.model.towers import TowerGroup
from alexnet_cli.core.parallel.ddp import wrap_ddp
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.parallel.process_group import (
    ProcessMesh,
    RankInfo,
    arrange_mesh,
    join_process_group,
    mesh_shape,
    read_rank_info,
)
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training.fine_tuning import freeze
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import CAFFE, PAPER, Recipe
from alexnet_plugins.benchmark.parallel import Strategy
from parallel_costs import FLOAT, HALF, sent_bytes
from rank_cases import PLACES, train_in_ranks

SMALL = replace(PAPER, width=1 / 16, batch_size=11, epochs=3)  # 11 divides by no number of replicas
JOINT = replace(CAFFE, width=1 / 16, batch_size=12, epochs=3, color_shift=0.1)
FEW = replace(SMALL, name="few", cross_talk=("conv2", "conv4"))  # not in layers 6 and 7
SEVEN = replace(SMALL, name="seven", left_out_layers=("conv3",))
TEN = 10
Results = Callable[..., Any]


@pytest.fixture(scope="module")
def results(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Train a recipe in a place; each pair runs once."""
    cache: dict[tuple[str, str], Any] = {}

    def train(place: str, recipe: Recipe = SMALL) -> Any:
        if (place, recipe.name) not in cache:
            folder = tmp_path_factory.mktemp("run") / "r"
            cache[place, recipe.name] = train_in_ranks(place, recipe, prepared, folder, TEN) | {"folder": folder}
        return cache[place, recipe.name]

    return train


TABLE = [
    pytest.param(place, recipe, id=f"{place}, {recipe.name}")
    for place, recipe in [
        *((place, SMALL) for place in PLACES if place != "one"),
        ("towers", JOINT),
        ("towers", SEVEN),
        *((place, FEW) for place in ("towers", "hybrid", "hybrid of four")),
    ]
]


@pytest.mark.parametrize(("place", "recipe"), TABLE)
def test_placement_does_not_change_the_numbers(results: Results, place: str, recipe: Recipe) -> None:
    one, here = results("one", recipe), results(place, recipe)
    np.testing.assert_allclose(here["logits"], one["logits"], rtol=0, atol=1e-6)
    gradients = [key for key in one if key.startswith("gradient")]
    assert len(gradients) == 16 - 2 * len(recipe.left_out_layers)
    for key in gradients:
        difference = np.linalg.norm(here[key] - one[key]) / np.linalg.norm(one[key])
        assert difference < 1e-5, key
    assert len(one["losses"]) == TEN
    np.testing.assert_allclose(here["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_array_equal(here["errors"], one["errors"])
    assert len(one["validation"]) == 2
    np.testing.assert_allclose(here["validation"], one["validation"], rtol=1e-5)
    for key in (key for key in one if key.startswith("weight")):
        np.testing.assert_allclose(here[key], one[key], rtol=0, atol=1e-6, err_msg=key)
    kept, kept_here = (Run(found["folder"]).kept_filters for found in (one, here))
    assert list(kept_here) == list(kept) == [0, 1, 2]
    for epoch, path in kept.items():
        np.testing.assert_allclose(np.load(kept_here[epoch]), np.load(path), rtol=0, atol=1e-6)


MOVES = [("towers", "one"), ("one", "data x towers"), ("data", "towers")]


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_run_resumes_elsewhere(results: Results, prepared: Path, tmp_path: Path, before: str, after: str) -> None:
    train_in_ranks(before, SMALL, prepared, tmp_path / "before", 6)
    whole = results("one")
    rest = train_in_ranks(after, SMALL, prepared, tmp_path / "after", TEN, tmp_path / "before" / "checkpoints" / "last")
    np.testing.assert_allclose(rest["losses"], whole["losses"][6:], rtol=1e-5)
    np.testing.assert_allclose(rest["weight fc8.weight"], whole["weight fc8.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_batch_slices_make_up_the_batch(ranks: int) -> None:
    whole = training_batches(100, 13, 5, 2)
    shares = [training_batches(100, 13, 5, 2, 0, rank, ranks) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), batch)
        for rank in range(ranks):
            part = ProcessMesh(rank, ranks, rank, ranks).batch_slice(len(batch))
            np.testing.assert_array_equal(batch[part], shares[rank][step])


def test_ddp_is_skipped_without_trainable_replicas() -> None:
    frozen = replace(SMALL, frozen="conv")
    columns, everyone = TowerGroup(2, 1), cast(dist.ProcessGroup, object())
    network = Network(frozen, 4, columns=columns)
    freeze(network, frozen)
    assert wrap_ddp(network, ProcessMesh(0, 2, 0, 2, columns=columns, group=everyone), compress=False) is network


@pytest.fixture
def _refuse_like_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to exchange what NCCL does: tensors that are not dense in memory, or of types it cannot add or copy."""

    def refuse(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*tensors: Any, **options: Any) -> Any:
            for tensor in itertools.chain(*(part if isinstance(part, list) else [part] for part in tensors)):
                assert tensor.is_contiguous()
                assert tensor.dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
            return exchange(*tensors, **options)

        return checked

    for name in ("all_gather", "all_reduce", "all_to_all_single"):
        monkeypatch.setattr(dist, name, refuse(getattr(dist, name)))


@pytest.mark.usefixtures("_refuse_like_nccl")
@pytest.mark.parametrize("parallel", ["tower", "data", "hybrid"])
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize(("precision", "element"), [("fp32", FLOAT), ("bf16", HALF)])
def test_a_step_of_many_ranks(size: int, parallel: Strategy, precision: str, element: int) -> None:
    """One rank of many, whose partners are pretended: it sends as many bytes as docs/parallel.md computes."""
    cpu, side, recipe = torch.device("cpu"), (3, 256, 256), replace(PAPER, width=1 / 16, batch_size=size)
    dist.init_process_group("fake", rank=3, world_size=size, store=FakeStore())
    try:
        ranks = arrange_mesh(ProcessMesh(3, size), parallel, 2, cpu)
        augment = Augment(recipe, np.zeros(side, np.float32), np.ones(3, np.float32), np.eye(3, dtype=np.float32), cpu)
        trainer = Trainer(recipe, 1000, size, augment, Placement(cpu, "CPU", precision, ranks=ranks))
        trainer.checks_every_step = False  # what the partners send is not a number
        trainer.begin_epoch()
        rows = np.arange(size)[ranks.batch_slice(size)]
        images = torch.zeros(len(rows), 256, 256, 3, dtype=torch.uint8)
        trainer.step(Batch(images, torch.zeros(len(rows), dtype=torch.int64), rows))
    finally:
        dist.destroy_process_group()
    sent: Counter[str] = Counter()
    for purpose, count in ranks.traffic.items():
        sent[purpose.partition(" ")[0]] += count
    assert sent == pytest.approx(
        sent_bytes(recipe, size, size, parallel, element), abs=2
    )  # rounded down for each tensor


def test_evaluations_are_summed_over_ranks() -> None:
    first, second = Evaluation.empty(3), Evaluation.empty(3)
    first.add(np.eye(3, dtype=np.float32), np.array([0, 1, 1]))
    second.add(np.eye(3, dtype=np.float32)[:1], np.array([2]))
    parts = {id(first.confusion): second.confusion, id(first.top5_hits): second.top5_hits}
    both = first.sum_over_ranks(lambda own: own + parts.get(id(own), np.array([second.loss_sum])))
    assert (both.images, both.top1_error) == (4, 0.5)
    assert both.loss_sum == pytest.approx(first.loss_sum + second.loss_sum)


@pytest.mark.parametrize(
    ("size", "parallel", "towers", "expected"),
    [
        (1, "auto", 2, (1, 1)), (2, "auto", 2, (1, 2)), (3, "auto", 2, (3, 1)), (4, "auto", 2, (2, 2)),
        (2, "auto", 1, (2, 1)), (2, "data", 2, (2, 1)), (4, "hybrid", 2, (4, 1)), (64, "tower", 2, (32, 2)),
    ],
)  # fmt: skip
def test_mesh_shape(size: int, parallel: Any, towers: int, expected: tuple[int, int]) -> None:
    assert mesh_shape(size, parallel, towers) == expected


@pytest.mark.parametrize(("size", "towers", "reason"), [(3, 2, r"odd \(3\)"), (2, 1, "one tower")])
def test_tower_parallel_needs_pairs(size: int, towers: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        mesh_shape(size, "tower", towers)


def test_rank_info_of_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_rank_info() is None
    for name, value in {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert read_rank_info() is None, "a batch script is not a rank"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    found = read_rank_info()
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    # `salloc` on two tasks gives one shell, a step of one task, and in it srun starts steps of their own sizes
    for tasks in (1, 4):
        for name, number in {"PROCID": tasks - 1, "LOCALID": tasks - 1, "STEP_NUM_TASKS": tasks}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(number))
        assert read_rank_info() == RankInfo(tasks - 1, tasks, tasks - 1, tasks)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="are not numbers"):
        read_rank_info()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UsageError, match="rank 2 of 2"):
        read_rank_info()


@pytest.mark.parametrize("text", ["soon", "0", "nan", "1e99"])
def test_an_invalid_timeout_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ALEXNET_TIMEOUT", text)
    with pytest.raises(UsageError, match=f"ALEXNET_TIMEOUT={text}"), join_process_group(RankInfo(0, 2, 0, 2), "gloo"):
        pass
