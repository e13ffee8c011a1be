"""`alexnet benchmark train`: what is compared is one network, and the command says what it should."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

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
    Conditions,
    build_ours,
    build_peer,
    build_stock,
    count_training_flop,
    feed_from_shards,
    get_memory_format,
    stock_arithmetic,
)

SMALL = replace(PAPER, width=1 / 16)


@pytest.mark.parametrize("channels_last", [False, True])
def test_stock_is_the_same_network(channels_last: bool) -> None:
    recipe = replace(PAPER, width=1 / 8, dropout_inverted=True)
    ours, images = Network(recipe, 30).eval(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    initialize(ours)
    theirs = build_stock(recipe, 30).to(memory_format=get_memory_format(channels_last)).eval()
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
        build_peer("stock", conditions, channels_last=False),
    ):
        before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
        assert learner.run(lambda: stock_arithmetic("cpu", bf16=False)) == 6
        assert all(not torch.equal(p, before[name]) for name, p in learner.network.named_parameters())


def test_operations_are_those_of_the_paper() -> None:
    assert count_training_flop(PAPER) == pytest.approx(4.35e9, rel=1e-3)


def test_ours_trains_from_shards(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "FED_BATCHES", 3)
    cpu, dataset = Placement(torch.device("cpu"), "CPU", "fp32"), open_dataset(prepared)
    ours = build_ours(Conditions(SMALL, 32, 1, "cpu", 1))
    before = ours.network.get_parameter("fc8.bias").detach().clone()
    with ExitStack() as stack:
        run = feed_from_shards(ours, dataset, cpu, stack)
        assert [run(), run()] == [96, 96]  # of 48 images
    assert not torch.equal(ours.network.get_parameter("fc8.bias"), before)


@pytest.mark.slow
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
        assert any("2 images per step" in note for note in line["notes"])


@pytest.mark.slow
def test_without_bf16_a_note_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RECIPE", SMALL)
    monkeypatch.setattr(placement, "has_cpu_bf16", lambda: False)
    benchmark(Topic.train, rounds=1, seconds=0.0, jobs=1, batch_size=2, gpus="none", json=True, quiet=True)
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record["name"] == "train fp32"
    assert any("bf16 is left out" in note for note in record["notes"])
