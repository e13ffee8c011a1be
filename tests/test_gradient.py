"""A batch in pieces gives the numbers of the batch at once; a GPU that is too small gets smaller pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_cli.core import triton_kernels
from alexnet_cli.core.architecture import PARAMETERS
from alexnet_cli.core.augment import Draws, Pixels
from alexnet_cli.core.gradient import Gradient
from alexnet_cli.core.loader import Batch
from alexnet_cli.core.network import Network
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.core.train import fit
from alexnet_cli.core.training import Training
from alexnet_cli.errors import MissingError
from alexnet_cli.recipe import RECIPES, TINY, Recipe

CPU = Placement(torch.device("cpu"), "CPU", "fp32")
RECIPE = replace(
    TINY, width=1 / 16, batch_size=16, epochs=2, learning_rate=0.01, conv1_scale=1.0, dropout=0.5, label_smoothing=0.2,
    precision="fp32",
)  # fmt: skip
NAMES = iter(f"run{i}" for i in range(1000))


@pytest.fixture
def start(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Training]:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))

    def start(micro_batch: int | None = None, recipe: Recipe = RECIPE) -> Training:
        run = Run.create(next(NAMES), recipe, {})
        return Training(recipe, open_dataset(prepared), run, CPU, 1, micro_batch=micro_batch)

    return start


def weights(training: Training) -> list[torch.Tensor]:
    return [training.network.get_parameter(name).detach() for name in PARAMETERS]


def difference(one: Training, other: Training) -> float:
    """The distance of two networks' weights as a share of their length."""
    a, b = (torch.cat([w.flatten() for w in weights(training)]).double() for training in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 16, 999])
@pytest.mark.parametrize("inverted", [True, False])
def test_pieces_give_the_numbers_of_the_whole(start: Callable[..., Training], micro_batch: int, inverted: bool) -> None:
    """Three steps of 16, which neither 3 nor 999 divides, with dropout, shifted colours and label smoothing."""
    recipe = replace(RECIPE, dropout_inverted=inverted)
    whole, pieces = start(None, recipe), start(micro_batch, recipe)
    told = [list(fit(training, record_every=1, max_steps=3)) for training in (whole, pieces)]
    for a, b in zip(*told, strict=True):
        assert (a.event, a.step, a.top1_error) == (b.event, b.step, b.top1_error)
        assert (a.loss or 0) == pytest.approx(b.loss or 0, rel=1e-6)
    assert difference(whole, pieces) < 1e-6
    if micro_batch >= 16:
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(pieces), strict=True))


def test_the_gradient_is_that_of_the_mean_loss_over_the_batch(start: Callable[..., Training]) -> None:
    """Against torch's own derivative of the mean, without dropout, whose masks depend on the place in the batch."""
    training = start(5, replace(RECIPE, dropout=0, label_smoothing=0))
    seen: dict[str, Any] = {}
    original = training.pixels.train

    def views(*arguments: Any) -> torch.Tensor:
        made = original(*arguments)
        seen.setdefault("views", []).append(made.clone())
        seen.setdefault("rows", []).extend(arguments[1].tolist())
        return made

    training.pixels.train = views  # type: ignore[assignment, method-assign]
    training.optimiser.step = lambda *_: None  # type: ignore[method-assign]
    list(fit(training, max_steps=1))
    assert [len(part) for part in seen["views"][:4]] == [5, 5, 5, 1]
    ours = {name: training.network.get_parameter(name).grad for name in PARAMETERS}
    assert all(gradient is not None for gradient in ours.values())
    network = Network(training.recipe, 4)
    network.load_state_dict(training.network.state_dict())
    labels = torch.from_numpy(training.data.split("train").labels[seen["rows"]].astype("int64"))
    torch.nn.functional.cross_entropy(network(torch.cat(seen["views"])), labels).backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, network.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


class SmallMemory:
    """A network's forward pass that fails as a GPU does: for more images than fit, and once in the second piece."""

    def __init__(self, network: Network, fits: int) -> None:
        self.original, self.fits, self.calls = network.forward, fits, 0
        self.sizes: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        if len(x) > self.fits or self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.original(x)


def test_a_gpu_that_is_too_small_gets_smaller_pieces(start: Callable[..., Training]) -> None:
    whole, small = start(), start()
    memory = SmallMemory(small.network, fits=8)
    small.network.forward = memory  # type: ignore[method-assign]
    list(fit(whole, max_steps=2))
    records = list(fit(small, max_steps=2))
    assert memory.sizes[:7] == [16, 8, 8, 4, 4, 4, 4]  # whole; halves, the second of which fails; quarters
    warnings = [r for r in records if r.event == "warning"]
    assert [r.step for r in warnings] == [1]
    assert "computing 4 images at a time" in str(warnings[0].text)
    assert "--micro-batch 4" in str(warnings[0].hint)
    assert difference(whole, small) < 1e-6


def test_a_gpu_that_cannot_hold_one_image(start: Callable[..., Training]) -> None:
    training = start()
    before = [w.clone() for w in weights(training)]
    training.network.forward = SmallMemory(training.network, fits=0)  # type: ignore[method-assign]
    with pytest.raises(MissingError, match="one image at a time"):
        list(fit(training))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(training), strict=True))


@pytest.mark.parametrize(
    ("message", "too_small"),
    [("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
     ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True), ("CUDA error: out of memory", True),
     ("CUDA error: an illegal memory access was encountered", False)],
)  # fmt: skip
def test_libraries_of_a_gpu_run_out_of_memory_in_their_own_words(
    start: Callable[..., Training], message: str, too_small: bool
) -> None:
    gradient = start().gradient
    assert not gradient._too_small(RuntimeError(message))
    gradient.placement = replace(CPU, device=torch.device("cuda", 0))
    assert gradient._too_small(RuntimeError(message)) is too_small


@pytest.mark.parametrize("name", ["paper", "krizhevsky", "caffe", "fast"])
@pytest.mark.parametrize("reason", ["", "no C compiler"])
def test_on_a_second_gpu_everything_is_there(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step as far as its loss, with tensors that have a device and no values; with the kernels and without."""
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: reason)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # autograd would want the device itself
    recipe, second = replace(RECIPES[name], width=1 / 16, batch_size=6), torch.device("cuda", 1)
    network = Network(recipe, 10)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():  # Module.to does not know such tensors
            for key, value in module.named_parameters(recurse=False):
                there = torch.empty_strided(value.shape, value.stride(), device=second)
                module.register_parameter(key, torch.nn.Parameter(there))
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(key, torch.empty_like(buffer, device=second))
        mean, axes = np.zeros((3, 256, 256), np.float32), np.eye(3, dtype=np.float32)
        pixels = Pixels(recipe, mean, np.ones(3, np.float32), axes, second)
        images = torch.empty(6, 256, 256, 3, dtype=torch.uint8, device=second)
        batch = Batch(images, torch.zeros(6, dtype=torch.int64), np.arange(6))
        gradient = Gradient(network, network, pixels, Placement(second, "GPU 1", "fp32"), 4, 6)
        sums = gradient.compute(batch, Draws.of_epoch(6, recipe, 1), 0, 1)
    assert {sums.loss.device, sums.errors.device, sums.top5_errors.device} == {second}
