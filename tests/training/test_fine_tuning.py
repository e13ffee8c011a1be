"""Fine-tuning: which layers are loaded, initialized or frozen, and what run.json says about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.model.architecture import LAYERS, PARAMETERS
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.model.network import Network, initialize
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import fine_tuning
from alexnet_cli.core.training.loop import TrainingLoop
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import TINY, Recipe
from alexnet_plugins.train.command import train
from model_files import random_model, save_model
from trainings import new_loop

CPU = Placement(torch.device("cpu"), "CPU", "fp32")
SMALL = replace(TINY, width=1 / 16, batch_size=16, epochs=2, precision="fp32")
CONVOLUTIONS, REST = LAYERS[:5], LAYERS[5:]
NAMES = iter(f"run{i}" for i in range(1000))


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """A network of ten other classes."""
    return save_model(random_model(SMALL), tmp_path / "other.safetensors")


@pytest.fixture
def start(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingLoop]:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))

    def start(recipe: Recipe = SMALL, model: Model | None = None, run: Run | None = None) -> TrainingLoop:
        data = open_dataset(prepared)
        transfer = fine_tuning.match_layers("x", model, recipe, data.classes) if model else None
        run = run or Run.create(next(NAMES), recipe, {})
        return new_loop(recipe, data, run, CPU, 1, transfer=transfer)

    return start


def tensors(network: Network) -> dict[str, np.ndarray]:
    return {name: network.get_parameter(name).detach().numpy().copy() for name in PARAMETERS}


def test_all_but_the_classes_is_taken_over(start: Callable[..., TrainingLoop]) -> None:
    model = random_model(SMALL)
    training = start(model=model)
    found, fresh = tensors(training.trainer.network), Network(SMALL, 4)
    initialize(fresh)
    for name in PARAMETERS:
        expected = model.tensors[name] if not name.startswith("fc8") else tensors(fresh)[name]
        np.testing.assert_array_equal(found[name], expected)
    assert training.transfer is not None
    assert training.transfer.initialized == {"fc8": "the data set has 4 other classes than the weights (10)"}
    record = next(iter(training.fit()))
    assert record.loaded == [name for name in PARAMETERS if not name.startswith("fc8")]
    assert record.initialized == ["fc8.weight", "fc8.bias"]


def test_the_same_classes_are_taken_over_too_but_not_as_many_others() -> None:
    model = random_model(SMALL)
    assert fine_tuning.match_layers("x", model, SMALL, model.classes).initialized == {}
    others = [ClassName(f"other {i}") for i in range(10)]
    assert list(fine_tuning.match_layers("x", model, SMALL, others).initialized) == ["fc8"]
    assert list(fine_tuning.match_layers("x", model, SMALL, model.classes[::-1]).initialized) == ["fc8"]


def test_a_layer_of_another_shape_starts_at_random() -> None:
    model = random_model(SMALL)
    odd = replace(model, tensors={**model.tensors, "fc6.weight": np.zeros((256, 9), np.float32)})
    transfer = fine_tuning.match_layers("x", odd, SMALL, model.classes)
    assert dict(transfer.initialized) == {"fc6": "shape 256x576, in the weights 256x9"}
    assert transfer.parameters()["loaded"] == [name for name in PARAMETERS if not name.startswith("fc6")]


def test_a_layer_that_is_left_out_on_one_side() -> None:
    """conv4 has other inputs without conv3. Without conv4, conv5 has the same shape, but sees other maps."""
    without = [replace(SMALL, left_out_layers=(layer,)) for layer in ("conv3", "conv4")]
    whole, shorter = random_model(SMALL), random_model(without[0])
    transfer = fine_tuning.match_layers("x", whole, without[0], whole.classes)
    assert dict(transfer.initialized) == {"conv4": "shape 24x16x3x3, in the weights 24x12x3x3"}
    transfer = fine_tuning.match_layers("x", shorter, SMALL, whole.classes)
    assert list(transfer.initialized) == ["conv3", "conv4"]
    assert transfer.initialized["conv3"] == "left out in the weights"
    transfer = fine_tuning.match_layers("x", whole, without[1], whole.classes)
    assert (dict(transfer.initialized), list(transfer.compare_recipe(without[1]))) == ({}, ["left_out_layers"])


def test_where_nothing_fits_the_first_layer_is_named() -> None:
    with pytest.raises(WeightsError, match=r"not even conv1 \(shape 12x3x11x11, in the weights 6x3x11x11\)") as caught:
        fine_tuning.match_layers("x", random_model(SMALL), replace(SMALL, width=1 / 8), random_model(SMALL).classes)
    assert caught.value.hint.endswith("or give --set width=0.0625")


def test_weights_that_are_no_numbers_are_named() -> None:
    model = random_model(SMALL)
    model.tensors["conv3.weight"][1, 0, 2, 2] = np.nan
    with pytest.raises(WeightsError, match=r"random: conv3\.weight has NaN or infinite values"):
        fine_tuning.match_layers("x", model, SMALL, model.classes)
    model.tensors["conv3.weight"][1, 0, 2, 2] = 0
    model.tensors["fc8.bias"][0] = np.inf  # of a layer that is not loaded
    assert fine_tuning.match_layers("x", model, SMALL, model.classes[::-1]).loaded[-1] == "fc7"
    with pytest.raises(WeightsError, match=r"fc8\.bias"):
        fine_tuning.match_layers("x", model, SMALL, model.classes)


def test_a_recipe_under_which_the_weights_mean_something_else_is_told() -> None:
    model = random_model(SMALL)
    transfer = fine_tuning.match_layers("x", model, SMALL, model.classes)
    assert transfer.compare_recipe(replace(SMALL, epochs=3, learning_rate=1, dropout=0)) == {}
    halved = replace(SMALL, dropout_inverted=False, dropout=0.0, input_size=227, mean="rgb")
    assert set(transfer.compare_recipe(halved)) == {"dropout_inverted", "dropout", "input_size", "mean"}
    assert transfer.compare_recipe(replace(SMALL, input_divisor=1.0, lrn_k=1.0)) == {
        "input_divisor": (1.0, 64.0),
        "lrn_k": (1.0, 2.0),
    }


def test_frozen_layers_keep_every_bit_and_the_others_learn_as_before(start: Callable[..., TrainingLoop]) -> None:
    """One step from the same weights: the update of the other layers does not depend on what is frozen."""
    frozen, free = (start(replace(SMALL, frozen=kind, weight_decay=0.1)) for kind in ("conv", "none"))
    before = tensors(frozen.trainer.network)
    for training in (frozen, free):
        list(training.fit(max_steps=1))
    after, other = tensors(frozen.trainer.network), tensors(free.trainer.network)
    for name in PARAMETERS:
        if name.split(".")[0] in CONVOLUTIONS:
            np.testing.assert_array_equal(after[name], before[name])
            assert not frozen.trainer.optimizer.velocity[name].any()
            assert frozen.trainer.network.get_parameter(name).grad is None
            assert not np.array_equal(other[name], before[name])
        else:
            np.testing.assert_array_equal(after[name], other[name])
            assert not np.array_equal(after[name], before[name])


def test_frozen_and_interrupted_it_ends_with_the_same_weights(start: Callable[..., TrainingLoop]) -> None:
    recipe, model = replace(SMALL, frozen="conv"), random_model(SMALL)
    whole = start(recipe, model)
    list(whole.fit())
    first = start(recipe, model)
    list(first.fit(max_steps=4))
    second = start(recipe, run=first.run)
    list(second.fit((first.run.checkpoints / "last").resolve()))
    for name, value in tensors(second.trainer.network).items():
        np.testing.assert_array_equal(value, tensors(whole.trainer.network)[name])
        if name.split(".")[0] in CONVOLUTIONS:
            np.testing.assert_array_equal(value, model.tensors[name])


def begun(path: Path, spec: str = "base") -> Run:
    """A run that began from a file and has no checkpoint yet."""
    transfer = fine_tuning.match_layers(spec, random_model(SMALL), SMALL, random_model(SMALL).classes)
    transfer = replace(transfer, model=replace(transfer.model, path=path))
    return Run.create(next(NAMES), SMALL, {"init_from": transfer.about()})


def test_a_run_without_a_checkpoint_begins_once_more_from_the_same_weights(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    run = begun(weights_file)
    for spec in (None, "base"):  # resumed by name; the same command once more
        again = fine_tuning.load_source(spec, run)
        assert again is not None
        np.testing.assert_array_equal(again.tensors["conv1.weight"], random_model(SMALL).tensors["conv1.weight"])
    save_model(random_model(SMALL, seed=1), weights_file)
    with pytest.raises(WeightsError, match="has changed since the run started"):
        fine_tuning.load_source(None, run)
    (run.checkpoints / "00000003").mkdir()
    (run.checkpoints / "00000003" / "meta.json").touch()
    weights_file.unlink()
    assert fine_tuning.load_source("base", run) is None


def test_a_run_cannot_be_gone_on_with_from_elsewhere(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    with pytest.raises(UsageError, match="was started from base"):
        fine_tuning.load_source("elsewhere", begun(weights_file))
    with pytest.raises(UsageError, match="was started without --init-from"):
        fine_tuning.load_source(str(weights_file), Run.create("plain", SMALL, {}))
    assert fine_tuning.load_source(None, Run(tmp_path / "runs" / "plain")) is None
    assert fine_tuning.load_source(None, None) is None
    with pytest.raises(WeightsError, match="there is no run, folder or file named nowhere"):
        fine_tuning.load_source("nowhere", None)


def test_the_command(
    prepared: Path,
    weights_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    train(str(prepared), init_from=str(weights_file), freeze="conv", name="tuned", max_steps=2, jobs=1, json=True)
    out, err = capsys.readouterr()
    assert "loaded  conv1, conv2, conv3, conv4, conv5, fc6, fc7\nrandom  fc8: the data set has 4 other classes" in err
    assert err.count("warn") == 1  # few validation images
    run = Run(tmp_path / "runs" / "tuned")
    assert run.recipe == replace(SMALL, frozen="conv")  # without --recipe, that of the weights
    assert run.about["init_from"]["weights"] == str(weights_file)
    assert run.about["init_from"]["initialized"] == ["fc8.weight", "fc8.bias"]
    begin, *_, end = (json.loads(line) for line in out.splitlines())
    assert (begin["event"], begin["path"], begin["initialized"]) == ("start", str(run.path), ["fc8.weight", "fc8.bias"])
    assert (end["event"], end["path"]) == ("end", str(run.path))
    train(str(prepared), init_from=str(weights_file), resume="auto", name="tuned", max_steps=3, jobs=1, quiet=True)
    assert run.records()[-1]["step"] == 3
    settings = ["width=0.0625", "lrn_joint=true"]
    train(str(prepared), "paper", settings, init_from=str(weights_file), name="odd", max_steps=1, batch_size=16, jobs=1)
    err = capsys.readouterr().err
    assert "warn    the weights were trained with other settings: " in err
    assert "lrn_joint = false (here true)" in err
    assert all(f"--set {text}" in err for text in ("lrn_joint=false", "dropout_inverted=true", "input_divisor=64.0"))


def test_what_does_not_fit_leaves_no_run(
    prepared: Path, weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    with pytest.raises(WeightsError, match="no layer of"):
        train(str(prepared), "tiny", init_from=str(weights_file), jobs=1)
    assert not (tmp_path / "runs").exists()
