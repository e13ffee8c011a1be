"""`alexnet benchmark train`: what is compared is one network, and the command says what it should."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.model.network import Network, initialize
from alexnet_cli.core.parallel import placement
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.recipe import PAPER
from alexnet_plugins.benchmark import training
from alexnet_plugins.benchmark.command import Topic, benchmark
from alexnet_plugins.benchmark.training import (
    FORMATS,
    Conditions,
    Contestants,
    Layout,
    arithmetic,
    build_ours,
    build_peer,
    build_stock,
    compare_training,
    count_operations,
)

SMALL = replace(PAPER, width=1 / 16)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_stock_is_the_same_network(layout: Layout) -> None:
    recipe = replace(PAPER, width=1 / 8, dropout_inverted=True)
    ours, images = Network(recipe, 30).eval(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    initialize(ours)
    theirs = build_stock(recipe, 30).to(memory_format=FORMATS[layout]).eval()
    theirs.load_state_dict(ours.state_dict())
    # As strong as after learning, and differing from map to map, so that normalization and towers show.
    images, found = images * 60, []
    with torch.no_grad():
        for network in (ours, theirs):
            network.get_submodule("conv1").get_parameter("weight").mul_(5)
            found.append(network(images))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5 * float(found[0].abs().max()))
    without = Network(replace(recipe, lrn="none"), 30).eval()
    without.load_state_dict(ours.state_dict())
    assert not torch.allclose(without(images), found[0], rtol=0.05)


def test_a_step_of_each_learns() -> None:
    conditions = Conditions(SMALL, 2, 3, "cpu", 1)
    for learner in (
        build_ours(conditions),
        build_peer("stock", conditions, "contiguous"),
    ):
        before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
        assert learner.run(lambda: arithmetic("cpu", bf16=False)) == 6
        assert all(not torch.equal(p, before[name]) for name, p in learner.network.named_parameters())


def test_operations_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        network = Network(PAPER, 1000)
    assert count_operations(network) == pytest.approx(4.35e9, rel=1e-3)


def test_ours_is_fed_from_shards_where_there_is_data(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "FED_BATCHES", 3)
    cpu, dataset = Placement(torch.device("cpu"), "CPU", "fp32"), open_dataset(prepared)
    with ExitStack() as stack:
        field = Contestants(Conditions(SMALL, 32, 1, "cpu", 1), lambda: (dataset, "four colors"), stack)
        before = field.ours.network.get_parameter("fc8.bias").detach().clone()
        contest = field.contest(cpu, [])
        run = contest.peers["ours, fed from shards"]
        assert [run(), run()] == [96, 96]  # of 48 pictures
    assert not torch.equal(field.ours.network.get_parameter("fc8.bias"), before)
    assert "fed from shards: four colors" in contest.notes


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RECIPE", SMALL)
    monkeypatch.setattr(placement, "has_cpu_bf16", lambda: True)
    benchmark(Topic.train, rounds=1, seconds=0.0, jobs=1, batch_size=2, gpus="none", json=True, quiet=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in found] == ["train fp32", "train bf16"]
    always = {"stock: contiguous, float32", "limit: ours without normalization", "torchvision's AlexNet"}
    for line in found:
        assert always <= set(line["peers"])
        assert ("stock: channels-last, bf16" in line["peers"]) == (line["name"] == "train bf16")
        assert set(line["ratio"]) == set(line["peers"])
        assert line["tflops"] == pytest.approx(line["ours"] * line["gflop_per_image"] / 1000)
        assert line["unit"] == "img/s"
        assert line["hardware"]["workers"] == 1
        assert {"torch", "torchvision"} <= set(line["versions"])
        assert any("another, simpler network" in note for note in line["notes"])
        assert any("2 pictures a step" in note for note in line["notes"])


def test_without_bf16_it_is_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RECIPE", SMALL)
    monkeypatch.setattr(placement, "has_cpu_bf16", lambda: False)
    (only,) = compare_training("none", 2, 1, no_data)
    assert only.name == "train fp32"
    assert any("bf16 is left out" in note for note in only.notes)


def no_data() -> NoReturn:
    raise AssertionError("a CPU is not fed from shards")
