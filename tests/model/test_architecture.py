"""The table of layer geometry: the paper's numbers, the network as it is built, and what each recipe changes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from alexnet_cli.core.model.architecture import (
    LAYERS,
    check_layers,
    describe_step,
    layer_names,
    layer_specs,
    list_layers,
    receptive_field,
    tensor_shapes,
)
from alexnet_cli.core.model.network import Network
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, RECIPES, TINY, Recipe

VARIANTS = [
    *RECIPES.values(),
    replace(PAPER, edge_padding=False),
    replace(PAPER, edge_padding=False, pool_ceil="pool5"),
    replace(PAPER, pool_size=2),
    replace(PAPER, towers=1),
    replace(PAPER, cross_talk=("conv2", "fc7"), conv1_width=0.25),
    replace(PAPER, left_out_layers=("conv3",)),
    replace(PAPER, left_out_layers=("conv4",)),
]


def map_sides(recipe: Recipe) -> list[int]:
    """Sides of the maps of the convolutions, each followed by that after pooling where it is pooled."""
    specs = [spec for spec in layer_specs(recipe, 10) if spec.is_conv]
    return [side for spec in specs for side in (spec.side, spec.pooled_side) if side]


def following(recipe: Recipe) -> dict[str, list[str]]:
    """What follows each layer, in words."""
    return {spec.name: [describe_step(recipe, step) for step in spec.then] for spec in layer_specs(recipe, 10)}


@pytest.mark.parametrize("recipe", [PAPER, KRIZHEVSKY, CAFFE])
def test_counts_are_those_of_the_paper(recipe: Recipe) -> None:
    specs = layer_specs(recipe, 1000)
    assert sum(spec.parameters for spec in specs) == 60_965_224
    assert sum(spec.weights for spec in specs) == 60_954_656
    assert sum(spec.multiplications for spec in specs) == 724_406_816
    facts = {
        "conv1": (48, 3, False, 34_944, 105_415_200), "conv2": (128, 48, False, 307_456, 223_948_800),
        "conv3": (192, 256, True, 885_120, 149_520_384), "conv4": (192, 192, False, 663_936, 112_140_288),
        "conv5": (128, 192, False, 442_624, 74_760_192), "fc6": (2048, 9216, True, 37_752_832, 37_748_736),
        "fc7": (2048, 4096, True, 16_781_312, 16_777_216), "fc8": (1000, 4096, True, 4_097_000, 4_096_000),
    }  # fmt: skip
    for spec in specs:
        assert (spec.maps, spec.inputs, spec.sees_both, spec.parameters, spec.multiplications) == facts[spec.name]
    assert [(spec.kernel, spec.stride) for spec in specs] == [(11, 4), (5, 1), *[(3, 1)] * 3, *[(1, 1)] * 3]
    assert map_sides(recipe) == [55, 27, 27, 13, 13, 13, 13, 6]


def test_the_one_gpu_network_and_other_widths() -> None:
    specs = layer_specs(replace(PAPER, towers=1), 1000)
    assert sum(spec.parameters for spec in specs) == 59_798_312
    assert not any(spec.sees_both for spec in specs)
    assert [spec.maps for spec in layer_specs(replace(PAPER, width=0.25), 7)] == [12, 32, 48, 48, 32, 512, 512, 7]


ALL_SIX = ("conv2", "conv3", "conv4", "conv5", "fc6", "fc7")


@pytest.mark.parametrize(
    ("cross_talk", "parameters"),
    [
        (ALL_SIX, 62_378_344),  # the same widths without groups
        ((), 2 * (17_472 + 153_728 + 192 * (128 * 9 + 1) + 331_968 + 221_312 + 2048 * 4609 + 2048 * 2049) + 4_097_000),
        (("fc6", "fc7"), 60_965_224 - 384 * 128 * 9),
        (("conv2", "conv3", "fc6", "fc7"), 60_965_224 + 256 * 48 * 25),
        (("conv4", "fc6", "fc7"), 60_965_224 - 384 * 128 * 9 + 384 * 192 * 9),
    ],
)
def test_cross_talk_gives_a_filter_the_maps_of_the_other_tower_too(
    cross_talk: tuple[Any, ...], parameters: int
) -> None:
    recipe = replace(PAPER, cross_talk=cross_talk)
    specs = layer_specs(recipe, 1000)
    assert sum(spec.parameters for spec in specs) == parameters
    assert [spec.name for spec in specs if spec.sees_both] == [*cross_talk, "fc8"]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Network(recipe, 1000).parameters()) == parameters
    alone = replace(recipe, towers=1)
    assert layer_specs(alone, 7) == layer_specs(replace(PAPER, towers=1), 7)


@pytest.mark.parametrize(
    ("left_out", "parameters", "meeting"),
    [
        (("conv3",), 60_965_224 - 885_120 - 663_936 + 384 * (256 * 9 + 1), "conv4"),
        (("conv4",), 60_965_224 - 663_936, "conv3"),
        (("conv3", "conv4"), 60_965_224 - 885_120 - 663_936 - 442_624 + 256 * (256 * 9 + 1), "conv5"),
    ],
)
def test_without_a_middle_layer_the_towers_meet_in_the_next(left_out: Any, parameters: int, meeting: str) -> None:
    recipe = replace(PAPER, left_out_layers=left_out)
    specs = layer_specs(recipe, 1000)
    assert [spec.name for spec in specs] == [layer for layer in LAYERS if layer not in left_out]
    assert [spec.name for spec in specs if spec.sees_both] == [meeting, "fc6", "fc7", "fc8"]
    assert sum(spec.parameters for spec in specs) == parameters
    first, end = receptive_field(recipe, "conv5", 6, clipped=False)
    assert end - first == 163 - 32 * len(left_out)


def test_layer_1_has_a_width_of_its_own() -> None:
    specs = layer_specs(replace(TINY, conv1_width=1.0), 7)
    assert [spec.maps for spec in specs] == [48, 32, 48, 48, 32, 512, 512, 7]
    assert [spec.parameters for spec in specs][:3] == [34_944, 64 * (48 * 25 + 1), 96 * (64 * 9 + 1)]


@pytest.mark.parametrize("recipe", VARIANTS, ids=lambda recipe: recipe.name)
def test_it_describes_the_network_that_is_built(recipe: Recipe) -> None:
    recipe = replace(recipe, width=1 / 16)
    network, sides = Network(recipe, 7).eval(), dict[str, int]()
    for layer in list_layers(recipe)[:-3]:
        network.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: sides.update({layer: output.shape[-1]})
        )
    with torch.inference_mode():
        network(torch.zeros(1, 3, recipe.input_size, recipe.input_size))
    assert sides == {spec.name: spec.side for spec in layer_specs(recipe, 7) if spec.is_conv}
    built = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert tensor_shapes(recipe, 7) == built | {"mean": (3, 256, 256)}


def test_what_follows_a_layer_is_what_the_recipe_says() -> None:
    norm, pool = "normalization across 5 maps", "pooling 3×3 / 2"
    assert following(PAPER) == {
        "conv1": ["ReLU", norm, pool], "conv2": ["ReLU", norm, pool], "conv3": ["ReLU"], "conv4": ["ReLU"],
        "conv5": ["ReLU", pool], "fc6": ["ReLU", "dropout 0.5"], "fc7": ["ReLU", "dropout 0.5"], "fc8": [],
    }  # fmt: skip
    code = following(KRIZHEVSKY)
    assert (code["conv1"], code["conv2"]) == ([norm, pool, "ReLU"], ["ReLU", norm, "normalization within 5×5", pool])
    assert following(CAFFE)["conv1"] == ["ReLU", f"{norm} of both towers", pool]
    less = following(replace(PAPER, lrn="none", dropout=0.0, activation="tanh", pool_size=2))
    assert (less["conv1"], less["fc6"]) == (["tanh", "pooling 2×2 / 2"], ["tanh"])


def test_every_layer_has_a_name_in_the_order_of_the_recipe() -> None:
    tail = "conv3 relu3 conv4 relu4 conv5 relu5 pool5 fc6 relu6 drop6 fc7 relu7 drop7 fc8"
    paper = f"conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 {tail}"
    assert [" ".join(layer_names(RECIPES[name])) for name in ("paper", "caffe", "fast", "tiny")] == [paper] * 4
    krizhevsky = f"conv1 norm1 pool1 relu1 conv2 relu2 norm2 within_norm2 pool2 {tail}"
    assert " ".join(layer_names(KRIZHEVSKY)) == krizhevsky
    plain = "conv1 tanh1 pool1 conv2 tanh2 pool2 conv3 tanh3 conv4 tanh4 conv5 tanh5 pool5 fc6 tanh6 fc7 tanh7 fc8"
    assert " ".join(layer_names(replace(PAPER, activation="tanh", lrn="none", dropout=0.0))) == plain


@pytest.mark.parametrize(
    ("layers", "tower", "what", "hint"),
    [
        (["conv1", "conv33"], None, "the network has no layer 'conv33'", "did you mean conv3? layers: conv1 relu1"),
        (["attention"], None, "the network has no layer 'attention'", "layers: conv1 relu1"),
        (["conv1"], 3, "the network has no tower 3", "towers: 1 2"),
        (["conv1"], 0, "the network has no tower 0", "towers: 1 2"),
        (["conv1", "fc8"], 1, "fc8 has no towers", "read fc8 without a tower"),
    ],
)
def test_a_layer_or_tower_that_is_not_there(layers: list[str], tower: int | None, what: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(what)) as error:
        check_layers(PAPER, layers, tower)
    assert error.value.hint.startswith(hint)
    check_layers(PAPER, layer_names(PAPER))
    check_layers(PAPER, layer_names(PAPER)[:-1], 2)


@pytest.mark.parametrize(
    ("change", "sides"),
    [
        ({"input_size": 227}, [55, 27, 27, 13, 13, 13, 13, 6]),
        ({"edge_padding": False}, [54, 27, 27, 13, 13, 13, 13, 6]),
        ({"edge_padding": False, "pool_ceil": "pool5"}, [54, 26, 26, 12, 12, 12, 12, 6]),
        ({"pool_size": 2}, [55, 28, 26, 13, 13, 13, 11, 6]),
    ],
)
def test_maps_of_variants(change: dict[str, Any], sides: list[int]) -> None:
    assert map_sides(replace(PAPER, **change)) == sides


def test_receptive_fields_are_what_the_kernels_and_strides_of_the_paper_give() -> None:
    sizes = []
    for layer in LAYERS[:5]:
        first, end = receptive_field(PAPER, layer, 6, clipped=False)
        sizes.append(end - first)
    assert sizes == [11, 19 + 4 * 8, 19 + 4 * 8 + 2 * 8 + 2 * 16, 131, 163]
