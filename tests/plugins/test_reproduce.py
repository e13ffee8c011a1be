"""`alexnet reproduce`: the released CIFAR-10 networks, trainings that continue, conclusions from known records."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.nn import functional

from alexnet_cli.core.analysis import filters
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError, Stopped, UsageError
from alexnet_cli.recipe import TINY, Recipe
from alexnet_plugins.experiments import ablation, cifar, cifar_norm, figure_1, study, towers
from alexnet_plugins.experiments.cifar import (
    CifarData,
    CifarTrainer,
    LocallyConnected,
    Training,
    TrainingRecord,
    build_network,
)
from alexnet_plugins.experiments.experiment import Experiment, Job, write_result
from alexnet_plugins.experiments.reproduce import _load_experiments, reproduce
from alexnet_plugins.experiments.table import Row, estimate_mean, judge_all
from commands import alexnet

CPU = Placement(torch.device("cpu"), "CPU", "fp32")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "BATCH_SIZE", 8)


@pytest.fixture(scope="module")
def data() -> CifarData:
    random = torch.Generator().manual_seed(0)
    train, test = (torch.randint(0, 256, (n, 3, 32, 32), generator=random, dtype=torch.uint8) for n in (80, 40))
    labels = [torch.randint(0, 10, (len(images),), generator=random) for images in (train, test)]
    return CifarData(train, labels[0], test, labels[1], train.float().mean(0))


def make_job(folder: Path, stop: Callable[[], str | None] = lambda: None) -> Job:
    return Job(folder, folder, CPU, [], stop, lambda images, note: None)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("19pct", [3 * 25 * 32, 32 * 25 * 32, 32 * 25 * 64, 1024 * 10]),
        # a pixel of 6 x 6 has 256 / 36 of 9 neighbors, the others lie beyond the edge
        ("conv-local-11pct", [3 * 25 * 64, 64 * 25 * 64, 256 * 64 * 32, 256 * 32 * 32, 1152 * 10]),
    ],
)
def test_networks_have_the_weights_of_the_released_files(name: str, weights: list[int]) -> None:
    network = build_network(name)
    layers = [layer for layer in network if isinstance(layer, nn.Conv2d | nn.Linear)]
    used = [layer.window if isinstance(layer, LocallyConnected) else torch.ones_like(layer.weight) for layer in layers]
    assert [int(window.sum()) for window in used] == weights
    side = cifar.NETWORKS[name].crop
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.01)
    assert network(torch.zeros(2, 3, side, side)).shape == (2, 10)


def test_a_locally_connected_layer_has_a_filter_per_pixel() -> None:
    layer, x = LocallyConnected(2, 3, 4), torch.randn(1, 2, 4, 4)
    padded, y = functional.pad(x, (1, 1, 1, 1)), layer(x)
    weight = functional.pad(layer.weight.view(3, 4, 4, 2, 4, 4), (1, 1, 1, 1))
    for row in range(4):
        for column in range(4):
            window = slice(row, row + 3), slice(column, column + 3)
            filters = weight[:, row, column][:, :, *window]
            expected = (padded[0][:, *window] * filters).sum((1, 2, 3)) + layer.bias.view(3, 4, 4)[:, row, column]
            torch.testing.assert_close(y[0, :, row, column], expected)


def test_norms_are_those_of_the_released_files() -> None:
    x = 100 * torch.randn(2, 8, 5, 5)
    across = nn.LocalResponseNorm(5, alpha=0.001, beta=0.75, k=1.0)
    torch.testing.assert_close(cifar.AcrossMapsNorm()(x), across(x))
    squares = functional.conv2d(x.square().reshape(16, 1, 5, 5), torch.ones(1, 1, 3, 3), padding=1).reshape(x.shape)
    torch.testing.assert_close(cifar.WithinMapNorm()(x), x * (1 + 5e-5 / 9 * squares) ** -0.75)


def test_a_training_continues_where_it_stopped(data: CifarData, tmp_path: Path) -> None:
    training = Training(network="conv-local-13pct", rate=0.001, seed=3, drops=(1,))
    whole = CifarTrainer(training, data, CPU)
    while whole.record.epochs < 2:
        whole.train_epoch(lambda images: False)
    whole.measure_test_error()
    calls = iter(range(100))
    job = make_job(tmp_path, lambda: "Ctrl-C" if next(calls) == 9 else None)  # inside the second epoch
    cifar.continue_training(training, data, job, lambda record: record.epochs >= 2)
    assert cifar.read_records(tmp_path)[0].epochs == 1
    cifar.continue_training(training, data, make_job(tmp_path), lambda record: record.epochs >= 2, True)
    [record] = cifar.read_records(tmp_path)
    assert (record.training, record.test_error) == (training, whole.record.test_error)
    assert record.errors == pytest.approx(whole.record.errors, abs=1e-6)
    assert len(record.errors) == 10
    state = torch.load(tmp_path / "trainings" / f"{training.name}.pt")["network"]
    for name, expected in whole.network.state_dict().items():
        assert torch.equal(state[name], expected)


def test_a_finished_training_needs_only_its_record(data: CifarData, tmp_path: Path) -> None:
    """So published records can be judged again, and continued with more seeds."""
    training = Training(network="19pct", rate=0.001, seed=0)
    save_record(tmp_path, training, [0.5] * 5)
    record = cifar.continue_training(training, data, make_job(tmp_path), lambda record: record.epochs >= 1)
    assert record.errors == (0.5,) * 5
    record = cifar.continue_training(training, data, make_job(tmp_path), lambda record: record.epochs >= 2)
    assert len(record.errors) == 10  # from the start, without a state to continue from
    assert record.errors[0] != 0.5


def test_a_file_of_another_training_is_refused(data: CifarData, tmp_path: Path) -> None:
    training = Training(network="19pct", rate=0.001, seed=0)
    cifar.continue_training(training, data, make_job(tmp_path), lambda record: record.epochs >= 1)
    with pytest.raises(DataError, match="another training"):
        cifar.continue_training(replace(training, decay=False), data, make_job(tmp_path), lambda record: True)
    (tmp_path / "trainings" / "weights.json").write_bytes(b"foreign")
    with pytest.raises(DataError, match=r"weights\.json is not a training of this experiment"):
        cifar.read_records(tmp_path)


def test_the_test_error_is_that_of_the_mean_of_nine_crops(data: CifarData) -> None:
    trainer = CifarTrainer(Training(network="conv-local-13pct", rate=0.001, seed=0), data, CPU)
    for parameter in trainer.network.parameters():
        nn.init.normal_(parameter, std=0.05)
    centered = data.test.float()
    mean = data.mean[:, 4:28, 4:28]
    crops = [centered[:, :, y : y + 24, x : x + 24] - mean for y in (0, 4, 8) for x in (0, 4, 8)]
    probabilities = sum(trainer.network(crop).softmax(1) for crop in crops)
    trainer.measure_test_error()
    assert trainer.record.test_error == pytest.approx(
        float((probabilities.argmax(1) != data.test_labels).float().mean())
    )


def test_a_training_that_diverges_ends(data: CifarData, tmp_path: Path) -> None:
    training = Training(network="19pct", rate=1e6, seed=0)
    cifar.continue_training(training, data, make_job(tmp_path), lambda record: record.epochs >= 5)
    [record] = cifar.read_records(tmp_path)
    assert record.diverged
    assert record.epochs < 5


def test_an_error_in_one_training_stops_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail_or_wait(training: Training, data: CifarData, job: Job, *args: Any) -> None:
        if training.seed == 0:
            raise DataError("broken", "mend it")
        while job.stop() is None:
            pass

    monkeypatch.setattr(cifar, "continue_training", fail_or_wait)
    trainings = [Training(network="19pct", rate=0.001, seed=seed) for seed in range(2)]
    with pytest.raises(DataError, match="broken"):
        cifar.continue_trainings(trainings, None, make_job(tmp_path), lambda record: True)  # type: ignore[arg-type]


def save_record(folder: Path, training: Training, errors: list[float], test_error: float | None = None) -> None:
    (folder / "trainings").mkdir(exist_ok=True)
    record = TrainingRecord(
        training=training, epochs=len(errors) // 5, errors=tuple(errors), test_error=test_error, machine="a CPU"
    )
    cifar.write_record(record, folder / "trainings")


def save_activation(folder: Path, activation: str, rate: float, seed: int, errors: list[float]) -> None:
    save_record(folder, Training(network="19pct", activation=activation, rate=rate, seed=seed, decay=False), errors)


def reach_target(fifth: int) -> list[float]:
    """Errors of 40 epochs, below the target from this fifth of an epoch on."""
    return [0.5] * (fifth - 1) + [0.2] * (201 - fifth)


def test_figure_1_compares_the_fastest_rates(tmp_path: Path) -> None:
    """ReLU reaches 25 % in the 3rd fifth with the better rate, tanh in the 12th: five times (11.5 / 2.5 = 4.6)."""
    for rate in figure_1.RATES:
        save_activation(tmp_path, "relu", rate, 0, reach_target(3) if rate == 0.003 else [0.4] * 40)
        save_activation(tmp_path, "tanh", rate, 0, reach_target(12) if rate == 0.001 else [math.nan])
    for seed in (1, 2):
        save_activation(tmp_path, "relu", 0.003, seed, reach_target(3))
        save_activation(tmp_path, "tanh", 0.001, seed, reach_target(12))
    result = figure_1.conclude(tmp_path)
    assert result.verdict == "agrees"
    assert (
        "tanh needed 4.6 times the epochs of ReLU (2.3 against 0.5, 3 seeds); 95 % interval 4.6 to 4.6"
        in result.finding
    )
    assert {row[1] for row in result.tables[0].rows if row[0] == "relu"} == {0.003}
    assert not [text for text in result.limits if "that was tried" in text]  # both inside the grid
    assert [text.partition(":")[0] for text in result.missing] == ["sigmoid"]
    assert result.machines == ["a CPU"]


def test_figure_1_says_more_than_where_tanh_never_arrives(tmp_path: Path) -> None:
    for rate in figure_1.RATES:
        save_activation(tmp_path, "relu", rate, 0, reach_target(31))
        save_activation(tmp_path, "tanh", rate, 0, [0.5 + rate] * 199 + [0.3 + rate])
    result = figure_1.conclude(tmp_path)
    assert "tanh needed more than 6.5 times" in result.finding  # 40 / 6.1 = 6.56
    assert "1 of 1 seeds of tanh had not reached it after 40 epochs" in result.finding
    assert {row[1] for row in result.tables[0].rows if row[0] == "tanh"} == {0.0003}  # came nearest
    assert (
        "The best rate of tanh, 0.0003, is the smallest that was tried; one beyond it may be faster." in result.limits
    )
    for seed in (1, 2):
        save_activation(tmp_path, "relu", 0.0003, seed, reach_target(31))
        save_activation(tmp_path, "tanh", 0.0003, seed, [0.5] * 200)
    bounded = figure_1.conclude(tmp_path)
    assert bounded.verdict == "agrees"
    assert "there is no interval, but each seed's ratio is at least 6.5" in bounded.finding
    save_activation(tmp_path, "tanh", 0.0003, 2, reach_target(190))
    assert figure_1.conclude(tmp_path).verdict == "undecided", "some ratios are bounds, others are not"


def test_figure_1_with_a_relu_that_never_arrives_is_undecided(tmp_path: Path) -> None:
    """ReLU is faster with two seeds and diverges with the third, which must not be left out."""
    for seed in range(3):
        for rate in figure_1.RATES if seed == 0 else (0.001,):
            for activation, fifth in (("relu", 3 + seed), ("tanh", 12 + seed)):
                errors = reach_target(fifth) if rate == 0.001 else [0.6] * 40
                if (activation, seed) == ("relu", 2):
                    errors = [0.5, 0.5, math.nan]
                save_activation(tmp_path, activation, rate, seed, errors)
    result = figure_1.conclude(tmp_path)
    assert result.verdict == "undecided"
    assert "1 of 3 seeds of ReLU had not reached it" in result.finding
    assert result.finding.endswith("Diverged: 19pct-relu-0.001-seed2.")
    write_result(figure_1.FIGURE_1, result, make_job(tmp_path))
    record = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert record["tables"][0]["rows"][2] == ["relu", 0.001, 2, None, None]


def test_figure_1_goes_on_with_the_two_best_rates(
    data: CifarData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure_1, "read_cifar", lambda folder, device: data)
    monkeypatch.setattr(figure_1, "ACTIVATIONS", ("relu",))
    monkeypatch.setattr(figure_1, "RATES", (0.001, 0.003, 1e6))
    monkeypatch.setattr(figure_1, "WHOLE", figure_1.Goal(0.25, 3))
    monkeypatch.setattr(figure_1, "SEARCH_EPOCHS", 2)
    figure_1.train(make_job(tmp_path))
    records = [(r.training.rate, r.training.seed, r.epochs) for r in cifar.read_records(tmp_path)]
    assert [epochs for rate, seed, epochs in records if rate < 1 and seed == 0] == [3, 3]
    assert sorted(seed for _, seed, epochs in records if epochs == 3) == [0, 0, 1, 2]


@pytest.mark.parametrize(("error", "epochs"), [(2.0, 1), (0.0, 3)])  # reached at once, and never
def test_figure_1_short_trains_until_its_error_is_reached(
    error: float, epochs: int, data: CifarData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure_1, "read_cifar", lambda folder, device: data)
    monkeypatch.setattr(figure_1, "SHORT", figure_1.Goal(error, 3))
    figure_1.train_short(make_job(tmp_path))
    records = cifar.read_records(tmp_path)
    assert [(r.training.activation, r.training.rate, r.training.seed, r.epochs) for r in records] == [
        ("relu", 0.003, 0, epochs), ("tanh", 0.01, 0, epochs),
    ]  # fmt: skip
    assert figure_1.conclude_short(tmp_path).missing == []


def test_figure_1_short_has_a_ratio_but_no_verdict(tmp_path: Path) -> None:
    """40 % in the 6th and the 21st fifth: 20.5 / 5.5 = 3.7. Another seed's training has no part in it."""
    save_activation(tmp_path, "relu", 0.003, 0, [0.5] * 5 + [0.39] * 5)
    save_activation(tmp_path, "relu", 0.003, 1, [0.3] * 10)
    save_activation(tmp_path, "tanh", 0.01, 0, [0.5] * 15)
    assert [text.partition(":")[0] for text in figure_1.conclude_short(tmp_path).missing] == ["tanh"]
    save_activation(tmp_path, "tanh", 0.01, 0, [0.5] * 20 + [0.39] * 5)
    result = figure_1.conclude_short(tmp_path)
    assert result.verdict == "undecided"
    assert result.finding == (
        "To 40% training error, tanh needed 3.7 times the epochs of ReLU (4.1 against 1.1, 1 seed); one seed gives no "
        "interval. The paper says six times to 25%."
    )
    assert result.missing == []


@pytest.mark.parametrize("experiment", _load_experiments())
def test_an_empty_folder_has_no_verdict(experiment: Experiment, tmp_path: Path) -> None:
    result = experiment.conclude(tmp_path)
    assert result.verdict == "undecided"
    assert result.missing
    assert write_result(experiment, result, make_job(tmp_path))


def test_cifar_norm_trains_both_networks_of_each_pair(
    data: CifarData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_norm, "read_cifar", lambda folder, device: data)
    monkeypatch.setattr(cifar_norm, "SEEDS", (0,))
    monkeypatch.setattr(cifar_norm, "PAIRS", [replace(pair, epochs=1) for pair in cifar_norm.PAIRS])
    cifar_norm.train(make_job(tmp_path))
    records = cifar.read_records(tmp_path)
    assert {r.training.network: r.epochs for r in records} == dict.fromkeys(cifar.NETWORKS, 1)
    assert all(record.test_error is not None for record in records)
    assert cifar_norm.conclude(tmp_path).missing == []


def test_cifar_norm_pairs_by_seed(tmp_path: Path) -> None:
    without, with_norm = [0.20, 0.22, 0.21], [0.19, 0.20, 0.195]
    for name, errors in (("19pct", without), ("18pct", with_norm)):
        for seed, error in enumerate(errors):
            save_record(tmp_path, Training(network=name, rate=0.001, seed=seed), [0.1], error)
    result = cifar_norm.conclude(tmp_path)
    interval = stats.ttest_rel(without, with_norm).confidence_interval(0.95)
    row = result.tables[0].rows[0]
    assert (row[4], row[5]) == pytest.approx((0.015, (interval.high - interval.low) / 2), abs=5e-5)
    assert row[7] == "agrees"
    assert result.verdict == "undecided"  # the paper's claim is about the other pair
    assert [text.partition(":")[0] for text in result.missing] == ["conv-local-13pct", "conv-local-11pct"]


def test_cifar_norm_does_not_ask_again_for_what_diverged(tmp_path: Path) -> None:
    for seed in range(3):
        save_record(tmp_path, Training(network="conv-local-13pct", rate=0.001, seed=seed), [0.1], 0.2 + seed / 1000)
        errors, test_error = ([0.1], 0.1) if seed else ([0.9, math.nan], None)
        save_record(tmp_path, Training(network="conv-local-11pct", rate=0.001, seed=seed), errors, test_error)
    result = cifar_norm.conclude(tmp_path)
    assert [text.partition(":")[0] for text in result.missing] == ["19pct", "18pct"]
    assert result.finding.endswith(" Diverged: conv-local-11pct seed 0.")
    assert result.verdict == "undecided"  # though the other two seeds agree
    assert "(2 seeds;" in result.finding


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten classes of drawn images, with the experiment's numbers cut down to them."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label in range(10):
            folder = tmp_path / "cifar" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = random.integers(0, 40, (32, 32, 3)) + 20 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
    monkeypatch.setattr(cifar, "COUNTS", (10, 80, 20))
    monkeypatch.setattr(figure_1, "SEARCH_EPOCHS", 1)
    monkeypatch.setattr(figure_1, "RATES", (0.001,))
    monkeypatch.setattr(figure_1, "ACTIVATIONS", ("relu", "tanh"))
    monkeypatch.setattr(figure_1, "WHOLE", figure_1.Goal(2.0, 1))  # reached at once
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cifar"


def test_reproduce_writes_page_tables_and_charts(small_cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce("figure-1", small_cifar, json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "alexnet.reproduce/1"
    assert (result["verdict"], result["missing"]) == ("undecided", [])  # equal speed
    folder = Path("runs/figure-1")
    assert {"index.html", "result.json", "curves.csv", "epochs.csv", "chart.svg"} <= {p.name for p in folder.iterdir()}
    assert len((folder / "curves.csv").read_text().splitlines()) == 1 + 2 * 3 * 5  # activations, seeds, fifths
    assert figure_1.FIGURE_1.claim in (folder / "index.html").read_text()


def test_reproduce_stopped_says_what_is_missing(
    small_cifar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = cifar.continue_training

    def stop(training: Training, data: CifarData, job: Job, *args: Any) -> TrainingRecord:
        signal.raise_signal(signal.SIGTERM)
        while job.stop() is None:  # the main thread notices
            time.sleep(0.01)
        return real(training, data, job, *args)

    monkeypatch.setattr(cifar, "continue_training", stop)
    with pytest.raises(Stopped, match="SIGTERM"):
        reproduce("figure-1", small_cifar)
    assert "missing relu: seed 0, 1, 2" in capsys.readouterr().err


def measure_shares(weight: filters.Kernels) -> towers.ColorShares:
    first, second = filters.measure_live_chroma(filters.split_towers(weight, 2))
    return first, second


def test_the_separation_of_one_run_is_that_of_the_filters() -> None:
    random = np.random.default_rng(0)
    gray = random.normal(size=(48, 1, 11, 11)).repeat(3, axis=1) + random.normal(0, 0.8, (48, 3, 11, 11))
    weight = np.concatenate([random.normal(size=(48, 3, 11, 11)), gray]).astype(np.float32)
    weak = np.concatenate([weight[:44], weight[48:52], weight[44:48], weight[52:]])[random.permutation(96)]
    for mixed in (weight, weak):
        measured = filters.measure_specialization(filters.split_towers(mixed, 2))
        separation = towers.measure_separation([measure_shares(mixed)])
        assert separation.aucs == [measured.auc]
        assert separation.p_value == pytest.approx(measured.p_value, abs=0.02)
    both = towers.measure_separation([measure_shares(weight), measure_shares(weak)])
    assert both.mean == pytest.approx(np.mean(both.aucs))
    assert towers.measure_separation([measure_shares(weak)]).limit > both.limit > 0.5  # more seeds see smaller effects


def test_equal_colors_separate_no_towers() -> None:
    """48 equal filters, 48 others: the order of equal ones must not count."""
    weight = np.random.default_rng(0).normal(size=(96, 3, 11, 11)).astype(np.float32)
    weight[24:72] = weight[0]
    separation = towers.measure_separation([measure_shares(weight)])
    expected = stats.mannwhitneyu(*measure_shares(weight))
    assert separation.p_value == pytest.approx(expected.pvalue, abs=0.02)
    same = towers.measure_separation([measure_shares(np.repeat(weight[:1], 96, axis=0))])
    assert (same.aucs, same.p_value, same.limit) == ([0.5], 1, 0.5)


def test_dead_filters_are_left_out() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(96, 3, 11, 11)).astype(np.float32)
    weight[:10] = random.normal(size=(10, 1, 11, 11)) * 1e-3  # dead and gray
    separation = towers.measure_separation([measure_shares(weight)])
    assert separation.aucs == [filters.measure_specialization(filters.split_towers(weight, 2)).auc]


def test_towers_agree_only_if_every_seed_does() -> None:
    def separate(p_values: list[float], p_value: float) -> towers.Separation:
        return towers.Separation([0.7] * len(p_values), p_values, 0.7, p_value, 0.58)

    cases = [
        ([0.01, 0.01, 0.01], 0.001, "agrees"), ([0.01, 0.01, 0.6], 0.001, "undecided"),
        ([0.2, 0.3, 0.6], 0.2, "disagrees"), ([0.01, 0.01], 0.001, "undecided"),
    ]  # fmt: skip
    for p_values, p_value, verdict in cases:
        assert towers.judge_separation({"base": separate(p_values, p_value)})[0] == verdict


def create_run(folder: Path, recipe: Recipe) -> Run:
    about = {"devices": ["a CPU"], "precision": "fp32", "versions": dict.fromkeys(("alexnet", "python", "torch"), "1")}
    return Run.create(f"base-seed{recipe.seed}", recipe, about, folder)


@pytest.mark.parametrize("module", [towers, ablation])
def test_a_run_that_diverged_is_not_missing(module: ModuleType, tmp_path: Path) -> None:
    run = create_run(tmp_path, module.RECIPE)
    before = module.conclude(tmp_path)
    run.update({"status": "failed", "reason": study.DIVERGED})
    after = module.conclude(tmp_path)
    assert (before.missing[0], after.missing[0]) == ("base: 3 of 3 seeds", "base: 2 of 3 seeds")
    assert (before.finding.count("Diverged"), after.finding.count("Diverged: base seed 0.")) == (0, 1)
    assert after.verdict == "undecided"


def test_one_view_is_compared_with_ten_views_of_the_same_runs(tmp_path: Path) -> None:
    one_view, ten_views = [0.30, 0.32, 0.31], [0.28, 0.29, 0.285]
    for seed, one in enumerate(one_view):
        run = create_run(tmp_path, replace(ablation.RECIPE, seed=seed))
        run.log({"event": "validation", "epoch": 30, "step": 1, "top1_error": one, "top5_error": one / 5})
        run.update({"status": "finished"})
        assert "one-view: 3 of 3 seeds" in ablation.conclude(tmp_path).missing
    for seed, ten in enumerate(ten_views):
        file = tmp_path / f"base-seed{seed}" / study.TEN_VIEWS
        file.write_text(json.dumps({"top1_error": ten, "top5_error": ten / 5}))
    result = ablation.conclude(tmp_path)
    row = dict(zip(result.chart.data.headings, result.chart.data.rows[-1], strict=True))
    interval = stats.ttest_rel(one_view, ten_views).confidence_interval(0.95)
    assert (row["switch"], row["seeds"], row["top-1 error"], row["verdict"]) == ("one-view", 3, 0.31, "agrees")
    assert (row["difference"], row["±"]) == pytest.approx((0.025, (interval.high - interval.low) / 2), abs=5e-5)
    assert not [text for text in result.missing if text.startswith(("base", "one-view"))]


def make_row(switch: study.Switch, top1: list[float], training: list[float]) -> Row:
    gaps = [a - b for a, b in zip(top1, training, strict=True)]
    differences = (estimate_mean(top1), None, estimate_mean(training), estimate_mean(gaps))
    return Row(switch, (0, 1, 2), (), 30, None, None, None, None, *differences, None, ())


def test_each_claim_is_judged_by_what_the_paper_says_to_rise() -> None:
    switches = {switch.name: switch for switch in study.SWITCHES}
    higher, lower = [0.01, 0.011, 0.012], [-0.02, -0.021, -0.022]
    for top1, training, verdicts in (
        (higher, lower, ("agrees", "agrees", "disagrees")),
        (lower, higher, ("disagrees", "disagrees", "agrees")),
        (lower, [2 * value for value in lower], ("disagrees", "agrees", "disagrees")),
    ):
        names = ("no-norm", "no-dropout", "no-weight-decay")
        assert tuple(make_row(switches[name], top1, training).verdict for name in names) == verdicts


def test_all_claims_agree_or_one_disagrees() -> None:
    assert judge_all(["agrees", "agrees"]) == "agrees"
    assert judge_all(["agrees", None]) == judge_all(["agrees", "undecided"]) == judge_all([]) == "undecided"
    assert judge_all(["agrees", "disagrees", None]) == "disagrees"


def test_seeds_to_decide_give_an_interval_without_zero() -> None:
    row = make_row(next(s for s in study.SWITCHES if s.name == "no-norm"), [0.0, 0.01, 0.02], [0.0] * 3)
    seeds = ablation.count_seeds_to_decide(row)
    assert seeds is not None
    low = [0.01 - stats.t.ppf(0.975, n - 1) * 0.01 / n**0.5 for n in (seeds - 1, seeds)]
    assert low[0] <= 0 < low[1]


def compare_with_the_filters(folder: Path) -> None:
    """Every AUC of the chart is that of the filters which the runs keep."""
    lines = (folder / "auc.csv").read_text().splitlines()[1:]
    assert len(lines) == 2 * 2, "two conditions, before and after the only epoch"
    for condition, seed, epoch, auc in (line.split(",") for line in lines):
        weight = np.load(Run(folder / f"{condition}-seed{seed}").kept_filters[int(epoch)])
        assert float(auc) == pytest.approx(filters.compute_auc(*measure_shares(weight)), abs=1e-3)


def test_towers_and_ablation_train_what_is_missing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = replace(TINY, width=1 / 32, batch_size=16, epochs=1, precision="fp32")
    monkeypatch.setattr(study, "IMAGENETTE", (4, 48, 20))
    for module, switches in ((towers, "CONDITIONS"), (ablation, "CLAIMS")):
        monkeypatch.setattr(module, "RECIPE", small)
        monkeypatch.setattr(module, switches, getattr(module, switches)[:2])
        monkeypatch.setattr(module, "SEEDS", 1)
    for name, conditions in (("towers", 3), ("ablation", 3)):  # with the initial values, and with one view
        reproduce(name, prepared, json=True, quiet=True)
        result = json.loads(capsys.readouterr().out)
        assert result["missing"] == []
        rows = (Path("runs") / name / f"{name}.csv").read_text().splitlines()
        assert len(rows) == 1 + conditions
        if name == "towers":
            compare_with_the_filters(Path("runs") / name)
        before = {path: path.stat().st_mtime_ns for path in (Path("runs") / name).glob("base-seed0/**/*")}
        reproduce(name, prepared, quiet=True)
        capsys.readouterr()
        assert {path: path.stat().st_mtime_ns for path in (Path("runs") / name).glob("base-seed0/**/*")} == before


def test_reproduce_lists_the_experiments() -> None:
    listed = json.loads(alexnet("reproduce", "--json").stdout)["experiments"]
    assert [row["name"] for row in listed] == ["figure-1-short", "figure-1", "cifar-norm", "towers", "ablation"]


def test_reproduce_refuses_what_it_cannot_do(
    prepared: Path, small_cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no such experiment"):
        reproduce("figure1")
    with pytest.raises(UsageError, match="needs CIFAR-10"):
        reproduce("figure-1")
    with pytest.raises(DataError, match="is not Imagenette: it has 4 classes"):
        reproduce("towers", prepared)
    Path("runs/ablation").mkdir(parents=True)
    Path("runs/ablation/run.json").write_text("{}")
    with pytest.raises(UsageError, match="ablation is a run"):
        reproduce("ablation", prepared)
    monkeypatch.setattr(cifar, "COUNTS", (10, 50_000, 10_000))
    with pytest.raises(DataError, match="80 training and 20 test images, not 10 classes, 50,000"):
        reproduce("figure-1", small_cifar)
