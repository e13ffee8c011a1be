"""The one place that chooses between the Triton kernels of `triton_kernels` and plain PyTorch.

It is apart from them because a CPU need not spend the time to import Triton.
"""

from __future__ import annotations

from types import ModuleType

import torch


def kernels_for(device: torch.device) -> ModuleType | None:
    """Return `triton_kernels` for a GPU that can run them; None where the plain form is used."""
    if device.type != "cuda":
        return None
    from alexnet_cli.core.model import triton_kernels

    if torch.compiler.is_compiling():  # torch.compile needs Triton and a C compiler itself
        return triton_kernels
    return None if triton_kernels.unavailable_reason(device.index or 0) else triton_kernels
