"""The network through torch.compile, for training: fewer, longer kernels, and on a GPU fewer launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from alexnet_cli.core.layers import ResponseNorm
from alexnet_cli.core.network import Network, autocast_dtype
from alexnet_cli.errors import MissingError

LAUNCH_BOUND = 256  # images to a step; above, an H100 should compute for longer than launching takes (an estimate)
torch.compiler.assume_constant_result(autocast_dtype)  # torch 2.11 cannot trace the question


def compiled(network: Network, device: torch.device, images: int) -> Callable[[Tensor], Tensor]:
    """A function that does what `network` does, of whose parameters it is; `images` is how many it gets at a time.

    It compiles when it is called first, and raises MissingError where it cannot.
    """
    plain: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False)
    captured: Callable[[Tensor], Tensor] | None = None
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, ResponseNorm):  # whose loop over images would be unrolled
                module.function = torch.compiler.disable(module.function)
    elif images <= LAUNCH_BOUND:
        captured = torch.compile(network, dynamic=False, mode="reduce-overhead")

    def forward(x: Tensor) -> Tensor:
        try:
            # A captured graph puts its gradients in the same place each time: there must be none to add them to.
            if captured is not None and network.fc8.bias.grad is None:
                torch.compiler.cudagraph_mark_step_begin()
                return captured(x)
            return plain(x)
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise MissingError(f"--compile: torch.compile fails here: {reason}", "train without --compile") from error

    return forward
