"""`alexnet doctor`: which packages and devices this installation has, and which of them work."""

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
VARIABLES = ("ALEXNET_DATA", "ALEXNET_RUNS_DIR", "ALEXNET_PLUGINS", "ALEXNET_TIMEOUT", "CUDA_VISIBLE_DEVICES",
             "NO_COLOR")  # fmt: skip

if TYPE_CHECKING:
    from alexnet_cli.core.devices import Gpu

T = TypeVar("T")


def doctor(json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Show versions, devices, and what does not work.

    Also shows the providers of ONNX Runtime, free disk space, environment variables and commands that fail to load.
    """
    from alexnet_cli.core.devices import check_gpu_copies, check_onnx_providers, has_cpu_bf16, list_gpus

    reporter = Reporter("doctor", json=json, quiet=quiet)
    problems: dict[str, str] = {}
    gpus = [_check_gpu(gpu) for gpu in _try_package("torch", list_gpus, problems) or []]
    working = [gpu["index"] for gpu in gpus if "problem" not in gpu]
    providers = _try_package("onnxruntime", check_onnx_providers, problems) or {}
    report = {
        "alexnet": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: number for name in PACKAGES if (number := _installed_version(name))},
        "gpus": gpus,
        "gpu_copies": check_gpu_copies(working) if len(working) > 1 else {},
        "cpu": {"cores": os.cpu_count(), "bf16": has_cpu_bf16()},
        "onnxruntime_providers": providers,
        "problems": problems,
        "disk_free": shutil.disk_usage(".").free,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "broken_commands": _find_broken_commands(),
    }
    reporter.result(report)
    for label, text in _format_report(report):
        reporter.show(f"{label:<10}{text}")


def _check_gpu(gpu: Gpu) -> dict[str, Any]:
    """Describe a GPU: with a `problem` if it does not compute, otherwise with the state of our Triton `kernels`."""
    from alexnet_cli.core.devices import try_gpu

    fields = {
        "index": gpu.index, "name": gpu.name, "memory": gpu.memory, "capability": gpu.capability, "bf16": gpu.has_bf16
    }  # fmt: skip
    if problem := try_gpu(gpu.index):
        return fields | {"problem": problem}
    from alexnet_cli.core.model import triton_kernels  # imports Triton, which takes a second

    return fields | {"kernels": triton_kernels.unavailable_reason(gpu.index) or "ok"}


def _try_package(package: str, check: Callable[[], T], problems: dict[str, str]) -> T | None:
    """Run a check. If it fails, or the package cannot be imported, add the error to `problems` and return None."""
    try:
        return check()
    except Exception as error:
        problems[package] = f"{type(error).__name__}: {error}"
        return None


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _find_broken_commands() -> dict[str, str]:
    """Commands that fail to load -> the reason."""
    broken = {}
    for entry in find_entries():
        if entry.status == "disabled":
            continue
        try:
            entry.load()
        except MissingError as error:
            broken[f"{entry.name} ({entry.distribution})"] = error.what
    return broken


def _format_report(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as lines of a label and a text."""
    no_gpus = "torch cannot be imported" if "torch" in report["problems"] else "none; training uses the CPU"
    cpu = report["cpu"]
    lines = [
        ("alexnet", f"{report['alexnet']} · Python {report['python']} · {report['platform']}"),
        ("packages", " · ".join(f"{name} {number}" for name, number in report["packages"].items())),
        ("GPUs", " · ".join(map(_format_gpu, report["gpus"])) or no_gpus),
        *([("copies", _format_copies(report["gpu_copies"]))] if report["gpu_copies"] else []),
        ("CPU", f"{cpu['cores']} cores, bf16: {'yes' if cpu['bf16'] else 'no'}"),
    ]
    lines += [("ONNX", f"{provider}: {state}") for provider, state in report["onnxruntime_providers"].items()]
    lines.append(("disk", f"{report['disk_free'] / 1e9:,.0f} GB free here"))
    lines += [("set", f"{name}={value}") for name, value in report["environment"].items() if value is not None]
    lines += [("broken", f"{name}: {why}") for name, why in (report["problems"] | report["broken_commands"]).items()]
    return lines


def _format_copies(states: dict[str, str]) -> str:
    failed = [f"{pair}: {state}" for pair, state in states.items() if state != "ok"]
    return f"{' · '.join(failed)}; train with NCCL_P2P_DISABLE=1" if failed else "between all GPUs: ok"


def _format_gpu(gpu: dict[str, Any]) -> str:
    bf16 = "yes" if gpu["bf16"] else "no"
    state = f"cannot be used: {gpu['problem']}" if "problem" in gpu else f"kernels: {gpu['kernels']}"
    return f"{gpu['index']}: {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, bf16: {bf16}, {state}"
