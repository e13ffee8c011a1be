"""Cases for the GPU kernels, of response normalisation and of the update, against the plain definitions in float32.

Run as a program with TRITON_INTERPRET=1, before which Triton must not be imported, they need no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from alexnet_cli.core import learning, response_norm, triton_kernels

K, ALPHA = 2.0, 5e-4
LAST, FIRST = torch.channels_last, torch.contiguous_format


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    size: int = 5
    towers: int = 2
    beta: float = 0.75
    relu: bool = False
    layout: torch.memory_format = LAST
    dtype: torch.dtype = torch.float32


CASES = [
    Case((2, 96, 3, 2)),
    Case((2, 96, 3, 2), layout=FIRST, relu=True),
    Case((1, 96, 2, 3), dtype=torch.bfloat16, relu=True),
    Case((1, 96, 2, 3), dtype=torch.bfloat16, layout=FIRST),
    Case((1, 96, 2, 3), towers=1, dtype=torch.float16),
    Case((1, 256, 2, 2), relu=True),
    Case((1, 256, 2, 2), towers=1, dtype=torch.bfloat16),
    Case((3, 12, 3, 5), size=3, beta=0.6, relu=True),
    Case((3, 12, 3, 5), size=7, towers=1, layout=FIRST),
    Case((2, 24, 7, 1), size=1, beta=0.5),
    Case((5, 5, 3, 1), towers=1, layout=FIRST, dtype=torch.bfloat16, relu=True),
    Case((3, 10, 1, 1), size=9),
    Case((0, 12, 3, 5), relu=True),
]


def close(found: torch.Tensor, expected: torch.Tensor | None) -> None:
    """Float32 `expected` in the dtype found; in float32, a GPU's roots and powers are good to some 1e-6."""
    assert expected is not None
    tolerance = 1e-5 if found.dtype == torch.float32 else None
    torch.testing.assert_close(found, expected.to(found), rtol=tolerance, atol=tolerance)


def check(case: Case, device: str) -> None:
    """Values and gradients equal those of the definition, in the layout and dtype of the input."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(case.shape, generator=generator).to(case.dtype) for _ in range(2))
    x = (x * 60).contiguous(memory_format=case.layout).to(device)
    arguments = (case.size, K, ALPHA, case.beta, case.towers, case.relu)
    quick, slow = x.clone().requires_grad_(), x.cpu().float().clone().requires_grad_()
    out, expected = triton_kernels.fused_response_norm(quick, *arguments), response_norm.plain(slow, *arguments)
    out.backward(grad.to(device))  # contiguous, whatever the layout of x
    expected.backward(grad.float())
    assert quick.grad is not None
    assert out.dtype == quick.grad.dtype == case.dtype
    assert out.stride() == quick.grad.stride() == x.stride()
    close(out, expected)
    close(quick.grad, slow.grad)


def check_layouts(device: str) -> None:
    """Inputs and gradients that lie otherwise in memory: cut out, transposed, one value for all."""
    whole = torch.randn(2, 10, 6, 8, generator=torch.Generator().manual_seed(2)).to(device) * 60
    for x in (whole[:, 2:8, 1:4, ::2], whole.transpose(2, 3), whole.permute(1, 0, 3, 2)):
        quick, slow = (v.detach().requires_grad_() for v in (x, x.cpu()))
        triton_kernels.fused_response_norm(quick, 5, K, ALPHA, 0.75, 2).sum().backward()
        response_norm.plain(slow, 5, K, ALPHA, 0.75, 2).sum().backward()
        assert quick.grad is not None
        close(quick.grad, slow.grad)


def check_not_a_number(device: str) -> None:
    """NaN is not rectified away, and stays inside its window."""
    x = torch.ones(1, 12, 1, 1, device=device)
    x[0, 5] = torch.nan
    out = triton_kernels.fused_response_norm(x, 5, K, ALPHA, 0.75, 1, True).flatten()
    assert out.isnan().nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def check_operator(device: str) -> None:
    """What torch.compile is told about the operator is true, and it takes it as one step."""
    x = torch.randn(2, 8, 3, 5, device=device).contiguous(memory_format=LAST).requires_grad_()
    torch.library.opcheck(torch.ops.alexnet.response_norm.default, (x, 5, K, ALPHA, 0.75, 2, True))
    compiled = torch.compile(
        lambda v: triton_kernels.fused_response_norm(v * 2, 5, K, ALPHA, 0.75, 2, True) + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    compiled(x).sum().backward()
    again = x.detach().clone().requires_grad_()
    (triton_kernels.fused_response_norm(again * 2, 5, K, ALPHA, 0.75, 2, True) + 1).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def check_update(device: str) -> None:
    """The update in one kernel is the update, over several steps, whatever the shape and layout."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(48, 3, 11, 11), (1000,), (7, 33), (1,)]
    plain = [torch.randn(shape, generator=generator) for shape in shapes]
    ours = [w.clone().to(device) for w in plain]
    ours[0] = ours[0].contiguous(memory_format=LAST)
    velocity = [torch.zeros_like(w) for w in ours]
    expected = [torch.zeros_like(w) for w in plain]
    for rate, decay in ((0.01, 5e-4), (0.01, 0.0), (0.001, 5e-4)):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        triton_kernels.fused_update(ours, velocity, [g.to(device) for g in gradients], 0.9, rate, decay)
        learning.update(plain, expected, gradients, 0.9, rate, decay)
        for found, right in zip((*ours, *velocity), (*plain, *expected), strict=True):
            torch.testing.assert_close(found.cpu(), right, rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        try:
            check(case, "cpu")
        except AssertionError as error:
            raise AssertionError(f"case {number}: {case}") from error
    check_layouts("cpu")
    check_not_a_number("cpu")
    check_operator("cpu")
    check_update("cpu")
