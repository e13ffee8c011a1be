"""Which device computes, and with what arithmetic, where the GPUs are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alexnet_cli.core.devices import Gpu
from alexnet_cli.core.model import triton_kernels
from alexnet_cli.core.parallel import placement
from alexnet_cli.core.parallel.placement import place, place_ranks, single_gpu
from alexnet_cli.core.parallel.process_group import ProcessMesh, RankInfo
from alexnet_cli.errors import MissingError, UsageError

T4, H100 = Gpu(0, "T4", 16 << 30, "7.5", "GPU-a"), Gpu(1, "H100", 80 << 30, "9.0", "GPU-b")


pytestmark = pytest.mark.usefixtures("own_runs_and_settings")


@pytest.fixture(autouse=True)
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which everything can be said but to compute."""
    monkeypatch.setattr(placement, "visible_gpus", lambda: [T4, H100])
    monkeypatch.setattr(placement, "try_gpu", lambda index: "")
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "")


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("gpu", "asked", "precision", "notes"),
    [("1", "bf16", "bf16", 0), ("1", "tf32", "tf32", 0), ("1", "fp32", "fp32", 0),
     ("0", "bf16", "fp32", 1), ("0", "tf32", "fp32", 0)],
)  # fmt: skip
def test_arithmetic_is_what_the_gpu_has(gpu: str, asked: str, precision: str, notes: int) -> None:
    placed = place(gpu, asked)
    assert (placed.device, placed.precision) == (torch.device("cuda", int(gpu)), precision)
    assert len(placed.notes) == notes
    assert tf32() == (precision != "fp32",) * 2


def test_float32_stays_float32_beside_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is a switch of the process: each placement sets it when it computes."""
    monkeypatch.setattr(torch, "autocast", lambda *_: None)
    low, high = place("1", "bf16"), place("1", "fp32")
    for placed, allowed in ((low, True), (high, False), (low, True)):
        placed.precision_context()
        assert tf32() == (allowed, allowed)


def test_a_gpu_that_cannot_compute_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "try_gpu", lambda index: "CUDA error: no kernel image is available")
    with pytest.raises(MissingError, match="GPU 0 T4 cannot be used: CUDA error: no kernel image") as told:
        place(None, "fp32")
    assert "--gpus none" in told.value.hint


def test_one_of_several() -> None:
    assert [single_gpu(gpus) for gpus in (None, "1", "all", "none")] == [0, 1, 0, None]
    with pytest.raises(UsageError, match="one device"):
        single_gpu("0,1")


@pytest.fixture
def among(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Where this process, the second of two, is placed; `other` says what the first one told."""

    def placed(gpus: str | None, seen: list[Gpu], other: tuple[str, str, str], precision: str = "bf16") -> Any:
        monkeypatch.setattr(placement, "read_rank_info", lambda: RankInfo(1, 2, 1, 2))
        monkeypatch.setattr(placement, "visible_gpus", lambda: seen)
        monkeypatch.setattr(placement, "arrange_mesh", lambda ranks, *_: ranks)
        monkeypatch.setattr(ProcessMesh, "gather_values", lambda self, value: [other, value])
        return place_ranks(ProcessMesh(1, 2), gpus, precision, "tower", 2)

    return placed


def test_each_process_has_its_own(among: Callable[..., Any]) -> None:
    found = among("0,1", [T4, H100], ("GPU 0 T4", "bf16", "GPU-a"))
    assert (found.device, found.precision) == (torch.device("cuda", 1), "bf16")
    assert found.names == ("GPU 0 T4", "GPU 1 H100")
    alone = replace(H100, index=0)  # all that a launcher lets it see, as with Slurm's --gpus-per-task=1
    assert among(None, [alone], ("GPU 0 H100", "bf16", "GPU-a")).device == torch.device("cuda", 0)


def test_two_that_see_the_same_gpu_are_told(among: Callable[..., Any]) -> None:
    with pytest.raises(MissingError, match="2 processes need a GPU each, but only 1 found") as told:
        among(None, [T4], ("GPU 0 T4", "fp32", "GPU-a"))
    assert "--gpus 0,0" in told.value.hint
    assert among("0,0", [T4], ("GPU 0 T4", "fp32", "GPU-a")).device == torch.device("cuda", 0)
    with pytest.raises(MissingError, match="names 1 for 2 or more processes"):
        among("0", [T4], ("GPU 0 T4", "fp32", "GPU-a"))


def test_all_compute_in_what_each_can(among: Callable[..., Any]) -> None:
    """Or what towers send each other would be read as something else."""
    found = among("0,1", [T4, H100], ("GPU 0 T4", "fp32", "GPU-a"))
    assert found.precision == "fp32"
    assert "not every device supports bf16" in found.notes[-1]
    found.precision_context()
    assert tf32() == (False, False)
