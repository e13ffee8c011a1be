"""The training loop (section 5): epochs, validation, checkpoints and records."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_cli import __version__
from alexnet_cli.core.analysis import filters
from alexnet_cli.core.data.loader import CachedLoader, CacheMode, Loader, all_batches, cache_decoded, training_batches
from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.evaluation.baselines import count_images, rank_network
from alexnet_cli.core.evaluation.evaluate import Evaluation, TorchClassifier, evaluate
from alexnet_cli.core.files import read_link
from alexnet_cli.core.model import model_file
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.records import Record, RunningMetrics
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.signals import EXIT_CODES
from alexnet_cli.core.training import checkpoint, diagnostics
from alexnet_cli.core.training.fine_tuning import Transfer
from alexnet_cli.core.training.trainer import NonFiniteLoss, StepMetrics, Trainer
from alexnet_cli.errors import DataError, VerificationError, WeightsError
from alexnet_cli.recipe import Recipe


class DataTimer:
    """Sums up the time spent in its `with` blocks, that is waiting for data; on a GPU, only while the GPU was idle.

    A GPU works through its queue while the host waits for the next batch. Each block puts two events into that queue;
    the time between them is the wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter() if self.device.type == "cpu" else self._record_event()

    def __exit__(self, *_: object) -> None:
        if isinstance(self._began, float):
            self._seconds += time.perf_counter() - self._began
        else:
            self._events.append((self._began, self._record_event()))

    def read(self) -> float:
        """Seconds of waiting since the last call. On a GPU, all queued work must be done."""
        milliseconds = float(sum(before.elapsed_time(after) for before, after in self._events))
        seconds = self._seconds + milliseconds / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds

    def _record_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def describe_training(command: Sequence[str], placement: Placement, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """Return what run.json holds of a new training besides its status."""
    packages = ("torch", "torchvision", "numpy", "simplejpeg")
    versions = {"alexnet": __version__, "python": sys.version.split()[0]}
    return {
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions | {name: version(name) for name in packages},
        "devices": list(placement.names) or [placement.name],
        "precision": placement.precision,
        "placement": {f"tower {i + 1}": ", ".join(placement.tower_devices(i)) for i in range(recipe.towers)},
        "replicas": placement.ranks.replicas,
        "data": data.name,
        "data_path": str(data.path.resolve()),
        "data_hash": data.hash,
        "seed": recipe.seed,
    }


def check_data(data: Dataset, run: Run | None) -> None:
    """Raise DataError if the data cannot be trained on, before a run is created."""
    if run and run.about.get("data_hash") != data.hash:
        own_data = f"its data set was {run.about.get('data_path')}"
        raise DataError(
            f"run {run.path.name} was not trained on {data.path}", f"{own_data}; give that, or start a new run"
        )
    for split in ("train", "val"):
        if not len(data.split(split)):
            hint = "prepare it again with --overwrite --val-fraction 0.1"
            if max(Counter(data.split("train").labels.tolist()).values(), default=0) < 2:
                hint = "prepare it again with --overwrite and at least two images per class, one for validation"
            raise DataError(f"{data.path}: split {split} has no images", hint)
    data.mean_image()  # raises DataError if it is damaged


def open_run(
    run: Run | None,
    name: str | None,
    recipe: Recipe,
    placement: Placement,
    data: Dataset,
    transfer: Transfer | None,
    saved_options: dict[str, Any],
    command: Sequence[str],
) -> Run:
    """The resumed run, or a new one created by rank 0. Writes the description of this training to run.json."""
    about, ranks = describe_training(command, placement, data, recipe), placement.ranks
    if run:
        run.update({"resumed": [*run.about.get("resumed", []), about], **saved_options})
        return run
    origin = {"init_from": transfer.about()} if transfer else {}
    created = Run.create(name, recipe, about | origin | saved_options) if ranks.is_main else None
    return Run(Path(ranks.broadcast(str(created.path) if created else "", "creating the run")), writes=ranks.is_main)


@dataclass
class TrainingLoop:
    """Trains, validates and saves one run. `keep` is the number of newest checkpoints to keep."""

    trainer: Trainer
    data: Dataset
    run: Run
    threads: int = 1
    cache: CacheMode = "auto"
    keep: int = 1
    transfer: Transfer | None = None
    epoch_metrics: RunningMetrics = field(default_factory=RunningMetrics)
    """Sums over the current epoch so far."""
    first_step: int = 0
    """Steps that were done before: 0, or those of the checkpoint that it resumes from."""
    saved_step: int = 0
    best: tuple[float, float] | None = None
    """Top-1 error and loss of the best epoch, as `rank_network` orders them."""

    @property
    def is_fine_tuning(self) -> bool:
        """Whether the run started from trained weights."""
        return self.transfer is not None or bool(self.run.about.get("init_from"))

    def fit(
        self,
        resume_from: Path | None = None,
        max_steps: int | None = None,
        record_every: int = 10,
        stop: Callable[[], str | None] = lambda: None,
        save_every: int = sys.maxsize,
    ) -> Iterator[Record]:
        """Train, and yield a record of each event when it has been written to metrics.jsonl.

        Saves a checkpoint after each epoch and each `save_every` steps. Ends with the last epoch ("finished"), after
        `max_steps` steps ("max-steps"), or when `stop()` returns a reason; the last record has that reason, and a
        checkpoint has been saved by then.

        Raises:
            VerificationError: the loss is NaN or infinite.
            StorageError: a checkpoint cannot be written; the one before is intact.
        """
        trainer, recipe = self.trainer, self.trainer.recipe
        stop = trainer.placement.ranks.agree_on_stop(stop, list(EXIT_CODES))
        metrics = self.restore(resume_from) if resume_from else {}
        self.first_step, is_fine_tuning = trainer.steps_done, self.is_fine_tuning
        self.run.begin(recipe, trainer.steps_done, trainer.epoch)
        if trainer.steps_done == 0:
            self._keep_filters(0)
        yield from self._log_start()
        split = self.data.split("train")
        class_counts = count_images(split.labels, len(self.data.classes))
        plateau = diagnostics.LossPlateauCheck.for_training(recipe, class_counts, trainer.total_steps, is_fine_tuning)
        reason, best_evaluation = None, None
        with Loader(split, trainer.rank_images, self.threads, trainer.placement.device) as decoder:
            loader = cache_decoded(decoder, self.cache, trainer.placement.processes_per_device)
            while reason is None and trainer.epoch <= recipe.epochs and not trainer.schedule.is_finished:
                for record in self._train_epoch(loader, record_every, save_every, stop, max_steps):
                    reason = record.reason
                    if reason is None:
                        yield self._log(record)
                    if warning := plateau.update(record):
                        yield self._log(warning)
                    is_due = record.event == "step" and record.step % save_every == 0
                    if is_due and record.step < trainer.last_step_of_epoch:
                        yield self._save(metrics)
                is_complete = trainer.steps_done == trainer.last_step_of_epoch
                evaluation = self.validate(stop) if is_complete else None
                if evaluation is None:
                    reason = reason or stop()
                    break
                fields, is_best = self._summarize_epoch(evaluation)
                best_evaluation = evaluation if is_best else best_evaluation
                metrics = {key: fields[key] for key in ("top1_error", "top5_error", "loss")}
                yield self._log(Record("validation", trainer.epoch, trainer.steps_done, best=is_best, **fields))
                self.run.write_csv()
                trainer.epoch, self.epoch_metrics = trainer.epoch + 1, RunningMetrics()
                yield self._save(metrics, is_best)
        if trainer.steps_done > trainer.first_step_of_epoch and trainer.steps_done != self.saved_step:
            yield self._save(metrics)
        yield from self._log_end(reason, best_evaluation)

    def _log_start(self) -> Iterator[Record]:
        """Log the start record and, in a new training, warnings about recipe and data."""
        trainer, data = self.trainer, self.data
        parameters: dict[str, Any] = self.transfer.parameters() if self.transfer else {}
        yield self._log(
            Record(
                "start", trainer.epoch, trainer.steps_done, data=str(data.path), recipe=trainer.recipe.name,
                classes=len(data.classes), epochs=trainer.recipe.epochs,
                steps_per_epoch=trainer.schedule.steps_per_epoch, path=str(self.run.path), **parameters,
            )
        )  # fmt: skip
        if trainer.steps_done == 0:
            differences = self.transfer.compare_recipe(trainer.recipe) if self.transfer else None
            for warning in diagnostics.check_settings(trainer.recipe, data, differences):
                yield self._log(warning)

    def _log_end(self, reason: str | None, best: Evaluation | None) -> Iterator[Record]:
        """Log the end record, after a warning if the `best` network gives nearly the same answer for every image."""
        trainer = self.trainer
        end = Record(
            "end", trainer.epochs_begun, trainer.steps_done, top1_error=self.best[0] if self.best else None,
            path=str(self.run.path), reason=reason or "finished",
        )  # fmt: skip
        names = [name.name for name in self.data.classes]
        if best and not reason and (warning := diagnostics.check_one_sided(best.confusion, names, end)):
            yield self._log(warning)
        yield self._log(end)

    def _train_epoch(
        self,
        loader: Loader | CachedLoader,
        record_every: int,
        save_every: int,
        stop: Callable[[], str | None],
        max_steps: int | None,
    ) -> Iterator[Record]:
        """Train to the end of the epoch; the last record has a reason if training must stop before."""
        trainer, recipe, ranks = self.trainer, self.trainer.recipe, self.trainer.placement.ranks
        trainer.begin_epoch()
        first = trainer.steps_done - trainer.first_step_of_epoch
        plan = training_batches(
            trainer.train_images, recipe.batch_size, recipe.seed, trainer.epoch, first, ranks.replica, ranks.replicas
        )
        batches = loader.batches(plan)
        timer, started = DataTimer(trainer.placement.device), time.perf_counter()
        pending: list[StepMetrics] = []  # steps whose losses are still on the device
        while True:
            with timer:
                reason = stop()
                if reason is None and max_steps is not None and trainer.steps_done >= max_steps:
                    reason = "max-steps"
                batch = None if reason else next(batches, None)
            error: VerificationError | None = None
            if batch is not None:
                micro_batch = trainer.micro_batch
                try:
                    pending.append(trainer.step(batch))
                except NonFiniteLoss as nonfinite:
                    layer = diagnostics.find_nonfinite_output(trainer, batch)
                    error = self.nonfinite_error(nonfinite.loss, trainer.steps_done + 1, layer)
                    if ranks.group is not None:  # replicas with a finite loss would wait for this one
                        raise error from nonfinite
                if trainer.micro_batch < micro_batch:
                    yield self._micro_batch_warning()
            is_due = any(trainer.steps_done % every == 0 for every in (record_every, save_every))
            if pending and (batch is None or error or is_due):
                step = trainer.steps_done - len(pending)
                recent, late_error = self._collect(pending)
                error = late_error or error
                recent.seconds, recent.waited = time.perf_counter() - started, timer.read()
                self.epoch_metrics.add(recent)
                if recent.images:
                    yield self._step_record(recent, step + recent.images // trainer.batch_size)
                started, pending = time.perf_counter(), []
            if error:
                raise error
            if batch is None:
                if reason:
                    yield Record("end", trainer.epoch, trainer.steps_done, reason=reason)
                return

    def _collect(self, pending: list[StepMetrics]) -> tuple[RunningMetrics, VerificationError | None]:
        """Sum the metrics of pending steps over all ranks, up to a loss that is not finite. Also returns its error."""
        trainer, recent = self.trainer, RunningMetrics()
        rank_metrics = [[float(m.loss), float(m.errors), float(m.top5_errors)] for m in pending]
        totals = trainer.placement.ranks.sum_over_replicas(np.array(rank_metrics))
        for step, total in enumerate(totals, trainer.steps_done - len(pending) + 1):
            loss, errors, top5_errors = (float(value) for value in total)
            if not math.isfinite(loss):
                where = diagnostics.find_nonfinite_weights(trainer.network)
                return recent, self.nonfinite_error(loss, step, where)
            size = trainer.batch_size
            recent.add(RunningMetrics(size, loss * size, round(errors), round(top5_errors)))
        return recent, None

    def validate(
        self, stop: Callable[[], str | None] = lambda: None, views: int = 1, split_name: str = "val"
    ) -> Evaluation | None:
        """Evaluate all images of a split, with the center view or ten. Returns None if `stop()` returned a reason."""
        placement, split, size = self.trainer.placement, self.data.split(split_name), self.trainer.micro_batch
        ranks = placement.ranks
        classify = TorchClassifier(self.trainer.network, self.trainer.augment, placement, views)
        evaluation = Evaluation.empty(len(self.data.classes))
        plan = [rows[ranks.batch_slice(len(rows))] for rows in all_batches(len(split), size * ranks.replicas)]
        with ranks.name_errors("validating"), Loader(split, size, self.threads, placement.device) as loader:
            for _ in evaluate(classify, loader.batches(plan), evaluation):
                if stop():
                    return None
        return evaluation.sum_over_ranks(ranks.sum_over_replicas)

    def save(self, metrics: dict[str, Any], best: bool) -> Path:
        """Write a checkpoint of the current state. Returns its folder."""
        trainer = self.trainer
        position = {
            "step": trainer.steps_done, "epoch": trainer.epoch, "schedule": trainer.schedule.state(),
            "metrics": metrics, "epoch_metrics": asdict(self.epoch_metrics), "best": self.best,
        }  # fmt: skip
        info = {
            "data": self.data.name, "data_hash": self.data.hash, "run": self.run.path.name,
            "epoch": trainer.epochs_begun, "step": trainer.steps_done, "metrics": metrics,
            "exif_rotate": self.data.record["image"].get("exif_rotate", False),
        }  # fmt: skip
        metadata = model_file.format_metadata(trainer.recipe, self.data.classes, info)
        mean = self.data.mean_image()
        if trainer.recipe.mean == "rgb":
            mean = np.broadcast_to(mean.mean((1, 2), keepdims=True), mean.shape)
        weights, velocity = trainer.gather_state()
        path = None
        if trainer.placement.ranks.is_main:
            tensors = {**weights, "mean": torch.from_numpy(np.ascontiguousarray(mean, dtype=np.float32))}
            path = checkpoint.save(self.run, trainer.steps_done, tensors, velocity, position, metadata, best, self.keep)
        self.saved_step = trainer.steps_done
        return Path(trainer.placement.ranks.broadcast(str(path), "saving"))

    def restore(self, directory: Path) -> dict[str, Any]:
        """Continue from a checkpoint. Returns the metrics saved with it."""
        trainer, saved = self.trainer, checkpoint.load(directory)
        checkpoint.restore(trainer.network, trainer.optimizer, saved)
        try:
            trainer.steps_done, trainer.epoch = int(saved.position["step"]), int(saved.position["epoch"])
            trainer.schedule.restore(saved.position["schedule"])
            self.epoch_metrics = RunningMetrics(**saved.position["epoch_metrics"])
            metrics = dict(saved.position["metrics"])
            if best := saved.position.get("best"):
                self.best = float(best[0]), float(best[1])
        except (LookupError, TypeError, ValueError) as error:
            what = f"{directory / checkpoint.META} has an invalid position: {error}"
            raise WeightsError(what, checkpoint.DAMAGED) from error
        self.saved_step = trainer.steps_done
        return metrics

    def nonfinite_error(self, loss: float, step: int, where: str) -> VerificationError:
        """The error for a loss that is NaN or infinite at `step` (from 1), caused by `where`."""
        trainer, last = self.trainer, read_link(self.run.checkpoints / "last")
        saved, resume = "", ""
        divergence = diagnostics.describe_divergence(self.run.records(), len(self.data.classes))
        if last and divergence:
            saved = f"the last checkpoint had already diverged ({divergence}); "
        elif last:
            saved = f"last good checkpoint: {last.resolve()}; "
            resume = f"alexnet train --resume {self.run.quoted}"
        rate = diagnostics.suggest_rate(
            trainer.optimizer, trainer.schedule, step, trainer.epoch, resume, bool(divergence)
        )
        place = f": {where} are not finite" if where else ""
        return VerificationError(
            f"the loss became {loss} at step {step:,} (epoch {trainer.epoch}){place}", saved + rate
        )

    def _check_finite(self, loss: float) -> None:
        """Raise VerificationError if the loss or a weight is NaN or infinite."""
        where = diagnostics.find_nonfinite_weights(self.trainer.network)
        if where or not math.isfinite(loss):
            raise self.nonfinite_error(loss, self.trainer.steps_done, where)

    def _log(self, record: Record) -> Record:
        self.run.log(record.as_dict())
        return record

    def _save(self, metrics: dict[str, Any], best: bool = False) -> Record:
        """Save a checkpoint and log it, unless the loss or a weight is NaN."""
        self._check_finite(self.epoch_metrics.loss)
        path = self.save(metrics, best)
        trainer = self.trainer
        return self._log(Record("checkpoint", trainer.epochs_begun, trainer.steps_done, path=str(path), best=best))

    def _micro_batch_warning(self) -> Record:
        size = self.trainer.micro_batch
        text = f"out of GPU memory: from now on, each batch is computed {size} images at a time"
        hint = f"the results do not change; next time, start with --micro-batch {size}"
        return Record("warning", self.trainer.epoch, self.trainer.steps_done, text=text, hint=hint)

    def _step_record(self, recent: RunningMetrics, step: int) -> Record:
        return Record(
            "step", self.trainer.epoch, step, loss=recent.loss / recent.images,
            lr=self.trainer.schedule.learning_rate(step - 1), top1_error=recent.errors / recent.images,
            top5_error=recent.top5_errors / recent.images,
            images_per_second=recent.images_per_second, data_wait=recent.waited / recent.seconds,
        )  # fmt: skip

    def _summarize_epoch(self, evaluation: Evaluation) -> tuple[dict[str, Any], bool]:
        """The fields of an epoch's validation record, and whether it is the best so far."""
        trainer, metrics = self.trainer, self.epoch_metrics
        rate = trainer.schedule.learning_rate(trainer.steps_done - 1)
        self._check_finite(evaluation.loss)
        trainer.schedule.observe(evaluation.top1_error)
        is_best = self._is_best(evaluation)
        fields = {
            "loss": evaluation.loss, "top1_error": evaluation.top1_error, "top5_error": evaluation.top5_error,
            "train_loss": metrics.loss / metrics.images, "train_top1_error": metrics.errors / metrics.images,
            "lr": rate, "images_per_second": metrics.images_per_second,
        }  # fmt: skip
        return fields | self._keep_filters(trainer.epoch), is_best

    def _is_best(self, evaluation: Evaluation) -> bool:
        """Whether an epoch is the best so far, which `best` then holds."""
        errors, images = (evaluation.top1_error, evaluation.loss), evaluation.images
        if self.best and rank_network(*errors, images) >= rank_network(*self.best, images):
            return False
        self.best = errors
        return True

    def _keep_filters(self, epoch: int) -> dict[str, float]:
        """Keep the first-layer filters after `epoch` in the run, before its checkpoint, so that no epoch is missing.

        Returns how strongly those of the towers differ in color (section 6.1); {} on most ranks.
        """
        ranks, network = self.trainer.placement.ranks, self.trainer.network
        if not ranks.is_collecting:
            return {}
        with ranks.name_errors("collecting layer 1"):
            weight = network.gather_whole("conv1.weight", network.conv1.weight)
        if weight is None:
            return {}
        self.run.keep_filters(epoch, weight.numpy())
        return filters.summarize_epoch(weight.numpy(), self.trainer.recipe.towers)
