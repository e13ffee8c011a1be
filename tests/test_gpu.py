"""What only a GPU shows: its kernel, its training step, its loader and cache, against the same on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import kernel_cases
import numpy as np
import pytest
import rank_cases
import torch

from alexnet_cli.core import response_norm, response_norm_gpu, update_gpu
from alexnet_cli.core.augment import Draws
from alexnet_cli.core.cache import Cache
from alexnet_cli.core.devices import visible_gpus
from alexnet_cli.core.loader import Loader, all_batches, training_batches
from alexnet_cli.core.network import parameters_by_name
from alexnet_cli.core.placement import place
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.core.train import fit
from alexnet_cli.core.training import Training
from alexnet_cli.recipe import PAPER, TINY, Recipe

pytestmark = pytest.mark.skipif(not visible_gpus(), reason="no CUDA device")

SMALL = replace(TINY, width=1 / 8, batch_size=16, epochs=2, dropout=0.5, precision="fp32")


@pytest.fixture(autouse=True)
def _own_runs_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in a folder of their own; what `place` sets for the whole process is put back."""
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def training(prepared: Path, name: str, gpus: str, recipe: Recipe = SMALL, *, compile: bool = False) -> Training:
    run = Run.create(name, recipe, {})
    return Training(recipe, open_dataset(prepared), run, place(gpus, recipe.precision), threads=2, compile=compile)


def losses(training: Training, steps: int) -> list[float]:
    """Of the first steps; leaves the gradients of the last."""
    recipe = training.recipe
    draws = Draws.of_epoch(training.rows, recipe, 1)
    plan = training_batches(training.rows, recipe.batch_size, recipe.seed, 1)[:steps]
    with Loader(training.data.split("train"), recipe.batch_size, 2, training.placement.device) as loader:
        return [float(training.take_step(batch, draws).loss) for batch in loader.batches(plan)]


def test_the_kernels_run_here() -> None:
    assert response_norm_gpu.why_not(0) == update_gpu.why_not(0) == ""


def test_the_update_is_one_kernel_and_the_same() -> None:
    kernel_cases.check_update("cuda")


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
def test_the_kernels_equal_the_definition(case: kernel_cases.Case) -> None:
    kernel_cases.check(case, "cuda")


def test_the_kernels_take_any_layout() -> None:
    kernel_cases.check_layouts("cuda")


def test_the_kernels_keep_what_is_no_number() -> None:
    kernel_cases.check_not_a_number("cuda")


@pytest.mark.filterwarnings("ignore")  # torch's own check reads gradients that are not kept
def test_the_kernels_are_what_torch_was_told() -> None:
    kernel_cases.check_operator("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps", [96, 256])
def test_as_many_values_as_in_training(maps: int, dtype: torch.dtype) -> None:
    """Many programs of the kernel, the last of them not full, against the composed form on the same device."""
    x = torch.randn(67, maps, 27, 27, device="cuda") * 60
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    quick, slow = x.clone().requires_grad_(), x.float().clone().requires_grad_()
    grad = torch.randn_like(x)
    out = response_norm_gpu.fused(quick, 5, 2.0, 1e-4, 0.75, 2)
    expected = response_norm.plain(slow, 5, 2.0, 1e-4, 0.75, 2)
    out.backward(grad)
    expected.backward(grad.float())
    assert quick.grad is not None
    kernel_cases.close(out, expected)
    kernel_cases.close(quick.grad, slow.grad)


def test_a_step_equals_one_on_the_cpu(prepared: Path) -> None:
    """Views, masks, loss, gradients and the update: only the order of sums differs."""
    cpu, gpu = training(prepared, "cpu", "none"), training(prepared, "gpu", "0")
    assert losses(gpu, 1) == pytest.approx(losses(cpu, 1), rel=1e-5)
    there = dict(parameters_by_name(gpu.network))
    for name, parameter in parameters_by_name(cpu.network):
        assert parameter.grad is not None
        found = there[name].grad
        assert found is not None
        error = (found.cpu() - parameter.grad).norm() / parameter.grad.norm()
        assert error.item() < 1e-4, name
        torch.testing.assert_close(there[name].cpu(), parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler would rather have TF32
def test_a_compiled_network_gives_the_same_losses(prepared: Path) -> None:
    """Six steps: the first two compile and capture a graph, which the others replay."""
    expected = losses(training(prepared, "eager", "0", replace(SMALL, batch_size=8)), 6)
    found = losses(training(prepared, "compiled", "0", replace(SMALL, batch_size=8), compile=True), 6)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found)) == 6


@pytest.mark.parametrize("batch_size", [4, 7])
def test_pinned_buffers_bring_the_same_bytes(prepared: Path, batch_size: int) -> None:
    """While the device is kept busy, so that a copy or a buffer used too early would show."""
    split, device = open_dataset(prepared).split("train"), torch.device("cuda", 0)
    busy = torch.randn(2048, 2048, device=device)
    plan, copies = all_batches(len(split), batch_size) * 4, []
    with Loader(split, batch_size, 2, device) as loader:
        for batch in loader.batches(plan):
            for _ in range(20):
                busy = torch.tanh(busy @ busy)
            copies.append(batch.images + 0)  # queued behind the work above
    with Loader(split, batch_size, 2) as plain:
        for batch, copy in zip(plain.batches(plan), copies, strict=True):
            np.testing.assert_array_equal(batch.images.numpy(), copy.cpu().numpy())


def test_the_cache_on_the_device_equals_the_loader(prepared: Path) -> None:
    split, device = open_dataset(prepared).split("train"), torch.device("cuda", 0)
    with Loader(split, 7, 2, device) as under, Loader(split, 7, 2) as plain:
        cache = Cache(under)
        for epoch in (1, 2):
            plan = training_batches(len(split), 7, 0, epoch)
            for a, b in zip(cache.batches(plan), plain.batches(plan), strict=True):
                assert a.images.device.type == "cuda"
                np.testing.assert_array_equal(a.images.cpu().numpy(), b.images.numpy())
                np.testing.assert_array_equal(a.labels.numpy(), b.labels.numpy())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_it_learns_in_every_precision(prepared: Path, precision: str) -> None:
    recipe = replace(SMALL, epochs=8, dropout=0.2, learning_rate=0.03, precision=precision)  # type: ignore[arg-type]
    learner = training(prepared, precision, "0", recipe)
    assert learner.placement.precision == precision
    records = list(fit(learner))
    assert records[-1].reason == "finished"
    found = [r.train_loss for r in records if r.event == "validation"]
    assert found[0] is not None
    assert found[-1] is not None
    assert found[-1] < 0.9 * found[0]


def test_without_the_kernels_it_gives_the_same(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler."""
    with_them = losses(training(prepared, "with", "0"), 2)
    monkeypatch.setattr(response_norm_gpu, "why_not", lambda index: "no C compiler")
    without = training(prepared, "without", "0")
    assert "no C compiler" in without.placement.notes[0]
    assert losses(without, 2) == pytest.approx(with_them, rel=1e-5)


@pytest.mark.parametrize("place", ["towers", "data", "hybrid"])
def test_two_processes_on_one_gpu_have_the_numbers_of_one(prepared: Path, tmp_path: Path, place: str) -> None:
    recipe = replace(PAPER, width=1 / 16, batch_size=12, epochs=3)
    one = rank_cases.result("one", recipe, prepared, tmp_path / "one", 10, gpu=True)
    two = rank_cases.result(place, recipe, prepared, tmp_path / "two", 10, gpu=True)
    np.testing.assert_allclose(two["logits"], one["logits"], rtol=0, atol=1e-5)
    for key in (key for key in one if key.startswith("gradient")):
        assert np.linalg.norm(two[key] - one[key]) < 1e-4 * np.linalg.norm(one[key]), key
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(two["validation"], one["validation"], rtol=1e-4)
