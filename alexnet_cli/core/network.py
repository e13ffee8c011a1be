"""The network (sections 3.2 and 3.5): eight layers in two towers, and one table of initial values (section 5).

Channel counts below are per tower; a process that holds `held` towers multiplies by it, and layers that see only
their own tower are grouped convolutions with `held` groups. The same class is the whole network on one device, one
tower of two, and the convolutions with some of the columns of layers 6 to 8.

    layer   kernel         in one filter   per tower   map      then
    conv1   11 x 11 / 4    3               48          55 x 55  norm, pool
    conv2   5 x 5          own 48          128         27 x 27  norm, pool
    conv3   3 x 3          both: 256       192         13 x 13
    conv4   3 x 3          own 192         192         13 x 13
    conv5   3 x 3          own 192         128         13 x 13  pool -> 6 x 6
    fc6     -              both: 9216      2048                 dropout
    fc7     -              both: 4096      2048                 dropout
    fc8     -              both: 4096      classes, a sum over towers
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli.core.layers import Activation, Dropout, OverlappingPooling, ResponseNorm, WithinMapNorm
from alexnet_cli.core.shapes import widths
from alexnet_cli.core.towers import HybridGather, TowerGroup
from alexnet_cli.core.weights import PARAMETERS, Model
from alexnet_cli.recipe import Recipe

PADDING_224 = (0, 3, 0, 3)  # three zero columns right, rows below: the last of 55 windows reaches pixel 226


class Network(nn.Module):
    """AlexNet. Float N x 3 x 224 x 224 (227 if the recipe says so), mean-subtracted -> logits N x classes."""

    def __init__(
        self, recipe: Recipe, classes: int, towers: TowerGroup | None = None, columns: TowerGroup | None = None
    ) -> None:
        """`towers` says which towers this process holds, `columns` which units of layers 6 to 8 if otherwise split."""
        super().__init__()
        self.recipe = recipe
        self.towers = towers = towers or TowerGroup(recipe.towers, recipe.towers)
        self.columns, self.rows = columns or towers, HybridGather(columns)
        c = widths(recipe)
        mine = {layer: n * towers.held for layer, n in c.items()}
        every = {layer: n * towers.total for layer, n in c.items()}
        units = {layer: every[layer] // self.columns.total * self.columns.held for layer in ("fc6", "fc7")}
        own = towers.held
        pad2, pad5 = (2, 1) if recipe.pool_size == 3 else (1, 0)  # so that maps are 27, 13, 13, 6 either way
        self.conv1 = nn.Conv2d(3, mine["conv1"], 11, stride=4)
        self.conv2 = nn.Conv2d(mine["conv1"], mine["conv2"], 5, padding=pad2, groups=own)
        self.conv3 = nn.Conv2d(every["conv2"], mine["conv3"], 3, padding=1)
        self.conv4 = nn.Conv2d(mine["conv3"], mine["conv4"], 3, padding=1, groups=own)
        self.conv5 = nn.Conv2d(mine["conv4"], mine["conv5"], 3, padding=pad5, groups=own)
        self.fc6 = nn.Linear(every["conv5"] * 6 * 6, units["fc6"])
        self.fc7 = nn.Linear(every["fc6"], units["fc7"])
        self.fc8 = nn.Linear(units["fc7"], classes)
        self.act = Activation(recipe)
        self.pool = OverlappingPooling(recipe)
        self.stage1 = _stage(recipe, recipe.stage1_order, towers, "norm1", extra=False)
        self.stage2 = _stage(recipe, recipe.stage2_order, towers, "norm2", extra=recipe.within_norm_2)
        before = self.columns.first * every["fc6"] // self.columns.total
        self.drop6, self.drop7 = Dropout(recipe, salt=6, first_unit=before), Dropout(recipe, salt=7, first_unit=before)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels to logits; softmax belongs to the loss."""
        towers, columns, images = self.towers, self.columns, x
        if self.recipe.input_size == 224 and self.recipe.edge_padding:
            x = padded(x)
        x = self.stage1(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        x = self.stage2(self.conv2(x))
        x = self.act(self.conv3(towers.share(x, "conv3")))
        x = self.act(self.conv4(x))
        x = self.pool(self.act(self.conv5(x)))
        x = self.rows.gather(towers.share(x, "fc6").flatten(1))
        x = self.drop6(self.act(self.fc6(x)))
        x = self.drop7(self.act(self.fc7(columns.share(x, "fc7"))))
        x = columns.sum(functional.linear(x, self.fc8.weight), "fc8") + self.fc8.bias
        return self.rows.own(x, images)

    def slicing(self, name: str) -> tuple[TowerGroup, int] | None:
        """Along which dimension a parameter is split, and among whom; None where everyone has it whole."""
        if name == "fc8.bias":
            return None
        if name == "fc8.weight":
            return self.columns, 1
        return (self.columns if name.startswith("fc") else self.towers), 0

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This process's slice of a parameter of the whole network, or of what goes with it."""
        slicing = self.slicing(name)
        return whole if slicing is None else slicing[0].own(whole, slicing[1])

    def whole(self, name: str, own: Tensor) -> Tensor | None:
        """The whole of a parameter, or of what goes with it, on the CPU; None where others collect it."""
        slicing = self.slicing(name)
        return own.detach().cpu().contiguous() if slicing is None else slicing[0].whole(own, slicing[1])

    def draw_dropout(self, step: int, first_row: int = 0) -> None:
        """Choose the dropout masks of the coming step: the same on any device."""
        first_row = 0 if self.rows.columns else first_row
        self.drop6.draw(self.recipe.seed, step, first_row)
        self.drop7.draw(self.recipe.seed, step, first_row)


def padded(x: Tensor) -> Tensor:
    """`functional.pad(x, PADDING_224)`, channels-last and in the type that convolution 1 computes in.

    The picture is copied once, instead of filled with zeros, copied and converted. Autocast leaves float64 as it is.
    """
    n, c, height, width = x.shape
    _, right, _, below = PADDING_224
    dtype = x.dtype if x.dtype == torch.float64 else cast(x.device.type) or x.dtype
    out = x.new_empty(n, height + below, width + right, c, dtype=dtype).permute(0, 3, 1, 2)
    out[:, :, height:] = 0
    out[:, :, :height, width:] = 0
    out[:, :, :height, :width] = x
    return out


def cast(device: str) -> torch.dtype | None:
    """The type that autocast has convolutions compute in, if it is on."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


class AcrossTowers(nn.Module):
    """A normalisation that looks over the edge of a tower, as Caffe's does, where the next tower is elsewhere."""

    def __init__(self, norm: ResponseNorm, towers: TowerGroup, name: str) -> None:
        super().__init__()
        self.norm, self.towers, self.name = norm, towers, name

    def forward(self, x: Tensor) -> Tensor:
        """N x held*C x H x W -> the same shape."""
        return self.towers.own(self.norm(self.towers.share(x, self.name)), 1)


def _stage(recipe: Recipe, order: str, towers: TowerGroup, name: str, *, extra: bool) -> nn.Sequential:
    """What follows convolutions 1 and 2, in the recipe's order."""
    across = recipe.lrn == "across-maps"
    joint = across and recipe.lrn_joint and towers.held < towers.total
    joined = across and not joint and recipe.activation == "relu" and "relu-norm" in order
    own = ResponseNorm(recipe, towers.held, relu=joined)
    norm: list[nn.Module] = [AcrossTowers(own, towers, name) if joint else own]
    if extra:
        norm.append(WithinMapNorm(recipe))
    parts: dict[str, list[nn.Module]] = {
        "relu": [] if joined else [Activation(recipe)],
        "norm": norm,
        "pool": [OverlappingPooling(recipe)],
    }
    return nn.Sequential(*(module for word in order.split("-") for module in parts[word]))


def initial_values(recipe: Recipe) -> dict[str, tuple[float | None, float]]:
    """Layer -> deviation of its weights and value of its biases (section 5). None: sqrt(2 / inputs).

    paper       conv1  conv2  conv3  conv4  conv5  fc6  fc7  fc8
    deviation   .01    .01    .03    .03    .03    .01  .01  .01     (.03: the code; the text has .01)
    bias        0      1      0      1      1      1    1    0
    """
    r = recipe
    deviation = dict.fromkeys(("conv1", "conv2", "fc8"), r.weight_std)
    deviation |= dict.fromkeys(("conv3", "conv4", "conv5"), r.conv345_std) | dict.fromkeys(("fc6", "fc7"), r.fc67_std)
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
    return {
        layer: (
            None if r.init == "scaled" else std,
            r.bias if layer in ones and r.init == "gaussian" else 0.0,
        )
        for layer, std in deviation.items()
    }


@torch.no_grad()
def initialise(network: Network) -> None:
    """Set every parameter from the recipe's table and seed; each layer has a generator of its own.

    What a process holds is a slice of what the whole network is drawn as.
    """
    with torch.device("meta"):
        whole = Network(network.recipe, network.fc8.out_features)
    for number, (layer, (deviation, bias)) in enumerate(sorted(initial_values(network.recipe).items())):
        module = network.get_submodule(layer)
        shape = whole.get_parameter(f"{layer}.weight").shape
        generator = torch.Generator().manual_seed(network.recipe.seed * 1000 + number)
        if deviation is None:
            # The last layer has no rectifier after it: half the variance, and a start at even odds.
            deviation = math.sqrt((1.0 if layer == "fc8" else 2.0) / shape[1:].numel())
        if layer == "conv1":
            deviation *= network.recipe.conv1_scale
        values = torch.empty(shape).normal_(0.0, deviation, generator=generator)
        module.get_parameter("weight").copy_(network.own(f"{layer}.weight", values))
        module.get_parameter("bias").fill_(bias)


def parameters_by_name(network: Network) -> Iterator[tuple[str, nn.Parameter]]:
    """Names as in a model file, and parameters, layer by layer."""
    for name in PARAMETERS:
        yield name, network.get_parameter(name)


def parameter_count(network: Network) -> int:
    """Of the whole network, whatever of it is here."""
    count = 0
    for name, parameter in parameters_by_name(network):
        slicing = network.slicing(name)
        count += parameter.numel() * (slicing[0].total // slicing[0].held if slicing else 1)
    return count


def from_model(model: Model) -> Network:
    """The network of a model file, in evaluation mode on the CPU."""
    network = Network(model.recipe, len(model.classes))
    with torch.no_grad():
        for name, parameter in parameters_by_name(network):
            parameter.copy_(torch.from_numpy(model.tensors[name]))
    return network.eval()
