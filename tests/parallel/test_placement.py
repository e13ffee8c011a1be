"""Which device and precision each process gets; the GPUs are fake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alexnet_cli.core.devices import Gpu
from alexnet_cli.core.model import triton_kernels
from alexnet_cli.core.parallel import placement
from alexnet_cli.core.parallel.placement import choose_decode_threads, place, place_ranks, single_gpu
from alexnet_cli.core.parallel.process_group import ProcessMesh, RankInfo
from alexnet_cli.errors import MissingError, UsageError

T4, H100 = Gpu(0, "T4", 16 << 30, "7.5", "GPU-a"), Gpu(1, "H100", 80 << 30, "9.0", "GPU-b")


pytestmark = pytest.mark.usefixtures("own_runs_and_settings")


@pytest.fixture(autouse=True)
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fake GPUs, which work but cannot compute."""
    monkeypatch.setattr(placement, "list_gpus", lambda: [T4, H100])
    monkeypatch.setattr(placement, "try_gpu", lambda index: "")
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "")


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("gpu", "asked", "precision", "notes"),
    [("1", "bf16", "bf16", 0), ("1", "tf32", "tf32", 0), ("1", "fp32", "fp32", 0),
     ("0", "bf16", "fp32", 1), ("0", "tf32", "fp32", 0)],
)  # fmt: skip
def test_precision_is_what_the_gpu_supports(gpu: str, asked: str, precision: str, notes: int) -> None:
    placed = place(gpu, asked)
    assert (placed.device, placed.precision) == (torch.device("cuda", int(gpu)), precision)
    assert len(placed.notes) == notes
    assert tf32() == (precision != "fp32",) * 2


def test_each_placement_sets_tf32_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is a setting of the process, which each placement sets when it computes."""
    monkeypatch.setattr(torch, "autocast", lambda *_: None)
    low, high = place("1", "bf16"), place("1", "fp32")
    for placed, allowed in ((low, True), (high, False), (low, True)):
        placed.precision_context()
        assert tf32() == (allowed, allowed)


def test_a_gpu_that_cannot_compute_is_an_error_if_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "try_gpu", lambda index: "CUDA error: no kernel image is available")
    with pytest.raises(MissingError, match="GPU 0 T4 cannot be used: CUDA error: no kernel image") as caught:
        place("0", "fp32")
    assert "--gpus none" in caught.value.hint
    placed = place(None, "fp32")
    assert placed.device.type == "cpu"
    assert placed.notes[0].startswith("GPU 0 T4 cannot be used: CUDA error: no kernel image")
    assert placed.notes[0].endswith("using the CPU")


def test_single_gpu() -> None:
    assert [single_gpu(gpus) for gpus in (None, "1", "all", "none")] == [0, 1, 0, None]
    with pytest.raises(UsageError, match="one device"):
        single_gpu("0,1")


@pytest.fixture
def place_second(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Place this process, the second of two; `other` is what the first one reports."""

    def placed(gpus: str | None, seen: list[Gpu], other: tuple[str, str, str], precision: str = "bf16") -> Any:
        monkeypatch.setattr(placement, "read_rank_info", lambda: RankInfo(1, 2, 1, 2))
        monkeypatch.setattr(placement, "list_gpus", lambda: seen)
        monkeypatch.setattr(placement, "arrange_mesh", lambda ranks, *_: ranks)
        monkeypatch.setattr(ProcessMesh, "gather_values", lambda self, value: [other, value])
        return place_ranks(ProcessMesh(1, 2), gpus, precision, "tower", 2)

    return placed


def test_each_process_gets_its_own_gpu(place_second: Callable[..., Any]) -> None:
    found = place_second("0,1", [T4, H100], ("GPU 0 T4", "bf16", "GPU-a"))
    assert (found.device, found.precision) == (torch.device("cuda", 1), "bf16")
    assert found.names == ("GPU 0 T4", "GPU 1 H100")
    alone = replace(H100, index=0)  # all that a launcher lets it see, as with Slurm's --gpus-per-task=1
    found = place_second(None, [alone], ("GPU 0 H100", "bf16", "GPU-a"))
    assert found.device == torch.device("cuda", 0)
    assert found.names == ("GPU 0 H100 (GPU-a)", "GPU 0 H100 (GPU-b)")
    assert found.processes_per_device == 1


@pytest.mark.parametrize(("gpus", "expected"), [("0,1", [torch.device("cuda", 1)]), ("0,0", [])])
def test_gpus_compare_what_they_send_each_other(
    place_second: Callable[..., Any], gpus: str, expected: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes on one GPU exchange data through main memory."""
    checked: list[torch.device] = []
    monkeypatch.setattr(placement, "check_peers", lambda ranks, device, names: checked.append(device))
    place_second(gpus, [T4, H100], ("GPU 0 T4", "fp32", "GPU-a"))
    assert checked == expected


def test_two_processes_on_one_gpu_must_ask_for_it(place_second: Callable[..., Any]) -> None:
    with pytest.raises(MissingError, match="2 processes need a GPU each, but only 1 found") as caught:
        place_second(None, [T4], ("GPU 0 T4", "fp32", "GPU-a"))
    assert "--gpus 0,0" in caught.value.hint
    found = place_second("0,0", [T4], ("GPU 0 T4", "fp32", "GPU-a"))
    assert found.device == torch.device("cuda", 0)
    assert found.processes_per_device == 2
    with pytest.raises(MissingError, match="names 1 for 2 or more processes"):
        place_second("0", [T4], ("GPU 0 T4", "fp32", "GPU-a"))


@pytest.mark.parametrize(("cores", "local_size", "threads"), [(64, 4, 16), (2, 4, 1), (192, None, 192)])
def test_images_are_decoded_by_all_cores(
    cores: int, local_size: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = RankInfo(1, 8, 1, local_size) if local_size else None
    monkeypatch.setattr(placement, "read_rank_info", lambda: info)
    monkeypatch.setattr(placement, "count_cores", lambda: cores)
    assert choose_decode_threads(None) == threads
    assert choose_decode_threads(3) == 3


def test_all_ranks_use_a_precision_that_each_supports(place_second: Callable[..., Any]) -> None:
    """Towers must send each other the same dtype."""
    found = place_second("0,1", [T4, H100], ("GPU 0 T4", "fp32", "GPU-a"))
    assert found.precision == "fp32"
    assert "not every device supports bf16" in found.notes[-1]
    found.precision_context()
    assert tf32() == (False, False)
