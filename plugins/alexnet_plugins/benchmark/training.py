"""`alexnet benchmark train`: our training step, the same network built from torch's own parts, and torchvision's.

A step is forward, loss, backward and update, on noise that is on the device already, so that nothing but the network
counts. The peers run in a process of their own, with threads and memory as any script has them: keeping freed memory
is a good part of what ours gains on a CPU, and holds for a whole process.
"""

from __future__ import annotations

import contextlib
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
from alexnet_cli.core.model.architecture import EDGE_PADDING, layer_widths
from alexnet_cli.core.model.network import Network, initialize, parameters_by_name
from alexnet_cli.core.parallel.placement import Placement, place
from alexnet_cli.core.training.optim import PaperSGD
from alexnet_cli.recipe import PAPER, Recipe
from alexnet_plugins.benchmark.stopwatch import Contest, Pass, fresh_process

if TYPE_CHECKING:
    from alexnet_cli.core.data.shards import Dataset

RECIPE = PAPER
BATCH, BATCH_ON_GPU = 64, 128
STEPS_ON_GPU = 20  # a pass: to wait for the device after every step would undo what overlaps
FED_BATCHES = 64  # a pass of the loader: enough that the first batch, which nothing hides, does not decide
CLASSES = 1000
RATE = 1e-4  # small: what is learned from noise should not run away, and takes as long
MAPS = {"conv1": 55 * 55, "conv2": 27 * 27} | dict.fromkeys(("conv3", "conv4", "conv5"), 13 * 13)  # pixels of each

Kind = Literal["stock", "torchvision"]
Layout = Literal["contiguous", "channels-last"]
Arithmetic = Callable[[], AbstractContextManager[object]]
FORMATS: dict[Layout, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels-last": torch.channels_last,
}

Data = Callable[[], tuple["Dataset", str]]


def compare_training(gpus: str | None, batch: int | None, workers: int, data: Data) -> Generator[Contest]:
    """One in float32, then one in bf16, where the CPU has it. `data` is asked for where there is a GPU to feed."""
    torch.set_num_threads(workers)
    placement = place(gpus, "fp32")
    on_gpu = placement.device.type == "cuda"
    batch = batch or (BATCH_ON_GPU if on_gpu else BATCH)
    conditions = Conditions(RECIPE, batch, STEPS_ON_GPU if on_gpu else 1, str(placement.device), workers)
    notes = [f"{placement.name}, {batch} pictures a step: noise, already on the device"]
    low = place(gpus, "bf16")
    if low.precision != "bf16":
        notes.append(f"this {'GPU' if on_gpu else 'CPU'} has no bf16 arithmetic: bf16 is left out")
    with ExitStack() as stack:
        field = Contestants(conditions, data if on_gpu else None, stack)
        yield field.contest(placement, notes)
        if low.precision == "bf16":
            yield field.contest(low, notes)


class Contestants:
    """The networks that compete, built once; both contests train the same ones further."""

    def __init__(self, conditions: Conditions, data: Data | None, stack: ExitStack) -> None:
        self.conditions, self.stack = conditions, stack
        self.process = stack.enter_context(fresh_process())
        self.ours, self.bound = build_ours(conditions), build_ours(conditions, norm=False)
        self.kept = None if data else build_peer("stock", conditions, "contiguous")
        self.data = data() if data else None

    def contest(self, placement: Placement, notes: list[str]) -> Contest:
        """Everything in the placement's arithmetic, and stock in float32 in any case."""
        low = placement.precision == "bf16"
        peers = {"stock: contiguous, float32": self._apart("stock", "contiguous", bf16=False)}
        if self.kept:
            peers["the same, memory kept as ours"] = partial(self.kept.run, nullcontext)
        if low:
            peers["stock: channels-last, bf16"] = self._apart("stock", "channels-last", bf16=True)
        peers["limit: ours without normalization"] = partial(self.bound.run, placement.precision_context)
        peers["torchvision's AlexNet"] = self._apart("torchvision", "channels-last", bf16=low)
        notes = [
            *notes,
            "stock and torchvision's run in a process of their own, with memory as any script has it",
            "torchvision's AlexNet is another, simpler network: one tower, fewer maps, no normalization",
        ]
        if self.data:
            dataset, note = self.data
            peers["ours, fed from shards"] = feed_from_shards(self.ours, dataset, placement, self.stack)
            notes.append(f"fed from shards: {note}")
        return Contest(
            f"train {placement.precision}", partial(self.ours.run, placement.precision_context), peers, notes,
            operations=count_operations(self.ours.network),
        )  # fmt: skip

    def _apart(self, kind: Kind, layout: Layout, *, bf16: bool) -> Pass:
        return lambda: self.process.submit(run_peer, kind, self.conditions, layout, bf16).result()


def feed_from_shards(learner: Learner, dataset: Dataset, placement: Placement, stack: ExitStack) -> Pass:
    """Ours from the loader on: decoding, the bus, crops and color on the device, the step."""
    conditions, split = learner.conditions, dataset.split("train")
    recipe, device, count = conditions.recipe, placement.device, FED_BATCHES * conditions.batch
    loader = stack.enter_context(Loader(split, conditions.batch, conditions.threads, device))
    colors = dataset.mean_image(), dataset.color_std, dataset.color_axes
    pixels = Augment(recipe, *colors, device, placement.dtype)
    draws = AugmentParams.draw(len(split), recipe, 1)
    plan = np.split(np.resize(np.random.default_rng(0).permutation(len(split)), count), FED_BATCHES)

    def run() -> int:
        for batch in loader.batches(plan):
            views = pixels.training_views(batch.images, batch.rows, draws, 1)
            learner.step(views, batch.labels.to(device, non_blocking=True), placement.precision_context)
        wait_for_device(conditions.device)
        return count

    return run


@dataclass(frozen=True)
class Conditions:
    """Under which every contestant trains: what network, images a step, steps a pass, where."""

    recipe: Recipe
    batch: int
    steps: int
    device: str
    threads: int


class Learner:
    """A network that learns, and a batch of noise in the layout that it likes."""

    def __init__(
        self,
        conditions: Conditions,
        network: nn.Module,
        forget: Callable[[], None],
        update: Callable[[], None],
        layout: Layout = "channels-last",
    ) -> None:
        """`forget` drops the gradients, `update` takes the step."""
        self.network, self.forget, self.update, self.conditions = network, forget, update, conditions
        size, generator = conditions.recipe.input_size, torch.Generator().manual_seed(0)
        images = torch.randint(-128, 128, (conditions.batch, 3, size, size), generator=generator).float()
        labels = torch.randint(CLASSES, (conditions.batch,), generator=generator)
        self.images = images.to(conditions.device, memory_format=FORMATS[layout])
        self.labels = labels.to(conditions.device)

    def step(self, images: Tensor, labels: Tensor, arithmetic: Arithmetic) -> None:
        """One step of gradient descent; whoever waits for the next turn holds no gradients."""
        with arithmetic():
            logits = self.network(images)
        functional.cross_entropy(logits.float(), labels).backward()
        self.update()
        self.forget()

    def run(self, arithmetic: Arithmetic) -> int:
        """A pass over the noise; the device is done with it when this returns."""
        for _ in range(self.conditions.steps):
            self.step(self.images, self.labels, arithmetic)
        wait_for_device(self.conditions.device)
        return self.conditions.steps * len(self.labels)


def wait_for_device(device: str) -> None:
    """Wait for what the device still has to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def arithmetic(device: str, *, bf16: bool) -> AbstractContextManager[object]:
    """As a script has it: float32, or torch's automatic mixed precision."""
    return torch.autocast(device.split(":")[0], torch.bfloat16) if bf16 else contextlib.nullcontext()


def build_ours(conditions: Conditions, *, norm: bool = True) -> Learner:
    """Our network and update rule; without response normalization it is the bound."""
    recipe = conditions.recipe if norm else replace(conditions.recipe, lrn="none")
    network = Network(recipe, CLASSES)
    initialize(network)
    network.to(conditions.device)
    optimizer, count = PaperSGD(parameters_by_name(network), recipe), itertools.count(1)

    def update() -> None:
        optimizer.step(RATE, 1)
        network.draw_dropout(next(count))

    return Learner(conditions, network, network.zero_grad, update)


def build_peer(kind: Kind, conditions: Conditions, layout: Layout) -> Learner:
    """A network as others have it, with torch's SGD."""
    network = build_stock(conditions.recipe, CLASSES) if kind == "stock" else _build_torchvision()
    network.to(conditions.device).to(memory_format=FORMATS[layout])
    recipe = conditions.recipe
    sgd = torch.optim.SGD(network.parameters(), RATE, recipe.momentum, weight_decay=recipe.weight_decay)
    return Learner(conditions, network, sgd.zero_grad, sgd.step, layout)


def run_peer(kind: Kind, conditions: Conditions, layout: Layout, bf16: bool) -> int:
    """A pass of a network as others have it, for a process that does nothing else; built in its first pass."""
    learner = _cached_peer(kind, conditions, layout)
    return learner.run(functools.partial(arithmetic, conditions.device, bf16=bf16))


@functools.cache
def _cached_peer(kind: Kind, conditions: Conditions, layout: Layout) -> Learner:
    torch.set_num_threads(conditions.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean the same as in ours
    return build_peer(kind, conditions, layout)


def _build_torchvision() -> nn.Module:
    from torchvision.models import alexnet

    network: nn.Module = alexnet(num_classes=CLASSES)
    return network


def build_stock(recipe: Recipe, classes: int) -> nn.Sequential:
    """The network of recipe `paper` or `fast`, at any width, from torch's parts; its parameters are named as ours.

    Dropout is torch's, which rescales in training: equal to ours where the recipe says `dropout_inverted`.
    """
    c = {layer: recipe.towers * n for layer, n in layer_widths(recipe).items()}
    own = recipe.towers
    parts: list[tuple[str, nn.Module]] = [
        ("pad", nn.ZeroPad2d((0, EDGE_PADDING, 0, EDGE_PADDING))),
        ("conv1", nn.Conv2d(3, c["conv1"], 11, stride=4)),
        *_stage(recipe, 1),
        ("conv2", nn.Conv2d(c["conv1"], c["conv2"], 5, padding=2, groups=own)),
        *_stage(recipe, 2),
        ("conv3", nn.Conv2d(c["conv2"], c["conv3"], 3, padding=1)),
        ("relu3", nn.ReLU(inplace=True)),
        ("conv4", nn.Conv2d(c["conv3"], c["conv4"], 3, padding=1, groups=own)),
        ("relu4", nn.ReLU(inplace=True)),
        ("conv5", nn.Conv2d(c["conv4"], c["conv5"], 3, padding=1, groups=own)),
        ("relu5", nn.ReLU(inplace=True)),
        ("pool5", nn.MaxPool2d(3, 2)),
        ("flat", nn.Flatten()),
        ("fc6", nn.Linear(c["conv5"] * 6 * 6, c["fc6"])),
        ("relu6", nn.ReLU(inplace=True)),
        ("drop6", nn.Dropout(recipe.dropout)),
        ("fc7", nn.Linear(c["fc6"], c["fc7"])),
        ("relu7", nn.ReLU(inplace=True)),
        ("drop7", nn.Dropout(recipe.dropout)),
        ("fc8", nn.Linear(c["fc7"], classes)),
    ]
    network = nn.Sequential()
    for name, part in parts:
        network.add_module(name, part)
    return network


def _stage(recipe: Recipe, number: int) -> list[tuple[str, nn.Module]]:
    """What follows convolutions 1 and 2."""
    return [
        (f"relu{number}", nn.ReLU(inplace=True)),
        (f"norm{number}", TowerNorm(recipe)),
        (f"pool{number}", nn.MaxPool2d(3, 2)),
    ]


class TowerNorm(nn.LocalResponseNorm):
    """Torch's response normalization inside each tower: towers become images."""

    def __init__(self, recipe: Recipe) -> None:
        # Torch divides alpha by the number of maps in the sum, the paper does not.
        alpha = recipe.lrn_alpha * recipe.input_divisor**2 * recipe.lrn_size
        super().__init__(recipe.lrn_size, alpha, recipe.lrn_beta, recipe.lrn_k)
        self.towers = recipe.towers

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape."""
        n, c, h, w = x.shape
        return super().forward(x.reshape(n * self.towers, c // self.towers, h, w)).reshape(n, c, h, w)


def count_operations(network: nn.Module) -> float:
    """Floating-point operations to train on one image: two a multiply-add, forward and twice that backward."""
    weights = {name.removesuffix(".weight"): p.numel() for name, p in network.named_parameters() if p.dim() > 1}
    return 3.0 * 2 * sum(count * MAPS.get(layer, 1) for layer, count in weights.items())
