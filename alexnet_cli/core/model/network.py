"""The network (sections 3.2 and 3.5): eight layers in two towers, and its initial values (section 5).

Geometry comes from `architecture.layer_specs`, per tower; a process that holds `held` towers multiplies maps by it, and
layers that see only their own tower are grouped convolutions with `held` groups. The same class is the whole network
on one device, one tower of two, or all convolutions with some of the units of layers 6 to 8 (hybrid).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli.core.model.architecture import (
    EDGE_PADDING,
    LAYERS,
    LayerSpec,
    Step,
    layer_specs,
    list_layers,
    norm_spec,
    step_name,
    tensor_shapes,
)
from alexnet_cli.core.model.layers import Dropout, ResponseNorm, TowerLinear, make_activation, make_pooling
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.model.towers import HybridGather, TowerGroup
from alexnet_cli.recipe import Recipe


class Network(nn.Module):
    """AlexNet. Mean-subtracted float N x 3 x 224 x 224 (227 if the recipe says so) -> logits N x classes."""

    def __init__(
        self, recipe: Recipe, classes: int, towers: TowerGroup | None = None, columns: TowerGroup | None = None
    ) -> None:
        """`towers`: the towers that this process holds. `columns`: its units of layers 6 to 8, if hybrid."""
        super().__init__()
        self.recipe = recipe
        self.towers = towers = towers or TowerGroup(recipe.towers, recipe.towers)
        self.columns = columns or towers
        self.hybrid = HybridGather(columns)
        specs = {spec.name: spec for spec in layer_specs(recipe, classes)}

        def conv(name: str) -> nn.Conv2d:
            spec = specs[name]
            groups = 1 if name == "conv1" or spec.sees_both else towers.held
            inputs, maps = spec.inputs * groups, spec.maps * towers.held
            padding = 0 if name == "conv1" else spec.padding[0]  # `pad_right_and_bottom` pads conv1's input
            return nn.Conv2d(inputs, maps, spec.kernel, spec.stride, padding, groups=groups)

        def units(name: str) -> int:
            return specs[name].biases // self.columns.total * self.columns.held

        def linear(name: str) -> nn.Linear:
            spec, held = specs[name], self.columns.held
            if recipe.towers == 1 or spec.sees_both:
                return nn.Linear(spec.inputs, units(name))
            # Hybrid: the inputs of both towers come in, and the units are some of one tower.
            first = columns.start * recipe.towers // columns.total if columns else 0
            return TowerLinear(spec.inputs, units(name), range(first, first + held))

        self.cross_talk = {spec.name for spec in specs.values() if spec.sees_both}
        self.conv1, self.conv2 = conv("conv1"), conv("conv2")
        self.deeper_convs = [layer for layer in ("conv3", "conv4", "conv5") if layer in specs]
        for layer in self.deeper_convs:
            self.add_module(layer, conv(layer))
        self.fc6, self.fc7 = linear("fc6"), linear("fc7")
        self.fc8 = nn.Linear(units("fc7"), classes)
        self.act = make_activation(recipe, inplace=True)  # the output of a layer is not used elsewhere
        self.stage1 = _make_stage(recipe, specs["conv1"], towers)
        self.stage2 = _make_stage(recipe, specs["conv2"], towers)
        self.pool = make_pooling(recipe, ceil=specs["conv5"].pool_ceil)
        first_unit = self.columns.start * specs["fc6"].biases // self.columns.total
        self.drop6 = Dropout(recipe, salt=6, first_unit=first_unit)
        self.drop7 = Dropout(recipe, salt=7, first_unit=first_unit)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits; softmax belongs to the loss."""
        sizes = self.hybrid.batch_sizes(x)
        if self.recipe.input_size == 224 and self.recipe.edge_padding:
            x = pad_right_and_bottom(x)
        x = self.stage1(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        x = self.stage2(self.conv2(self._share(x, "conv2")))
        for layer in self.deeper_convs:
            x = self.act(getattr(self, layer)(self._share(x, layer)))
        x = self.hybrid.gather_images(self._share(self.pool(x), "fc6").flatten(1), sizes)
        x = self.drop6(self.act(self.fc6(x)))
        x = self.drop7(self.act(self.fc7(self._share(x, "fc7"))))
        x = self.columns.sum(functional.linear(x, self.fc8.weight), "fc8") + self.fc8.bias
        return self.hybrid.keep_own(x, sizes)

    def _share(self, x: Tensor, layer: str) -> Tensor:
        """The maps or units that this process's filters of a layer see: of both towers if it has cross-talk."""
        if layer == "fc7" and self.hybrid.columns:
            return self.columns.share(x, layer)  # a tower's units are in several processes
        return self.towers.share(x, layer) if layer in self.cross_talk else x

    def split_of(self, name: str) -> tuple[TowerGroup, int] | None:
        """The group that a parameter is split over, and the dimension; None if every process has all of it."""
        if name == "fc8.bias":
            return None
        if name == "fc8.weight":
            return self.columns, 1
        return (self.columns if name.startswith("fc") else self.towers), 0

    def slice_own(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's slice of a whole parameter, or of a tensor of its shape (velocity, gradient)."""
        if (split := self.split_of(name)) is None:
            return whole
        group, dimension = split
        return group.slice_own(whole, dimension)

    def gather_whole(self, name: str, part: Tensor) -> Tensor | None:
        """Gather a whole parameter, or a tensor of its shape, on the CPU; None on ranks that do not collect it."""
        if (split := self.split_of(name)) is None:
            return part.detach().cpu().contiguous()
        group, dimension = split
        return group.gather_whole(part, dimension)

    def draw_dropout(self, step: int, first_row: int = 0) -> None:
        """Choose the dropout masks of a step; they are the same on any device and for any placement."""
        first_row = 0 if self.hybrid.columns else first_row  # hybrid: layers 6 and 7 see the whole batch
        self.drop6.draw(self.recipe.seed, step, first_row)
        self.drop7.draw(self.recipe.seed, step, first_row)


def pad_right_and_bottom(x: Tensor) -> Tensor:
    """`functional.pad(x, (0, 3, 0, 3))`, channels-last and in the type that convolution 1 computes in.

    One copy instead of three (fill with zeros, copy, convert). Autocast leaves float64 as it is.
    """
    n, c, height, width = x.shape
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype
    out = x.new_empty(n, height + EDGE_PADDING, width + EDGE_PADDING, c, dtype=dtype).permute(0, 3, 1, 2)
    out[:, :, height:] = 0
    out[:, :, :height, width:] = 0
    out[:, :, :height, :width] = x
    return out


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which convolutions compute under autocast; None if autocast is off."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


class JointTowerNorm(nn.Module):
    """Normalization across the maps of both towers (as in Caffe), when the other tower is in another process."""

    def __init__(self, norm: ResponseNorm, towers: TowerGroup, name: str) -> None:
        super().__init__()
        self.norm, self.towers, self.name = norm, towers, name

    def forward(self, x: Tensor) -> Tensor:
        """N x held*C x H x W -> the same shape."""
        return self.towers.slice_own(self.norm(self.towers.share(x, self.name)), 1)


def _make_stage(recipe: Recipe, spec: LayerSpec, towers: TowerGroup) -> nn.Sequential:
    """What follows convolution 1 or 2. ReLU and normalization across maps are one module where they are adjacent."""
    is_across = recipe.lrn == "across-maps"
    is_split = is_across and recipe.lrn_joint and towers.held < towers.total
    fuses = is_across and not is_split and recipe.activation == "relu" and spec.then[:2] == ("activation", "norm")

    def make(step: Step) -> nn.Module:
        if step == "activation":
            return make_activation(recipe, inplace=True)
        if step == "pool":
            return make_pooling(recipe, ceil=spec.pool_ceil)
        norm = norm_spec(recipe, step)
        module = ResponseNorm(norm._replace(groups=min(norm.groups, towers.held)), relu=fuses)
        if is_split and step == "norm":
            return JointTowerNorm(module, towers, step_name(recipe, spec.name, step))
        return module

    return nn.Sequential(*map(make, spec.then[1:] if fuses else spec.then))


def initial_values(recipe: Recipe) -> dict[str, tuple[float | None, float]]:
    """Layer -> (std of its weights, value of its biases) (section 5). A std of None means sqrt(2 / inputs).

    paper       conv1  conv2  conv3  conv4  conv5  fc6  fc7  fc8
    std         .01    .01    .03    .03    .03    .01  .01  .01     (.03: the code; the text has .01)
    bias        0      1      0      1      1      1    1    0
    """
    if recipe.init == "scaled":
        return dict.fromkeys(LAYERS, (None, 0.0))
    stds = dict.fromkeys(LAYERS, recipe.weight_std)
    stds |= dict.fromkeys(("conv3", "conv4", "conv5"), recipe.conv345_std)
    stds |= dict.fromkeys(("fc6", "fc7"), recipe.fc67_std)
    return {layer: (std, 0.0 if layer in ("conv1", "conv3", "fc8") else recipe.bias) for layer, std in stds.items()}


def initial_tensors(recipe: Recipe, classes: int) -> Iterator[tuple[str, Tensor]]:
    """Draw every parameter of the whole network from `initial_values` and the seed: (name, values), layer by layer.

    Each layer has a random generator of its own, numbered in alphabetical order.
    """
    shapes, values = tensor_shapes(recipe, classes), initial_values(recipe)
    for layer in list_layers(recipe):
        std, bias = values[layer]
        shape = shapes[f"{layer}.weight"]
        if std is None:
            # No ReLU follows the last layer: half the variance is enough.
            std = math.sqrt((1.0 if layer == "fc8" else 2.0) / math.prod(shape[1:]))
        if layer == "conv1":
            std *= recipe.conv1_scale
        generator = torch.Generator("cpu").manual_seed(recipe.seed * 1000 + sorted(LAYERS).index(layer))
        yield f"{layer}.weight", torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)
        yield f"{layer}.bias", torch.full(shapes[f"{layer}.bias"], bias, device="cpu")


@torch.no_grad()
def initialize(network: Network) -> None:
    """Set every parameter from `initial_tensors`: the whole is drawn, then sliced, whatever the placement."""
    for name, whole in initial_tensors(network.recipe, network.fc8.out_features):
        network.get_parameter(name).copy_(network.slice_own(name, whole))


def parameters_by_name(network: Network) -> Iterator[tuple[str, nn.Parameter]]:
    """(name as in a model file, parameter), layer by layer."""
    for layer in list_layers(network.recipe):
        for part in ("weight", "bias"):
            yield f"{layer}.{part}", network.get_parameter(f"{layer}.{part}")


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put every layer into evaluation mode inside the block, and each into its own mode again after it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def network_from_model(model: Model) -> Network:
    """The network of a model file, in evaluation mode on the CPU."""
    network = Network(model.recipe, len(model.classes))
    with torch.no_grad():
        for name, parameter in parameters_by_name(network):
            parameter.copy_(torch.from_numpy(model.tensors[name]))
    return network.eval()
