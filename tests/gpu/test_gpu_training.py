"""Training on a GPU: the numbers of the CPU, out of memory, captured graphs, several GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu_cases
import rank_cases
from alexnet_cli.core.evaluation.evaluate import TorchClassifier
from alexnet_cli.core.model import triton_kernels
from alexnet_cli.core.model.network import parameters_by_name
from alexnet_cli.core.runs.run import Run
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, Recipe
from gpu_cases import GPU, SMALL, losses, needs_bf16, needs_two_gpus, training

pytestmark = gpu_cases.MARKS
RECIPES = [
    SMALL,
    replace(PAPER, width=1 / 8, batch_size=16),
    replace(KRIZHEVSKY, width=1 / 8, batch_size=16),
    replace(CAFFE, width=1 / 8, batch_size=16),
    replace(SMALL, lrn="within-map", activation="tanh", towers=1),
]


@pytest.mark.parametrize("gpu", ["0", pytest.param("1", marks=needs_two_gpus)])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name}, {recipe.lrn}")
def test_a_step_equals_one_on_the_cpu(prepared: Path, recipe: Recipe, gpu: str) -> None:
    """Views, masks, loss, gradients and the update; only the order of sums differs."""
    here, there = training(prepared, "cpu", "none", recipe), training(prepared, "gpu", gpu, recipe)
    assert there.trainer.placement.device == torch.device("cuda", int(gpu))
    assert losses(there, 1) == pytest.approx(losses(here, 1), rel=1e-5)
    found = dict(parameters_by_name(there.trainer.network))
    for name, parameter in parameters_by_name(here.trainer.network):
        gradient = found[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        error = (gradient.cpu() - parameter.grad).norm() / parameter.grad.norm()
        assert error.item() < 1e-4, name
        torch.testing.assert_close(found[name].cpu(), parameter, rtol=1e-4, atol=1e-6)


def test_micro_batches_give_the_losses_of_the_whole_batch(prepared: Path) -> None:
    whole, pieces = training(prepared, "whole", "0"), training(prepared, "pieces", "0", micro_batch=7)
    assert losses(pieces, 3) == pytest.approx(losses(whole, 3), rel=1e-4)


@pytest.fixture
def memory_limit() -> Iterator[None]:
    """Remove the memory limit after a test that sets one."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)


@pytest.mark.usefixtures("memory_limit")
def test_a_batch_that_does_not_fit_is_halved(prepared: Path) -> None:
    recipe = replace(SMALL, width=1 / 2, batch_size=48)
    expected = losses(training(prepared, "whole", "0", recipe), 1)
    loop = training(prepared, "pieces", "0", recipe)
    loop.trainer.network.zero_grad()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved(GPU) + (200 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info(GPU)[1], GPU)
    found = losses(loop, 1)
    assert loop.trainer.micro_batch < 48
    assert found == pytest.approx(expected, rel=1e-4)


def test_memory_does_not_grow(prepared: Path) -> None:
    loop, allocated = training(prepared, "long", "0", replace(SMALL, batch_size=4)), []
    for record in loop.fit(record_every=3):
        if record.event == "step":
            allocated.append(torch.cuda.memory_allocated(GPU))
    assert len(allocated) > 4
    assert allocated[-1] <= allocated[1] * 1.1


@pytest.mark.filterwarnings("ignore")  # the compiler would rather have TF32
@pytest.mark.parametrize("way", ["captured", "captured, then pieces", "plain"])
def test_a_compiled_network_gives_the_same_losses(prepared: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps: the first two compile and capture a graph, which the others replay."""
    torch.compiler.reset()
    recipe, piece = replace(SMALL, batch_size=8), 3 if "pieces" in way else None
    if way == "plain":
        monkeypatch.setattr("alexnet_cli.core.training.trainer.CUDA_GRAPH_IMAGES", 0)
    expected = losses(training(prepared, "eager", "0", recipe), 6)
    found = losses(training(prepared, "compiled", "0", recipe, compile=True, micro_batch=piece), 6)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found)) == 6


@pytest.mark.filterwarnings("ignore")
@needs_bf16
def test_a_compiled_run_validates_saves_and_resumes(prepared: Path) -> None:
    """In bf16, which compiled code rounds less often."""
    torch.compiler.reset()
    recipe = replace(SMALL, precision="bf16", dropout=0.0)
    eager = [r.train_loss for r in training(prepared, "eager", "0", recipe).fit() if r.event == "validation"]
    first_part = training(prepared, "compiled", "0", recipe, compile=True)
    compiled = [r.train_loss for r in first_part.fit(max_steps=4) if r.event == "validation"]
    rest = training(prepared, "rest", "0", recipe, compile=True)
    rest.run = Run(first_part.run.path)
    compiled += [r.train_loss for r in rest.fit(first_part.run.checkpoints / "last") if r.event == "validation"]
    assert len(compiled) == 2
    assert compiled == pytest.approx(eager, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "tf32", pytest.param("bf16", marks=needs_bf16)])
def test_it_learns_in_every_precision(prepared: Path, precision: str) -> None:
    recipe = replace(SMALL, epochs=8, dropout=0.2, learning_rate=0.03, precision=precision)  # type: ignore[arg-type]
    records = list(training(prepared, precision, "0", recipe).fit())
    assert records[-1].reason == "finished"
    found = [r.train_loss for r in records if r.event == "validation"]
    assert found[0] is not None
    assert found[-1] is not None
    assert found[-1] < 0.9 * found[0]
    waits = [r.data_wait for r in records if r.data_wait is not None]
    assert waits
    assert all(0 <= wait <= 1 for wait in waits)


def test_losses_are_the_same_without_the_kernels(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler."""
    with_them = losses(training(prepared, "with", "0"), 2)
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "no C compiler")
    without = training(prepared, "without", "0")
    assert "no C compiler" in without.trainer.placement.notes[0]
    assert losses(without, 2) == pytest.approx(with_them, rel=1e-5)


def test_a_run_resumes_from_its_checkpoint(prepared: Path) -> None:
    """To the same numbers but for the order of sums: bit-identical is the CPU's promise."""
    whole = [r.loss for r in training(prepared, "whole", "0").fit(record_every=1) if r.event == "step"]
    first_part = training(prepared, "first_part", "0")
    list(first_part.fit(max_steps=2))
    rest = training(prepared, "rest", "0")
    rest.run = Run(first_part.run.path)
    found = [r.loss for r in rest.fit(first_part.run.checkpoints / "last", record_every=1) if r.event == "step"]
    assert len(whole) == 6
    assert found == pytest.approx(whole[2:], rel=1e-4)


@pytest.mark.parametrize("views", [1, 10])
def test_probabilities_equal_those_of_the_cpu(prepared: Path, views: int) -> None:
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (6, 256, 256, 3), dtype=np.uint8))
    answers = []
    for gpus in ("none", "0"):
        loop = training(prepared, f"on-{gpus}", gpus, replace(SMALL, width=1 / 4))
        answers.append(
            TorchClassifier(loop.trainer.network, loop.trainer.augment, loop.trainer.placement, views)(images)
        )
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-5)


PLACES = [("one", place) for place in ("towers", "data", "hybrid")]
PLACES += [pytest.param("each", place, marks=needs_two_gpus) for place in ("towers", "data", "hybrid")]  # type: ignore[misc]


@pytest.mark.parametrize(("gpus", "place"), PLACES)
def test_two_processes_give_the_numbers_of_one(
    prepared: Path, tmp_path: Path, gpus: rank_cases.Gpus, place: str
) -> None:
    """On one GPU, with gloo through the host's memory; on two GPUs, with NCCL."""
    recipe = replace(PAPER, width=1 / 16, batch_size=12, epochs=3)
    one = rank_cases.train_in_ranks("one", recipe, prepared, tmp_path / "one", 10, gpus="one")
    two = rank_cases.train_in_ranks(place, recipe, prepared, tmp_path / "two", 10, gpus=gpus)
    np.testing.assert_allclose(two["logits"], one["logits"], rtol=0, atol=1e-5)
    for key in (key for key in one if key.startswith("gradient")):
        assert np.linalg.norm(two[key] - one[key]) < 1e-4 * np.linalg.norm(one[key]), key
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(two["validation"], one["validation"], rtol=1e-4)


@pytest.mark.parametrize("gpus", [[], ["--gpus", "0,0"], pytest.param(["--gpus", "0,1"], marks=needs_two_gpus)])
def test_the_commands_of_the_readme(prepared: Path, tmp_path: Path, gpus: list[str]) -> None:
    """Train with and without --gpus, evaluate, and resume on the CPU."""

    def run_command(*words: str) -> str:
        process = [sys.executable, "-m", "alexnet_cli", *words, "--json"]
        done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_command(
        "train", "--data", str(prepared), "--recipe", "tiny", "--set", "width=0.125", "-b", "12", "--epochs", "2",
        "--name", "here", *gpus,
    )  # fmt: skip
    about = json.loads((tmp_path / "runs" / "here" / "run.json").read_text())
    assert all(name.startswith("GPU ") for name in about["devices"])
    measured = [json.loads(run_command("evaluate", "-w", "here", *more))["loss"] for more in ((), ("--gpus", "none"))]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)
    run_command("train", "--resume", "here", "--set", "epochs=3", "--gpus", "none")
