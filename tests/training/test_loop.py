"""The training loop: learning, reproducibility, resuming, errors and the data timer."""

from __future__ import annotations

import csv
import errno
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alexnet_cli
from alexnet_cli.core.analysis import filters
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.model import model_file
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.report.history import read_history
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.resolve import find_weights
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import checkpoint, diagnostics
from alexnet_cli.core.training.loop import DataTimer, TrainingLoop
from alexnet_cli.core.training.optim import PaperSGD, Schedule
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.errors import StorageError, VerificationError, WeightsError
from alexnet_cli.recipe import FAST, KRIZHEVSKY, PAPER, TINY, Recipe
from trainings import new_loop

CPU = Placement(torch.device("cpu"), "CPU", "fp32")
SMALL = replace(TINY, width=1 / 16, batch_size=16, epochs=2, precision="fp32")
Start = Callable[..., TrainingLoop]
NAMES = iter(f"run{i}" for i in range(1000))


@pytest.fixture
def start(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))

    def start(recipe: Recipe = SMALL, run: Run | None = None) -> TrainingLoop:
        run = run or Run.create(next(NAMES), recipe, {})
        return new_loop(recipe, open_dataset(prepared), run, CPU, threads=1)

    return start


def final(training: TrainingLoop) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in training.trainer.network.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_four_colors(start: Start) -> None:
    training = start(replace(SMALL, epochs=14, learning_rate=0.03))
    records = list(training.fit())
    validation = [r for r in records if r.event == "validation"]
    assert validation[-1].top1_error is not None
    assert validation[-1].top1_error <= 0.1
    first = next(r for r in records if r.event == "step")
    assert first.loss is not None
    assert validation[-1].train_loss is not None
    assert validation[-1].train_loss < first.loss / 1.5


def test_ten_views_are_those_of_the_plain_network(start: Start) -> None:
    """The mean of ten softmaxes, as `AlexNet.preprocess` documents it."""
    training = start()
    list(training.fit())
    network = alexnet_cli.load(training.run.path)
    split = training.data.split("val")
    views = network.preprocess([split.jpeg(row) for row in range(len(split))], views=10)
    with torch.inference_mode():
        probabilities = network(views).softmax(1).unflatten(0, (-1, 10)).mean(1)
    expected = -probabilities[range(len(split)), split.labels].log().mean()
    evaluation = training.validate(views=10)
    assert evaluation is not None
    assert evaluation.loss == pytest.approx(float(expected), rel=1e-4)


def test_records_and_metrics_csv(start: Start) -> None:
    training = start()
    records = list(training.fit(record_every=2))
    assert [r.event for r in records] == (
        ["start", "warning", "warning", *["step", "step", "validation", "checkpoint"] * 2, "end"]
    )  # 48 images, batches of 16: three steps an epoch, a record at every second and at the end
    assert [r.step for r in records if r.event == "step"] == [2, 3, 4, 6]
    assert records[-1].reason == "finished"
    assert repr(records[-1]).startswith("Record(event='end', epoch=2, step=6, top1_error=")
    assert "None" not in repr(records[-1])
    assert training.run.records() == [r.as_dict() for r in records]
    rows = (training.run.path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("epoch,step,lr")


def test_each_epoch_records_the_specialization_of_the_towers(start: Start) -> None:
    training = start()
    told = [record for record in training.fit() if record.event == "validation"]
    weight = training.trainer.network.conv1.weight.detach().numpy()
    found = filters.measure_specialization(filters.split_towers(weight, 2))
    assert told[-1].specialization == found.auc
    assert (told[-1].chroma_tower1, told[-1].chroma_tower2) == pytest.approx(found.means)
    assert told[0].chroma_tower1 != told[1].chroma_tower1
    with (training.run.path / "metrics.csv").open(newline="") as file:
        assert [float(row["specialization"]) for row in csv.DictReader(file)] == [r.specialization for r in told]


def test_the_filters_of_each_epoch_are_kept(start: Start) -> None:
    """They are those of the checkpoints, and those before the first step."""
    training = start()
    training.keep = 5
    first = training.trainer.network.conv1.weight.detach().numpy().copy()
    records = [record for record in training.fit() if record.event == "validation"]
    kept = {epoch: np.load(path) for epoch, path in training.run.kept_filters.items()}
    assert list(kept) == [0, 1, 2]
    assert (kept[0] == first).all()
    for record in records:
        saved = model_file.read_model(training.run.checkpoints / f"{record.step:08}" / "model.safetensors")
        assert (kept[record.epoch] == saved.tensors["conv1.weight"]).all()
        assert filters.summarize_epoch(kept[record.epoch], 2)["specialization"] == record.specialization


def test_a_resumed_run_keeps_the_filters_of_each_epoch_once(start: Start) -> None:
    """Also if it was killed before the checkpoint of an epoch."""
    whole = start()
    list(whole.fit())
    training = start()
    for record in training.fit():
        if record.event == "validation" and record.epoch == 2:
            break  # as kill -9 there
    assert list(training.run.kept_filters) == [0, 1, 2]
    (training.run.path / "conv1" / ".0002.npy.1.tmp.npy").touch()
    last = (training.run.checkpoints / "last").resolve()
    training = start(SMALL, Run(training.run.path))
    records = training.fit(last)
    next(records)
    assert [path.name for path in sorted((training.run.path / "conv1").iterdir())] == ["0000.npy", "0001.npy"]
    list(records)
    expected, found = whole.run.kept_filters, training.run.kept_filters
    assert list(found) == list(expected) == [0, 1, 2]
    for epoch, path in found.items():
        assert path.read_bytes() == expected[epoch].read_bytes()


def test_a_disk_too_full_for_the_filters_does_not_stop_the_training(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, _: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", fail)
    training = start(replace(SMALL, epochs=1))
    assert list(training.fit())[-1].reason == "finished"
    assert training.run.kept_filters == {}
    assert list((training.run.path / "conv1").iterdir()) == []


def test_the_caller_can_take_records_and_leave(start: Start) -> None:
    events = [r.event for r in islice(start().fit(record_every=1), 5)]
    assert events == ["start", "warning", "warning", "step", "step"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(start: Start) -> None:
    trainings = [start(replace(SMALL, seed=seed, epochs=1)) for seed in (4, 4, 5)]
    for training in trainings:
        list(training.fit())
    a, b, other = map(final, trainings)
    assert same(a, b)
    assert not same(a, other)


@pytest.mark.parametrize("recipe", [SMALL, replace(PAPER, width=1 / 16, batch_size=16, epochs=3, conv345_std=0.1)])
def test_a_resumed_run_ends_with_the_same_weights(start: Start, recipe: Recipe) -> None:
    whole = start(recipe)
    list(whole.fit())
    training, resume, ends = start(recipe), None, []
    for stop_at in (1, 3, 4, 100):  # inside an epoch, between two, at the first step of one, never
        trainer = training.trainer

        def stop(trainer: Trainer = trainer, stop_at: int = stop_at) -> str | None:
            return "Ctrl-C" if trainer.steps_done >= stop_at else None

        records = list(training.fit(resume, stop=stop))
        ends.append(records[-1].reason)
        if stop_at != 100:
            resume = (training.run.checkpoints / "last").resolve()
            training = start(recipe, Run(training.run.path))
    assert ends == ["Ctrl-C", "Ctrl-C", "Ctrl-C", "finished"]
    assert same(final(whole), final(training))
    fields = ("step", "top1_error", "loss", "train_loss", "train_top1_error", "lr")
    one, other = (
        [[r[f] for f in fields] for r in t.run.records() if r["event"] == "validation"] for t in (whole, training)
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_max_steps_ends_with_a_checkpoint(start: Start) -> None:
    training = start()
    records = list(training.fit(max_steps=4))
    assert (records[-1].event, records[-1].reason, training.trainer.steps_done) == ("end", "max-steps", 4)
    saved = model_file.read_model(find_weights(str(training.run.path / "checkpoints" / "last")))
    assert saved.info["step"] == 4
    torch.testing.assert_close(torch.from_numpy(saved.tensors["fc8.bias"]), final(training)["fc8.bias"])


def test_plateau_ends_training_by_itself(start: Start) -> None:
    recipe = replace(
        PAPER, width=1 / 16, batch_size=48, epochs=50, learning_rate=1e-7, plateau_epochs=1, plateau_drops=1
    )
    records = list(start(recipe).fit())
    rates = [r.lr for r in records if r.event == "validation"]
    assert len(rates) < 10
    assert rates[0] == pytest.approx(1e-7)
    assert rates[-1] == pytest.approx(1e-8)
    assert records[-1].reason == "finished"


def test_a_nan_loss_stops_training(start: Start) -> None:
    training = start(replace(SMALL, learning_rate=1e12, epochs=5))
    with pytest.raises(VerificationError, match=r"loss became (nan|inf) at step \d+") as caught:
        list(training.fit())
    assert caught.value.hint == "the learning rate was 4e+10; train again with --set learning_rate=0.03"


def test_a_diverged_checkpoint_is_not_called_good(start: Start) -> None:
    training = start(replace(SMALL, epochs=5))
    list(training.fit(max_steps=training.trainer.schedule.steps_per_epoch))
    assert diagnostics.describe_divergence(training.run.records(), 4) == ""
    training.run.log({"event": "validation", "epoch": 1, "step": training.trainer.steps_done, "loss": 58.5})
    error = training.nonfinite_error(math.nan, training.trainer.steps_done + 1, "")
    told = "the last checkpoint had already diverged (validation loss 58.5, guessing 1.39); train again with"
    assert error.hint.startswith(told)
    assert "--resume" not in error.hint
    assert error.hint.endswith("--set learning_rate=0.03"), "what it learned with since is not to blame"


@pytest.mark.parametrize(
    ("recipe", "step", "told"),
    [
        (
            replace(TINY, epochs=10),
            3,
            "the learning rate was 0.0015; train again with --set learning_rate=0.000151",
        ),  # rising
        (replace(TINY, epochs=10), 30, "the learning rate was 0.028; train again with --set learning_rate=0.003"),
        (
            replace(TINY, learning_rate=0.3),
            20,
            "the learning rate was 0.27; train again with --set learning_rate=0.0272",
        ),
        (replace(TINY, learning_rate=9.0), 90, "the learning rate was 4.3; train again with --set learning_rate=0.03"),
        (
            replace(FAST, learning_rate=9.0, name="my"),
            90,
            "the learning rate was 8.4; train again with --set learning_rate=",
        ),
        (KRIZHEVSKY, 260, "the learning rate was 0.001 (0.02 for biases); train again with --set learning_rate=0.001"),
        (PAPER, 1, "no weight was updated yet"),
        (replace(PAPER, learning_rate=0.0), 9, "no weight was updated yet"),
    ],
)
def test_the_hint_names_the_current_rate(recipe: Recipe, step: int, told: str) -> None:
    schedule, optimizer = Schedule(recipe, 10), PaperSGD([("fc8.bias", torch.zeros(1))], recipe)
    assert diagnostics.suggest_rate(optimizer, schedule, step, -(-step // 10), "").startswith(told)
    going_on = diagnostics.suggest_rate(optimizer, schedule, step, -(-step // 10), "R")
    assert (", or continue: R --set learning_rate=" in going_on) == ("train again" in told)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_steps_before_a_loss_that_is_no_number_are_recorded(start: Start, at_once: bool) -> None:
    """Whether it is seen at once, as on a CPU, or at the next record: those up to it, and no other."""
    trainings = [start(replace(SMALL, learning_rate=1e12, batch_size=4)) for _ in range(2)]
    trainings[0].trainer.checks_every_step = trainings[1].trainer.checks_every_step = at_once
    for training, every in zip(trainings, (1, 10), strict=True):
        with pytest.raises(VerificationError) as caught:
            list(training.fit(record_every=every))
    bad = int(re.findall(r"at step (\d+)", caught.value.what)[0])
    single, together = ([r for r in t.run.records() if r["event"] == "step"] for t in trainings)
    assert [r["step"] for r in single] == list(range(1, bad))
    assert [r["step"] for r in together] == [bad - 1]
    assert together[0]["loss"] == pytest.approx(np.mean([r["loss"] for r in single]))
    assert together[0]["lr"] == single[-1]["lr"]


@pytest.mark.parametrize(("layer", "left_out"), [("conv3", ()), ("fc7", ("conv3",)), ("fc8", ())])
def test_the_layer_that_overflows_is_named_and_nothing_learns_from_it(start: Start, layer: str, left_out: Any) -> None:
    """At the eighth step, the second of its epoch; the weights that make it overflow are numbers themselves."""
    training = start(replace(SMALL, dropout=0.5, epochs=4, left_out_layers=left_out))
    records = training.fit(max_steps=7)
    list(records)
    with torch.no_grad():
        training.trainer.network.get_submodule(layer).get_parameter("weight").fill_(1e38)
    before = final(training)
    with pytest.raises(VerificationError) as caught:
        list(training.fit())
    assert re.match(
        rf"the loss became (inf|nan) at step 8 \(epoch 3\): the outputs of {layer} are not finite$", caught.value.what
    )
    assert f"last good checkpoint: {(training.run.checkpoints / 'last').resolve()}; " in caught.value.hint
    assert same(before, final(training))
    assert checkpoint.find_newest(training.run)[0] == (training.run.checkpoints / "last").resolve()


def test_a_gradient_that_overflows_is_named_by_its_layer(start: Start) -> None:
    training = start()
    list(training.fit(max_steps=1))
    with torch.no_grad():
        for layer in ("conv1", "conv2", "conv3"):
            training.trainer.network.get_submodule(layer).get_parameter("bias").fill_(math.nan)
    with pytest.raises(VerificationError, match=r"at step 2 \(epoch 1\): the weights of conv3 are not finite"):
        list(training.fit())


def test_a_late_check_still_names_the_first_bad_step(
    start: Start,
) -> None:
    """As on a GPU, which is not waited for at every step."""
    told = []
    for at_once in (True, False):
        training = start(replace(SMALL, learning_rate=1e12, batch_size=4))
        training.trainer.checks_every_step = at_once
        with pytest.raises(VerificationError) as caught:
            list(training.fit())
        told.append(caught.value.what)
        steps = training.trainer.steps_done
    assert steps == 10  # the first record
    assert re.sub(r": the .*", "", told[0]) == re.sub(r": the .*", "", told[1])
    assert "the weights of all layers are not finite" in told[1]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start()
    records = training.fit()
    for record in records:
        if record.event == "checkpoint":
            break
    before = (training.run.checkpoints / "last").resolve()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match="disk is full"):
        list(records)
    assert (training.run.checkpoints / "last").resolve() == before
    checkpoint.load(before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "tamper", "remove"])
def test_a_damaged_checkpoint_is_a_message(start: Start, name: str, damage: str) -> None:
    training = start()
    list(training.fit(max_steps=1))
    last = (training.run.checkpoints / "last").resolve()
    content = (last / name).read_bytes()
    if damage == "remove":
        (last / name).unlink()
    else:
        (last / name).write_bytes(content[:-50] if damage == "truncate" else content[:-50] + bytes(50))
    with pytest.raises(WeightsError) as caught:
        checkpoint.load(last)
    assert str(last) in caught.value.what


def test_a_network_with_nan_weights_is_never_saved(start: Start) -> None:
    """Also when it breaks in the last step of an epoch, whose own loss was still good."""
    training = start(replace(SMALL, batch_size=48, epochs=3, learning_rate=1e20))
    with pytest.raises(VerificationError):
        list(training.fit())
    assert not list(training.run.checkpoints.iterdir())
    assert "NaN" not in (training.run.path / "metrics.jsonl").read_text()


def test_the_newest_complete_checkpoint_is_found(start: Start) -> None:
    training = start(replace(SMALL, epochs=2))
    training.keep = 2
    list(training.fit())
    other = training.run.checkpoints / "00000003"
    last = (training.run.checkpoints / "last").resolve()
    (training.run.checkpoints / "last").unlink()
    assert checkpoint.find_newest(training.run) == (training.run.checkpoints / last.name, [])
    (last / "optimizer.safetensors").write_bytes(b"")
    found, damaged = checkpoint.find_newest(training.run)
    assert found is not None
    assert (found.name, [p.name for p in damaged]) == ("00000003", [last.name])
    shutil.rmtree(other)
    with pytest.raises(WeightsError, match="has no complete checkpoint"):
        checkpoint.find_newest(training.run)
    assert checkpoint.find_newest(start().run) == (None, [])


@pytest.mark.parametrize(
    ("images", "epochs", "best"),
    [
        (100, [(0.5, 0.7), (0.5, 0.6), (0.5, 0.6), (0.49, 0.9), (0.5, 0.1)], [1, 2, 4]),
        (90, [(0.5, 0.7), (0.4, 0.8), (0.6, 0.6), (0.6, 0.6), (0.2, 0.61)], [1, 3]),
        (1, [(0.0, 0.69), (1.0, 0.68)], [1, 2]),
    ],
)
def test_best_is_the_lowest_error_then_loss_and_on_few_images_the_lowest_loss(
    start: Start, monkeypatch: pytest.MonkeyPatch, images: int, epochs: list[tuple[float, float]], best: list[int]
) -> None:
    """Also across a stop after each epoch; the checkpoint, the records and the report mean the same epoch."""
    recipe = replace(SMALL, epochs=len(epochs), batch_size=48)

    def validate(loop: TrainingLoop, stop: object) -> Evaluation:
        error, loss = epochs[loop.trainer.epoch - 1]
        wrong = round(error * images)
        confusion = np.array([[images - wrong, wrong, 0, 0], *[[0] * 4] * 3])
        return Evaluation(confusion, np.array([images, 0, 0, 0]), loss * images)

    monkeypatch.setattr(TrainingLoop, "validate", validate)
    run, last = Run.create(next(NAMES), recipe, {}), None
    for step in range(1, len(epochs) + 1):
        training = start(recipe, run)
        *_, end = training.fit(last, max_steps=step if step < len(epochs) else None)
        last = (run.checkpoints / "last").resolve()
    found = [r["epoch"] for r in run.records() if r["event"] == "validation" and r["best"]]
    assert found == best
    assert (run.checkpoints / "best").resolve().name == f"{best[-1]:08}"
    assert end.top1_error == pytest.approx(epochs[best[-1] - 1][0])
    history = read_history(run.records(), recipe).best
    assert history is not None
    assert history["epoch"] == best[-1]


def test_only_last_and_best_are_kept(start: Start) -> None:
    training = start(replace(SMALL, epochs=4))
    records = list(training.fit())
    best = [r.path for r in records if r.event == "checkpoint" and r.best][-1]
    folders = {p.name for p in training.run.checkpoints.iterdir() if not p.is_symlink()}
    assert folders == {Path(str(best)).name, "00000012"}


def test_other_files_among_the_checkpoints_are_kept(start: Start) -> None:
    training = start()
    (training.run.checkpoints / "backup").mkdir()
    (training.run.checkpoints / "backup" / "notes").touch()
    list(training.fit())
    assert (training.run.checkpoints / "backup" / "notes").exists()


def test_a_checkpoint_of_another_network_or_place_is_a_message(start: Start) -> None:
    other, training = start(replace(SMALL, width=1 / 8)), start()
    list(other.fit(max_steps=1))
    last = (other.run.checkpoints / "last").resolve()
    with pytest.raises(WeightsError, match=r"does not fit this network: conv1\.weight"):
        training.restore(last)
    moved = last.rename(last.with_name("00000099"))
    with pytest.raises(WeightsError, match="holds step 1: it was renamed"):
        checkpoint.load(moved)
    position = {"step": 1, "epoch": 1, "schedule": training.trainer.schedule.state(), "metrics": {}}  # no epoch_metrics
    mean = torch.from_numpy(training.data.mean_image())
    text = model_file.format_metadata(training.trainer.recipe, training.data.classes, {})
    tensors = {name: p.detach().contiguous() for name, p in training.trainer.network.named_parameters()} | {
        "mean": mean
    }
    path = checkpoint.save(training.run, 1, tensors, training.trainer.optimizer.velocity, position, text, False, 1)
    with pytest.raises(WeightsError, match=r"meta.json has an invalid position: 'epoch_metrics'"):
        training.restore(path)


def test_records_name_their_fields() -> None:
    record = Record("step", 1, 2, loss=0.5)
    assert record.as_dict() == {"event": "step", "epoch": 1, "step": 2, "loss": 0.5}


def test_data_timer_on_a_cpu() -> None:
    timer, started = DataTimer(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        with timer:
            time.sleep(0.02)
    time.sleep(0.03)
    assert 0.04 <= timer.read() <= time.perf_counter() - started - 0.03
    assert timer.read() == 0


def test_data_timer_on_a_gpu_counts_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches: the first two come while the device still works; before the third it is idle."""
    host, device = [0.0], [0.0]  # milliseconds: where the host is, and when the device will be done

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            assert stream == "the stream of cuda:1"
            device[0] = self.at = max(host[0], device[0])

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: f"the stream of {place}")
    timer = DataTimer(torch.device("cuda", 1))
    device[0] = 10.0
    for until, work in ((4.0, 10.0), (15.0, 10.0), (37.0, 10.0)):
        with timer:
            host[0] = until
        device[0] += work
    assert timer.read() == pytest.approx(0.007)
    assert timer.read() == 0
