"""The drawing of the network (figure 2 of the paper) in the report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core.model.architecture import layer_specs
from alexnet_cli.core.report.charts import draw_charts, draw_network
from alexnet_cli.core.report.history import read_history
from alexnet_cli.recipe import PAPER

DRAW = """
from alexnet_cli.core.model.architecture import layer_specs
from alexnet_cli.core.report.charts import draw_network
from alexnet_cli.recipe import PAPER
print(draw_network(PAPER, layer_specs(PAPER, 1000)).svg)
"""


@pytest.mark.parametrize(("towers", "boxes", "crossing"), [(2, 2, 6), (1, 1, 0)])
def test_the_drawing_has_the_towers_and_where_they_meet(towers: int, boxes: int, crossing: int) -> None:
    recipe = replace(PAPER, towers=towers)
    specs = layer_specs(recipe, 1000)
    chart = draw_network(recipe, specs)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
    assert texts.count("48 maps 55×55") == texts.count("192 maps 13×13") / 2 == boxes
    assert texts.count("1,000 classes") == texts.count("3 colors 224×224") == 1
    assert chart.svg.count("stroke-dasharray") == 2 * crossing, "the line of an arrow, and its head"
    assert ("two towers" in chart.alt) is (towers == 2)
    assert draw_network(recipe, specs) == chart, "to the byte"


@pytest.mark.parametrize(
    ("cross_talk", "crossing", "meeting"),
    [(("conv2", "conv4"), 4, "conv2, conv4 and fc8"), (("fc7",), 2, "fc7 and fc8"), ((), 0, "fc8")],
)
def test_the_drawing_shows_cross_talk(cross_talk: tuple[Any, ...], crossing: int, meeting: str) -> None:
    recipe = replace(PAPER, cross_talk=cross_talk)
    chart = draw_network(recipe, layer_specs(recipe, 1000))
    assert chart.svg.count("stroke-dasharray") == 2 * crossing
    assert chart.alt.endswith(f"; each layer reads its own tower, and the towers meet in {meeting}.")
    assert chart.point == f"The towers meet in {meeting}."
    assert ("Dashed" in chart.caption) is bool(cross_talk)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_users_settings_backend_and_home_do_not_count(tmp_path: Path, encoding: str) -> None:
    settings = "text.usetex: True\nlines.linewidth: 9\nbackend: none"
    (tmp_path / "matplotlibrc").write_text(settings, encoding=encoding)
    expected = draw_network(PAPER, layer_specs(PAPER, 1000)).svg
    odd = os.environ | {"MPLBACKEND": "module://no_such.backend", "MATPLOTLIBRC": str(tmp_path), "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", DRAW], env=odd, capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().strip() == expected.strip()
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("errors", "point"),
    [
        ([0.5, 0.3, 0.4], "Validation error (center view) stopped falling at epoch 2: 30.0%."),
        ([0.5, 0.4, 0.3], "Validation error (center view) is at its lowest after epoch 3: 30.0%."),
        ([0.3, 0.5, 0.4], "Validation error (center view) never fell below that of epoch 1: 30.0%."),
        ([0.3], "Validation error (center view) is 30.0% after epoch 1."),
        ([], "No epoch has been validated yet."),
    ],
)
def test_a_caption_begins_with_what_the_curve_shows(errors: list[float], point: str) -> None:
    steps: list[dict[str, object]] = [{"event": "step", "step": 1, "top1_error": 0.9}]
    epochs = [{"event": "validation", "epoch": i, "top1_error": error} for i, error in enumerate(errors, 1)]
    assert draw_charts(read_history(steps + epochs, PAPER))["errors"].point == point


@pytest.mark.parametrize(
    ("rates", "schedule", "point"),
    [
        ([0.01, 0.03, 0.002], "one-cycle", "The learning rate peaks at 0.03 in epoch 2, then falls to 0.002."),
        ([0.01, 0.01, 0.001], "fixed", "The learning rate drops after epoch 2, from 0.01 to 0.001."),
        ([0.01, 0.01, 0.01], "fixed", "The learning rate stays at 0.01."),
    ],
)
def test_the_caption_of_the_learning_rate(rates: list[float], schedule: str, point: str) -> None:
    records: list[dict[str, object]] = [{"event": "start", "step": 0, "steps_per_epoch": 10}]
    for epoch, rate in enumerate(rates, 1):
        records.append({"event": "step", "epoch": epoch, "step": 10 * epoch, "lr": rate})
        records.append({"event": "validation", "epoch": epoch, "lr": rate})
    recipe = PAPER if schedule == "fixed" else replace(PAPER, schedule="one-cycle")
    assert draw_charts(read_history(records, recipe))["rate"].point == point
