"""Receptive fields, compared with the rows of the image that change the output of a real network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alexnet_cli.core.model.architecture import receptive_field
from alexnet_cli.core.model.network import Network, network_from_model
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, Recipe
from model_files import random_model

RECIPES = {
    "paper": PAPER,
    "krizhevsky": KRIZHEVSKY,
    "caffe": CAFFE,
    "unpadded": replace(PAPER, edge_padding=False),
    "maps of 54, 26, 12, 6": replace(PAPER, edge_padding=False, pool_ceil="pool5"),
    "pool 2": replace(PAPER, pool_size=2),
    "within": replace(PAPER, lrn="within-map", lrn_size=3),
}


def positive(recipe: Recipe) -> Network:
    """A network with positive weights only, so that every input in a receptive field changes the output."""
    network = network_from_model(random_model(replace(recipe, width=1 / 32, lrn_alpha=0.1, input_divisor=1.0))).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    return network


def seen(recipe: Recipe, layer: str, places: list[int], rows: list[int]) -> list[set[int]]:
    """For each place in the middle column of a layer's map: those of `rows` of the crop that change its activation."""
    network, maps = positive(recipe), []
    getattr(network, layer).register_forward_hook(lambda _m, _i, output: maps.append(output.clone()))
    generator, side = torch.Generator().manual_seed(0), recipe.input_size
    found: list[set[int]] = [set() for _ in places]
    for _ in range(2):
        batch = torch.rand(1, 3, side, side, generator=generator, dtype=torch.float64).repeat(1 + len(rows), 1, 1, 1)
        for number, row in enumerate(rows, 1):
            batch[number, :, row] = 3 * torch.rand(3, side, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            network(batch)
        answers = maps.pop()
        middle = answers[..., answers.shape[-1] // 2] if layer.startswith("conv") else answers[..., None]
        for place, those in zip(places, found, strict=True):
            change = ((middle[1:, :, place] - middle[:1, :, place]).abs() / middle[:1, :, place]).amax(1)
            those |= {row for row, much in zip(rows, change.tolist(), strict=True) if much > 1e-12}
    return found


def around(recipe: Recipe, layer: str, places: list[int]) -> tuple[list[set[int]], list[int]]:
    """The rows in the receptive field of each place, and rows to try: on both sides of every end."""
    low, side = (256 - recipe.input_size) // 2, recipe.input_size
    ends = [receptive_field(recipe, layer, place) for place in places]
    fields = [set(range(first - low, end - low)) for first, end in ends]
    tried = {end - low + by for both in ends for end in both for by in (-1, 0)} | {0, side // 2, side - 1}
    return fields, sorted(row for row in tried if 0 <= row < side)


@pytest.mark.parametrize("name", RECIPES)
def test_rows_outside_of_a_field_change_nothing_and_those_inside_do(name: str) -> None:
    recipe = RECIPES[name]
    for layer, places in (("conv2", [25]), ("conv5", [3, 10])):
        fields, rows = around(recipe, layer, places)
        assert seen(recipe, layer, places, rows) == [field & set(rows) for field in fields], layer


@pytest.mark.parametrize(("name", "unseen"), [("paper", 0), ("unpadded", 1), ("caffe", 0)])
def test_layer_6_sees_the_whole_crop_but_for_what_no_window_reaches(name: str, unseen: int) -> None:
    recipe = RECIPES[name]
    [field], rows = around(recipe, "fc6", [0])
    assert field == set(range(recipe.input_size - unseen))
    assert seen(recipe, "fc6", [0], rows) == [field & set(rows)]


def test_sizes_are_those_that_the_kernels_and_strides_of_the_paper_give() -> None:
    sizes = []
    for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        first, end = receptive_field(PAPER, layer, 6, clipped=False)
        sizes.append(end - first)
    assert sizes == [11, 19 + 4 * 8, 19 + 4 * 8 + 2 * 8 + 2 * 16, 131, 163]
