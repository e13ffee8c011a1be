"""`alexnet doctor`: what this installation consists of and what it can really use."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from alexnet_cli import __version__
from alexnet_cli.console import Reporter
from alexnet_cli.entry_points import find_entries
from alexnet_cli.errors import MissingError
from alexnet_cli.options import JsonFlag, QuietFlag

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "safetensors", "onnx", "onnxruntime-gpu",
            "onnxruntime", "typer", "rich", "tomli-w")  # fmt: skip
VARIABLES = ("ALEXNET_DATA", "ALEXNET_RUNS_DIR", "ALEXNET_PLUGINS", "CUDA_VISIBLE_DEVICES", "NO_COLOR")

if TYPE_CHECKING:
    from alexnet_cli.core.devices import Gpu

Found = TypeVar("Found")


def doctor(json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Show versions, devices, and what does not work.

    Includes ONNX Runtime providers, disk space, settings and broken commands.
    """
    from alexnet_cli.core.devices import check_onnx_providers, has_cpu_bf16, visible_gpus

    reporter = Reporter("doctor", json=json, quiet=quiet)
    problems: dict[str, str] = {}
    gpus = _tried("torch", visible_gpus, problems) or []
    providers = _tried("onnxruntime", check_onnx_providers, problems) or {}
    found = {
        "alexnet": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed for name in PACKAGES if (installed := _installed(name))},
        "gpus": [_about(gpu) for gpu in gpus],
        "cpu": {"cores": os.cpu_count(), "bf16": has_cpu_bf16()},
        "onnxruntime_providers": providers,
        "problems": problems,
        "disk_free": shutil.disk_usage(".").free,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "broken_commands": _broken(),
    }
    reporter.result(found)
    for label, text in _lines(found):
        reporter.show(f"{label:<10}{text}")


def _about(gpu: Gpu) -> dict[str, Any]:
    """A GPU, and whether it computes: why not, if it does not, and why not with our kernels."""
    from alexnet_cli.core.devices import try_gpu

    about = {
        "index": gpu.index,
        "name": gpu.name,
        "memory": gpu.memory,
        "capability": gpu.capability,
        "bf16": gpu.has_bf16,
    }
    if problem := try_gpu(gpu.index):
        return about | {"problem": problem}
    from alexnet_cli.core.model import triton_kernels  # which imports Triton

    return about | {"kernels": triton_kernels.unavailable_reason(gpu.index) or "ok"}


def _told(gpu: dict[str, Any]) -> str:
    """The same for people."""
    bf16 = "yes" if gpu["bf16"] else "no"
    state = f"cannot be used: {gpu['problem']}" if "problem" in gpu else f"kernels: {gpu['kernels']}"
    return f"{gpu['index']}: {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, bf16 arithmetic: {bf16}, {state}"


def _tried(package: str, probe: Callable[[], Found], problems: dict[str, str]) -> Found | None:
    """What a probe finds; a package that does not even import is a finding too, noted under its name."""
    try:
        return probe()
    except Exception as error:
        problems[package] = f"{type(error).__name__}: {error}"
        return None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _broken() -> dict[str, str]:
    """Commands that do not load -> why."""
    broken = {}
    for entry in (entry for entry in find_entries() if entry.status != "disabled"):
        try:
            entry.load()
        except MissingError as error:
            broken[f"{entry.name} ({entry.distribution})"] = error.what
    return broken


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    none = "torch does not import" if "torch" in found["problems"] else "none for torch: training runs on the CPU"
    gpus = [_told(gpu) for gpu in found["gpus"]]
    cpu = found["cpu"]
    lines = [
        ("alexnet", f"{found['alexnet']} · Python {found['python']} · {found['platform']}"),
        ("packages", " · ".join(f"{name} {number}" for name, number in found["packages"].items())),
        ("GPUs", " · ".join(gpus) or none),
        ("CPU", f"{cpu['cores']} cores, bf16 arithmetic: {'yes' if cpu['bf16'] else 'no'}"),
    ]
    lines += [("ONNX", f"{provider}: {state}") for provider, state in found["onnxruntime_providers"].items()]
    lines.append(("disk", f"{found['disk_free'] / 1e9:,.0f} GB free here"))
    lines += [("set", f"{name}={value}") for name, value in found["environment"].items() if value is not None]
    lines += [("broken", f"{name}: {why}") for name, why in (found["problems"] | found["broken_commands"]).items()]
    return lines
