"""One step of training (section 5): augment, forward, loss, backward, all-reduce, update.

A `Trainer` holds the network, the optimizer, the schedule and the augmentation on one device. It writes no files and
shows nothing: `loop.py` feeds it batches, validates and saves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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

CUDA_GRAPH_IMAGES = 256  # largest micro-batch for CUDA graphs; above, kernel launches should not matter (an estimate)


@dataclass(frozen=True)
class StepMetrics:
    """Loss and number of top-1 and top-5 errors of this rank's images: scalars, still on the device.

    The loss is this rank's share of the mean loss of the whole batch; the shares of all ranks add up to that mean.
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

    `epoch` counts from 1. `batch_size` is the number of images per step over all ranks, `rank_images` the share of one
    rank (rounded up), and `micro_batch` the number of images computed at once.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: int,
        train_images: int,
        augment: Augment,
        placement: Placement,
        *,
        micro_batch: int | None = None,
        compile: bool = False,
        compress: bool = False,
    ) -> None:
        """`train_images` is the size of the training set; `compress` exchanges gradients as bf16."""
        ranks = placement.ranks
        self.recipe, self.augment, self.placement = recipe, augment, placement
        self.train_images = train_images
        self.network = Network(recipe, classes, ranks.towers, ranks.columns)
        initialize(self.network)
        freeze(self.network, recipe)
        self.network.to(placement.device)
        if placement.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # a search of seconds for each shape, which pays only in training
        self.optimizer = PaperSGD(parameters_by_name(self.network), recipe)
        self.schedule = Schedule(recipe, steps_per_epoch(train_images, recipe.batch_size))
        self.batch_size = min(recipe.batch_size, train_images)
        self.rank_images = -(-self.batch_size // ranks.replicas)
        self.micro_batch = min(micro_batch or self.rank_images, self.rank_images)
        self.compiled, self.compress = compile, compress
        self.forward: Callable[[Tensor], Tensor] = self.network
        if compile:
            self.forward = compile_network(self.network, placement.device, self.micro_batch)
        self.checks_every_step = placement.device.type == "cpu"  # on a GPU, the check would wait for it
        self.steps_done, self.epoch = 0, 1
        self._ddp_parameters: list[str] = []  # names of the parameters whose gradients DDP all-reduces

    @classmethod
    def for_dataset(cls, recipe: Recipe, data: Dataset, placement: Placement, **options: Any) -> Trainer:
        """A trainer for the classes and color statistics of a prepared data set; `options` as for `Trainer`."""
        statistics = data.mean_image(), data.color_std, data.color_axes
        augment = Augment(recipe, *statistics, placement.device, placement.dtype)
        return cls(recipe, len(data.classes), len(data.split("train")), augment, placement, **options)

    def begin_epoch(self) -> None:
        """Draw the epoch's crops, reflections and color shifts; switch off the gradients of frozen parameters."""
        order = epoch_order(self.train_images, self.recipe.seed, self.epoch)
        self.draws = AugmentParams.draw(self.train_images, self.recipe, self.epoch, order)
        for name, parameter in parameters_by_name(self.network):
            if name.partition(".")[0] not in FROZEN[self.recipe.frozen]:
                parameter.requires_grad_(self.optimizer.is_learning(name, self.epoch))
        ranks, learning = self.placement.ranks, trainable_names(self.network)
        if ranks.group is not None and self._ddp_parameters != learning:
            self.forward = wrap_ddp(self.network, ranks, self.compress)
            self._ddp_parameters = learning

    def step(self, batch: Batch) -> StepMetrics:
        """Train on one batch: augment, forward, loss, backward, all-reduce, update.

        `batch` is this rank's share of the whole batch. If the GPU runs out of memory, fewer images are computed at
        once from then on.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite (checked on a CPU only). The weights have not changed.
            MissingError: the GPU cannot hold even one image.
        """
        with self.placement.ranks.name_errors(f"step {self.steps_done + 1}"):
            while isinstance(metrics := self.compute_gradient(batch), str):  # out of memory
                self._halve_micro_batch(len(batch.rows), metrics)
        if self.checks_every_step and not bool(torch.isfinite(metrics.loss)):
            raise NonFiniteLoss(float(metrics.loss))
        self.optimizer.step(self.schedule.learning_rate(self.steps_done), self.epoch)
        self.steps_done += 1
        return metrics

    def compute_gradient(self, batch: Batch) -> StepMetrics | str:
        """Set each parameter's `grad` to the gradient of the mean loss of the whole batch, over all ranks.

        Returns the error if the GPU ran out of memory. Micro-batches change the result by rounding only: dropout masks
        belong to an image's place in the whole batch, and each loss counts by its number of images.
        """
        first_image = self.placement.ranks.batch_slice(self.batch_size).start
        sums: list[Tensor] = []
        self.network.zero_grad()
        try:
            for start in range(0, len(batch.rows), self.micro_batch):
                part = slice(start, start + self.micro_batch)
                labels = batch.labels[part].to(self.placement.device, non_blocking=True)
                with self._all_reduce(is_last=part.stop >= len(batch.rows)):
                    images = self.augment.training_views(batch.images[part], batch.rows[part], self.draws, self.epoch)
                    self.network.draw_dropout(self.steps_done, first_image + start)
                    with self.placement.precision_context():
                        logits = self.forward(images)
                    smoothing = self.recipe.label_smoothing
                    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
                    loss = loss * (len(labels) / self.batch_size)
                    loss.backward()
                is_hit = logits.detach().topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
                metrics = [loss.detach(), (~is_hit[:, 0]).sum(), (~is_hit.any(1)).sum()]
                sums = [a + b for a, b in zip(sums, metrics, strict=True)] if sums else metrics
        except RuntimeError as error:
            if not is_gpu_out_of_memory(error, self.placement.device):
                raise
            return str(error).partition("\n")[0]  # the error itself would keep the memory
        return StepMetrics(*sums)

    def _all_reduce(self, is_last: bool) -> AbstractContextManager[object]:
        """DDP all-reduces gradients inside backward(): let it do so for the last micro-batch only."""
        if isinstance(self.forward, DistributedDataParallel) and not is_last:
            return self.forward.no_sync()
        return nullcontext()

    def _halve_micro_batch(self, images: int, reason: str) -> None:
        """Compute half as many images at once from now on. Raises MissingError if that is impossible."""
        ranks, what = self.placement.ranks, f"{self.placement.name} ran out of memory with"
        if self.micro_batch == 1:
            raise MissingError(
                f"{what} a single image: {reason}",
                "train on the CPU (--gpus none), or a narrower network (--set width=0.5)",
            )
        if ranks.size > 1:  # other ranks wait inside this step's all-reduce: it cannot be repeated
            smaller = f"try --micro-batch {self.micro_batch // 2}; the result does not change"
            hint = "use a smaller batch (-b), or --parallel data with --micro-batch" if ranks.columns else smaller
            raise MissingError(f"{what} {self.micro_batch} images at once: {reason}", hint)
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
        """Number of steps of the whole training; `plateau` may end it earlier."""
        return self.recipe.epochs * self.schedule.steps_per_epoch

    @property
    def first_step_of_epoch(self) -> int:
        """Number of steps before the current epoch."""
        return (self.epoch - 1) * self.schedule.steps_per_epoch

    @property
    def last_step_of_epoch(self) -> int:
        """Number of steps done at the end of the current epoch."""
        return self.epoch * self.schedule.steps_per_epoch

    @property
    def epochs_begun(self) -> int:
        """Number of epochs of which at least one step is done."""
        return -(-self.steps_done // self.schedule.steps_per_epoch)


def is_gpu_out_of_memory(error: RuntimeError, device: torch.device) -> bool:
    """Whether a GPU ran out of memory. cuBLAS and cuDNN raise a RuntimeError, known by its message."""
    return isinstance(error, torch.OutOfMemoryError) or (device.type == "cuda" and is_out_of_memory(error))


def compile_network(network: Network, device: torch.device, images: int) -> Callable[[Tensor], Tensor]:
    """A forward function of `network`, compiled with torch.compile at its first call for `images` at a time.

    It shares the network's parameters. Calling it raises MissingError if torch.compile fails.
    """
    from torch._dynamo.exc import TorchDynamoException  # importing the compiler takes a second

    torch.compiler.assume_constant_result(autocast_dtype)  # torch 2.11 cannot trace into it
    compiled: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False)
    cuda_graph: Callable[[Tensor], Tensor] | None = None
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, ResponseNorm):  # its loop over images would be unrolled
                module.function = torch.compiler.disable(module.function)
    elif images <= CUDA_GRAPH_IMAGES:
        cuda_graph = torch.compile(network, dynamic=False, mode="reduce-overhead")

    def forward(x: Tensor) -> Tensor:
        try:
            # A CUDA graph writes gradients to fixed memory: it cannot add to those of an earlier micro-batch.
            if cuda_graph is not None and network.fc8.bias.grad is None:
                torch.compiler.cudagraph_mark_step_begin()
                return cuda_graph(x)
            return compiled(x)
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise MissingError(f"--compile: torch.compile failed: {reason}", "train without --compile") from error

    return forward
