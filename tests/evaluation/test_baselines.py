"""What guessing is worth where classes are not equal, and how a network that only guesses is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from alexnet_cli.core.evaluation import baselines
from alexnet_cli.core.intervals import wilson_interval


def test_equal_classes_are_guessed_as_ever() -> None:
    assert baselines.guessing_error(10) == pytest.approx(baselines.majority_error(np.full(10, 50)))
    assert baselines.format_baselines(0.9, 0.9) == "guessing: 90.0%"
    assert baselines.describe_no_better(0.9, 0.91, 0.9, 0.9) == "no better than guessing (90.0%)"
    assert baselines.describe_no_better(0.89, 0.91, 0.9, 0.9) == "not certainly better than guessing (90.0%)"
    assert baselines.describe_no_better(0.85, 0.89, 0.9, 0.9) == ""


def test_who_always_answers_the_commonest_class() -> None:
    labels = np.array([0] * 80 + [1] * 15 + [2] * 5)
    always = baselines.majority_error(baselines.count_images(labels, 3))
    assert always == pytest.approx(np.mean(labels != 0))
    assert baselines.format_baselines(2 / 3, always) == "guessing: 66.7%, always the most frequent class: 20.0%"
    totals = {"top1_error": 0.15, "chance_error": 2 / 3, "commonest_error": always}
    assert baselines.describe_totals(totals | {"top1_error_interval": (0.1, 0.3)}) == (
        "not certainly better than always predicting the most frequent class (20.0%)"
    )
    assert baselines.describe_totals(totals | {"top1_error_interval": (0.1, 0.19)}) == ""
    assert baselines.describe_no_better(0.5, 1.0, 0.5, 0.0) == "", (
        "where all pictures are of one class there is nothing to guess"
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("pictures", [[7, 7, 7, 7], [90, 8, 2, 0]])
def test_the_loss_of_one_answer_for_all(pictures: list[int], smoothing: float) -> None:
    """The lowest that gradient descent finds for logits that see no picture."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(pictures))
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = functional.cross_entropy(logits.expand(len(labels), 4), labels, label_smoothing=smoothing)
        found.backward()
        return found

    optimizer.step(loss)
    assert baselines.constant_loss(np.array(pictures), smoothing) == pytest.approx(loss().item(), abs=1e-4)
    if len(set(pictures)) == 1:
        assert baselines.constant_loss(np.array(pictures), smoothing) == pytest.approx(math.log(4))


def test_the_lowest_of_many_guesses_is_no_achievement() -> None:
    """Thirty epochs of pure guessing on 500 pictures, a thousand times."""
    errors = np.random.default_rng(0).binomial(500, 0.9, (1000, 30)).min(axis=1) / 500
    told = [baselines.bound_lowest_error(error, 500, 30) >= 0.9 for error in errors]
    alone = [wilson_interval(error, 500)[1] >= 0.9 for error in errors]
    assert np.mean(told) > 0.95
    assert np.mean(alone) < 0.8
    assert baselines.bound_lowest_error(0.85, 500, 1) == pytest.approx(wilson_interval(0.85, 500)[1], abs=1e-4)


@pytest.mark.parametrize(
    ("confusion", "said"),
    [
        ([[50, 0, 0], [9, 1, 0], [5, 0, 0]], "98.5% of the predictions are a, but only 76.9% of the images"),
        ([[0, 0, 10], [0, 0, 10], [0, 0, 0]], "100.0% of the predictions are c, but only 0.0% of the images"),
        ([[50, 0, 0], [8, 2, 0], [5, 0, 0]], ""),
        ([[900, 0, 0], [2, 8, 0], [2, 0, 8]], ""),  # nearly all answers are right
        ([[50, 0, 0], [0, 0, 0], [0, 0, 0]], ""),  # nothing else to be seen
    ],
)
def test_a_network_that_takes_nearly_everything_for_one_class(confusion: list[list[int]], said: str) -> None:
    told = baselines.describe_one_sided(np.array(confusion), "abc")
    assert told.partition(": ")[0] == said
