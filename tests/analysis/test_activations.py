"""Activations of one image: equal to those of a literal pass in numpy, and drawn on a page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.core import drawing
from alexnet_cli.core.analysis import activations
from alexnet_cli.core.analysis.activations import LayerActivations, Trace, make_layer_records, trace_image
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.inference.predict import Label
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import CAFFE, FAST, KRIZHEVSKY, PAPER, Recipe
from literal_network import forward_layers
from model_files import random_model

PICTURE = np.random.default_rng(5).integers(0, 256, (256, 256, 3), np.uint8)
RECIPES = {
    "paper": PAPER,
    "krizhevsky": KRIZHEVSKY,
    "caffe": CAFFE,
    "one tower, pooling 2 x 2": replace(PAPER, towers=1, pool_size=2),
    "tanh": replace(PAPER, activation="tanh"),
    "sigmoid": replace(PAPER, activation="sigmoid"),
    "sigmoid, dropout inverted": replace(FAST, activation="sigmoid"),
    "no layer 4": replace(PAPER, left_out_layers=("conv4",)),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_layer_is_what_the_network_makes_of_the_center_crop(recipe: Recipe) -> None:
    model = random_model(replace(recipe, width=1 / 32))
    found = trace_image(model, PICTURE)
    side = recipe.input_size
    low = (256 - side) // 2
    crop = PICTURE[low : low + side, low : low + side]
    assert (found.seen == crop).all()

    literal = forward_layers(model, np.ascontiguousarray(crop.transpose(2, 0, 1)))
    logits, keep = literal["fc8"], 1 if recipe.dropout_inverted else 1 - recipe.dropout
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert [layer.name for layer in found.layers] == [
        layer
        for layer in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
        if f"{layer}.bias" in model.tensors
    ]
    for layer in found.layers:
        number = layer.name[-1]
        expected = literal[f"{recipe.activation}{number}" if layer.has_maps else f"drop{number}"]
        np.testing.assert_allclose(layer.values, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        rest = (0.5 if layer.has_maps else 0.5 * keep) if recipe.activation == "sigmoid" else 0
        assert layer.compute_active_share() == pytest.approx((expected > rest).mean(), abs=0.005), layer.name
        peaks = expected.reshape(len(expected), -1).max(1)
        half = len(expected) // recipe.towers
        for tower in range(recipe.towers):
            mine = peaks[tower * half : (tower + 1) * half]
            assert peaks[layer.sort_units(tower)[0]] == pytest.approx(mine.max(), rel=1e-3)
            assert sorted(layer.sort_units(tower)) == list(range(tower * half, (tower + 1) * half))
    assert [label.index for label in found.top] == np.argsort(-chances)[:5].tolist()
    assert [label.probability for label in found.top] == pytest.approx(np.sort(chances)[::-1][:5].tolist(), rel=1e-3)


def test_nan_weights_in_any_layer_are_an_error() -> None:
    for name in ("conv4.bias", "fc7.bias", "fc8.bias"):
        model = random_model(replace(PAPER, width=1 / 32))
        model.tensors[name][0] = np.nan
        with pytest.raises(WeightsError, match="computes NaN"):
            trace_image(model, PICTURE)


def make_trace(values: np.ndarray, towers: int = 2, *, lowest: float = 0.0, name: str = "cat") -> Trace:
    """Five layers of these maps, and their peaks as units."""
    flat = values.max(axis=(1, 2))
    kinds = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
    layers = tuple(LayerActivations(k, values if k[0] == "c" else flat, towers, lowest, 0.0) for k in kinds)
    top = tuple(Label(i + 1, name, None, i, 0.5 - i / 10) for i in range(5))
    return Trace(np.full((224, 224, 3), (10, 200, 30), np.uint8), layers, top)


def tiles(page: Image.Image, found: Trace, tower: int) -> np.ndarray:
    """The pixels of a tower's first map in layer 1."""
    side, left = activations.TILE, activations.MARGIN + activations.LEFT
    each = (1600 - left - 2 * activations.GUTTER - activations.MARGIN) // 2
    x = left + activations.GUTTER + tower * (each + activations.GUTTER)
    y = activations.COLUMNS_TOP + 2 * activations.HEAD
    return np.asarray(page.convert("L"))[y : y + side, x : x + side]


def test_a_tower_at_rest_is_black_and_the_highest_answer_of_the_layer_white() -> None:
    values = np.zeros((40, 7, 7), np.float32)
    values[25, :3], values[22, 6, 6] = 8.0, 2.0
    found = make_trace(values)
    page = activations.draw_trace(found, [0, 1], "cat.jpg", ["run a", "epoch 3"])
    assert page.width == 1600
    assert page.height > 1000
    assert (tiles(page, found, 0) == 0).all()
    map25 = tiles(page, found, 1)
    assert (map25[:29] == 255).all()
    assert (map25[31:] == 0).all()
    assert found.layers[0].sort_units(1)[:2] == [25, 22]
    grays = activations.scale_to_gray(found.layers[0])
    assert grays[22, 6, 6] == round(255 * (2 / 8) ** 0.5)
    [one, two] = make_layer_records(found, [0, 1])[0]["strongest"]
    assert one == {"tower": 1, "unit": None, "response": 0.0, "active": 0.0}
    assert two["unit"] == 25
    assert two["active"] == pytest.approx((21 + 1) / (20 * 49))
    left, top = activations.MARGIN, activations.COLUMNS_TOP
    assert page.getpixel((left + 150, top + 150)) == (10, 200, 30)


def test_where_answers_lie_on_both_sides_of_rest_that_is_mid_gray() -> None:
    values = np.zeros((4, 3, 3), np.float32)
    values[0, 0, 0], values[3, 1, 1] = -1.0, 0.25
    layer = make_trace(values, lowest=-1.0).layers[0]
    grays = activations.scale_to_gray(layer)
    assert (grays[0, 0, 0], grays[1, 0, 0], grays[3, 1, 1]) == (0, 128, round(255 * 0.75))


def test_a_strip_has_a_square_for_each_unit_and_nothing_after_the_last() -> None:
    values = np.zeros((53, 1, 1), np.float32)
    values[[2, 51]] = 1.0
    page = np.asarray(activations.draw_trace(make_trace(values, 1), [0], "cat", []).convert("L"))
    left = activations.MARGIN + activations.LEFT + activations.GUTTER
    top = activations.COLUMNS_TOP + 7 * activations.HEAD
    top += 5 * 2 * (activations.TILE + activations.NUMBER)  # layer 6: 50 squares of 24 pixels in a row
    squares = page[top + 12 : top + 48 : 24, left + 12 : left + 24 * 50 : 24]
    assert squares[0].tolist() == [0, 0, 255] + [0] * 47
    assert squares[1].tolist() == [0, 255, 0] + [255] * 47


@pytest.mark.parametrize(("units", "towers"), [(2, 2), (3, 1), (2048, 2), (4096, 1)])
def test_any_width_and_any_name_fit_the_page(units: int, towers: int) -> None:
    values = np.random.default_rng(1).random((units, 2, 2), np.float32)
    name = "a name that never ends, " * 40
    found = make_trace(values, towers, name=name)
    for shown in ([0], list(range(towers))):
        page = np.asarray(activations.draw_trace(found, shown, name, [name]))
        assert page.shape[1] == 1600
        margin = page[:, -activations.MARGIN // 2 :]
        assert (margin == 255).all()
        between = activations.MARGIN + activations.LEFT + activations.GUTTER // 2
        assert (page[activations.COLUMNS_TOP :, between] == 255).all()


def test_answers_are_bars_as_long_as_they_are_likely() -> None:
    page = activations.draw_trace(make_trace(np.ones((2, 2, 2), np.float32)), [0, 1], "cat", [])
    pixels = np.asarray(page)
    bar = (pixels == drawing.BAR).all(-1)
    lengths = [int(row.sum()) for row in bar if row.any()]
    wanted = [round(activations.LEFT * p) for p in (0.5, 0.4, 0.3, 0.2, 0.1)]
    assert sorted(set(lengths), reverse=True) == wanted


def test_two_classes_have_two_answers() -> None:
    model = random_model(replace(PAPER, width=1 / 32), classes=2)
    assert model.classes[1] == ClassName("class 1", "n00000001")
    assert len(trace_image(model, PICTURE).top) == 2
