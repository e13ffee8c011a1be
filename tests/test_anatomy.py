"""The layers as the report tells them: the paper's numbers, whatever the recipe changes, and the drawing of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from alexnet_cli.core.anatomy import Layer, layers
from alexnet_cli.core.report_charts import draw_network
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, Recipe

NORM, POOL = "normalisation across 5 maps", "pooling 3×3 / 2"


def sides(recipe: Recipe) -> list[int | None]:
    """Those of the maps of convolutions, each with that after pooling where it is pooled."""
    found = [(layer.side, layer.pooled) for layer in layers(recipe, 10) if layer.kernel]
    return [side for pair in found for side in pair if side]


def then(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """What follows each layer."""
    return {layer.name: layer.then for layer in layers(recipe, 10)}


@pytest.mark.parametrize("recipe", [PAPER, KRIZHEVSKY, CAFFE])
def test_it_is_the_network_of_the_paper(recipe: Recipe) -> None:
    found = layers(recipe, 1000)
    assert sum(layer.parameters for layer in found) == 60_965_224
    assert sum(layer.weights for layer in found) == 60_954_656
    told = {
        "conv1": (48, 3, False, 34_944, 105_415_200), "conv2": (128, 48, False, 307_456, 223_948_800),
        "conv3": (192, 256, True, 885_120, 149_520_384), "conv4": (192, 192, False, 663_936, 112_140_288),
        "conv5": (128, 192, False, 442_624, 74_760_192), "fc6": (2048, 9216, True, 37_752_832, 37_748_736),
        "fc7": (2048, 4096, True, 16_781_312, 16_777_216), "fc8": (1000, 4096, True, 4_097_000, 4_096_000),
    }  # fmt: skip
    for layer in found:
        this = (layer.units, layer.inputs, layer.meets, layer.parameters, layer.multiplications)
        assert this == told[layer.name], layer.name
    assert [(layer.kernel, layer.stride) for layer in found] == [(11, 4), (5, 1), *[(3, 1)] * 3, *[(None, None)] * 3]
    assert sides(recipe) == [55, 27, 27, 13, 13, 13, 13, 6]


def test_one_tower_and_other_widths() -> None:
    one = layers(replace(PAPER, towers=1), 1000)
    assert sum(layer.parameters for layer in one) == 59_798_312
    assert not any(layer.meets for layer in one)
    assert [layer.units for layer in layers(replace(PAPER, width=0.25), 7)] == [12, 32, 48, 48, 32, 512, 512, 7]


def test_what_follows_is_what_the_recipe_says() -> None:
    assert then(PAPER) == {
        "conv1": ("ReLU", NORM, POOL), "conv2": ("ReLU", NORM, POOL), "conv3": ("ReLU",), "conv4": ("ReLU",),
        "conv5": ("ReLU", POOL), "fc6": ("ReLU", "dropout 0.5"), "fc7": ("ReLU", "dropout 0.5"), "fc8": (),
    }  # fmt: skip
    code = then(KRIZHEVSKY)
    assert (code["conv1"], code["conv2"]) == ((NORM, POOL, "ReLU"), ("ReLU", NORM, "normalisation within 5×5", POOL))
    assert then(CAFFE)["conv1"] == ("ReLU", f"{NORM} of both towers", POOL)
    less = then(replace(PAPER, lrn="none", dropout=0.0, activation="tanh", pool_size=2))
    assert less["conv1"] == ("tanh", "pooling 2×2 / 2")
    assert less["fc6"] == ("tanh",)
    assert then(replace(PAPER, lrn="within-map", lrn_size=3))["conv1"][1] == "normalisation within 3×3"


@pytest.mark.parametrize(
    ("change", "maps"),
    [
        ({"input_size": 227}, [55, 27, 27, 13, 13, 13, 13, 6]),
        ({"edge_padding": False}, [54, 27, 27, 13, 13, 13, 13, 6]),
        ({"pool_size": 2}, [55, 28, 26, 13, 13, 13, 11, 6]),
    ],
)
def test_maps_are_as_large_as_they_are(change: dict[str, Any], maps: list[int]) -> None:
    assert sides(replace(PAPER, **change)) == maps


@pytest.mark.parametrize(("towers", "boxes", "crossing"), [(2, 2, 6), (1, 1, 0)])
def test_the_drawing_has_the_towers_and_where_they_meet(towers: int, boxes: int, crossing: int) -> None:
    found: tuple[Layer, ...] = layers(replace(PAPER, towers=towers), 1000)
    chart = draw_network(found, towers, 224)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
    assert texts.count("48 maps 55×55") == texts.count("192 maps 13×13") / 2 == boxes
    assert texts.count("1,000 classes") == texts.count("3 colours 224×224") == 1
    assert chart.svg.count("stroke-dasharray") == 2 * crossing, "the line of an arrow, and its head"
    assert ("two towers" in chart.alt) is (towers == 2)
    assert draw_network(found, towers, 224) == chart, "to the byte"
