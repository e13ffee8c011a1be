"""The loop (section 5): a generator of records. What it shows, and when it stops, is the caller's affair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_cli.core import checkpoint, weights
from alexnet_cli.core.augment import Draws, Pixels
from alexnet_cli.core.cache import Cache, Where, remembering
from alexnet_cli.core.evaluate import Evaluation, TorchClassifier, evaluate
from alexnet_cli.core.fine_tuning import Transfer, freeze
from alexnet_cli.core.gradient import Gradient, Sums
from alexnet_cli.core.learning import Momentum, Schedule
from alexnet_cli.core.loader import Batch, Loader, all_batches, epoch_order, steps_per_epoch, training_batches
from alexnet_cli.core.network import Network, initialise, parameters_by_name
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.records import Record, Tally
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import Dataset
from alexnet_cli.errors import VerificationError
from alexnet_cli.recipe import Recipe


@dataclass
class Training:
    """A network in training: everything a step needs, and everything a checkpoint keeps."""

    recipe: Recipe
    data: Dataset
    run: Run
    placement: Placement
    threads: int
    cache: Where = "auto"
    step: int = 0
    epoch: int = 1
    tally: Tally = field(default_factory=Tally)
    transfer: Transfer | None = None
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        device = self.placement.device
        self.rows = len(self.data.split("train"))
        self.network = Network(self.recipe, len(self.data.classes))
        initialise(self.network)
        if self.transfer:
            self.transfer.apply(self.network)
        freeze(self.network, self.recipe)
        self.network.to(device)
        self.optimiser = Momentum(parameters_by_name(self.network), self.recipe)
        self.schedule = Schedule(self.recipe, steps_per_epoch(self.rows, self.recipe.batch_size))
        self.pixels = Pixels(self.recipe, self.data.mean_image(), self.data.colour_std, self.data.colour_axes, device)
        piece = min(self.micro_batch or self.recipe.batch_size, self.recipe.batch_size)
        self.gradient = Gradient(self.network, self.pixels, self.placement, piece)

    @property
    def first_step_of_epoch(self) -> int:
        """The number of steps before the current epoch."""
        return (self.epoch - 1) * self.schedule.steps_per_epoch

    @property
    def epochs_begun(self) -> int:
        """How many epochs have had a step."""
        return -(-self.step // self.schedule.steps_per_epoch)

    def take_step(self, batch: Batch, draws: Draws) -> Sums:
        """One step of gradient descent."""
        sums = self.gradient.compute(batch, draws, self.step, self.epoch)
        self.optimiser.step(self.schedule.rate(self.step), self.epoch)
        self.step += 1
        return sums

    def validate(self) -> Evaluation:
        """The errors of the centre view over the validation split."""
        split, size = self.data.split("val"), self.gradient.piece
        classify = TorchClassifier(self.network, self.pixels, self.placement)
        counts = Evaluation.empty(len(self.data.classes))
        with Loader(split, size, self.threads) as loader:
            for _ in evaluate(classify, loader.batches(all_batches(len(split), size)), counts):
                pass
        return counts

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
        return checkpoint.save(self.run, self.step, self.network, self.optimiser, position, mean, text, best)

    def restore(self, directory: Path) -> dict[str, Any]:
        """Go on from a checkpoint. Returns the metrics it was saved with."""
        saved = checkpoint.load(directory)
        checkpoint.restore(self.network, self.optimiser, saved)
        self.step, self.epoch = int(saved.position["step"]), int(saved.position["epoch"])
        self.schedule.restore(saved.position["schedule"])
        self.tally = Tally(**saved.position["tally"])
        return dict(saved.position["metrics"])

    def _mean(self) -> Any:
        """What predictions subtract: the mean image, or the mean colour everywhere."""
        image = self.data.mean_image()
        return np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape) if self.recipe.mean == "rgb" else image


def fit(
    training: Training,
    resume_from: Path | None = None,
    max_steps: int | None = None,
    record_every: int = 10,
    stop: Callable[[], str | None] = lambda: None,
) -> Iterator[Record]:
    """Train, yielding a record of each thing that happens; each is in the run's metrics.jsonl when it is yielded.

    Ends when the recipe says so, after `max_steps` steps, or when `stop()` gives a reason; in each case a checkpoint
    has been saved and the last record's reason is "finished", "max-steps" or the one given.

    Raises:
        VerificationError: the loss is not a number any more.
        StorageError: a checkpoint cannot be written; the one before is intact.
    """
    run = training.run
    metrics = training.restore(resume_from) if resume_from else {}
    run.begin(training.recipe, training.step)
    yield _log(run, _start_record(training))
    reason = None
    train, size, device = training.data.split("train"), training.recipe.batch_size, training.placement.device
    with Loader(train, size, training.threads, device) as decoding:
        loader = remembering(decoding, training.cache)
        while reason is None and not _over(training):
            for record in _epoch(training, loader, record_every, stop, max_steps):
                reason = record.reason
                if reason is None:
                    yield _log(run, record)
            if reason is not None and training.step < training.epoch * training.schedule.steps_per_epoch:
                break
            validation, best = _validation(training)
            metrics = {key: validation[key] for key in ("top1_error", "top5_error", "loss")}
            yield _log(run, Record("validation", training.epoch, training.step, best=best, **validation))
            run.write_csv()
            training.epoch, training.tally = training.epoch + 1, Tally()
            path = training.save(metrics, best)
            yield _log(run, Record("checkpoint", training.epoch - 1, training.step, path=str(path), best=best))
    if reason is not None and training.step > training.first_step_of_epoch:
        _check_finite(training, training.tally.loss)
        path = training.save(metrics, best=False)
        yield _log(run, Record("checkpoint", training.epoch, training.step, path=str(path), best=False))
    reason = reason or "finished"
    yield _log(run, Record("end", training.epochs_begun, training.step, path=str(run.path), reason=reason))


def _start_record(training: Training) -> Record:
    """Where training begins; `path` is the run's."""
    tensors = training.transfer.tensors() if training.transfer else {}
    return Record(
        "start", training.epoch, training.step, steps_per_epoch=training.schedule.steps_per_epoch,
        path=str(training.run.path), loaded=tensors.get("loaded"), afresh=tensors.get("afresh"),
    )  # fmt: skip


def _over(training: Training) -> bool:
    return training.epoch > training.recipe.epochs or training.schedule.over


def _log(run: Run, record: Record) -> Record:
    run.log(record.as_dict())
    return record


def _epoch(
    training: Training,
    loader: Loader | Cache,
    record_every: int,
    stop: Callable[[], str | None],
    max_steps: int | None,
) -> Iterator[Record]:
    """Steps to the end of the epoch; the last record carries a reason if it was left early."""
    recipe, epoch = training.recipe, training.epoch
    draws = Draws.of_epoch(training.rows, recipe, epoch, epoch_order(training.rows, recipe.seed, epoch))
    first = training.step - training.first_step_of_epoch
    batches = loader.batches(training_batches(training.rows, recipe.batch_size, recipe.seed, epoch, first))
    recent = Tally()
    pending: list[tuple[Sums, int]] = []
    started = time.perf_counter()
    while True:
        waiting = time.perf_counter()
        reason = stop() or ("max-steps" if max_steps is not None and training.step >= max_steps else None)
        batch = None if reason else next(batches, None)
        recent.waited += time.perf_counter() - waiting
        if batch is not None:
            piece = training.gradient.piece
            pending.append((training.take_step(batch, draws), len(batch.rows)))
            if training.gradient.piece < piece:
                yield _smaller_pieces(training)
        if pending and (batch is None or training.step % record_every == 0):
            _settle(training, recent, pending, started)
            yield _step_record(training, recent)
            started, recent = time.perf_counter(), Tally()
        if batch is None:
            if reason:
                yield Record("end", epoch, training.step, reason=reason)
            return


def _smaller_pieces(training: Training) -> Record:
    text = f"the GPU's memory is too small for the whole batch: computing {training.gradient.piece} images at a time"
    hint = f"the batch and the numbers stay; --micro-batch {training.gradient.piece} starts that way"
    return Record("warning", training.epoch, training.step, text=text, hint=hint)


def _settle(training: Training, recent: Tally, pending: list[tuple[Sums, int]], started: float) -> None:
    """Bring the losses of the steps since the last record over from the device, and check them."""
    for sums, images in pending:
        loss, errors, top5_errors = float(sums.loss), int(sums.errors), int(sums.top5_errors)
        recent.add(Tally(images, loss * images, errors, top5_errors))
    recent.seconds += time.perf_counter() - started
    pending.clear()
    training.tally.add(recent)
    if not math.isfinite(recent.loss):
        _check_finite(training, recent.loss)


def _check_finite(training: Training, loss: float) -> None:
    """Stop before a network that is no network any more is shown or saved."""
    broken = [name for name, p in parameters_by_name(training.network) if not bool(torch.isfinite(p).all())]
    if math.isfinite(loss) and not broken:
        return
    last = training.run.checkpoints / "last"
    raise VerificationError(
        f"the loss became {loss} at step {training.step:,} (epoch {training.epoch})"
        + (f", first in {broken[0]}" if broken else ""),
        (f"last good checkpoint: {last.resolve()}; " if last.exists() else "")
        + f"train with a lower rate than {training.recipe.learning_rate:g} (--lr)",
    )


def _step_record(training: Training, recent: Tally) -> Record:
    return Record(
        "step", training.epoch, training.step, loss=recent.loss / recent.images,
        lr=training.schedule.rate(training.step - 1), top1_error=recent.errors / recent.images,
        top5_error=recent.top5_errors / recent.images,
        images_per_second=recent.rate, data_wait=recent.waited / recent.seconds,
    )  # fmt: skip


def _validation(training: Training) -> tuple[dict[str, Any], bool]:
    """The fields of an epoch's validation record, and whether its error is the lowest so far."""
    rate, tally = training.schedule.rate(training.step - 1), training.tally
    counts = training.validate()
    _check_finite(training, counts.loss)
    best = training.schedule.observe(counts.top1_error)
    fields = {
        "loss": counts.loss, "top1_error": counts.top1_error, "top5_error": counts.top5_error, "lr": rate,
        "train_loss": tally.loss / tally.images, "train_top1_error": tally.errors / tally.images,
        "images_per_second": tally.rate,
    }  # fmt: skip
    return fields, best
