"""Parts on a GPU against the same on the CPU: kernels, views, dropout masks, loader, cache, sessions."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu_cases
import kernel_cases
from alexnet_cli.core.data.augment import Augment, AugmentParams
from alexnet_cli.core.data.loader import CachedLoader, Loader, all_batches, training_batches
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.devices import check_onnx_providers, list_gpus, try_gpu
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.inference.torch_session import TorchSession
from alexnet_cli.core.model import layers, response_norm, triton_kernels
from alexnet_cli.core.training.loop import DataTimer
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, TINY, Recipe
from gpu_cases import GPU, needs_two_gpus
from model_files import random_model

pytestmark = gpu_cases.MARKS
RNG = np.random.default_rng(7)


def test_the_kernels_run_here() -> None:
    for gpu in list_gpus():
        assert triton_kernels.unavailable_reason(gpu.index) == ""
        assert try_gpu(gpu.index) == ""
    assert try_gpu(0) == ""


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=needs_two_gpus)])
def test_the_update_kernel_equals_the_definition(device: str) -> None:
    kernel_cases.check_update(device)


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=needs_two_gpus)])
def test_the_dropout_kernel_equals_the_definition(device: str) -> None:
    kernel_cases.check_dropout(device)


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=needs_two_gpus)])
@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
def test_the_norm_kernels_equal_the_definition(case: kernel_cases.Case, device: str) -> None:
    """Also on a second GPU, while the first is the current one."""
    kernel_cases.check(case, device)


def test_the_kernels_take_any_layout() -> None:
    kernel_cases.check_layouts("cuda")


def test_the_kernels_keep_nan() -> None:
    kernel_cases.check_not_a_number("cuda")


@pytest.mark.filterwarnings("ignore")  # torch's check reads gradients that are not retained
def test_the_kernels_are_valid_torch_operators() -> None:
    kernel_cases.check_operators("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps", [96, 256])
def test_the_kernels_on_batches_of_training_size(maps: int, dtype: torch.dtype) -> None:
    """Many programs of the kernel, the last one not full, against the plain form on the same device."""
    x = torch.randn(67, maps, 27, 27, device=GPU) * 60
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    quick, slow = x.clone().requires_grad_(), x.float().clone().requires_grad_()
    grad = torch.randn_like(x)
    out = triton_kernels.fused_response_norm(quick, 5, 2.0, 1e-4, 0.75, 2)
    expected = response_norm.normalize_plain(slow, 5, 2.0, 1e-4, 0.75, 2)
    out.backward(grad)
    expected.backward(grad.float())
    assert quick.grad is not None
    kernel_cases.close(out, expected)
    kernel_cases.close(quick.grad, slow.grad)


@pytest.mark.parametrize(("images", "gigabytes"), [(1024, 4), (7400, 20)])
def test_more_values_than_32_bits_count(images: int, gigabytes: int) -> None:
    """Layer 1 of many images: 0.3e9 values, then 2.15e9, which is more than 2^31."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(GPU)[0] < gigabytes << 30:
        pytest.skip(f"less than {gigabytes} GB free")
    x = torch.empty(images, 96, 55, 55, dtype=torch.bfloat16, device=GPU, memory_format=torch.channels_last)
    x.uniform_(-100, 100)
    settings = (5, 2.0, 1e-4, 0.75, 2, True)
    out = triton_kernels.response_norm_forward(x, *settings)
    for part in (slice(0, 1), slice(-2, None)):
        kernel_cases.close(out[part], response_norm.normalize_plain(x[part].float(), *settings))
    grad = x / 100
    found = triton_kernels.response_norm_backward(x, grad, *settings)[-1:]
    last = x[-1:].float().requires_grad_()
    response_norm.normalize_plain(last, *settings).backward(grad[-1:].float())
    kernel_cases.close(found, last.grad)


def test_dropout_masks_equal_those_of_the_cpu() -> None:
    for key, first_row, first_unit in ((12345678901234567, 0, 0), (2**63 + 5, 77, 2048)):
        start = layers.dropout_state(key, first_row)
        here, there = (layers.hash_uniform(start.to(device), 130, 300, first_unit) for device in ("cpu", GPU))
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("recipe", [PAPER, KRIZHEVSKY, CAFFE, TINY, replace(PAPER, mean="rgb")])
def test_views_equal_those_of_the_cpu(recipe: Recipe) -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (5, 256, 256, 3), dtype=np.uint8))
    mean, axes = RNG.uniform(90, 140, (3, 256, 256)).astype(np.float32), np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    rows, draws = np.array([3, 0, 8, 7, 2]), AugmentParams.draw(9, recipe, 1)
    here, there = (
        Augment(recipe, mean, np.array([19, 37, 121], np.float32), axes.astype(np.float32), torch.device(device))
        for device in ("cpu", GPU)
    )
    pairs = [(here.training_views(images, rows, draws, 1), there.training_views(images.to(GPU), rows, draws, 1))]
    pairs += [(here.center_view(images), there.center_view(images))]
    pairs += list(zip(here.ten_views(images), there.ten_views(images), strict=True))
    for expected, found in pairs:
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [4, 7])
def test_pinned_buffers_hold_the_same_bytes(prepared: Path, batch_size: int) -> None:
    """While the device is busy, so that a buffer reused too early would show."""
    split = open_dataset(prepared).split("train")
    busy = torch.randn(2048, 2048, device=GPU)
    plan, copies = all_batches(len(split), batch_size) * 4, []
    with Loader(split, batch_size, 2, GPU) as loader:
        for batch in loader.batches(plan):
            for _ in range(20):
                busy = torch.tanh(busy @ busy)
            copies.append(batch.images + 0)  # queued behind the work above
    with Loader(split, batch_size, 2) as plain:
        for batch, copy in zip(plain.batches(plan), copies, strict=True):
            np.testing.assert_array_equal(batch.images.numpy(), copy.cpu().numpy())


def test_the_cache_on_the_device_equals_the_loader(prepared: Path) -> None:
    split = open_dataset(prepared).split("train")
    with Loader(split, 7, 2, GPU) as under, Loader(split, 7, 2) as plain:
        cache = CachedLoader(under)
        for epoch in (1, 2):
            plan = training_batches(len(split), 7, 0, epoch)
            for a, b in zip(cache.batches(plan), plain.batches(plan), strict=True):
                assert a.images.device.type == "cuda"
                np.testing.assert_array_equal(a.images.cpu().numpy(), b.images.numpy())
                np.testing.assert_array_equal(a.labels.numpy(), b.labels.numpy())


def test_data_wait_is_measured_on_the_device() -> None:
    """The host waits 0.1 s while the GPU works, and again while it is idle; only the second counts."""
    cycles = 2_000_000_000  # about a second
    waited = []
    for work in (cycles, 0):
        torch.cuda.synchronize(GPU)
        waiting = DataTimer(GPU)
        torch.cuda._sleep(work)
        with waiting:
            time.sleep(0.1)
        torch.cuda.synchronize(GPU)
        waited.append(waiting.read())
    assert waited[0] < 0.05
    assert 0.09 < waited[1] < 0.5


def test_onnx_runtime_equals_the_cpu() -> None:
    if (state := check_onnx_providers().get("CUDAExecutionProvider")) != "ok":
        pytest.skip(f"ONNX Runtime has no CUDA here: {state}")
    model = random_model(replace(PAPER, width=1 / 8))
    crops = RNG.integers(0, 256, (5, 3, 224, 224), dtype=np.uint8)
    expected = Session(model, provider="cpu").logits(crops)
    found = Session(model, provider="cuda")
    assert found.device == "cuda"
    np.testing.assert_allclose(found.logits(crops), expected, atol=1e-4 * float(np.abs(expected).max()))
    assert Session(model).device == "cuda"
    assert Session(model, fast_start=True).device == "cpu"


def test_torch_session_equals_the_cpu() -> None:
    """In float32, not in TF32."""
    model = random_model(replace(PAPER, width=1 / 8))
    crops = RNG.integers(0, 256, (5, 3, 224, 224), dtype=np.uint8)
    expected, found = TorchSession(model, "cpu").logits(crops), TorchSession(model)
    assert found.device == "cuda"
    np.testing.assert_allclose(found.logits(crops), expected, atol=1e-5 * float(np.abs(expected).max()))
