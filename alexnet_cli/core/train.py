"""The loop (section 5): a generator of records. What it shows, and when it stops, is the caller's affair."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_cli.core import advice, filters
from alexnet_cli.core.augment import Draws
from alexnet_cli.core.baselines import count_images
from alexnet_cli.core.cache import Cache, remembering
from alexnet_cli.core.evaluate import Evaluation
from alexnet_cli.core.gradient import Sums
from alexnet_cli.core.loader import Loader, epoch_order, training_batches
from alexnet_cli.core.records import Record, Tally
from alexnet_cli.core.resume import EXIT_CODES
from alexnet_cli.core.runs import Run
from alexnet_cli.core.training import Training
from alexnet_cli.core.waiting import Waiting
from alexnet_cli.errors import VerificationError


def fit(
    training: Training,
    resume_from: Path | None = None,
    max_steps: int | None = None,
    record_every: int = 10,
    stop: Callable[[], str | None] = lambda: None,
    save_every: int = sys.maxsize,
) -> Iterator[Record]:
    """Train, yielding a record of each thing that happens; each is in the run's metrics.jsonl when it is yielded.

    Saves a checkpoint after each epoch and each `save_every` steps. Ends when the recipe says so, after `max_steps`
    steps, or when `stop()` gives a reason; in each case a checkpoint has been saved and the last record's reason is
    "finished", "max-steps" or the one given.

    Raises:
        VerificationError: the loss is not a number any more.
        StorageError: a checkpoint cannot be written; the one before is intact.
    """
    run, stop = training.run, training.placement.ranks.agreed(stop, list(EXIT_CODES))
    metrics = training.restore(resume_from) if resume_from else {}
    run.begin(training.recipe, training.step, training.epoch)
    yield _log(run, _start_record(training))
    for said in _advice(training):
        yield _log(run, said)
    reason, shown = None, None  # counts of the epoch with the lowest error
    train, size, device = training.data.split("train"), training.share, training.placement.device
    guessing = advice.Guessing.at(
        training.recipe, count_images(train.labels, len(training.data.classes)), training.steps
    )
    with Loader(train, size, training.threads, device) as decoding:
        loader = remembering(decoding, training.cache, training.placement.sharing)
        while reason is None and not _over(training):
            for record in _epoch(training, loader, (record_every, save_every), stop, max_steps):
                reason = record.reason
                if reason is None:
                    yield _log(run, record)
                if (remark := guessing.heed(record)) is not None:
                    yield _log(run, remark)
                if record.event == "step" and 0 == record.step % save_every < training.last_step_of_epoch - record.step:
                    yield _saved(training, metrics)
            if training.step < training.last_step_of_epoch or (counts := training.validate(stop)) is None:
                reason = reason or stop()
                break
            validation, best = _validation(training, counts)
            shown = counts if best else shown
            metrics = {key: validation[key] for key in ("top1_error", "top5_error", "loss")}
            yield _log(run, Record("validation", training.epoch, training.step, best=best, **validation))
            run.write_csv()
            training.epoch, training.tally = training.epoch + 1, Tally()
            yield _saved(training, metrics, best)
    if training.step > training.first_step_of_epoch and training.step != training.saved:
        yield _saved(training, metrics)
    lowest = training.schedule.best_error if training.schedule.best_error <= 1 else None
    end = Record(
        "end", training.epochs_begun, training.step, top1_error=lowest, path=str(run.path), reason=reason or "finished"
    )
    names = [name.name for name in training.data.classes]
    if shown and not reason and (remark := advice.one_sided(shown.confusion, names, end)):
        yield _log(run, remark)
    yield _log(run, end)


def _saved(training: Training, metrics: dict[str, Any], best: bool = False) -> Record:
    """Save a checkpoint, but not of a network that is broken."""
    training.check(training.tally.loss, training.step)
    path = training.save(metrics, best)
    return _log(training.run, Record("checkpoint", training.epochs_begun, training.step, path=str(path), best=best))


def _start_record(training: Training) -> Record:
    """Where training begins; `path` is the run's."""
    tensors = training.transfer.tensors() if training.transfer else {}
    recipe, data = training.recipe, training.data
    return Record(
        "start", training.epoch, training.step, data=str(data.path), recipe=recipe.name, classes=len(data.classes),
        epochs=recipe.epochs, steps_per_epoch=training.schedule.steps_per_epoch,
        path=str(training.run.path), loaded=tensors.get("loaded"), afresh=tensors.get("afresh"),
    )  # fmt: skip


def _advice(training: Training) -> Iterator[Record]:
    """What an expert would say before the first step."""
    if training.step == 0:
        transfer = training.transfer
        different = transfer.different(training.recipe) if transfer else None
        yield from advice.before(training.recipe, training.data, different)


def _over(training: Training) -> bool:
    return training.epoch > training.recipe.epochs or training.schedule.over


def _log(run: Run, record: Record) -> Record:
    run.log(record.as_dict())
    return record


def _epoch(
    training: Training,
    loader: Loader | Cache,
    every: tuple[int, int],
    stop: Callable[[], str | None],
    max_steps: int | None,
) -> Iterator[Record]:
    """Steps to the end of the epoch, with a record every so many steps; the last carries a reason to leave."""
    recipe, epoch = training.recipe, training.epoch
    training.begin_epoch()
    draws = Draws.of_epoch(training.rows, recipe, epoch, epoch_order(training.rows, recipe.seed, epoch))
    first = training.step - training.first_step_of_epoch
    ranks = training.placement.ranks
    plan = training_batches(training.rows, recipe.batch_size, recipe.seed, epoch, first, ranks.replica, ranks.replicas)
    batches = loader.batches(plan)
    recent, waiting = Tally(), Waiting(training.placement.device)
    pending: list[Sums] = []
    started = time.perf_counter()
    while True:
        with waiting:
            reason = stop() or ("max-steps" if max_steps is not None and training.step >= max_steps else None)
            batch = None if reason else next(batches, None)
        broken = None
        if batch is not None:
            piece = training.gradient.piece
            try:
                pending.append(training.take_step(batch, draws))
            except VerificationError as error:
                broken = error
            if training.gradient.piece < piece:
                yield _smaller_pieces(training)
        if broken and ranks.group is not None:  # other replicas may have had numbers, and would not add theirs up
            raise broken
        if pending and (batch is None or broken or any(training.step % n == 0 for n in every)):
            step = training.step - len(pending)
            broken = _settle(training, recent, pending, waiting, started) or broken
            if recent.images:
                yield _step_record(training, recent, step + recent.images // training.batch)
            started, recent = time.perf_counter(), Tally()
        if broken:
            raise broken
        if batch is None:
            if reason:
                yield Record("end", epoch, training.step, reason=reason)
            return


def _smaller_pieces(training: Training) -> Record:
    text = f"the GPU's memory is too small for the whole batch: computing {training.gradient.piece} images at a time"
    hint = f"the batch and the numbers stay; --micro-batch {training.gradient.piece} starts that way"
    return Record("warning", training.epoch, training.step, text=text, hint=hint)


def _settle(
    training: Training, recent: Tally, pending: list[Sums], waiting: Waiting, started: float
) -> VerificationError | None:
    """Bring the losses of the steps since the last record over from the device, up to one that is no number."""
    broken = None
    own = [[float(sums.loss), float(sums.errors), float(sums.top5_errors)] for sums in pending]
    for step, found in enumerate(training.placement.ranks.total(np.array(own)), training.step - len(pending) + 1):
        loss, errors, top5_errors = (float(value) for value in found)
        if not math.isfinite(loss):
            broken = training.fault(loss, step)
            break
        recent.add(Tally(training.batch, loss * training.batch, round(errors), round(top5_errors)))
    recent.seconds += time.perf_counter() - started
    recent.waited += waiting.taken()
    pending.clear()
    training.tally.add(recent)
    return broken


def _step_record(training: Training, recent: Tally, step: int) -> Record:
    return Record(
        "step", training.epoch, step, loss=recent.loss / recent.images,
        lr=training.schedule.rate(step - 1), top1_error=recent.errors / recent.images,
        top5_error=recent.top5_errors / recent.images,
        images_per_second=recent.rate, data_wait=recent.waited / recent.seconds,
    )  # fmt: skip


def _validation(training: Training, counts: Evaluation) -> tuple[dict[str, Any], bool]:
    """The fields of an epoch's validation record, and whether its error is the lowest so far."""
    rate, tally = training.schedule.rate(training.step - 1), training.tally
    training.check(counts.loss, training.step)
    best = training.schedule.observe(counts.top1_error)
    fields = {
        "loss": counts.loss, "top1_error": counts.top1_error, "top5_error": counts.top5_error, "lr": rate,
        "train_loss": tally.loss / tally.images, "train_top1_error": tally.errors / tally.images,
        "images_per_second": tally.rate,
    }  # fmt: skip
    return fields | _specialisation(training), best


def _specialisation(training: Training) -> dict[str, float]:
    """How far the towers' kernels differ in colour by now (section 6.1), for whoever writes the run."""
    ranks, network = training.placement.ranks, training.network
    if not ranks.collects:
        return {}
    with ranks.together("collecting layer 1"):
        weight = network.whole("conv1.weight", network.conv1.weight)
    return {} if weight is None else filters.summarize_epoch(weight.numpy(), training.recipe.towers)
