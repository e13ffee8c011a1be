"""Pooling against a plain loop; dropout: keep rate, scaling, masks that do not depend on the placement."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from alexnet_cli.core.model.layers import Dropout, dropout_state, hash_uniform, make_pooling
from alexnet_cli.recipe import PAPER


@pytest.mark.parametrize("ceil", [True, False])
@pytest.mark.parametrize(("size", "side"), [(3, 55), (3, 27), (3, 26), (3, 13), (2, 55), (2, 26), (2, 11)])
def test_pooling_equals_a_plain_loop(size: int, side: int, ceil: bool) -> None:
    x = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(0))
    values, steps = x.numpy(), math.ceil((side - size) / 2) + 1 if ceil else math.floor((side - size) / 2) + 1
    expected = np.array(
        [
            [
                [values[0, c, 2 * i : 2 * i + size, 2 * j : 2 * j + size].max() for j in range(steps)]
                for i in range(steps)
            ]
            for c in range(2)
        ]
    )
    out = make_pooling(replace(PAPER, pool_size=size), ceil=ceil)(x)
    np.testing.assert_array_equal(out[0].numpy(), expected)


def test_hash_is_uniform_and_uncorrelated() -> None:
    values = hash_uniform(dropout_state(12345 << 32 | 678, first_row=0), 256, 512, first_unit=0).double()
    n = values.numel()
    counts = torch.histc(values.float(), 64, 0, 1)
    chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum().item()
    assert 20 < chi_square < 120  # 63 degrees of freedom
    centered = values - 0.5
    limit = 5 / 12 / n**0.5  # five standard errors of a mean of products
    assert abs(centered.mean().item()) < 5 * (1 / 12 / n) ** 0.5
    for shifted in (centered.roll(1, 0), centered.roll(1, 1), centered.roll((3, 7), (0, 1))):
        assert abs((centered * shifted).mean().item()) < limit
    other = hash_uniform(dropout_state(12345 << 32 | 679, first_row=0), 256, 512, first_unit=0).double() - 0.5
    assert abs((centered * other).mean().item()) < limit


def test_a_part_of_a_mask_equals_that_part_of_the_whole() -> None:
    whole = hash_uniform(dropout_state(99, first_row=0), 8, 20, first_unit=0)
    part = hash_uniform(dropout_state(99, first_row=5), 3, 10, first_unit=10)
    torch.testing.assert_close(part, whole[5:, 10:], rtol=0, atol=0)


@pytest.mark.parametrize("inverted", [False, True])
def test_dropout_keeps_the_expectation(inverted: bool) -> None:
    layer = Dropout(replace(PAPER, dropout=0.3, dropout_inverted=inverted), salt=6)
    x = torch.ones(64, 1024)
    layer.draw(seed=0, step=3)
    train, test = layer.train()(x), layer.eval()(x)
    assert (train == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert train.mean().item() == pytest.approx(test.mean().item(), abs=0.02)
    assert test.mean().item() == pytest.approx(1.0 if inverted else 0.7)
    assert sorted(set(train.flatten().tolist())) == pytest.approx([0.0, 1 / 0.7 if inverted else 1.0])


def test_masks_differ_between_layers_and_steps() -> None:
    """No row of one mask is a row of another, whatever the shift: half of all units must differ everywhere."""
    x = torch.ones(128, 512)
    masks = []
    for salt, step in ((6, 1), (7, 1), (6, 2), (6, 17), (7, 2)):
        layer = Dropout(PAPER, salt=salt).train()
        layer.draw(seed=0, step=step)
        masks.append(layer(x))
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            agreement = (one @ other.T + (1 - one) @ (1 - other).T) / 512  # every row against every row
            assert agreement.min().item() > 0.3
            assert agreement.max().item() < 0.7
