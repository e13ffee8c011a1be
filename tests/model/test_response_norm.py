"""Response normalization against plain loops and torch's operator, in values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from alexnet_cli.core.model import response_norm
from alexnet_cli.core.model.layers import within_map

K, ALPHA, BETA = 2.0, 5e-4, 0.75


def loop_norm(x: np.ndarray, size: int, towers: int, beta: float = BETA) -> np.ndarray:
    """The formula of the paper, four nested loops and a tower's edges."""
    n, c, h, w = x.shape
    per, out = c // towers, np.empty_like(x)
    for image in range(n):
        for i in range(c):
            first, last = (i // per) * per, (i // per + 1) * per - 1
            for row in range(h):
                for column in range(w):
                    window = range(max(first, i - size // 2), min(last, i + size // 2) + 1)
                    total = sum(x[image, j, row, column] ** 2 for j in window)
                    out[image, i, row, column] = x[image, i, row, column] / (K + ALPHA * total) ** beta
    return out


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values, large enough that normalization matters: inputs of 0..255 give about 60 after layer 1."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 60).to(dtype)


@pytest.mark.parametrize("function", [response_norm.normalize_plain, response_norm.normalize_fast])
@pytest.mark.parametrize(
    ("size", "towers", "beta"), [(5, 2, 0.75), (5, 1, 0.75), (3, 2, 0.6), (1, 2, 0.75), (9, 1, 0.75)]
)
def test_equals_the_formula(function: object, size: int, towers: int, beta: float) -> None:
    x = activations(2, 12, 3, 4)
    assert callable(function)
    out = function(x, size, K, ALPHA, beta, towers)
    np.testing.assert_allclose(out.numpy(), loop_norm(x.double().numpy(), size, towers, beta), rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 96, 7, 5), (3, 10, 1, 1), (1, 6, 55, 55)])
def test_fast_equals_plain_in_values_and_gradients(layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    plain = activations(*shape).contiguous(memory_format=layout).requires_grad_()
    fast = plain.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    grad = activations(*shape).flip(0)
    expected = response_norm.normalize_plain(plain, 5, K, ALPHA, BETA, 2)
    out = response_norm.normalize_fast(fast, 5, K, ALPHA, BETA, 2)
    expected.backward(grad)
    out.backward(grad)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(fast.grad, plain.grad)


@pytest.mark.parametrize("function", [response_norm.normalize_plain, response_norm.normalize_fast])
def test_fused_relu_equals_relu_and_then_the_formula(function: object) -> None:
    x = activations(2, 12, 3, 4).requires_grad_()
    assert callable(function)
    out = function(x * 1, 5, K, ALPHA, BETA, 2, relu=True)  # times 1: `fast` may overwrite what it is given
    rectified = np.maximum(x.detach().double().numpy(), 0)
    np.testing.assert_allclose(out.detach().numpy(), loop_norm(rectified, 5, 2), rtol=1e-5)
    grad = activations(2, 12, 3, 4).flip(0)
    out.backward(grad)
    after = torch.from_numpy(rectified).float().requires_grad_()
    response_norm.normalize_plain(after, 5, K, ALPHA, BETA, 2).backward(grad)
    assert x.grad is not None
    assert after.grad is not None
    torch.testing.assert_close(x.grad, after.grad * (x.detach() > 0))


def test_gradient_equals_finite_differences() -> None:
    x = activations(2, 8, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: response_norm.normalize_plain(v, 5, K, ALPHA, BETA, 2).double(), x, eps=1e-2, atol=1e-3
    )
    single = x.detach().float().requires_grad_()
    response_norm.normalize_fast(single, 5, K, ALPHA, BETA, 2)[0, 3, 1, 0].backward()
    assert single.grad is not None
    step = 0.5
    for place in [(0, 1, 1, 0), (0, 3, 1, 0), (0, 4, 1, 0)]:
        high, low = x.detach().clone(), x.detach().clone()
        high[place] += step
        low[place] -= step
        values = [response_norm.normalize_plain(v, 5, K, ALPHA, BETA, 2)[0, 3, 1, 0] for v in (high, low)]
        assert single.grad[place].item() == pytest.approx(
            ((values[0] - values[1]) / (2 * step)).item(), rel=1e-2, abs=1e-5
        )


def test_bf16_is_normalized_in_float32() -> None:
    x = activations(2, 16, 5, 5, dtype=torch.bfloat16)
    out = response_norm.normalize_fast(x, 5, K, ALPHA, BETA, 2)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, response_norm.normalize_plain(x.float(), 5, K, ALPHA, BETA, 2).to(torch.bfloat16))


def test_equals_torchs_operator_for_one_tower() -> None:
    """torch divides alpha by the size: its 5e-4 is the paper's 1e-4."""
    x = activations(2, 12, 4, 4)
    stock = torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
    torch.testing.assert_close(response_norm.normalize_fast(x, 5, 2.0, 1e-4, 0.75, 1), stock(x))


def test_an_empty_batch() -> None:
    empty = torch.empty(0, 8, 5, 5)
    settings = (5, 2.0, 1e-4, 0.75, 2)
    torch.testing.assert_close(
        response_norm.normalize_fast(empty, *settings), response_norm.normalize_plain(empty, *settings)
    )


def test_towers_never_see_each_other() -> None:
    x = activations(1, 96, 2, 2)
    loud = x.clone()
    loud[:, 48:] *= 100
    quiet, other = (response_norm.normalize_fast(v, 5, K, ALPHA, BETA, 2) for v in (x, loud))
    torch.testing.assert_close(quiet[:, :48], other[:, :48], rtol=0, atol=0)
    joint = response_norm.normalize_fast(loud, 5, K, ALPHA, BETA, 1)
    changed = ((joint - quiet)[0, :48].abs().amax((1, 2)) > 0).nonzero().flatten().tolist()
    assert changed == [46, 47]  # only the maps whose window reaches over the edge


def test_within_map_equals_a_plain_loop() -> None:
    x = activations(1, 2, 6, 7).double().numpy()
    expected = np.empty_like(x)
    for channel in range(2):
        for row in range(6):
            for column in range(7):
                window = x[0, channel, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
                expected[0, channel, row, column] = x[0, channel, row, column] * (1 + 4e-5 * (window**2).sum()) ** -0.75
    out = within_map(torch.from_numpy(x).float(), 5, 1.0, 1e-3 / 25, 0.75)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5)
