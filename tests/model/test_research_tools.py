"""The tools of researchers on the plain network: hooks, Captum, torchcam, torchvision, torch.func, torch.export."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.alexnet import AlexNet
from alexnet_cli.core.model.architecture import norm_spec
from alexnet_cli.core.model.layers import ResponseNorm
from alexnet_cli.core.model.response_norm import normalize_plain
from alexnet_cli.recipe import RECIPES
from model_files import random_model

TARGET = 3
CAPTUM = "the extra `research` brings captum"

quiet_captum = pytest.mark.filterwarnings(
    "ignore:Setting (backward hooks|forward, backward hooks):UserWarning",  # each time that it does what it is for
    "ignore:Input Tensor .* did not already require gradients:UserWarning",
)


@pytest.fixture(params=RECIPES)
def network(request: pytest.FixtureRequest) -> AlexNet:
    """A narrow network of every recipe, with random weights."""
    return AlexNet.from_model(random_model(replace(RECIPES[request.param], width=1 / 16)))


def make_input(network: AlexNet, count: int = 2) -> Tensor:
    shape = count, 3, network.recipe.input_size, network.recipe.input_size
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 60 / network.recipe.input_divisor


def check_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Check shapes, and that the largest difference is at most this part of the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    assert expected.any()


def keep_outputs(network: AlexNet) -> dict[str, Tensor]:
    """The output of every layer by name, filled by hooks in each pass."""
    outputs: dict[str, Tensor] = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
    return outputs


def difference(network: AlexNet, x: Tensor, baseline: Tensor) -> Tensor:
    """How far the logit of the target is from that of the baseline."""
    with torch.no_grad():
        result: Tensor = (network(x) - network(baseline))[:, TARGET]
    assert (result.abs() > 0.05).all()  # of logits of order 1: sums equal to it say something
    return result


# Hooks


def test_forward_hooks_see_each_value_once_and_no_later_layer_changes_it(network: AlexNet) -> None:
    by_reference, copies = keep_outputs(network), dict[str, Tensor]()
    for name, module in network.named_children():
        module.register_forward_hook(lambda _module, _inputs, out, name=name: copies.update({name: out.clone()}))
    network(make_input(network))
    assert [name for name, _ in network.named_modules() if name] == list(by_reference) == list(network.layers)
    assert all(torch.equal(by_reference[name], copies[name]) for name in network.layers)
    for i, name in enumerate(network.layers):
        if name.startswith("relu"):
            before = by_reference[network.layers[i - 1]]
            assert before.min() < 0
            assert torch.equal(by_reference[name], before.clamp(min=0))


def test_forward_pre_hooks_see_and_replace_the_input_of_a_layer(network: AlexNet) -> None:
    inputs: dict[str, Tensor] = {}
    outputs = keep_outputs(network)
    for name, module in network.named_children():
        module.register_forward_pre_hook(lambda _module, args, name=name: inputs.update({name: args[0]}))
    x = make_input(network)
    network(x)
    side = network.recipe.input_size
    assert torch.equal(inputs["conv1"][..., :side, :side], x)
    for before, name in zip(network.layers, network.layers[1:], strict=False):
        assert torch.equal(inputs[name], outputs[before].flatten(1) if name == "fc6" else outputs[before])
    network.get_submodule("fc8").register_forward_pre_hook(lambda _module, args: (torch.zeros_like(args[0]),))
    assert torch.equal(network(x), network.get_parameter("fc8.bias").expand(2, -1))


def test_full_backward_hooks_run_once_per_layer_with_its_gradients(network: AlexNet) -> None:
    called: list[str] = []
    gradients: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, grad_outputs: tuple[Tensor, ...]) -> None:
            called.append(name)
            gradients[name] = grad_outputs[0].clone()

        return hook

    outputs = keep_outputs(network)
    logit = network(make_input(network).requires_grad_())[:, TARGET].sum()
    expected = torch.autograd.grad(logit, list(outputs.values()))
    for name, module in network.named_children():
        module.register_full_backward_hook(keep(name))
    network(make_input(network).requires_grad_())[:, TARGET].sum().backward()
    assert called == list(reversed(network.layers))
    for name, gradient in zip(outputs, expected, strict=True):
        check_equal(gradients[name], gradient)


def test_feature_extraction_of_torchvision_equals_activations(network: AlexNet) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    layers = [name for name in network.layers if not name.startswith("drop")] + ["drop7"]
    x = make_input(network)
    extractor = create_feature_extractor(network, layers)
    features, activations = extractor(x), network.activations(x, layers)
    assert all(torch.equal(features[name], activations[name]) for name in layers)


# Attribution


@quiet_captum
def test_guided_backprop_clamps_the_gradient_at_every_relu(network: AlexNet) -> None:
    captum = pytest.importorskip("captum.attr", reason=CAPTUM)

    class GuidedReLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            x: Tensor = ctx.saved_tensors[0]
            return gradient.clamp(min=0) * (x > 0)

    class GuidedLayer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = GuidedReLU.apply(x)
            return result

    guided = copy.deepcopy(network)
    for name in network.layers:
        if name.startswith("relu"):
            guided.set_submodule(name, GuidedLayer())
    x = make_input(network).requires_grad_()
    [expected] = torch.autograd.grad(guided(x)[:, TARGET].sum(), x)
    attributions = captum.GuidedBackprop(network).attribute(x, target=TARGET)
    check_equal(attributions, expected)
    plain = captum.Saliency(network).attribute(x, target=TARGET, abs=False)
    assert (attributions - plain).abs().max() > 0.1 * plain.abs().max()


def pool_rule(
    pool: nn.MaxPool2d, inputs: Tensor, outputs: Tensor, grad_input: Tensor, grad_output: Tensor, eps: float = 1e-10
) -> Tensor:
    """Captum's rule for max pooling, but a pixel that is the largest of several windows gets the sum of their parts."""
    (x, baseline), (out, out_baseline) = inputs.chunk(2), outputs.chunk(2)
    top = torch.maximum(out, out_baseline)
    pixels = inputs.detach().requires_grad_()
    with torch.enable_grad():
        pooled = functional.max_pool2d(pixels, pool.kernel_size, pool.stride, ceil_mode=pool.ceil_mode)
    [parts] = torch.autograd.grad(pooled, pixels, grad_output * torch.cat([top - out_baseline, out - top]))
    change = x - baseline
    return torch.where(change.abs() < eps, 0 * change, sum(parts.chunk(2)) / change).repeat(2, 1, 1, 1)


def smooth_rule(
    module: nn.Module, inputs: Tensor, outputs: Tensor, grad_input: Tensor, grad_output: Tensor, eps: float = 1e-10
) -> Tensor:
    """The gradient averaged from the baseline to the input, by Gauss-Legendre quadrature."""
    (x, baseline), gradient = inputs.chunk(2), grad_output.chunk(2)[0]
    total = torch.zeros_like(x)
    for node, weight in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        between = (baseline + (node + 1) / 2 * (x - baseline)).requires_grad_()
        with torch.enable_grad():
            out = module.forward(between)
        total += weight / 2 * torch.autograd.grad(out, between, gradient)[0]
    return total.repeat(2, 1, 1, 1)


@quiet_captum
def test_deeplift_sums_to_the_difference_with_rules_for_pooling_and_normalization(
    network: AlexNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    captum = pytest.importorskip("captum.attr", reason=CAPTUM)
    rules = pytest.importorskip("captum.attr._core.deep_lift").SUPPORTED_NON_LINEAR
    x = make_input(network)
    baseline = torch.zeros_like(x)
    expected = difference(network, x, baseline)

    def attribute() -> Tensor:
        values: Tensor = captum.DeepLift(network).attribute(x, baseline, target=TARGET)
        return values.detach().flatten(1).sum(1)

    without = attribute()
    monkeypatch.setitem(rules, nn.MaxPool2d, pool_rule)
    monkeypatch.setitem(rules, ResponseNorm, smooth_rule)
    assert (attribute() - expected).abs().max() < 1e-3
    assert (without - expected).abs().max() > 1e-2


@quiet_captum
def test_integrated_gradients_sum_to_the_difference(network: AlexNet) -> None:
    captum = pytest.importorskip("captum.attr", reason=CAPTUM)
    x, baseline = make_input(network).split(1)  # between two images one gradient alone is far off
    expected = difference(network, x, baseline)
    method = captum.IntegratedGradients(network)
    values = method.attribute(x, baseline, target=TARGET, n_steps=64, internal_batch_size=32)
    gradient = captum.Saliency(network).attribute(x, target=TARGET, abs=False)
    one_gradient_error = ((x - baseline) * gradient).detach().sum() - expected
    assert (values.sum() - expected).abs() < 0.1 * one_gradient_error.abs()


@quiet_captum
@pytest.mark.parametrize("layer", ["conv3", "fc7"])
def test_the_conductance_of_a_layer_sums_to_the_difference(network: AlexNet, layer: str) -> None:
    captum = pytest.importorskip("captum.attr", reason=CAPTUM)
    x = make_input(network, 1)
    baseline = torch.zeros_like(x)
    expected = difference(network, x, baseline)
    conductance = captum.LayerConductance(network, network.get_submodule(layer))
    values = conductance.attribute(x, baseline, target=TARGET, n_steps=100, internal_batch_size=25).detach()
    assert values.shape == network.activations(x, layer)[layer].shape
    check_equal(values.flatten(1).sum(1), expected, 0.1)


def grad_cam(network: AlexNet, x: Tensor) -> Tensor:
    """The formula: the maps of layer 5, each weighted by its mean gradient, summed. N x 1 x 13 x 13."""
    kept = keep_outputs(network)
    logit = network(x)[:, TARGET].sum()
    [gradient] = torch.autograd.grad(logit, kept["conv5"])
    return (gradient.mean((2, 3), keepdim=True) * kept["conv5"]).sum(1, keepdim=True).detach()


@quiet_captum
def test_grad_cam_of_captum_is_the_formula(network: AlexNet) -> None:
    captum = pytest.importorskip("captum.attr", reason=CAPTUM)
    x = make_input(network)
    found = captum.LayerGradCam(network, network.get_submodule("conv5")).attribute(x, target=TARGET)
    assert found.shape == (2, 1, 13, 13)
    check_equal(found.detach(), grad_cam(network, x))


def test_grad_cam_of_torchcam_is_the_formula_scaled_to_0_to_1(network: AlexNet) -> None:
    methods = pytest.importorskip("torchcam.methods", reason="the extra `research` brings torchcam")
    x = make_input(network)
    with methods.GradCAM(network, target_layer="conv5") as extractor:
        [found] = extractor(TARGET, network(x))
    expected = grad_cam(network, x)[:, 0].clamp(min=0)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    check_equal(found, (expected - low) / (high - low))


# torch.autograd and torch.func


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # the first import of torch's own jvp rules
def test_second_derivatives_equal_finite_differences(network: AlexNet) -> None:
    """Backward through backward, and forward over reverse."""
    network.double()
    x, direction = make_input(network, 2).double().split(1)

    def gradient(x: Tensor) -> Tensor:
        result: Tensor = torch.func.grad(lambda x: network(x)[0, TARGET])(x)
        return result

    step = 1e-6
    expected = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    x.requires_grad_()
    [first] = torch.autograd.grad(network(x)[0, TARGET], x, create_graph=True)
    [backward] = torch.autograd.grad(first, x, direction)
    forward = torch.func.jvp(gradient, (x.detach(),), (direction,))[1]
    check_equal(backward, expected, 1e-4)
    check_equal(forward, expected, 1e-4)


@pytest.mark.parametrize("kind", ["across-maps", "within-map", "extra"])
def test_the_normalizations_pass_gradgradcheck(kind: str) -> None:
    recipe = replace(RECIPES["paper"], lrn="within-map" if kind == "within-map" else "across-maps")
    spec = norm_spec(recipe, "within-norm" if kind == "extra" else "norm")
    norm = ResponseNorm(spec, function=normalize_plain)
    x = torch.randn(1, 6, 3, 2, dtype=torch.double, generator=torch.Generator().manual_seed(2)) * 60
    assert torch.autograd.gradcheck(norm, x.requires_grad_())
    assert torch.autograd.gradgradcheck(norm, x)


def test_jacrev_gives_the_gradient_of_every_logit(network: AlexNet) -> None:
    x = make_input(network, 1)[0].requires_grad_()
    logits = network(x)
    rows = [torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in logits]
    check_equal(torch.func.jacrev(network)(x.detach()), torch.stack(rows))


def test_vmap_over_images_equals_the_batch(network: AlexNet) -> None:
    x = make_input(network, 3)
    check_equal(torch.func.vmap(network)(x), network(x))


def test_gradients_per_image_equal_one_image_at_a_time(network: AlexNet) -> None:
    x, labels = make_input(network), torch.tensor([1, 2])
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())

    def loss(parameters: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, ({**parameters}, buffers), (image,))
        return functional.cross_entropy(logits, label)

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    for i in range(2):
        network.zero_grad()
        functional.cross_entropy(network(x[i : i + 1]), labels[i : i + 1]).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            check_equal(found[name][i], parameter.grad)


def test_without_gradients_of_the_parameters_the_pixels_have_theirs(network: AlexNet) -> None:
    x = make_input(network).requires_grad_()
    [expected] = torch.autograd.grad(network(x)[:, TARGET].sum(), x)
    assert network.requires_grad_(False) is network
    network(x)[:, TARGET].sum().backward()
    assert x.grad is not None
    check_equal(x.grad, expected)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network(x.detach()).requires_grad


# Graphs, copies, types


def test_torch_fx_traces_the_network(network: AlexNet) -> None:
    x = make_input(network)
    graph = torch.fx.symbolic_trace(network)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == [name for name in network.layers if name.rstrip("12345678") in ("conv", "relu", "pool", "fc")]
    assert torch.equal(graph(x), network(x))


def test_layers_6_and_7_without_cross_talk_can_be_traced_and_mapped() -> None:
    """They are no layer of PyTorch: torch.fx traces through them."""
    network = AlexNet.from_model(random_model(replace(RECIPES["paper"], width=1 / 16, cross_talk=())))
    x = make_input(network)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), network(x))
    check_equal(torch.func.vmap(network)(x), network(x))
    check_equal(torch.export.export(network, (x,)).module()(x), network(x))


def test_torch_export_with_any_batch_size(network: AlexNet) -> None:
    shapes = {"x": {0: torch.export.Dim("images")}}
    program = torch.export.export(network, (make_input(network),), dynamic_shapes=shapes)
    exported = program.module()
    for count in (1, 2, 5):
        x = make_input(network, count)
        check_equal(exported(x), network(x))
    assert program.state_dict.keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    "recipe", ["paper", *(pytest.param(name, marks=pytest.mark.slow) for name in ("krizhevsky", "caffe"))]
)
def test_the_onnx_export_of_torch_equals_ours(recipe: str, tmp_path: Path) -> None:
    """Ours takes pixels of 0 to 255 and subtracts the mean image itself."""
    pytest.importorskip("onnxscript", reason="the extra `research` brings onnxscript")
    import onnxruntime

    model = random_model(replace(RECIPES[recipe], width=1 / 16))
    network, path = AlexNet.from_model(model), tmp_path / "torch.onnx"
    shapes = {"x": {0: torch.export.Dim("images")}}
    torch.onnx.export(network, (make_input(network),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    theirs, ours = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), Session(model)
    images = np.random.default_rng(1).integers(0, 256, (3, 256, 256, 3), np.uint8)
    start, side = (256 - network.recipe.input_size) // 2, network.recipe.input_size
    crops = images[:, start : start + side, start : start + side].transpose(0, 3, 1, 2)
    for count in (1, 3):
        [logits] = theirs.run(None, {"x": network.preprocess(images[:count]).numpy()})
        expected = ours.logits(np.ascontiguousarray(crops[:count]))
        assert logits.shape == expected.shape == (count, 10)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_a_deep_copy_shares_nothing(network: AlexNet) -> None:
    x = make_input(network)
    expected = network(x)
    other = copy.deepcopy(network)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any()
    assert torch.equal(network(x), expected)


def test_the_whole_module_through_torch_save(network: AlexNet) -> None:
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = make_input(network)
    assert torch.equal(loaded(x), network(x))
    assert (loaded.recipe, loaded.classes, loaded.layers) == (network.recipe, network.classes, network.layers)
    assert not loaded.training


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.half, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_in_every_layer(network: AlexNet, dtype: torch.dtype, tolerance: float) -> None:
    x = make_input(network)
    expected = network.activations(x, network.layers)
    values = network.to(dtype).activations(x.to(dtype), network.layers)
    for name in network.layers:
        assert values[name].dtype == dtype, name
        check_equal(values[name].float(), expected[name], tolerance)


def test_on_the_meta_device_every_layer_has_its_shape(network: AlexNet) -> None:
    x = make_input(network)
    expected = {name: values.shape for name, values in network.activations(x, network.layers).items()}
    values = network.to("meta").activations(x.to("meta"), network.layers)
    assert {name: values.shape for name, values in values.items()} == expected
    assert all(value.is_meta for value in values.values())
