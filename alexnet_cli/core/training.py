"""A network in training: all that a step needs, and all that a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_cli.core import checkpoint, diagnosis, weights
from alexnet_cli.core.augment import Draws, Pixels
from alexnet_cli.core.cache import Where
from alexnet_cli.core.ddp import replicated, trainable
from alexnet_cli.core.evaluate import Evaluation, TorchClassifier, evaluate
from alexnet_cli.core.fine_tuning import FROZEN, Transfer, freeze
from alexnet_cli.core.gradient import Gradient, Sums
from alexnet_cli.core.learning import Momentum, Schedule
from alexnet_cli.core.loader import Batch, Loader, all_batches, steps_per_epoch
from alexnet_cli.core.network import Network, initialise, parameters_by_name
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.records import Tally
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import Dataset
from alexnet_cli.errors import VerificationError, WeightsError
from alexnet_cli.recipe import Recipe


@dataclass
class Training:
    """A network on its way: `step` steps are done, the last checkpoint is of step `saved`, and of the current
    `epoch` (from 1) `tally` holds the sums so far.
    """

    recipe: Recipe
    data: Dataset
    run: Run
    placement: Placement
    threads: int
    cache: Where = "auto"
    compile: bool = False
    transfer: Transfer | None = None
    micro_batch: int | None = None
    keep: int = 1
    compress: bool = False
    step: int = 0
    epoch: int = 1
    tally: Tally = field(default_factory=Tally)
    saved: int = 0

    def __post_init__(self) -> None:
        device, ranks = self.placement.device, self.placement.ranks
        self.rows = len(self.data.split("train"))
        self.batch = min(self.recipe.batch_size, self.rows)
        self.network = Network(self.recipe, len(self.data.classes), ranks.towers, ranks.columns)
        initialise(self.network)
        if self.transfer:
            self.transfer = self.transfer.applied(self.network)
        freeze(self.network, self.recipe)
        self.network.to(device)
        self.optimiser = Momentum(parameters_by_name(self.network), self.recipe)
        self.schedule = Schedule(self.recipe, steps_per_epoch(self.rows, self.recipe.batch_size))
        colours = self.data.mean_image(), self.data.colour_std, self.data.colour_axes
        self.pixels = Pixels(self.recipe, *colours, device, self.placement.dtype)
        self.share = -(-self.batch // ranks.replicas)  # of the rank with most: all plan with the same number
        piece = min(self.micro_batch or self.share, self.share)
        forward: Callable[[Tensor], Tensor] = self.network
        if self.compile:
            from alexnet_cli.core.compilation import compiled  # which imports the compiler, that few need

            forward = compiled(self.network, device, piece)
        self.gradient = Gradient(self.network, forward, self.pixels, self.placement, piece, self.batch)
        self.learning: list[str] = []  # the parameters that replicas exchange the gradients of
        self.checks_every_step = device.type == "cpu"  # a GPU would have to be waited for

    @property
    def steps(self) -> int:
        """How many steps the recipe takes, at most."""
        return self.recipe.epochs * self.schedule.steps_per_epoch

    @property
    def first_step_of_epoch(self) -> int:
        """The number of steps before the current epoch."""
        return (self.epoch - 1) * self.schedule.steps_per_epoch

    @property
    def last_step_of_epoch(self) -> int:
        """The number of steps at the end of the current epoch."""
        return self.epoch * self.schedule.steps_per_epoch

    @property
    def epochs_begun(self) -> int:
        """How many epochs have had a step."""
        return -(-self.step // self.schedule.steps_per_epoch)

    def begin_epoch(self) -> None:
        """Compute no gradient in this epoch for what does not learn in it: a frozen layer 1 costs its forward alone."""
        for name, parameter in parameters_by_name(self.network):
            if name.partition(".")[0] not in FROZEN[self.recipe.frozen]:
                parameter.requires_grad_(self.optimiser.learns(name, self.epoch))
        ranks = self.placement.ranks
        if ranks.group is not None and self.learning != (learning := trainable(self.network)):
            self.gradient.forward, self.learning = replicated(self.network, ranks, self.compress), learning

    def take_step(self, batch: Batch, draws: Draws) -> Sums:
        """One step of gradient descent.

        Raises:
            VerificationError: the loss is not a number; on a CPU, before the weights have learned from it.
        """
        with self.placement.ranks.together(f"step {self.step + 1}"):
            sums = self.gradient.compute(batch, draws, self.step, self.epoch)
        if self.checks_every_step and not bool(torch.isfinite(sums.loss)):
            where = diagnosis.outputs(self.gradient, batch, draws, self.step, self.epoch)
            raise self.broken(float(sums.loss), self.step + 1, where)
        self.optimiser.step(self.schedule.rate(self.step), self.epoch)
        self.step += 1
        return sums

    def check(self, loss: float, step: int) -> None:
        """Stop before a network that is no network any more is shown or saved; `loss` is that of `step`, from 1.

        Raises:
            VerificationError: the loss or a weight is not a number.
        """
        if fault := self.fault(loss, step):
            raise fault

    def fault(self, loss: float, step: int) -> VerificationError | None:
        """The same error, to be raised when everything else is said."""
        where = diagnosis.weights(self.network)
        return self.broken(loss, step, where) if where or not math.isfinite(loss) else None

    def broken(self, loss: float, step: int, where: str) -> VerificationError:
        """What to say when numbers have stopped being numbers, `where` being the first place."""
        last, first = self.run.checkpoints / "last", f", first in {where}" if where else ""
        saved, way_on, spoilt = "", "", diagnosis.spoilt(self.run.records(), len(self.data.classes))
        if last.exists() and spoilt:
            saved = f"the last checkpoint is no good either, {spoilt}; "
        elif last.exists():
            saved = f"last good checkpoint: {last.resolve()}; "
            way_on = f", or go on from there: alexnet train --resume {self.run.quoted}"
        hint = saved + diagnosis.remedy(self.optimiser, self.schedule, step, self.epoch, way_on, bool(spoilt))
        return VerificationError(f"the loss became {loss} at step {step:,} (epoch {self.epoch}){first}", hint)

    def validate(self, stop: Callable[[], str | None] = lambda: None) -> Evaluation | None:
        """The errors of the centre view over the validation split, or None if `stop()` gave a reason meanwhile."""
        split, ranks, size = self.data.split("val"), self.placement.ranks, self.gradient.piece
        classify = TorchClassifier(self.network, self.pixels, self.placement)
        counts = Evaluation.empty(len(self.data.classes))
        plan = [rows[ranks.share(len(rows))] for rows in all_batches(len(split), size * ranks.replicas)]
        with ranks.together("validating"), Loader(split, size, self.threads, self.placement.device) as loader:
            for _ in evaluate(classify, loader.batches(plan), counts):
                if stop():
                    return None
        return counts.sum_over_ranks(ranks.total)

    def save(self, metrics: dict[str, Any], best: bool) -> Path:
        """Write a checkpoint of this moment."""
        position = {
            "step": self.step, "epoch": self.epoch, "schedule": self.schedule.state(), "metrics": metrics,
            "tally": asdict(self.tally),
        }  # fmt: skip
        info = {
            "data": self.data.name, "data_hash": self.data.hash, "run": self.run.path.name,
            "epoch": self.epochs_begun, "step": self.step, "metrics": metrics,
            "exif_rotate": self.data.record["image"].get("exif_rotate", False),
        }  # fmt: skip
        text = weights.metadata(self.recipe, self.data.classes, info)
        mean = torch.from_numpy(np.ascontiguousarray(self._mean(), dtype=np.float32))
        tensors, velocity = self.whole()
        path = None
        if self.placement.ranks.first:
            path = checkpoint.save(self.run, self.step, tensors, velocity, position, mean, text, best, self.keep)
        del tensors, velocity
        self.saved = self.step
        return Path(self.placement.ranks.broadcast(str(path), "saving"))

    def whole(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and velocity of the whole network, by name, on the CPU of rank 0; elsewhere what it lacks is sent."""
        ranks = self.placement.ranks
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        if ranks.collects:
            with ranks.together("collecting the network"):
                for name, parameter in parameters_by_name(self.network):
                    for whole, own in zip(found, (parameter, self.optimiser.velocity[name]), strict=True):
                        if (tensor := self.network.whole(name, own)) is not None:
                            whole[name] = tensor
        return found

    def restore(self, directory: Path) -> dict[str, Any]:
        """Go on from a checkpoint. Returns the metrics it was saved with."""
        saved = checkpoint.load(directory)
        checkpoint.restore(self.network, self.optimiser, saved)
        try:
            self.step, self.epoch = int(saved.position["step"]), int(saved.position["epoch"])
            self.schedule.restore(saved.position["schedule"])
            self.tally = Tally(**saved.position["tally"])
            metrics = dict(saved.position["metrics"])
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{directory} does not say where training was: {error}", checkpoint.DAMAGED) from error
        self.saved = self.step
        return metrics

    def _mean(self) -> Any:
        """What predictions subtract: the mean image, or the mean colour everywhere."""
        image = self.data.mean_image()
        return np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape) if self.recipe.mean == "rgb" else image
