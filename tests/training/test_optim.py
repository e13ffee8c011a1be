"""Section 5: the update rule against the formula by hand and against torch.optim; the schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from alexnet_cli.core.training.optim import PaperSGD, Schedule
from alexnet_cli.recipe import FAST, KRIZHEVSKY, PAPER, Recipe


def run(recipe: Recipe, rates: list[float], name: str = "fc6.weight", epoch: int = 1) -> list[float]:
    """One scalar parameter, starting at 2, with gradients 1, 2, 3, ...: its values after each step."""
    w = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = PaperSGD([(name, w)], recipe)
    values = []
    for i, rate in enumerate(rates):
        w.grad = torch.tensor([i + 1.0], dtype=torch.float64)
        optimizer.step(rate, epoch)
        values.append(w.item())
    return values


def by_hand(rates: list[float], momentum: float = 0.9, decay: float = 0.0005) -> list[float]:
    """The two lines of section 5."""
    w, v, values = 2.0, 0.0, []
    for i, rate in enumerate(rates):
        v = momentum * v - decay * rate * w - rate * (i + 1.0)
        w = w + v
        values.append(w)
    return values


RATES = [0.01, 0.01, 0.01, 0.001, 0.001, 0.0001]


def test_update_rule_over_rate_changes() -> None:
    assert run(PAPER, RATES) == pytest.approx(by_hand(RATES), rel=1e-12)


def test_update_rule_is_torchs_while_the_rate_stands_and_not_after() -> None:
    w = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    stock = torch.optim.SGD([w], lr=0.01, momentum=0.9, weight_decay=0.0005)
    theirs = []
    for i, rate in enumerate(RATES):
        stock.param_groups[0]["lr"] = rate
        w.grad = torch.tensor([i + 1.0], dtype=torch.float64)
        stock.step()
        theirs.append(w.item())
    ours = run(PAPER, RATES)
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-12)
    assert abs(ours[3] - theirs[3]) > 0.01


def test_biases_of_the_authors_code() -> None:
    """Twice the rate, never dropped, no decay."""
    assert run(KRIZHEVSKY, RATES, "fc6.bias") == pytest.approx(by_hand([0.02] * 6, decay=0), rel=1e-12)
    assert run(PAPER, RATES, "fc6.bias") == pytest.approx(by_hand(RATES), rel=1e-12)


@pytest.mark.parametrize(("epoch", "factor"), [(67, 1.0), (68, 0.1), (72, 0.1)])
def test_layer_1_is_slowed(epoch: int, factor: float) -> None:
    slowed = [rate * factor for rate in RATES]
    assert run(KRIZHEVSKY, RATES, "conv1.weight", epoch) == pytest.approx(by_hand(slowed), rel=1e-12)
    assert run(KRIZHEVSKY, RATES, "conv1.bias", epoch) == run(KRIZHEVSKY, RATES, "conv1.bias", 1)  # as the log has it


def test_layer_1_is_frozen_decay_and_all() -> None:
    assert run(KRIZHEVSKY, RATES, "conv1.weight", epoch=73) == [2.0] * 6
    assert run(KRIZHEVSKY, RATES, "conv1.bias", epoch=73) == [2.0] * 6
    assert run(PAPER, RATES, "conv1.weight", epoch=73) != [2.0] * 6


def test_fixed_schedule_of_the_authors() -> None:
    schedule = Schedule(KRIZHEVSKY, steps_per_epoch=10)
    rates = {epoch: schedule.learning_rate((epoch - 1) * 10) for epoch in (1, 25, 26, 51, 52, 79, 80, 91)}
    assert rates == pytest.approx(
        {1: 1e-2, 25: 1e-2, 26: 1e-3, 51: 1e-3, 52: 1e-4, 79: 1e-4, 80: 1e-5, 91: 1e-5}, rel=1e-9
    )


def test_plateau_drops_three_times_then_ends() -> None:
    recipe = replace(PAPER, plateau_epochs=2)
    schedule = Schedule(recipe, steps_per_epoch=5)
    rates, errors = [], [0.9, 0.8, 0.7, 0.7, 0.71, 0.6, 0.65, 0.6, 0.7, 0.7, 0.7, 0.7, 0.1]
    for error in errors:
        if schedule.is_finished:
            break
        rates.append(schedule.learning_rate(0))
        schedule.observe(error)
    assert rates == pytest.approx([1e-2] * 5 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2)
    assert schedule.is_finished
    assert schedule.best_error == 0.6


def test_schedule_goes_on_from_its_state() -> None:
    first = Schedule(PAPER, 5)
    for error in (0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.55):
        first.observe(error)
    second = Schedule(PAPER, 5)
    second.restore(first.state())
    assert second == first
    assert second.learning_rate(0) == pytest.approx(1e-3)


def test_one_cycle_rises_falls_and_never_jumps() -> None:
    schedule = Schedule(replace(FAST, epochs=10, learning_rate=1.0), steps_per_epoch=100)
    rates = [schedule.learning_rate(step) for step in range(1001)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(abs(b - a) for a, b in pairwise(rates)) < 0.02
    assert 0 < rates[-1] < 0.01
    assert math.isfinite(schedule.learning_rate(5000))
