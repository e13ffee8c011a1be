"""The layers of a network as they are (sections 3.2 to 3.5), read off the network itself.

Weights are those of the network built without memory for them. Maps are what comes out when it is run once at its least
width, since they are as large at any width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alexnet_cli.core.architecture import WITHIN_NORM_SIZE as EXTRA
from alexnet_cli.core.layers import Activation, Dropout, OverlappingPooling, ResponseNorm, WithinMapNorm
from alexnet_cli.core.network import Network, parameters_by_name
from alexnet_cli.recipe import Recipe

NARROW = 1 / 64  # of the paper's width: the least that a recipe may have
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid"}


@dataclass(frozen=True)
class Layer:
    """A layer with weights, and in words what follows it. Sides are in pixels, of square kernels and maps."""

    name: str
    units: int
    """Maps of a convolution or units, in each tower; the classes of fc8, which has no towers."""
    inputs: int
    """Channels or units that one of them sees."""
    meets: bool
    """Whether it sees both towers."""
    weights: int
    biases: int
    kernel: int | None = None
    stride: int | None = None
    side: int | None = None
    then: tuple[str, ...] = ()
    pooled: int | None = None
    """Side of the maps after pooling, if they are pooled."""

    @property
    def parameters(self) -> int:
        """Weights and biases, of both towers."""
        return self.weights + self.biases

    @property
    def multiplications(self) -> int:
        """For one picture, of both towers."""
        return self.weights * (self.side or 1) ** 2


def layers(recipe: Recipe, classes: int) -> tuple[Layer, ...]:
    """The eight layers of the network of a recipe, in order."""
    with torch.device("meta"):
        network = Network(recipe, classes)
    sizes = {name: parameter.numel() for name, parameter in parameters_by_name(network)}
    found: list[Layer] = []
    for module, name, side in _passed(recipe):
        if isinstance(module, nn.Conv2d | nn.Linear):
            found.append(_layer(network, name, side, sizes))
        elif words := _words(recipe, module):
            pooled = side if isinstance(module, OverlappingPooling) else found[-1].pooled
            found[-1] = replace(found[-1], then=found[-1].then + words, pooled=pooled)
    return (*found, _layer(network, "fc8", None, sizes))  # of which the network uses the tensors alone


def _passed(recipe: Recipe) -> list[tuple[nn.Module, str, int | None]]:
    """Every part that a picture passes, with its name and the side of the maps that come out of it."""
    network, passed = Network(replace(recipe, width=NARROW), 1).eval(), list[tuple[nn.Module, str, int | None]]()
    for name, module in network.named_modules():
        if not list(module.children()):

            def note(part: nn.Module, _given: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                passed.append((part, name, out.shape[-1] if out.dim() == 4 else None))

            module.register_forward_hook(note)
    with torch.inference_mode():
        network(torch.zeros(1, 3, recipe.input_size, recipe.input_size))
    return passed


def _layer(network: Network, name: str, side: int | None, sizes: dict[str, int]) -> Layer:
    part, towers = network.get_submodule(name), network.recipe.towers
    weight = part.get_parameter("weight")
    kernel, stride = (weight.shape[2], part.stride[0]) if isinstance(part, nn.Conv2d) else (None, None)
    whole = not isinstance(part, nn.Conv2d) or part.groups == 1
    return Layer(
        name, weight.shape[0] // (1 if name == "fc8" else towers), weight.shape[1],
        whole and towers > 1 and name != "conv1", sizes[f"{name}.weight"], sizes[f"{name}.bias"], kernel, stride, side,
    )  # fmt: skip


def _words(recipe: Recipe, part: nn.Module) -> tuple[str, ...]:
    """What a part without weights does; nothing if the recipe switches it off."""
    activation = ACTIVATIONS[recipe.activation]
    if isinstance(part, Activation):
        return (activation,)
    if isinstance(part, ResponseNorm) and part.kind != "none":
        joint = recipe.lrn_joint and recipe.towers > 1
        across = f"normalisation across {part.size} maps{' of both towers' if joint else ''}"
        within = f"normalisation within {part.size}×{part.size}"
        return (*(activation,) * part.relu, across if part.kind == "across-maps" else within)
    if isinstance(part, WithinMapNorm):
        return (f"normalisation within {EXTRA}×{EXTRA}",)
    if isinstance(part, OverlappingPooling):
        return (f"pooling {part.kernel_size}×{part.kernel_size} / {part.stride}",)
    return (f"dropout {part.p:g}",) if isinstance(part, Dropout) and part.p else ()
