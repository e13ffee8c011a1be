"""The history of a training, read from records that may hold anything."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from alexnet_cli.core.report.history import read_history
from report_cases import RECIPE

HUGE = int("9" * 400)


def steps(per_epoch: int, epochs: int, every: int = 10) -> list[dict[str, Any]]:
    """Records as a training leaves them: each so many steps, and at the end of each epoch; noise for losses."""
    generator, found = np.random.default_rng(0), [{"event": "start", "steps_per_epoch": per_epoch}]
    for epoch in range(epochs):
        for end in [*range(every, per_epoch, every), per_epoch]:
            count = end % every or every
            loss = float(generator.normal(3, 1 / np.sqrt(count)))
            found.append({"event": "step", "step": epoch * per_epoch + end, "loss": loss, "lr": 0.1**epoch})
    return found


@pytest.mark.parametrize("rest", [1, 4, 5, 9, 10])
@pytest.mark.parametrize("epochs", [1, 3, 90])
def test_no_point_is_a_mean_over_few_steps(rest: int, epochs: int) -> None:
    history = read_history(steps(70 + rest, epochs), RECIPE)
    places = [round(at * (70 + rest)) for at, _ in history.step_curve("loss")]
    sizes = np.diff([0, *places])
    assert len(sizes) <= 200
    assert places[-1] == epochs * (70 + rest)
    assert sizes.min() >= 5
    assert sizes.max() <= 4 * sizes.min()


def test_curves_are_thinned_without_changing_their_mean() -> None:
    records: list[dict[str, Any]] = [{"event": "start", "steps_per_epoch": 10_000}]
    losses = np.random.default_rng(0).normal(3, 1, 5000)
    records += [{"event": "step", "step": 10 * i + 10, "loss": float(v)} for i, v in enumerate(losses)]
    curve = read_history(records, RECIPE).step_curve("loss")
    assert len(curve) == 200
    assert curve[-1][0] == 5
    assert np.mean([v for _, v in curve]) == pytest.approx(losses.mean())


def test_the_rate_curve_has_only_rates_that_were_used() -> None:
    rates = [rate for _, rate in read_history(steps(10_010, 3), RECIPE).rate_curve()]
    assert sorted(set(rates)) == pytest.approx([0.01, 0.1, 1])


@pytest.mark.parametrize("value", [None, True, "1", [], HUGE, float("nan"), 1e300])
@pytest.mark.parametrize("key", ["epoch", "step", "steps_per_epoch", "loss", "lr", "top1_error", "images_per_second"])
def test_values_that_are_not_numbers_are_skipped(key: str, value: Any) -> None:
    good = {"epoch": 1, "step": 20, "steps_per_epoch": 20, "loss": 1.0, "lr": 0.1, "top1_error": 0.5}
    good |= {"images_per_second": 40.0}
    records = [{**good, "event": event, key: value} for event in ("start", "step", "validation")]
    history = read_history(json.loads(json.dumps(records)), RECIPE)
    for column in ("loss", "lr", "top1_error"):
        for curve in (history.epoch_curve(column), history.step_curve(column)):
            assert np.isfinite(np.array(curve).astype(float)).all()
    assert history.seconds in (None, pytest.approx(4))
    assert history.speed in (None, 40)
    assert history.best is None or history.best["top1_error"] == 0.5
