"""What is said before the first step and when nothing is learned; and that nothing is said where all is well."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.prepare import pack
from alexnet_cli.core.data.shards import Dataset, open_dataset
from alexnet_cli.core.data.sources import detect_source
from alexnet_cli.core.evaluation.baselines import ClassCounts
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import diagnostics
from alexnet_cli.core.training.optim import PaperSGD, Schedule
from alexnet_cli.recipe import CAFFE, FAST, KRIZHEVSKY, PAPER, RECIPES, TINY, Recipe
from alexnet_cli.recipe_io import apply_changes, parse_settings
from alexnet_plugins.train.command import train
from trainings import new_loop


@pytest.fixture(scope="module")
def odd(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class whose training pictures are all damaged, and two validation pictures that are in train too."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(pictures, folder / "source")
    for file in (folder / "source" / "train" / "green").iterdir():
        file.write_bytes(b"no picture")
    for i in range(2):
        shutil.copy(
            folder / "source" / "val" / "red" / f"0{i}.jpg", folder / "source" / "train" / "red" / f"copy{i}.jpg"
        )
    for _ in pack(Plan(detect_source(folder / "source"), folder / "odd", 95), workers=1):
        pass
    return folder / "odd"


def equal(classes: int) -> ClassCounts:
    return np.full(classes, 700)


class FakeSplit:
    """The labels of a split."""

    def __init__(self, images: int, classes: int) -> None:
        self.labels = np.arange(images) % classes

    def __len__(self) -> int:
        return len(self.labels)


def make_data(train: int, val: int, classes: int = 2) -> Dataset:
    """A data set of so many images, without their files."""
    splits = {"train": FakeSplit(train, classes), "val": FakeSplit(val, classes)}
    names = [SimpleNamespace(name=f"class {i}") for i in range(classes)]
    return SimpleNamespace(split=splits.__getitem__, classes=names, record={}, path=Path("x"))  # type: ignore[return-value]


def list_warnings(recipe: Recipe, data: Dataset) -> list[str]:
    return [str(record.text) for record in diagnostics.check_settings(recipe, data)]


@pytest.mark.parametrize("name", list(RECIPES))
def test_nothing_is_said_where_all_is_well(name: str) -> None:
    assert list_warnings(RECIPES[name], make_data(400, 100, 4)) == []


@pytest.mark.parametrize(
    ("train", "val", "few", "uncertain", "hint"),
    [
        (42, 4, True, "15% to 85%", "add images, or keep more of them: alexnet prepare --val-fraction 0.3 --overwrite"),
        (200, 99, False, "40% to 60%", "add images"),
        (199, 100, True, "", ""),
        (200, 100, False, "", ""),
        (1, 1, True, "5% to 95%", "add images"),
    ],
)
def test_few_images_are_told(train: int, val: int, few: bool, uncertain: str, hint: str) -> None:
    """The interval is Wilson's, as scipy computes it."""
    warnings = list(diagnostics.check_few_images(make_data(train, val), False))
    texts = [str(record.text) for record in warnings]
    assert any("few to learn from" in text for text in texts) == few
    assert any("the best epoch is" in text for text in texts) == bool(uncertain)
    if uncertain:
        low, high = proportion_interval(val)
        assert f"(for 50%, the 95 % interval is {low:.0%} to {high:.0%})" in texts[-1]
        assert f"{low:.0%} to {high:.0%}" == uncertain
        assert warnings[-1].hint == hint
    from_weights = [str(record.text) for record in diagnostics.check_few_images(make_data(train, val), True)]
    assert from_weights == texts[few:]


def proportion_interval(images: int) -> tuple[float, float]:
    """Wilson's interval of one half: the shares p for which (p - 0.5)^2 = z^2 p (1 - p) / images."""
    n = images / 1.96**2
    low, high = sorted(np.roots([1 + 1 / n, -1 - 1 / n, 0.25]).real)
    return float(low), float(high)


def test_classes_without_pictures_and_pictures_in_both_splits(odd: Path) -> None:
    empty, leak, *_ = diagnostics.check_settings(PAPER, open_dataset(odd))
    assert empty.text == "1 of 4 classes has no training image: green"
    assert leak.text == "2 images are in both train and val"
    assert str(odd / "duplicates.jsonl") in str(leak.hint)
    listed = [json.loads(line) for line in (odd / "duplicates.jsonl").read_text().splitlines()]
    assert len(listed) == 2


def test_classes_that_nothing_is_validated_on(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(prepared)
    found = [np.array(labels) for labels in ([0, 1, 2, 3], [1, 3])]
    monkeypatch.setattr(Dataset, "split", lambda _, name: SimpleNamespace(labels=found[name == "val"]))
    (told,) = diagnostics.check_empty_classes(data)
    assert told.text == "2 of 4 classes have no validation image: blue, red"


@pytest.mark.parametrize(
    ("recipe", "lr", "batch", "far"),
    [
        (PAPER, 0.02, 256, False),  # as the authors' own check had it
        (PAPER, 0.04, 512, False),  # linear
        (PAPER, 0.02, 512, False),  # square root
        (PAPER, 0.01, 1024, False),  # forgotten: 2.8 times too low for the square root
        (PAPER, 0.01, 4096, True),  # 5.7 times
        (PAPER, 0.01, 16, False),  # 2.8 times the square root's 0.0035
        (PAPER, 0.01, 8, True),  # forgotten: 4 times the square root's 0.0025
        (TINY, 0.03, 4, True),
        (PAPER, 0.1, 128, True),
        (PAPER, 0.001, 128, True),
        (FAST, 0.02, 64, False),
        (TINY, 0.3, 64, True),
        (CAFFE, 0.01, 128, False),
        (KRIZHEVSKY, 0.0, 128, True),
        (replace(TINY, name="mine", dropout=0.5), 5.0, 128, True),  # a variant of tiny, whatever its name
        (replace(TINY, name="mine", dropout=0.5), 0.05, 128, False),
    ],
)
def test_a_rate_far_from_the_batchs(recipe: Recipe, lr: float, batch: int, far: bool) -> None:
    told = list(diagnostics.check_batch(replace(recipe, learning_rate=lr, batch_size=batch), batch, False))
    assert len(told) == far
    assert all(f"learning rate {lr:g} is unusual for batch size {batch}: " in str(record.text) for record in told)


def test_a_rate_that_rounds_alike_at_both_ends_is_one_number() -> None:
    (told,) = diagnostics.check_batch(replace(TINY, learning_rate=3.0, batch_size=65), 65, False)
    assert str(told.text).endswith("recipe tiny has 0.03 for 64, which scales to 0.03")
    (told,) = diagnostics.check_batch(replace(TINY, learning_rate=3.0), 64, False)
    assert str(told.text).endswith("recipe tiny has 0.03 for 64")
    assert told.hint == "try -b 64 --lr 0.03"


@pytest.mark.parametrize(
    ("recipe", "epochs", "told", "settings"),
    [
        (KRIZHEVSKY, 91, "", ""),
        (KRIZHEVSKY, 30, "drop_epochs = [25, 51, 79]", "--set 'drop_epochs=[8, 17, 26]'"),
        (KRIZHEVSKY, 2, "drop_epochs = [25, 51, 79]", "--set 'drop_epochs=[1]'"),
        (KRIZHEVSKY, 99, "", ""),
        (replace(KRIZHEVSKY, schedule="plateau", color_shift=0.0, frozen="conv"), 182, "", ""),
        (replace(KRIZHEVSKY, name="mine"), 30, "drop_epochs = [25, 51, 79]", "--set 'drop_epochs=[8, 17, 26]'"),
        (
            KRIZHEVSKY,
            182,
            "drop_epochs = [25, 51, 79], conv1_slow_epoch = 67, conv1_freeze_epoch = 72, color_shift_epochs = 67",
            "--set 'drop_epochs=[50, 102, 158]' --set conv1_slow_epoch=134 --set conv1_freeze_epoch=144 "
            "--set color_shift_epochs=134",
        ),
        (replace(KRIZHEVSKY, drop_epochs=(8, 17)), 30, "", ""),
        (TINY, 30, "", ""),
        (PAPER, 200, "", ""),
    ],
)
def test_epochs_that_others_were_counted_for(recipe: Recipe, epochs: int, told: str, settings: str) -> None:
    said = [(record.text, record.hint) for record in diagnostics.check_epochs(replace(recipe, epochs=epochs))]
    meant = f"is meant for the 91 epochs of recipe krizhevsky, not for {epochs}"
    assert said == ([(f"{told} {meant}", f"scaled to {epochs} epochs: {settings}")] if told else [])


@pytest.mark.parametrize(("pictures", "said"), [([89, 0, 9, 50], False), ([100, 0, 10, 50], True), ([7], False)])
def test_classes_that_are_far_from_equal_are_named(pictures: list[int], said: bool) -> None:
    told = diagnostics.describe_imbalance(("cat", "dog", "emu", "fox"), np.array(pictures))
    assert (told is not None) == said
    if told:
        assert told[0] == "the classes are very unequal: 100 training images of cat, 10 of emu"
        assert told[1].startswith("always answering cat has an error of only 37.5%: add images of rare classes")


def test_a_loss_that_only_knows_how_frequent_the_classes_are() -> None:
    """It is far below ln(classes); one batch with few of the commonest class says nothing."""
    pictures = np.array([950, 50])
    flat = -(0.95 * math.log(0.95) + 0.05 * math.log(0.05))
    for losses, said in (([flat] * 3, True), ([0.9 * flat] * 3, False), ([0.7 * flat, 0.7 * flat, 1.3 * flat], False)):
        watch = diagnostics.LossPlateauCheck.for_training(PAPER, pictures, 1000)
        told = [watch.update(Record("step", 1, 100 + i, loss=loss)) for i, loss in enumerate(losses)]
        assert any(told) == said
        if said:
            assert str(told[0] and told[0].text).endswith("than guessing (the class frequencies give 0.199)")


@pytest.mark.parametrize(
    ("recipe", "pictures", "val", "error", "steps", "way"),
    [
        (TINY, [200, 200], 50, 0.5, 8, "8 steps may be too few: train again with --epochs 75"),
        (TINY, [200, 20], 50, 0.5, 400, "add images of rare classes, or leave out images of common ones"),
        (TINY, [21, 21], 4, 0.5, 2, "2 steps may be too few: train again with -b 4 --lr 0.0029 --epochs 30"),
        (TINY, [200, 200], 50, 0.5, 1, "1 step may be too few: train again with --epochs 600"),
        (PAPER, [200, 200], 50, 0.5, 6, "6 steps may be too few: train again with --set schedule=one-cycle --epochs 1"),
        (
            TINY,
            [200, 200],
            50,
            0.5,
            400,
            "check the labels; if they are right, try another learning rate than 0.03 (--",
        ),
        (
            TINY,
            [21, 21],
            4,
            0.25,
            400,
            "add images, or keep more of them: alexnet prepare --val-fraction 0.3 --overwri",
        ),
        (
            TINY,
            [21, 21],
            4,
            0.5,
            400,
            "42 training images are few: add images (100 of each class are a start), or star",
        ),
    ],
)
def test_the_way_on_of_a_training_that_learned_nothing(
    recipe: Recipe, pictures: list[int], val: int, error: float, steps: int, way: str
) -> None:
    counts = np.array(pictures), np.array([val // 2, val // 2])
    assert diagnostics.next_command(recipe, *counts, error, steps, 2, False).startswith(way)


def test_no_hint_leads_back_to_where_a_hint_was_given() -> None:
    """Who does what hints say, and learns nothing or gets a NaN each time, never starts the same training twice."""
    sizes, batches, rates, lengths = (6, 46, 3000), (0, 1, 4096), (0, 1), (0, 1)
    recipes, done = (PAPER, KRIZHEVSKY, TINY), set[Situation]()
    for images, batch, rate, epochs, recipe in itertools.product(sizes, batches, rates, lengths, recipes):
        changes: dict[str, Any] = {"batch_size": batch, "learning_rate": rate, "epochs": epochs}
        changed = replace(recipe, **{key: value for key, value in changes.items() if value})
        follow_hints(Situation(changed, images - images // 10, max(1, images // 10), 3, False), [], done)


KEYS = {"-b": "batch_size", "--lr": "learning_rate", "--epochs": "epochs"}
OPTION = re.compile(rf"({'|'.join(KEYS)}|--set|--recipe|--val-fraction) ('[^']+'|[^ ;,]+)")


@dataclass(frozen=True)
class Situation:
    """What a user trains next; `has_diverged` once a loss was NaN."""

    recipe: Recipe
    train: int
    val: int
    classes: int
    has_diverged: bool


def follow_hints(at: Situation, path: list[Situation], done: set[Situation]) -> None:
    """Follow every hint from here, depth first, and fail in a circle or after twelve hints. `done` have been left."""
    told = [f"-b {s.recipe.batch_size} --lr {s.recipe.learning_rate} --epochs {s.recipe.epochs}" for s in (*path, at)]
    assert (at.recipe, at.val) not in [(before.recipe, before.val) for before in path], told
    assert len(path) < 12, told
    if at not in done:
        for then in next_situations(at):
            follow_hints(then, [*path, at], done)
        done.add(at)


def next_situations(at: Situation) -> list[Situation]:
    """What is trained next by someone who does what one of the possible hints says."""
    recipe, data = at.recipe, make_data(at.train, at.val, at.classes)
    counts, validated = (np.bincount(data.split(name).labels, minlength=at.classes) for name in ("train", "val"))
    per_epoch = max(1, at.train // recipe.batch_size)
    epochs = min(recipe.epochs, 24) if recipe.schedule == "plateau" else recipe.epochs  # four times six without a best
    error = float(1 - validated.max() / validated.sum())
    hints = [str(record.hint) for record in diagnostics.check_settings(recipe, data)]
    hints += [
        diagnostics.next_command(recipe, counts, validated, e, per_epoch * epochs, epochs, False) for e in (error, 0)
    ]
    hints += [diagnostics.suggest_fix(recipe, counts, False)]
    optimizer = PaperSGD([("fc8.bias", torch.zeros(1))], recipe)
    nan = diagnostics.suggest_rate(optimizer, Schedule(recipe, per_epoch), 9, 1, "") if not at.has_diverged else ""
    if at.has_diverged:
        hints = [hint for hint in hints if not hint.startswith("unless a higher rate diverged")]
    return [apply_hint(at, hint, hint == nan) for hint in [*hints, nan] if OPTION.search(hint)]


def apply_hint(at: Situation, hint: str, has_diverged: bool) -> Situation:
    """The next training, after a hint that names options of `train` or `prepare`."""
    recipe, changes, then = at.recipe, dict[str, str](), replace(at, has_diverged=at.has_diverged or has_diverged)
    for option, quoted in OPTION.findall(hint):
        value = quoted.strip("'")
        if option in KEYS:
            changes[KEYS[option]] = value
        elif option == "--set":
            changes |= [value.split("=")]
        elif option == "--recipe":
            recipe = RECIPES[value]
        elif option == "--val-fraction":
            val = round(float(value) * (at.train + at.val))
            then = replace(then, train=at.train + at.val - val, val=val)
    return replace(then, recipe=apply_changes(recipe, parse_settings([f"{k}={v}" for k, v in changes.items()])))


def test_a_batch_is_no_larger_than_the_training_set(prepared: Path) -> None:
    """48 pictures make batches of 48, and a rate for 4,096 is not to be advised."""
    (told,) = diagnostics.check_batch(replace(PAPER, batch_size=4096), 48, False)
    assert told.text == "batch size 4,096 is larger than the training set (48 images); each step uses all of it"
    assert told.hint == "with -b 4 --lr 0.00083, an epoch has 12 steps"
    (told,) = diagnostics.check_batch(replace(PAPER, batch_size=4096, learning_rate=0.32), 48, False)
    assert "unusual for batch size 48" in str(told.text)
    assert str(told.hint).endswith("try -b 48 --lr 0.0037")


def test_fine_tuning_may_be_slow_and_frozen_layers_should_be_of_somebody() -> None:
    data, slow = make_data(400, 100), replace(PAPER, learning_rate=1e-4, frozen="conv")
    assert list(diagnostics.check_settings(slow, data, {})) == []
    assert [text.split(" is unusual")[0] for text in list_warnings(slow, data)] == [
        "learning rate 0.0001", "conv1 to conv5 are frozen at random weights",
    ]  # fmt: skip
    (told,) = diagnostics.check_settings(slow, data, {"lrn_k": (2.0, 1.0), "lrn_joint": (False, True)})
    assert str(told.text).endswith(": lrn_k = 1.0 (here 2.0), lrn_joint = true (here false)")
    assert told.hint == "to use these, remove --recipe or add --set lrn_k=1.0 --set lrn_joint=true"


@pytest.mark.parametrize(("steps", "patience"), [(3, 20), (48, 48), (1248, 124), (3510, 351), (900_000, 2000)])
def test_patience_is_a_tenth_of_the_steps_and_ends_with_them(steps: int, patience: int) -> None:
    assert diagnostics.LossPlateauCheck.for_training(PAPER, equal(10), steps).patience == patience


def test_a_loss_that_stays_at_guessing_is_told_once() -> None:
    watch, chance = (
        diagnostics.LossPlateauCheck.for_training(replace(PAPER, conv345_std=0.01), equal(1000), 1000),
        math.log(1000),
    )
    told = [watch.update(Record("step", 1, step, loss=loss)) for step, loss in (
        (90, chance), (100, 0.97 * chance), (110, 0.99 * chance), (120, chance), (130, 1.2 * chance),
    )]  # fmt: skip
    assert [record is not None for record in told] == [False, False, True, False, False]
    assert told[2] is not None
    assert told[2].step == 110
    assert str(told[2].text).endswith("no better than guessing (ln 1000 = 6.908)")
    assert "conv345_std=0.03" in str(told[2].hint)


def test_one_small_batch_raises_no_alarm() -> None:
    """The last record of an epoch can be the loss of a single step of three images."""
    watch, flat = diagnostics.LossPlateauCheck.for_training(TINY, equal(2), 100), math.log(2)
    records = [Record("step", 1, step, loss=loss * flat) for step, loss in ((80, 0.9), (90, 0.7), (100, 1.8))]
    assert [watch.update(record) for record in records] == [None] * 3


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [(PAPER, "bias=0.1"), (CAFFE, "conv345_std=0.03"), (FAST, "labels"), (replace(CAFFE, conv345_std=0.03), "labels")],
)
def test_the_remedy_fits_the_recipe(recipe: Recipe, remedy: str) -> None:
    told = diagnostics.LossPlateauCheck.for_training(recipe, equal(10), 100).update(
        Record("step", 2, 100, loss=math.log(10))
    )
    assert told is not None
    assert remedy in str(told.hint)


def test_the_papers_letter_stays_at_guessing_and_training_says_so(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred steps with 0.01 everywhere; the correction is what is proposed."""
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    recipe = replace(PAPER, width=1 / 64, batch_size=4, learning_rate=0.002, conv345_std=0.01, epochs=9)
    training = new_loop(
        recipe,
        open_dataset(prepared),
        Run.create("letter", recipe, {}),
        Placement(torch.device("cpu"), "CPU", "fp32"),
        1,
    )
    warnings = [record for record in training.fit() if record.event == "warning" and record.step]
    assert [(record.epoch, record.step) for record in warnings] == [(9, 100), (9, 108)]
    assert "% of the predictions are " in str(warnings[1].text)
    assert "no better than guessing (ln 4 = 1.386)" in str(warnings[0].text)
    assert training.run.records().count(warnings[0].as_dict()) == 1


def test_the_command_says_it_before_the_first_step(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    settings = ["width=0.0625"]
    train(str(odd), "tiny", settings, batch_size=16, lr=3.0, max_steps=1, jobs=1, name="a", json=True, quiet=True)
    out, err = capsys.readouterr()
    assert err.count("warn    ") == 5
    assert (
        "warn    learning rate 3 is unusual for batch size 16: "
        "recipe tiny has 0.03 for 64, which scales to 0.0075 to 0.015" in err
    )
    assert "--lr 0.0075" in err
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert events == ["start", *["warning"] * 5, "step", "checkpoint", "end"]
    train(str(odd), resume="a", max_steps=2, jobs=1, quiet=True)
    assert "warn" not in capsys.readouterr().err  # said once
