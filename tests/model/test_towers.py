"""Exchange between towers: values and gradients, in float32 and bf16."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch

from alexnet_cli.core.model.towers import HybridGather
from alexnet_cli.core.parallel.placement import place_ranks
from alexnet_cli.core.parallel.process_group import join_process_group, read_rank_info
from rank_cases import run_ranks


def share_with_the_other_tower(dtype: torch.dtype) -> None:
    """One of two ranks: share channels with the other tower; the backward pass sums the gradients of both."""
    with ExitStack() as stack:
        ranks = stack.enter_context(join_process_group(read_rank_info(), "gloo"))
        towers = place_ranks(ranks, "none", "fp32", "tower", 2).ranks.towers
        assert towers is not None
        whole = torch.arange(2 * 6 * 2 * 2).reshape(2, 6, 2, 2).to(dtype)
        own = towers.slice_own(whole, 1).clone().requires_grad_()
        shared = towers.share(own, "conv3")
        assert shared.dtype == dtype
        torch.testing.assert_close(shared, whole, rtol=0, atol=0)
        shared.backward(whole * (1 + 2 * ranks.rank))
        torch.testing.assert_close(own.grad, towers.slice_own(whole * 4, 1), rtol=0, atol=0)
        assert ranks.traffic == {"conv3": 2 * own.numel() * own.element_size()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_its_gradient(dtype: torch.dtype) -> None:
    run_ranks(2, share_with_the_other_tower, dtype)


def test_batch_sizes_are_exchanged_from_the_cpu() -> None:
    """A tensor on a GPU would make the process wait for it in every step."""
    sent: list[torch.Tensor] = []

    class Columns:
        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            sent.append(tensor)
            return torch.stack([tensor, tensor + 1])

    assert HybridGather(cast(Any, Columns())).batch_sizes(torch.empty(3, 2, device="meta")) == [3, 4]
    assert [tensor.device.type for tensor in sent] == ["cpu"]
    assert HybridGather().batch_sizes(torch.empty(3, 2)) == []
