"""Section 6: errors against hand-counted ones, ten views against their average, classes matched by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.loader import Batch
from alexnet_cli.core.evaluation.evaluate import (
    Evaluation,
    TorchClassifier,
    evaluate,
    match_classes,
    rank_classes,
    to_gray,
)
from alexnet_cli.core.intervals import wilson_interval
from alexnet_cli.core.model.network import Network, initialize
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.errors import DataError
from alexnet_cli.recipe import FAST

CPU = Placement(torch.device("cpu"), "CPU", "fp32")


def test_errors_are_counted_by_hand() -> None:
    p = np.array(
        [
            [0.30, 0.25, 0.20, 0.10, 0.08, 0.05, 0.02],  # class 0: right
            [0.30, 0.25, 0.20, 0.10, 0.08, 0.05, 0.02],  # class 4: among the five
            [0.30, 0.25, 0.20, 0.10, 0.08, 0.05, 0.02],  # class 5: the sixth
            [0.02, 0.05, 0.08, 0.10, 0.20, 0.25, 0.30],  # class 6: right
        ],
        dtype=np.float32,
    )
    counts = Evaluation.empty(7)
    counts.add(p[:3], np.array([0, 4, 5]))
    counts.add(p[3:], np.array([6]))
    assert (counts.images, counts.top1_error, counts.top5_error) == (4, 0.5, 0.25)
    assert counts.loss == pytest.approx(-np.log([0.3, 0.08, 0.05, 0.3]).mean(), rel=1e-6)
    assert counts.confusion[4, 0] == counts.confusion[5, 0] == counts.confusion[0, 0] == counts.confusion[6, 6] == 1
    assert counts.confusion.sum() == 4


def test_what_a_notebook_shows() -> None:
    assert repr(Evaluation.empty(2)) == "<Evaluation of 0 images>"
    shown = repr(Evaluation(np.array([[3, 1], [0, 4]]), np.array([4, 4])))
    assert shown == "<Evaluation of 8 images: top-1 error 12.5%, top-5 error 0.0%>"


def test_a_network_that_says_the_same_of_everything_is_wrong_most_of_the_time() -> None:
    """Equal probabilities must not count as right for every class."""
    counts = Evaluation.empty(10)
    counts.add(np.full((10, 10), 0.1, np.float32), np.arange(10))
    assert counts.top1_error == pytest.approx(0.9)
    assert counts.top5_error == pytest.approx(0.5)


def test_ranking_of_few_classes() -> None:
    assert rank_classes(np.array([[0.2, 0.7, 0.1]], np.float32), 5).tolist() == [[1, 0, 2]]


def test_ranking_is_that_of_a_stable_sort() -> None:
    """With many equal values, which keep the order of the classes."""
    table = np.random.default_rng(0).integers(0, 12, (40, 1000)).astype(np.float32)
    before = table.copy()
    np.testing.assert_array_equal(rank_classes(table, 5), np.argsort(-table, axis=1, kind="stable")[:, :5])
    np.testing.assert_array_equal(table, before)
    assert rank_classes(table[:0], 5).shape == (0, 5)


def classifier(views: int) -> TorchClassifier:
    recipe = replace(FAST, width=1 / 16)
    network = Network(recipe, 5)
    initialize(network)
    mean = np.full((3, 256, 256), 120, np.float32)
    return TorchClassifier(network, Augment(recipe, mean, None, None, CPU.device), CPU, views)


def test_gray_is_pillows() -> None:
    levels = np.array([0, 1, 2, 84, 127, 128, 171, 254, 255], np.uint8)
    pixels = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, 27, 27, 3)
    noise = np.random.default_rng(0).integers(0, 256, (3, 27, 27, 3), np.uint8)
    images = np.concatenate([pixels, noise])
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L").convert("RGB")) for image in images])
    np.testing.assert_array_equal(to_gray(torch.from_numpy(images)).numpy(), expected)


def test_ten_views_average_probabilities_not_logits() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8))
    ten = classifier(10)
    ten.network.eval()
    with torch.no_grad():
        each = [torch.softmax(ten.network(view), 1).numpy() for view in ten.augment.ten_views(images)]
    np.testing.assert_allclose(ten(images), np.mean(each, axis=0), atol=1e-6)
    np.testing.assert_allclose(ten(images).sum(1), 1, atol=1e-5)
    assert not np.allclose(ten(images), classifier(1)(images), atol=1e-6)


def test_training_mode_is_put_back() -> None:
    one = classifier(1)
    one.network.train()
    one(torch.zeros(1, 256, 256, 3, dtype=torch.uint8))
    assert one.network.training


A, B, C = ClassName("cat", "n01"), ClassName("dog", "n02"), ClassName("fox", None)


def batch(labels: list[int]) -> Batch:
    return Batch(torch.zeros(len(labels), 256, 256, 3, dtype=torch.uint8), torch.tensor(labels), np.arange(len(labels)))


def test_a_permuted_class_list_changes_nothing() -> None:
    table = np.eye(3, dtype=np.float32)[[0, 1, 1]] * 0.6 + 0.1
    model = (A, B, C)
    assert match_classes(model, (A, B, C), Path("m")) is None
    plain, permuted = Evaluation.empty(3), Evaluation.empty(3)
    assert len(list(evaluate(lambda _: table, [batch([0, 1, 2])], plain))) == 1
    permuted_classes = (C, A, B)
    output_of = match_classes(model, permuted_classes, Path("m"))
    assert output_of is not None
    labels = [permuted_classes.index(c) for c in model]
    assert len(list(evaluate(lambda _: table, [batch(labels)], permuted, output_of))) == 1
    np.testing.assert_array_equal(plain.confusion, permuted.confusion)
    assert plain.top1_error == permuted.top1_error == pytest.approx(1 / 3)


def test_a_subset_matches_and_an_unknown_class_is_an_error() -> None:
    subset = match_classes((A, B, C), (B,), Path("m"))
    assert subset is not None
    assert subset.tolist() == [1]
    renamed = match_classes((A, B), (ClassName("chien", "n02"), A), Path("m"))
    assert renamed is not None
    assert renamed.tolist() == [1, 0]
    with pytest.raises(DataError, match="such as wolf"):
        match_classes((A, B), (A, ClassName("wolf", "n03")), Path("m"))


@pytest.mark.parametrize(
    ("error", "images", "low", "high"), [(0.0, 300, 0.0, 0.0126), (0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0)]
)
def test_intervals_are_wilsons(error: float, images: int, low: float, high: float) -> None:
    """Values of the textbook formula, worked out elsewhere."""
    assert wilson_interval(error, images) == pytest.approx((low, high), abs=5e-4)
