"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled for several GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_cases
from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.loader import Batch
from alexnet_cli.core.devices import Gpu
from alexnet_cli.core.model import layers, response_norm, triton_kernels
from alexnet_cli.core.parallel import placement
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.training import optim
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.recipe import PAPER

TRIED = ("response_norm_forward", "response_norm_backward", "fused_dropout", "fused_update")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_interpreted_kernels_equal_the_definition() -> None:
    """In another process, since Triton chooses between interpreter and compiler when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    program = Path(kernel_cases.__file__)
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def compile_kernel(kernel: Any, capability: int, kinds: dict[str, str], constants: Mapping[str, float]) -> Any:
    """`kinds` are the types of its arguments; i32 if not given."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_norm_kernels_compile_for_all_gpus(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter accepts Python that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"beta": 0.75, "half": 2, "maps": 48, "relu": True, "block": triton_kernels.BLOCK}
    kinds = {"x": f"*{dtype}", "grad": f"*{dtype}", "out": f"*{dtype}", "k": "fp32", "alpha": "fp32"}
    for kernel in (triton_kernels._norm_forward_kernel, triton_kernels._norm_backward_kernel):
        compiled = compile_kernel(kernel, capability, kinds, constants)
        assert compiled.metadata.shared == 0
        reads, half = compiled.asm["ttgir"].count("tt.load"), constants["half"]
        # Every map once, and in backward the gradients: not once for each window that it is in.
        assert reads == (2 * half + 1 if kernel.arg_names[1] == "out" else (4 * half + 1) + (2 * half + 1))


@needs_triton
@pytest.mark.parametrize("capability", [75, 90])
def test_the_other_kernels_compile_for_all_gpus(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"x": "*bf16", "out": "*bf16", "state": "*i32", "p": "fp32", "scale": "fp32"}
    compile_kernel(triton_kernels._dropout_kernel, capability, kinds, {"block": triton_kernels.BLOCK})
    for alignment, access in ((16, "global.v4.b32"), (4, "global.b32")):
        constants = {"columns": 7, "most": 16, "alignment": alignment, "block": triton_kernels.UPDATE_BLOCK}
        compiled = compile_kernel(
            triton_kernels._update_kernel, capability, {"table": "*fp64", "momentum": "fp32"}, constants
        )
        code = compiled.asm["ptx"]
        reads, writes = 6, 4  # of three and two arrays: each of 128 threads takes eight values
        several = 1 if alignment == 16 else 4
        assert (code.count(f"ld.{access}"), code.count(f"st.{access}")) == (reads * several, writes * several)


class FakeDriver:
    """A Triton driver without a GPU: it compiles kernels and records their launches."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, ...], list[Any]]] = []
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, *_: object) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024

    def unload_module(self, module: object) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            x, y, z, *_ = arguments
            self.launched.append((metadata.name, (x, y, z), list(arguments[9:])))

        return launch


@pytest.fixture
def fake_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels: tuple[Any, ...] = (
        triton_kernels._norm_forward_kernel,
        triton_kernels._norm_backward_kernel,
        triton_kernels._dropout_kernel,
        triton_kernels._update_kernel,
    )
    monkeypatch.setattr(driver, "_active", driver_double := FakeDriver())
    yield driver_double
    for kernel in kernels:
        kernel.device_caches.clear()  # forget what the fake driver compiled


@needs_triton
def test_launch_arguments(fake_driver: FakeDriver) -> None:
    """Covers the path from a call to a launch, which the interpreter and the compiler skip."""
    x = torch.empty(64, 96, 55, 55, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    for values in (x, x[:0]):
        triton_kernels.response_norm_forward(values, 5, 2.0, 1e-4, 0.75, 2, True)
        triton_kernels.response_norm_backward(values, values, 5, 2.0, 1e-4, 0.75, 2, True)
    for rows in (torch.empty(64, 4096), torch.empty(0, 4096)):
        triton_kernels.fused_dropout(rows, torch.zeros(3, dtype=torch.int32), 0.5, 2.0, 0)
    tensors = [(torch.empty(shape), torch.empty(shape), torch.empty(shape)) for shape in ((96, 3, 11, 11), (1000,))]
    triton_kernels.fused_update({(0.01, 0.0005): tensors[:1], (0.02, 0.0): tensors[1:]}, 0.9)
    triton_kernels.fused_update({}, 0.9)
    found = [(name, grid[0], given[-1]) for name, grid, given in fake_driver.launched]
    block, programs = triton_kernels.BLOCK, x.numel() // triton_kernels.BLOCK
    assert found == [
        ("_norm_forward_kernel", programs, block), ("_norm_backward_kernel", programs, block),
        ("_norm_forward_kernel", 1, block), ("_norm_backward_kernel", 1, block),
        ("_dropout_kernel", 1024, block), ("_dropout_kernel", 1, block),
        ("_update_kernel", 35 + 1, triton_kernels.UPDATE_BLOCK),
    ]  # fmt: skip
    counts = [next(value for value in given if type(value) is int) for _, _, given in fake_driver.launched]
    assert counts == [x.numel(), x.numel(), 0, 0, 64 * 4096, 0, len(tensors)]


@needs_triton
@pytest.mark.parametrize(("size", "shift", "alignment"), [(1000, 0, 16), (10, 0, 4), (1000, 1, 4), (1000, 4, 16)])
def test_unaligned_tensors_are_not_read_four_values_at_once(
    size: int, shift: int, alignment: int, fake_driver: FakeDriver
) -> None:
    """A GPU stops at an unaligned address; gradients in DDP's buckets may have one."""
    gradient = torch.empty(size + shift)[shift:]
    tensors = [(torch.empty(64), torch.empty(64), torch.empty(64)), (torch.empty(size), torch.empty(size), gradient)]
    triton_kernels.fused_update({(0.01, 0.0): tensors}, 0.9)
    ((_, _, given),) = fake_driver.launched
    assert given[-2] == alignment


class Operators(TorchDispatchMode):
    """Counts the operators that compute or copy: a GPU launches at least a kernel for each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not (function.is_view or name in ("empty", "new_empty", "empty_like", "_unsafe_view")):
            self.counts[name] += 1
        return function(*args, **kwargs or {})


@needs_triton
def test_a_training_step_is_120_operators_and_one_update(
    fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step on the CPU along the GPU's branches; the kernels compute nothing."""
    for module in (response_norm, layers, optim):
        monkeypatch.setattr(module, "kernels_for", lambda device: triton_kernels)
    monkeypatch.setattr(Augment, "crop_in_loop", Augment.crop_by_index)
    recipe = replace(PAPER, width=1 / 16, batch_size=4, precision="bf16")
    place, axes = Placement(torch.device("cpu"), "CPU", "bf16"), np.eye(3, dtype=np.float32)
    augment = Augment(recipe, np.zeros((3, 256, 256), np.float32), axes[0], axes, place.device, place.dtype)
    trainer = Trainer(recipe, 1000, 8, augment, place)
    trainer.checks_every_step = False
    trainer.begin_epoch()
    batch = Batch(torch.zeros(4, 256, 256, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), np.arange(4))
    with Operators() as operators:
        trainer.step(batch)
    assert operators.counts["convolution"] == operators.counts["convolution_backward"] == 5
    assert operators.counts.total() <= 120
    assert Counter(name for name, *_ in fake_driver.launched) == {
        "_norm_forward_kernel": 2, "_norm_backward_kernel": 2, "_dropout_kernel": 4, "_update_kernel": 1
    }  # fmt: skip


def test_without_triton_the_reason_is_given() -> None:
    """The training does not import torch's compiler either, which takes a second."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import alexnet_cli.core.training.loop; assert 'torch._dynamo' not in sys.modules\n"
        "from alexnet_cli.core.model import triton_kernels\n"
        "assert triton_kernels.unavailable_reason(0) == 'Triton is not installed'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@needs_triton
@pytest.mark.parametrize("broken", TRIED)
def test_every_kernel_is_tried(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `doctor` and the note of a training say; a broken kernel is enough."""
    for name in TRIED:
        monkeypatch.setattr(triton_kernels, name, MagicMock())
    monkeypatch.setattr(triton_kernels, broken, MagicMock(side_effect=RuntimeError(f"{broken}: no image\nmore")))
    with FakeTensorMode():
        assert triton_kernels.unavailable_reason.__wrapped__(0) == f"{broken}: no image"


@pytest.mark.parametrize(("reason", "used"), [("", True), ("Failed to find C compiler.", False)])
def test_the_kernel_is_used_on_a_gpu_if_it_works(reason: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake tensors in the place of those on a GPU."""
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: reason)
    calls: list[tuple[object, ...]] = []
    fused = triton_kernels.fused_response_norm

    def count_call(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return fused(x, *arguments)

    monkeypatch.setattr(triton_kernels, "fused_response_norm", count_call)
    with FakeTensorMode():
        x = torch.empty(2, 8, 3, 5, device="cuda").contiguous(memory_format=torch.channels_last)
        out = response_norm.normalize_fast(x, 5, 2.0, 1e-4, 0.75, 2, True)
    assert (out.shape, out.device.type, out.stride()) == (x.shape, "cuda", x.stride())
    assert calls == ([(5, 2.0, 1e-4, 0.75, 2, True)] if used else [])


def test_a_note_tells_that_the_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "list_gpus", lambda: [Gpu(0, "H100", 80 << 30, "9.0")])
    monkeypatch.setattr(placement, "try_gpu", lambda index: "")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # restored after the test
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "Failed to find C compiler.")
    chosen = placement.place("0", "fp32")
    assert chosen.device == torch.device("cuda", 0)
    assert "normalization, dropout and weight updates are slower without the Triton kernels" in chosen.notes[0]
    assert "Failed to find C compiler." in chosen.notes[0]
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "")
    assert placement.place("0", "fp32").notes == ()
