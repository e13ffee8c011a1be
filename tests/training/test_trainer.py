"""One step: micro-batches give the numbers of the whole batch, masks are those of the step, memory may run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.loader import Batch, Loader
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.devices import Gpu
from alexnet_cli.core.model import triton_kernels
from alexnet_cli.core.model.architecture import PARAMETERS
from alexnet_cli.core.model.network import Network
from alexnet_cli.core.model.towers import TowerGroup
from alexnet_cli.core.parallel import placement
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.parallel.process_group import ProcessMesh
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training.loop import TrainingLoop
from alexnet_cli.core.training.trainer import Trainer, is_gpu_out_of_memory
from alexnet_cli.errors import MissingError
from alexnet_cli.recipe import RECIPES, TINY, Recipe
from trainings import new_loop

CPU = Placement(torch.device("cpu"), "CPU", "fp32")
RECIPE = replace(
    TINY, width=1 / 16, batch_size=16, epochs=2, learning_rate=0.01, conv1_scale=1.0, dropout=0.5, label_smoothing=0.2,
    precision="fp32",
)  # fmt: skip
Start = Callable[..., TrainingLoop]
NAMES = iter(f"run{i}" for i in range(1000))


@pytest.fixture
def start(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))

    def start(micro_batch: int | None = None, recipe: Recipe = RECIPE) -> TrainingLoop:
        run = Run.create(next(NAMES), recipe, {})
        return new_loop(recipe, open_dataset(prepared), run, CPU, 1, micro_batch=micro_batch)

    return start


def weights(training: TrainingLoop) -> list[torch.Tensor]:
    return [training.trainer.network.get_parameter(name).detach() for name in PARAMETERS]


def difference(one: TrainingLoop, other: TrainingLoop) -> float:
    """The distance of two networks' weights as a share of their length."""
    a, b = (torch.cat([w.flatten() for w in weights(training)]).double() for training in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 16, 999])
@pytest.mark.parametrize("inverted", [True, False])
def test_pieces_give_the_numbers_of_the_whole(start: Start, micro_batch: int, inverted: bool) -> None:
    """Three steps of 16, which neither 3 nor 999 divides, with dropout, shifted colors and label smoothing."""
    recipe = replace(RECIPE, dropout_inverted=inverted)
    whole, pieces = start(None, recipe), start(micro_batch, recipe)
    told = [list(training.fit(record_every=1, max_steps=3)) for training in (whole, pieces)]
    for a, b in zip(*told, strict=True):
        assert (a.event, a.step, a.top1_error) == (b.event, b.step, b.top1_error)
        assert (a.loss or 0) == pytest.approx(b.loss or 0, rel=1e-6)
    assert difference(whole, pieces) < 1e-6
    if micro_batch >= 16:
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(pieces), strict=True))


def test_the_gradient_is_that_of_the_mean_loss_over_the_batch(start: Start) -> None:
    """Against torch's own derivative of the mean, without dropout, whose masks depend on the place in the batch."""
    training = start(5, replace(RECIPE, dropout=0, label_smoothing=0))
    seen: dict[str, Any] = {}
    original = training.trainer.augment.training_views

    def views(*arguments: Any) -> torch.Tensor:
        made = original(*arguments)
        seen.setdefault("views", []).append(made.clone())
        seen.setdefault("rows", []).extend(arguments[1].tolist())
        return made

    training.trainer.augment.training_views = views  # type: ignore[assignment, method-assign]
    training.trainer.optimizer.step = lambda *_: None  # type: ignore[method-assign]
    list(training.fit(max_steps=1))
    assert [len(part) for part in seen["views"][:4]] == [5, 5, 5, 1]
    ours = {name: training.trainer.network.get_parameter(name).grad for name in PARAMETERS}
    assert all(gradient is not None for gradient in ours.values())
    network = Network(training.trainer.recipe, 4)
    network.load_state_dict(training.trainer.network.state_dict())
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


def test_a_gpu_that_is_too_small_gets_smaller_pieces(start: Start) -> None:
    whole, small = start(), start()
    memory = SmallMemory(small.trainer.network, fits=8)
    small.trainer.network.forward = memory  # type: ignore[method-assign]
    list(whole.fit(max_steps=2))
    records = list(small.fit(max_steps=2))
    assert memory.sizes[:7] == [16, 8, 8, 4, 4, 4, 4]  # whole; halves, the second of which fails; quarters
    warnings = [r for r in records if r.event == "warning" and r.step]
    assert [r.step for r in warnings] == [1]
    assert "computed 4 images at a time" in str(warnings[0].text)
    assert "--micro-batch 4" in str(warnings[0].hint)
    assert difference(whole, small) < 1e-6


def test_a_gpu_that_cannot_hold_one_image(start: Start) -> None:
    training = start()
    before = [w.clone() for w in weights(training)]
    training.trainer.network.forward = SmallMemory(training.trainer.network, fits=0)  # type: ignore[method-assign]
    with pytest.raises(MissingError, match="with a single image: CUDA out of memory"):
        list(training.fit())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(training), strict=True))


@pytest.mark.parametrize(
    ("mesh", "micro_batch", "hint"),
    [(ProcessMesh(1, 2), None, "try --micro-batch 8;"), (ProcessMesh(1, 2), 1, "train on the CPU"),
     (ProcessMesh(1, 2, columns=TowerGroup(2, 1, 1)), None, "use a smaller batch (-b)")],
)  # fmt: skip
def test_one_of_several_gpus_is_too_small(start: Start, mesh: ProcessMesh, micro_batch: int | None, hint: str) -> None:
    """The others wait for this one inside the step, so it cannot be repeated; hybrid has no pieces."""
    trainer = start(micro_batch).trainer
    trainer.placement = replace(CPU, ranks=mesh)
    trainer.network.forward = SmallMemory(trainer.network, fits=0)  # type: ignore[method-assign]
    trainer.begin_epoch()
    images = torch.zeros(16, 256, 256, 3, dtype=torch.uint8)
    with pytest.raises(MissingError, match=r"ran out of memory with .*: CUDA out of memory") as caught:
        trainer.step(Batch(images, torch.zeros(16, dtype=torch.int64), np.arange(16)))
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("message", "too_small"),
    [("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
     ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True), ("CUDA error: out of memory", True),
     ("FIND was unable to find an engine to execute this computation", True),
     ("GET was unable to find an engine to execute this computation", True),
     ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
     ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", True),
     ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
     ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", True), ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
     ("CUDA error: an illegal memory access was encountered", False)],
)  # fmt: skip
def test_libraries_of_a_gpu_run_out_of_memory_in_their_own_words(message: str, too_small: bool) -> None:
    assert not is_gpu_out_of_memory(RuntimeError(message), torch.device("cpu"))
    assert is_gpu_out_of_memory(RuntimeError(message), torch.device("cuda", 0)) is too_small


@pytest.mark.parametrize("name", ["paper", "krizhevsky", "caffe", "fast"])
@pytest.mark.parametrize("reason", ["", "no C compiler"])
def test_on_a_second_gpu_everything_is_there(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step as far as its loss, with tensors that have a device and no values; with the kernels and without."""
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: reason)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # autograd would want the device itself
    recipe, second = replace(RECIPES[name], width=1 / 16, batch_size=6), torch.device("cuda", 1)
    mean, axes = np.zeros((3, 256, 256), np.float32), np.eye(3, dtype=np.float32)
    on_cpu = Augment(recipe, mean, np.ones(3, np.float32), axes, CPU.device)
    trainer = Trainer(recipe, 10, 6, on_cpu, CPU, micro_batch=4)
    trainer.begin_epoch()
    network = trainer.network
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():  # Module.to does not know such tensors
            for key, value in module.named_parameters(recurse=False):
                there = torch.empty_strided(value.shape, value.stride(), device=second)
                module.register_parameter(key, torch.nn.Parameter(there))
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(key, torch.empty_like(buffer, device=second))
        trainer.augment = Augment(recipe, mean, np.ones(3, np.float32), axes, second)
        images = torch.empty(6, 256, 256, 3, dtype=torch.uint8, device=second)
        batch = Batch(images, torch.zeros(6, dtype=torch.int64), np.arange(6))
        trainer.placement = Placement(second, "GPU 1", "fp32")
        sums = trainer.compute_gradient(batch)
    assert not isinstance(sums, str)
    assert {sums.loss.device, sums.errors.device, sums.top5_errors.device} == {second}


@pytest.mark.usefixtures("own_runs_and_settings")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_training_searches_for_the_fastest_convolutions(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN tries all algorithms for each new shape, which would take longer than many an evaluation."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(placement, "list_gpus", lambda: [Gpu(0, "H100", 80 << 30, "9.0")])
    monkeypatch.setattr(placement, "try_gpu", lambda index: "")
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "")
    torch.backends.cudnn.benchmark = False
    mean, axes = np.zeros((3, 256, 256), np.float32), np.eye(3, dtype=np.float32)
    placed = placement.place("0" if device == "cuda" else "none", "fp32")
    assert not torch.backends.cudnn.benchmark
    Trainer(RECIPE, 10, 16, Augment(RECIPE, mean, np.ones(3, np.float32), axes, CPU.device), placed)
    assert torch.backends.cudnn.benchmark is (device == "cuda")


def test_dropout_masks_are_those_of_their_step(prepared: Path) -> None:
    """A network that draws the same mask at every step learns nearly as well: no other test would see it."""
    data = open_dataset(prepared)
    trainer, expected = Trainer.for_dataset(RECIPE, data, CPU, micro_batch=8), Network(RECIPE, 4)
    trainer.begin_epoch()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # nonzero inputs and outputs, a pair for each half of a batch
    trainer.network.drop6.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0] != 0, output != 0)))
    with Loader(data.split("train"), 16, 1) as loader:
        for batch in loader.batches([np.arange(16), np.arange(16, 32)]):
            trainer.step(batch)
    masks = []
    for (step, first_image), (alive, kept) in zip([(0, 0), (0, 8), (1, 0), (1, 8)], seen, strict=True):
        expected.draw_dropout(step, first_image)
        masks.append(expected.drop6(torch.ones(kept.shape)) != 0)
        assert torch.equal(kept, alive & masks[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
