"""Devices of this machine: GPUs, cores, memory, bf16, ONNX Runtime's providers. Imports torch lazily."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONTAINER_MEMORY = (  # files with the limit and the use of control groups, versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU. `index` counts within CUDA_VISIBLE_DEVICES; `memory` is in bytes; `capability` is such as "8.0"."""

    index: int
    name: str
    memory: int
    capability: str
    uuid: str = ""

    @property
    def has_bf16(self) -> bool:
        """Whether its hardware supports bf16 and TF32: since capability 8.0 (Ampere)."""
        return int(self.capability.partition(".")[0]) >= 8


def list_gpus() -> list[Gpu]:
    """The GPUs that torch can use; none without a driver. They may still fail to compute: see `try_gpu`."""
    import torch

    with warnings.catch_warnings():  # a CUDA build of torch warns if there is no driver
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(Gpu(index, properties.name, properties.total_memory, capability, str(properties.uuid)))
    return gpus


def try_gpu(index: int) -> str:
    """Make a GPU the current one of this process, and compute on it. Returns the reason if that fails, or ""."""
    import torch

    try:
        torch.cuda.set_device(index)
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:  # too old for this torch, used by another process, or full
        return (str(error) or type(error).__name__).partition("\n")[0]
    return ""


def check_gpu_copies(indices: Sequence[int]) -> dict[str, str]:
    """Copy random bytes from each GPU to each other one. Returns "0 to 1" -> "ok", "corrupted" or the error."""
    import torch

    sent, states = torch.randint(256, (1 << 20,), dtype=torch.uint8), {}
    for source, target in itertools.permutations(indices, 2):
        try:
            is_equal = torch.equal(sent.to(f"cuda:{source}").to(f"cuda:{target}").cpu(), sent)
            states[f"{source} to {target}"] = "ok" if is_equal else "corrupted"
        except RuntimeError as error:
            states[f"{source} to {target}"] = str(error).partition("\n")[0]
    return states


def has_gpu() -> bool:
    """Whether CUDA may work here. Does not import torch, which takes seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or os.name == "nt"


def suggest_train_command() -> str:
    """The command that trains on this machine: on a CPU recipe `paper` takes days, recipe `tiny` minutes."""
    return "alexnet train" if has_gpu() else "alexnet train --recipe tiny"


def suggest_gpus(typed: str) -> str:
    """The value of --gpus for another tool's word for a device (cpu, cuda:0, "0 1"); "" if it is none."""
    if typed.lower() == "cpu":
        return "none"
    words = re.sub(r"cuda|gpu|[^\w-]", " ", typed.lower()).split()
    return (",".join(words) or "0") if typed and all(word.isdecimal() for word in words) else ""


def count_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The model of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes of memory still available, within the limit of a container; None on systems other than Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for limit, used in CONTAINER_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # the file is missing or says "max"
            free = min(free, int(Path(limit).read_text(encoding="utf-8")) - int(Path(used).read_text(encoding="utf-8")))
    return max(0, free)


def has_cpu_bf16() -> bool:
    """Whether the CPU has bf16 instructions. Without them, bf16 is slower than float32."""
    if platform.machine() in ("arm64", "aarch64"):
        return platform.system() == "Darwin" or "bf16" in _cpu_flags()
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = (line for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    return set(next(lines, "").split())


def preload_cuda() -> None:
    """Load CUDA's libraries for ONNX Runtime, quietly, if they were installed as Python packages."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def check_onnx_providers() -> dict[str, str]:
    """Try each provider that ONNX Runtime lists. Returns provider -> "ok", or why it does not work."""
    import onnxruntime
    from onnx import TensorProto, helper

    onnxruntime.set_default_logger_severity(4)
    if has_gpu():
        preload_cuda()
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "test",
        [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    states = {}
    for provider in onnxruntime.get_available_providers():
        if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") and not has_gpu():
            states[provider] = "not tried: no GPU"
            continue
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider], enable_fallback=0)
            opened = session.get_providers()
            states[provider] = "ok" if opened[0] == provider else f"fell back to {opened[0]}"
        except Exception as error:  # ONNX Runtime's errors share no base class
            states[provider] = f"does not work ({type(error).__name__})"
    return states
