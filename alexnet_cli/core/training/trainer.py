"""One step of training (section 5): augment, forward, loss, backward, all-reduce, update.

A `Trainer` holds the network, the optimizer, the schedule and the augmentation on one device. It writes no files and
shows nothing: `loop.py` feeds it batches, validates and saves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from alexnet_cli.core.data.augment import Augment, AugmentParams
from alexnet_cli.core.data.loader import Batch, epoch_order, steps_per_epoch
from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.model.layers import ResponseNorm
from alexnet_cli.core.model.network import Network, autocast_dtype, initialize, parameters_by_name
from alexnet_cli.core.parallel.ddp import trainable_names, wrap_ddp
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.training.fine_tuning import FROZEN, freeze
from alexnet_cli.core.training.optim import PaperSGD, Schedule
from alexnet_cli.errors import MissingError, is_out_of_memory
from alexnet_cli.recipe import Recipe

CUDA_GRAPH_IMAGES = 256  # per step; above, an H100 should compute for longer than launching kernels takes (an estimate)


@dataclass(frozen=True)
class StepMetrics:
    """Mean loss and number of top-1 and top-5 errors of this rank's images: scalars, still on the device.

    The loss is this rank's share of the mean over the whole batch: shares of all ranks are added.
    """

    loss: Tensor
    errors: Tensor
    top5_errors: Tensor


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is infinite or NaN. The weights have not changed yet."""

    def __init__(self, loss: float) -> None:
        super().__init__(loss)
        self.loss = loss


class Trainer:
    """Trains one network on one device, alone or as one rank of several.

    `steps_done` counts steps, `epoch` is the current epoch (from 1). `batch_size` is the whole batch over all ranks,
    `rank_images` the most images that one rank computes, `micro_batch` the images computed at once.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: int,
        rows: int,
        augment: Augment,
        placement: Placement,
        *,
        micro_batch: int | None = None,
        compile: bool = False,
        compress: bool = False,
    ) -> None:
        """`rows` is the number of training images; `compress` sends gradients as bf16."""
        ranks = placement.ranks
        self.recipe, self.rows, self.augment, self.placement = recipe, rows, augment, placement
        self.network = Network(recipe, classes, ranks.towers, ranks.columns)
        initialize(self.network)
        freeze(self.network, recipe)
        self.network.to(placement.device)
        self.optimizer = PaperSGD(parameters_by_name(self.network), recipe)
        self.schedule = Schedule(recipe, steps_per_epoch(rows, recipe.batch_size))
        self.batch_size = min(recipe.batch_size, rows)
        self.rank_images = -(-self.batch_size // ranks.replicas)
        self.micro_batch = min(micro_batch or self.rank_images, self.rank_images)
        self.compiled, self.compress = compile, compress
        self.forward: Callable[[Tensor], Tensor] = self.network
        if compile:
            self.forward = compile_network(self.network, placement.device, self.micro_batch)
        self.checks_every_step = placement.device.type == "cpu"  # a GPU would have to be waited for
        self.steps_done, self.epoch = 0, 1
        self._replicated: list[str] = []  # parameters whose gradients the replicas exchange

    @classmethod
    def for_dataset(
        cls,
        recipe: Recipe,
        data: Dataset,
        placement: Placement,
        *,
        micro_batch: int | None = None,
        compile: bool = False,
        compress: bool = False,
    ) -> Trainer:
        """A trainer for the classes, the number of images and the color statistics of a prepared data set."""
        statistics = data.mean_image(), data.color_std, data.color_axes
        augment = Augment(recipe, *statistics, placement.device, placement.dtype)
        rows = len(data.split("train"))
        return cls(
            recipe, len(data.classes), rows, augment, placement,
            micro_batch=micro_batch, compile=compile, compress=compress,
        )  # fmt: skip

    def begin_epoch(self) -> None:
        """Draw the epoch's crops, reflections and color shifts, and switch off gradients that nothing learns from."""
        order = epoch_order(self.rows, self.recipe.seed, self.epoch)
        self.draws = AugmentParams.draw(self.rows, self.recipe, self.epoch, order)
        for name, parameter in parameters_by_name(self.network):
            if name.partition(".")[0] not in FROZEN[self.recipe.frozen]:
                parameter.requires_grad_(self.optimizer.is_learning(name, self.epoch))
        ranks, learning = self.placement.ranks, trainable_names(self.network)
        if ranks.group is not None and self._replicated != learning:
            self.forward, self._replicated = wrap_ddp(self.network, ranks, self.compress), learning

    def step(self, batch: Batch) -> StepMetrics:
        """Take one step of gradient descent. `batch` is this rank's share of the whole batch.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite (on a CPU only; the weights have not changed).
            MissingError: the device cannot hold even one image.
        """
        with self.placement.ranks.name_errors(f"step {self.steps_done + 1}"):
            while (metrics := self.compute_gradient(batch)) is None:
                self._halve_micro_batch(len(batch.rows))
        if self.checks_every_step and not bool(torch.isfinite(metrics.loss)):
            raise NonFiniteLoss(float(metrics.loss))
        self.optimizer.step(self.schedule.rate(self.steps_done), self.epoch)
        self.steps_done += 1
        return metrics

    def compute_gradient(self, batch: Batch) -> StepMetrics | None:
        """Leave the gradient of the whole batch's mean loss in the parameters. None if the GPU ran out of memory.

        Micro-batches change the numbers by rounding only: each image keeps the dropout mask of its place in the whole
        batch, and each loss is weighted by the images it stands for.
        """
        first_image = self.placement.ranks.batch_slice(self.batch_size).start
        sums: list[Tensor] = []
        self.network.zero_grad()
        try:
            for start in range(0, len(batch.rows), self.micro_batch):
                part = slice(start, start + self.micro_batch)
                labels = batch.labels[part].to(self.placement.device, non_blocking=True)
                with self._all_reduce(last=part.stop >= len(batch.rows)):
                    images = self.augment.training_views(batch.images[part], batch.rows[part], self.draws, self.epoch)
                    self.network.draw_dropout(self.steps_done, first_image + start)
                    with self.placement.precision_context():
                        logits = self.forward(images)
                    smoothing = self.recipe.label_smoothing
                    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
                    loss = loss * (len(labels) / self.batch_size)
                    loss.backward()
                top = logits.detach().topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
                metrics = [loss.detach(), (~top[:, 0]).sum(), (~top.any(1)).sum()]
                sums = [a + b for a, b in zip(sums, metrics, strict=True)] if sums else metrics
        except RuntimeError as error:
            if not is_gpu_out_of_memory(error, self.placement.device):
                raise
            return None
        return StepMetrics(*sums)

    def _all_reduce(self, last: bool) -> AbstractContextManager[object]:
        """Data-parallel replicas add up their gradients during the backward pass of the last micro-batch only."""
        waits = not last and isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if waits else nullcontext()  # type: ignore[attr-defined]

    def _halve_micro_batch(self, images: int) -> None:
        """Compute half as many images at once from now on. Raises MissingError if that is impossible."""
        if self.placement.ranks.size > 1:  # the others wait inside this step's all-reduce
            raise MissingError(
                f"{self.placement.name} ran out of memory computing {self.micro_batch} images at once",
                f"--micro-batch {max(1, self.micro_batch // 2)} computes the same in smaller pieces",
            )
        if self.micro_batch == 1:
            raise MissingError(
                f"{self.placement.name} ran out of memory computing one image at a time",
                "train on the CPU with --gpus none, or a narrower network with --set width=0.5",
            )
        self.micro_batch = (min(self.micro_batch, images) + 1) // 2
        torch.cuda.empty_cache()

    def gather_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and velocity of the whole network by name, on the CPU of rank 0; other ranks send their part."""
        ranks = self.placement.ranks
        weights: dict[str, Tensor] = {}
        velocity: dict[str, Tensor] = {}
        if ranks.is_collecting:
            with ranks.name_errors("collecting the network"):
                for name, parameter in parameters_by_name(self.network):
                    for whole, own in ((weights, parameter), (velocity, self.optimizer.velocity[name])):
                        if (tensor := self.network.gather_whole(name, own)) is not None:
                            whole[name] = tensor
        return weights, velocity

    @property
    def total_steps(self) -> int:
        """Steps of the whole training, at most."""
        return self.recipe.epochs * self.schedule.steps_per_epoch

    @property
    def first_step_of_epoch(self) -> int:
        """Steps before the current epoch."""
        return (self.epoch - 1) * self.schedule.steps_per_epoch

    @property
    def last_step_of_epoch(self) -> int:
        """Steps done at the end of the current epoch."""
        return self.epoch * self.schedule.steps_per_epoch

    @property
    def epochs_begun(self) -> int:
        """Epochs of which at least one step is done."""
        return -(-self.steps_done // self.schedule.steps_per_epoch)


def is_gpu_out_of_memory(error: RuntimeError, device: torch.device) -> bool:
    """Whether a GPU ran out of memory; cuBLAS and cuDNN say so in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or (device.type == "cuda" and is_out_of_memory(error))


def compile_network(network: Network, device: torch.device, images: int) -> Callable[[Tensor], Tensor]:
    """`network` through torch.compile, sharing its parameters; `images` is how many it gets at a time.

    It compiles at its first call, and raises MissingError where it cannot.
    """
    from torch._dynamo.exc import TorchDynamoException  # importing the compiler takes a second

    torch.compiler.assume_constant_result(autocast_dtype)  # torch 2.11 cannot trace the question
    plain: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False)
    captured: Callable[[Tensor], Tensor] | None = None
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, ResponseNorm):  # whose loop over images would be unrolled
                module.function = torch.compiler.disable(module.function)
    elif images <= CUDA_GRAPH_IMAGES:
        captured = torch.compile(network, dynamic=False, mode="reduce-overhead")

    def forward(x: Tensor) -> Tensor:
        try:
            # A CUDA graph writes its gradients to the same memory each time: it cannot add to gradients already there.
            if captured is not None and network.fc8.bias.grad is None:
                torch.compiler.cudagraph_mark_step_begin()
                return captured(x)
            return plain(x)
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise MissingError(f"--compile: torch.compile fails here: {reason}", "train without --compile") from error

    return forward
