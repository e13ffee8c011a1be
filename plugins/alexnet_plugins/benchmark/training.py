"""`alexnet benchmark train`: our training step, the same network from PyTorch's own layers, and torchvision's AlexNet.

A step is forward, loss, backward and update, on noise that is already on the device, so that only the network counts.
The peers run in a process of their own, with threads and memory as in a user's script: on a CPU, much of our gain is
that freed memory is kept, which holds for a whole process.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli.core.data.augment import Augment, AugmentParams
from alexnet_cli.core.data.loader import Loader
from alexnet_cli.core.model.architecture import layer_specs
from alexnet_cli.core.model.network import Network, initialize, parameters_by_name
from alexnet_cli.core.parallel.placement import Placement, place
from alexnet_cli.core.training.optim import PaperSGD
from alexnet_cli.recipe import PAPER, Recipe
from alexnet_plugins.benchmark.sample_images import open_or_make_dataset
from alexnet_plugins.benchmark.stock_network import build_stock_network
from alexnet_plugins.benchmark.timing import BenchmarkCase, BenchmarkOptions, Work, start_script_process

if TYPE_CHECKING:
    from alexnet_cli.core.data.shards import Dataset

RECIPE = PAPER
BATCH, BATCH_ON_GPU = 64, 128
STEPS_ON_GPU = 20  # per pass: waiting for the device after every step would undo what overlaps
FED_BATCHES = 64  # per pass of the loader: enough that the first batch, which nothing hides, does not decide
CLASSES = 1000
RATE = 1e-4  # small, so that weights trained on noise stay finite
NOTES = (
    "stock and torchvision's run in a process of their own, with memory as in a user's script",
    "torchvision's AlexNet is another, simpler network: one tower, fewer maps, no normalization",
)

NetworkKind = Literal["stock", "torchvision"]
Arithmetic = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Conditions:
    """What all networks train with: recipe, images per step, steps per pass, device, CPU threads."""

    recipe: Recipe
    batch: int
    steps: int
    device: str
    threads: int


def compare_training(options: BenchmarkOptions) -> Generator[BenchmarkCase]:
    """Yield a case in float32, and one in bf16 if the device has it. The bf16 case continues with the same networks."""
    torch.set_num_threads(options.workers)
    torch.backends.cudnn.benchmark = True  # as a `Trainer` does
    placements = [place(options.gpus, "fp32"), place(options.gpus, "bf16")]
    on_gpu = placements[0].device.type == "cuda"
    batch = options.batch_size or (BATCH_ON_GPU if on_gpu else BATCH)
    device = str(placements[0].device)
    conditions = Conditions(RECIPE, batch, STEPS_ON_GPU if on_gpu else 1, device, options.workers)
    notes = [f"{placements[0].name}, {batch} images per step: noise, already on the device", *NOTES]
    if placements[1].precision != "bf16":
        placements.pop()
        notes.append(f"this {'GPU' if on_gpu else 'CPU'} has no bf16 arithmetic: bf16 is left out")
    ours, without_norm = build_ours(conditions), build_ours(conditions, norm=False)
    with start_script_process() as process, ExitStack() as stack:

        def run_apart(kind: NetworkKind, *, channels_last: bool, bf16: bool) -> Work:
            return lambda: process.submit(run_peer, kind, conditions, channels_last, bf16).result()

        peers = {"stock: contiguous, float32": run_apart("stock", channels_last=False, bf16=False)}
        if not on_gpu:
            kept = build_peer("stock", conditions, channels_last=False)
            peers["the same, memory kept as ours"] = partial(kept.run, nullcontext)
        dataset = open_or_make_dataset(options) if on_gpu else None
        for placement in placements:
            bf16 = placement.precision == "bf16"
            others = {"stock: channels-last, bf16": run_apart("stock", channels_last=True, bf16=True)} if bf16 else {}
            others["limit: ours without normalization"] = partial(without_norm.run, placement.precision_context)
            others["torchvision's AlexNet"] = run_apart("torchvision", channels_last=True, bf16=bf16)
            if dataset:
                others["ours, fed from shards"] = feed_from_shards(ours, dataset[0], placement, stack)
            yield BenchmarkCase(
                f"train {placement.precision}", partial(ours.run, placement.precision_context), peers | others,
                [*notes, *([f"fed from shards: {dataset[1]}"] if dataset else [])],
                flop_per_image=count_training_flop(conditions.recipe),
            )  # fmt: skip


class NoiseTrainer:
    """A network, its optimizer, and the batch of noise that it trains on."""

    def __init__(
        self, conditions: Conditions, network: nn.Module, optimizer_step: Callable[[], None], *, channels_last: bool
    ) -> None:
        self.conditions, self.network, self.optimizer_step = conditions, network, optimizer_step
        size, generator = conditions.recipe.input_size, torch.Generator().manual_seed(0)
        images = torch.randint(-128, 128, (conditions.batch, 3, size, size), generator=generator).float()
        labels = torch.randint(CLASSES, (conditions.batch,), generator=generator)
        self.images = images.to(conditions.device, memory_format=get_memory_format(channels_last))
        self.labels = labels.to(conditions.device)

    def step(self, images: Tensor, labels: Tensor, arithmetic: Arithmetic) -> None:
        """Take one step; gradients are freed at its end, so that other networks have the memory."""
        with arithmetic():
            logits = self.network(images)
        functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer_step()
        self.network.zero_grad()

    def run(self, arithmetic: Arithmetic) -> int:
        """Train on the noise and wait for the device. Returns the number of images."""
        for _ in range(self.conditions.steps):
            self.step(self.images, self.labels, arithmetic)
        wait_for_device(self.conditions.device)
        return self.conditions.steps * len(self.labels)


def build_ours(conditions: Conditions, *, norm: bool = True) -> NoiseTrainer:
    """Return our network and optimizer, with or without response normalization."""
    recipe = conditions.recipe if norm else replace(conditions.recipe, lrn="none")
    network = Network(recipe, CLASSES)
    initialize(network)
    network.to(conditions.device)
    optimizer, steps = PaperSGD(parameters_by_name(network), recipe), itertools.count(1)

    def optimizer_step() -> None:
        optimizer.step(RATE, 1)
        network.draw_dropout(next(steps))

    return NoiseTrainer(conditions, network, optimizer_step, channels_last=True)


def build_peer(kind: NetworkKind, conditions: Conditions, *, channels_last: bool) -> NoiseTrainer:
    """Return a network from PyTorch's own layers, or torchvision's, with PyTorch's SGD."""
    recipe = conditions.recipe
    network = build_stock(recipe, CLASSES) if kind == "stock" else _build_torchvision()
    network.to(conditions.device).to(memory_format=get_memory_format(channels_last))
    sgd = torch.optim.SGD(network.parameters(), RATE, recipe.momentum, weight_decay=recipe.weight_decay)
    return NoiseTrainer(conditions, network, sgd.step, channels_last=channels_last)


def build_stock(recipe: Recipe, classes: int) -> nn.Sequential:
    """Return the network of recipe `paper`, at the recipe's width, from PyTorch's own layers."""
    return build_stock_network([spec.biases for spec in layer_specs(recipe, classes)])


def _build_torchvision() -> nn.Module:
    from torchvision.models import alexnet

    network: nn.Module = alexnet(num_classes=CLASSES)
    return network


def run_peer(kind: NetworkKind, conditions: Conditions, channels_last: bool, bf16: bool) -> int:
    """Run a pass of a peer in this process, which does nothing else; the first pass builds it."""
    trainer = _get_peer(kind, conditions, channels_last)
    return trainer.run(partial(stock_arithmetic, conditions.device, bf16=bf16))


@functools.cache
def _get_peer(kind: NetworkKind, conditions: Conditions, channels_last: bool) -> NoiseTrainer:
    set_script_defaults(conditions.threads)
    return build_peer(kind, conditions, channels_last=channels_last)


def set_script_defaults(threads: int) -> None:
    """Set up PyTorch as a careful script does; float32 means the same as in ours."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False


def stock_arithmetic(device: str, *, bf16: bool) -> AbstractContextManager[object]:
    """Return the arithmetic of a script: float32, or PyTorch's automatic mixed precision."""
    return torch.autocast(device.split(":")[0], torch.bfloat16) if bf16 else nullcontext()


def feed_from_shards(trainer: NoiseTrainer, dataset: Dataset, placement: Placement, stack: ExitStack) -> Work:
    """Train from the loader on: decoding, copying, crops and color on the device, and the step."""
    conditions, split, device = trainer.conditions, dataset.split("train"), placement.device
    count = FED_BATCHES * conditions.batch
    loader = stack.enter_context(Loader(split, conditions.batch, conditions.threads, device))
    colors = dataset.mean_image(), dataset.color_std, dataset.color_axes
    augment = Augment(conditions.recipe, *colors, device, placement.dtype)
    params = AugmentParams.draw(len(split), conditions.recipe, 1)
    batches = np.split(np.resize(np.random.default_rng(0).permutation(len(split)), count), FED_BATCHES)

    def run() -> int:
        for batch in loader.batches(batches):
            views = augment.training_views(batch.images, batch.rows, params, 1)
            trainer.step(views, batch.labels.to(device, non_blocking=True), placement.precision_context)
        wait_for_device(conditions.device)
        return count

    return run


def get_memory_format(channels_last: bool) -> torch.memory_format:
    """Return the layout of a batch of images and of the weights of convolutions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def wait_for_device(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def count_training_flop(recipe: Recipe) -> float:
    """Return the floating-point operations to train on one image: forward, and twice that backward."""
    return 3.0 * 2 * sum(spec.multiplications for spec in layer_specs(recipe, CLASSES))
