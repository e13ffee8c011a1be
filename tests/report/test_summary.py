"""The sentences at the top of the report say what the numbers support, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from alexnet_cli.core.analysis.filters import measure_specialization
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.evaluation.results import summarize
from alexnet_cli.core.evaluation.towers import CONDITIONS, ClassNeed, TowerCounts, TowerTable
from alexnet_cli.core.report.collect import Measurements, OpenedModel, Report, collect_report
from alexnet_cli.core.report.summary import PAPER_ERROR, summarize_report
from alexnet_cli.recipe import PAPER
from model_files import random_model

CLASSES = tuple(ClassName(name) for name in ("car", "dog", "fish", "tree", "house", "boat"))
AS_IN_THE_PAPER = f"{PAPER_ERROR} There, one tower learned color in every run, as here; one run does not settle it."


def make_report(confusion: np.ndarray | None = None) -> Report:
    """The report of a network with random weights; `confusion` is what it answers."""
    model = replace(random_model(replace(PAPER, width=1 / 32), len(CLASSES)), classes=CLASSES)
    found = collect_report(None, OpenedModel(model, ""), "none")
    if confusion is None:
        return found
    counts = Evaluation(confusion, confusion.sum(axis=1))
    return replace(found, measurements=Measurements(((summarize(counts, 1, "torch"), counts),)))


def make_filters(generator: np.random.Generator, share: float) -> np.ndarray:
    """Smooth filters, 24 x 3 x 11 x 11, with this much color noise on gray gratings."""
    phase = generator.uniform(0, 6, (24, 1, 1, 1))
    wave = np.sin(np.arange(11)[:, None] + phase) * np.ones((24, 1, 1, 11))
    color = generator.normal(size=(24, 3, 1, 1)) * np.ones((1, 1, 11, 11))
    return (wave + share * color).astype(np.float32)


def make_table(right: np.ndarray, seed: int = 0) -> TowerTable:
    """The comparison of towers that are right on this share of the images of each class, networks x classes.

    Wrong answers are spread over the other classes.
    """
    generator, counts, per_class = np.random.default_rng(seed), TowerCounts.empty(len(CLASSES)), 100
    labels = np.repeat(np.arange(len(CLASSES)), per_class)
    hits = []
    for row, condition in enumerate(CONDITIONS):
        is_right = generator.random(len(labels)) < right[row % 3][labels]
        wrong = (labels + generator.integers(1, len(CLASSES), len(labels))) % len(CLASSES)
        np.add.at(counts.evaluations[condition].confusion, (labels, np.where(is_right, labels, wrong)), 1)
        hits.append(is_right)
    counts.right.append(np.stack(hits))
    counts.labels.append(labels)
    return TowerTable.from_record(counts.make_record(CLASSES, 1, {}))


def test_without_numbers_there_are_no_sentences() -> None:
    assert summarize_report(replace(make_report(), specialization=None)) == []


def test_the_error_is_explained_and_compared_with_guessing() -> None:
    [text, *_] = summarize_report(make_report(np.diag([5] * 6) + 1))
    assert text == (
        "The network gets 45.5% of the 66 validation images wrong (top-1 error, center view; guessing: 83.3%). "
        "For 0.0%, the right class is not among the five most probable ones (top-5 error)."
    )
    [text, *_] = summarize_report(make_report(np.eye(6, dtype=np.int64)[[0] * 6] * 9))
    assert "This is no better than guessing (83.3%)." in text
    assert "100.0% of the predictions are car, but only 16.7% of the images" in text


@pytest.mark.parametrize("swapped", [False, True])
def test_the_tower_with_more_color_is_named(swapped: bool) -> None:
    generator = np.random.default_rng(1)
    gray, color = make_filters(generator, 0.1), make_filters(generator, 2)
    measured = measure_specialization((color, gray) if swapped else (gray, color))
    towers, paper = summarize_report(replace(make_report(), specialization=measured))
    assert towers.startswith(f"Tower {2 - swapped} has more color in its first-layer filters than tower {1 + swapped}:")
    assert f"a color share of {max(measured.means):.2f} against {min(measured.means):.2f} (" in towers
    assert paper == AS_IN_THE_PAPER


def test_towers_that_do_not_differ_or_are_not_trained_have_no_color() -> None:
    generator = np.random.default_rng(2)
    alike = measure_specialization((make_filters(generator, 1), make_filters(generator, 1)))
    [text] = summarize_report(replace(make_report(), specialization=alike))
    assert text.endswith("here, they differ by no more than chance.")
    noise = generator.normal(size=(2, 24, 3, 11, 11)).astype(np.float32)
    noise[1] += 0.5 * noise[1].mean(axis=1, keepdims=True)
    [text] = summarize_report(replace(make_report(), specialization=measure_specialization(tuple(noise))))
    assert text.startswith("The first-layer filters still look like their random initial values")


def test_classes_are_named_if_each_tower_alone_is_better_than_guessing() -> None:
    whole, first, second = np.full(6, 0.9), np.full(6, 0.5), np.full(6, 0.5)
    first[[0, 1]], second[3] = 0.9, 0.95
    found = replace(make_report(), specialization=None)
    measured = [Measurements(towers=make_table(np.stack([whole, first, tower]))) for tower in (second, second / 10)]
    texts = [summarize_report(replace(found, measurements=table)) for table in measured]
    assert texts[0] in (["Tower 1 matters more for dog and car, tower 2 for tree."],
                        ["Tower 1 matters more for car and dog, tower 2 for tree."])  # fmt: skip
    assert texts[1] == []


@pytest.mark.parametrize(
    ("interval", "answers", "tower"),
    [
        ((0.11, 0.3), (50, 60, 40), 1),
        ((-0.3, -0.11), (50, 60, 40), 2),
        ((0.09, 0.3), (50, 60, 40), None),
        ((-0.3, 0.1), (50, 60, 40), None),
        ((0.11, 0.3), (50, 101, 40), None),
        ((-0.3, -0.11), (50, 101, 40), 2),
    ],
)
def test_a_class_needs_a_tower_that_does_not_give_its_answer_all_the_time(
    interval: tuple[float, float], answers: tuple[int, ...], tower: int | None
) -> None:
    need = ClassNeed(0, "", "car", 50, [0.1] * 6, [*answers, 0, 0, 0], sum(interval) / 2, interval)
    assert need.needed_tower == tower
