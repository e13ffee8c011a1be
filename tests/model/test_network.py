"""The paper's facts: parameter counts, map sizes, groups, initial values, what crosses between towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from alexnet_cli.core.model import response_norm
from alexnet_cli.core.model.architecture import EDGE_PADDING, layer_widths
from alexnet_cli.core.model.layers import within_map
from alexnet_cli.core.model.network import Network, initialize, pad_right_and_bottom, parameters_by_name
from alexnet_cli.core.model.towers import TowerGroup
from alexnet_cli.recipe import FAST, PAPER, RECIPES

SMALL = replace(PAPER, width=1 / 16)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameters_by_layer() -> None:
    with torch.device("meta"):
        network = Network(PAPER, 1000)
    sizes = {layer: count(network.get_submodule(layer)) for layer in (*layer_widths(PAPER), "fc8")}
    assert sizes == {
        "conv1": 34_944, "conv2": 307_456, "conv3": 885_120, "conv4": 663_936, "conv5": 442_624,
        "fc6": 37_752_832, "fc7": 16_781_312, "fc8": 4_097_000,
    }  # fmt: skip
    assert [name for name, _ in parameters_by_name(network)] == [name for name, _ in network.named_parameters()]


def test_one_tower_of_two_holds_its_half() -> None:
    with torch.device("meta"):
        half = Network(PAPER, 1000, TowerGroup(2, 1))
    sizes = [count(half.get_submodule(layer)) for layer in layer_widths(PAPER)]
    assert sizes == [17_472, 153_728, 442_560, 331_968, 221_312, 18_876_416, 8_390_656]


def test_the_padding_is_on_the_right_and_below() -> None:
    """A bright last column or row reaches the last of the 55 windows, as if the input went on with zeros."""
    network = Network(replace(SMALL, lrn="none", stage1_order="relu-norm-pool"), 10)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(1, 3, 227, 227)
    padded[:, :, :224, :224] = x
    maps: list[torch.Tensor] = []
    network.conv1.register_forward_hook(lambda _m, _i, out: maps.append(out.detach().clone()))
    network(x)
    torch.testing.assert_close(maps[0], network.conv1(padded))
    corner = torch.nn.functional.conv2d(x[:, :, 216:, 216:], network.conv1.weight[:, :, :8, :8], network.conv1.bias)
    torch.testing.assert_close(maps[0][:, :, 54, 54], corner[:, :, 0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_padding_equals_functional_pad(bf16: bool) -> None:
    x = torch.randn(2, 3, 224, 224, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        fast = pad_right_and_bottom(x)
    reference = functional.pad(x, (0, EDGE_PADDING, 0, EDGE_PADDING)).to(torch.bfloat16 if bf16 else torch.float32)
    assert fast.dtype == reference.dtype
    assert fast.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fast, reference)
    (gradient,) = torch.autograd.grad(fast.float().square().sum(), x)
    (expected,) = torch.autograd.grad(reference.float().square().sum(), x)
    assert torch.equal(gradient, expected)


def test_padding_keeps_float64_and_works_on_device_meta() -> None:
    """Autocast does not know device `meta`, and does not cast float64."""
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pad_right_and_bottom(x), functional.pad(x, (0, EDGE_PADDING, 0, EDGE_PADDING)))
    with torch.device("meta"):
        out = Network(SMALL, 10)(torch.empty(2, 3, 224, 224))
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 10), torch.float32)


@pytest.mark.parametrize("order", ["relu-norm-pool", "norm-pool-relu", "relu-pool-norm"])
@pytest.mark.parametrize("change", [{}, {"activation": "tanh"}, {"lrn": "within-map"}, {"lrn": "none"}])
def test_a_stage_does_what_its_order_says(order: str, change: dict[str, str]) -> None:
    """Also if activation and normalization are fused."""
    recipe = replace(SMALL, stage1_order=order, **change)  # type: ignore[arg-type]
    network = Network(recipe, 10)
    x = torch.randn(2, 6, 55, 55, generator=torch.Generator().manual_seed(0)) * 60
    expected = x.clone()
    for word in order.split("-"):
        if word == "relu":
            expected = torch.tanh(expected) if recipe.activation == "tanh" else torch.relu(expected)
        elif word == "pool":
            expected = torch.nn.functional.max_pool2d(expected, 3, 2, ceil_mode=True)
        elif recipe.lrn == "across-maps":
            expected = response_norm.normalize_plain(expected, 5, 2.0, 1e-4, 0.75, 2)
        elif recipe.lrn == "within-map":
            expected = within_map(expected, 5, 2.0, 1e-4, 0.75)
    torch.testing.assert_close(network.stage1(x), expected)


@pytest.mark.parametrize("cross_talk", [PAPER.cross_talk, ("conv2", "conv5", "fc6"), ("conv4", "fc7"), ()])
def test_towers_meet_in_the_layers_with_cross_talk_only(cross_talk: tuple[Any, ...]) -> None:
    """Silence tower 2 of a layer's input: tower 1 of the output notices if the layer has cross-talk."""
    network = Network(replace(SMALL, cross_talk=cross_talk), 10)
    initialize(network)
    maps = {"conv2": 6, "conv3": 16, "conv4": 24, "conv5": 24, "fc6": 16 * 36, "fc7": 256}  # of both towers
    for layer, inputs in maps.items():
        module = network.get_submodule(layer)
        weight = module.get_parameter("weight")
        shape = (1, inputs) if weight.ndim == 2 else (1, inputs, 7, 7)
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        silent = x.clone()
        silent[:, inputs // 2 :] = 0
        half = weight.shape[0] // 2
        assert bool((module(x)[:, :half] != module(silent)[:, :half]).any()) is (layer in cross_talk), layer


def test_without_a_middle_layer_the_others_start_with_the_same_weights() -> None:
    networks = [Network(replace(SMALL, left_out_layers=left_out), 10) for left_out in ((), ("conv4",))]
    for network in networks:
        initialize(network)
    whole, without = (dict(parameters_by_name(network)) for network in networks)
    assert whole.keys() - without.keys() == {"conv4.weight", "conv4.bias"}
    assert all(torch.equal(whole[name], without[name]) for name in without)


def test_without_cross_talk_the_logits_are_those_of_two_networks_of_half_the_size() -> None:
    network = Network(replace(SMALL, cross_talk=()), 10).eval()
    initialize(network)
    half = Network(replace(SMALL, cross_talk=()), 10, TowerGroup(2, 1)).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 60
    logits = torch.zeros(2, 10)
    for tower in (0, 1):
        for name, parameter in half.named_parameters():
            dimension = 1 if name == "fc8.weight" else 0
            whole = network.get_parameter(name).detach()
            parameter.data = whole if name == "fc8.bias" else whole.chunk(2, dimension)[tower].contiguous()
        logits += half(x)
    torch.testing.assert_close(network(x), logits - network.fc8.bias)


def test_initial_values_follow_the_table() -> None:
    network = Network(replace(PAPER, width=0.5), 100)
    initialize(network)
    for layer, deviation, bias in [
        ("conv1", 0.01, 0), ("conv2", 0.01, 1), ("conv3", 0.03, 0), ("conv4", 0.03, 1), ("conv5", 0.03, 1),
        ("fc6", 0.01, 1), ("fc7", 0.01, 1), ("fc8", 0.01, 0),
    ]:  # fmt: skip
        module = network.get_submodule(layer)
        assert module.get_parameter("weight").std().item() == pytest.approx(deviation, rel=0.03), layer
        assert (module.get_parameter("bias") == bias).all(), layer


def test_initial_values_depend_on_the_seed_alone() -> None:
    networks = [Network(replace(SMALL, seed=seed), 10) for seed in (1, 1, 2)]
    for network in networks:
        torch.manual_seed(np.random.default_rng().integers(1 << 30))
        initialize(network)
    first, same, other = (dict(parameters_by_name(n)) for n in networks)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["conv4.weight"][:4], first["conv5.weight"][:4])


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_runs_forward_and_backward(name: str) -> None:
    recipe = replace(RECIPES[name], width=1 / 16)
    network = Network(recipe, 7)
    initialize(network)
    network.draw_dropout(step=1)
    logits = network(torch.randn(2, 3, recipe.input_size, recipe.input_size) * 60 / recipe.input_divisor)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for parameter_name, parameter in parameters_by_name(network):
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(
    "change",
    [{"activation": "tanh"}, {"activation": "sigmoid"}, {"towers": 1}, {"lrn": "none"}, {"lrn": "within-map"},
     {"pool_size": 2}, {"dropout": 0.0}, {"stage1_order": "relu-pool-norm"}],
)  # fmt: skip
def test_every_switch_changes_the_network(change: dict[str, object]) -> None:
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 60
    outputs = []
    for recipe in (replace(FAST, width=1 / 16), replace(FAST, width=1 / 16, **change)):  # type: ignore[arg-type]
        network = Network(recipe, 7)
        initialize(network)
        network.draw_dropout(step=1)
        outputs.append(network(x / 64))
    assert not torch.allclose(outputs[0], outputs[1])
