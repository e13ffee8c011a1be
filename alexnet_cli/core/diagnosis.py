"""Where numbers first stopped being numbers (Inf, NaN): in a layer's output on the way up, or in its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alexnet_cli.core.augment import Draws
from alexnet_cli.core.gradient import Gradient
from alexnet_cli.core.loader import Batch
from alexnet_cli.core.network import Network
from alexnet_cli.core.weights import LAYERS


def weights(network: Network) -> str:
    """The layer whose weights went first, or "" if all are numbers.

    A gradient that overflows spoils its layer and those before it, so the last of them was the first. Where every layer
    is spoilt, as after an update with the gradient of a loss that is no number, nothing can be told.
    """
    layers = [
        layer
        for layer in LAYERS
        if not all(bool(torch.isfinite(p).all()) for p in network.get_submodule(layer).parameters())
    ]
    if len(layers) == len(LAYERS):
        return "every layer by the time it was seen"
    return f"the weights of {layers[-1]}" if layers else ""


def outputs(gradient: Gradient, batch: Batch, draws: Draws, step: int, epoch: int) -> str:
    """The first layer, in the order of computing, whose output for this batch is no number; else its weights, or ""."""
    network, found = gradient.network, []
    ranks, spoilt = gradient.placement.ranks, weights(network)
    if spoilt or ranks.columns:  # a forward takes everyone there, and others may have losses that are numbers
        return spoilt

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not bool(torch.isfinite(output).all()):
                found.append(layer)

        return look

    handles = [network.get_submodule(layer).register_forward_hook(watch(layer)) for layer in LAYERS[:-1]]
    try:
        for first in range(0, len(batch.rows), gradient.piece):
            part = slice(first, first + gradient.piece)
            network.draw_dropout(step, ranks.share(gradient.images).start + first)
            with torch.no_grad(), gradient.placement.arithmetic():
                network(gradient.pixels.train(batch.images[part], batch.rows[part], draws, epoch))
            if found:
                break
    finally:
        for handle in handles:
            handle.remove()
    return f"the outputs of {found[0] if found else LAYERS[-1]}"
