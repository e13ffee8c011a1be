"""What crosses between towers arrives as it was sent, in any arithmetic."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch

from alexnet_cli.core.model.towers import HybridGather
from alexnet_cli.core.parallel.placement import place_ranks
from alexnet_cli.core.parallel.process_group import join_process_group, read_rank_info
from rank_cases import processes


def meet(dtype: torch.dtype) -> None:
    """Share one's channels with the other tower, and get back the sum of what both say of them."""
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
def test_both_ways(dtype: torch.dtype) -> None:
    processes(2, meet, dtype)


def test_how_many_images_each_has_is_told_without_the_gpu() -> None:
    """Tensors of a GPU would have to be waited for, twice in every step."""
    told: list[torch.Tensor] = []

    class Columns:
        def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
            told.append(mine)
            return torch.stack([mine, mine + 1])

    assert HybridGather(cast(Any, Columns()))._batch_sizes(torch.empty(3, 2, device="meta")) == [3, 4]
    assert [mine.device.type for mine in told] == ["cpu"]
