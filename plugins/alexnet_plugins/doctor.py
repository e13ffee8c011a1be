"""`alexnet doctor`: what this installation consists of and what it can really use."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from alexnet_cli import __version__
from alexnet_cli.console import Reporter
from alexnet_cli.entry_points import offers
from alexnet_cli.errors import MissingError
from alexnet_cli.options import JsonFlag, QuietFlag

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "safetensors", "onnx", "onnxruntime-gpu",
            "onnxruntime", "typer", "rich", "tomli-w")  # fmt: skip
VARIABLES = ("ALEXNET_DATA", "ALEXNET_RUNS_DIR", "ALEXNET_PLUGINS", "CUDA_VISIBLE_DEVICES", "NO_COLOR")


def doctor(json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Show versions, devices, what ONNX Runtime can really open, disk space, settings and broken commands."""
    from alexnet_cli.core.devices import cpu_bf16, onnx_providers, visible_gpus

    reporter = Reporter("doctor", json=json, quiet=quiet)
    gpus = [{"index": g.index, "name": g.name, "memory": g.memory, "capability": g.capability} for g in visible_gpus()]
    found = {
        "alexnet": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed for name in PACKAGES if (installed := _installed(name))},
        "gpus": gpus,
        "cpu": {"cores": os.cpu_count(), "bf16": cpu_bf16()},
        "onnxruntime_providers": onnx_providers(),
        "disk_free": shutil.disk_usage(".").free,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "broken_commands": _broken(),
    }
    reporter.result(found)
    for label, text in _lines(found):
        reporter.show(f"{label:<10}{text}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _broken() -> dict[str, str]:
    """Commands that do not load -> why."""
    broken = {}
    for offer in offers():
        try:
            offer.load()
        except MissingError as error:
            broken[f"{offer.name} ({offer.distribution})"] = error.what
    return broken


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    gpus = [f"{g['index']}: {g['name']}, {g['memory'] / 2**30:.0f} GiB" for g in found["gpus"]]
    cpu = found["cpu"]
    lines = [
        ("alexnet", f"{found['alexnet']} · Python {found['python']} · {found['platform']}"),
        ("packages", " · ".join(f"{name} {number}" for name, number in found["packages"].items())),
        ("GPUs", " · ".join(gpus) or "none that torch can use: training runs on the CPU"),
        ("CPU", f"{cpu['cores']} cores, bf16 arithmetic: {'yes' if cpu['bf16'] else 'no'}"),
    ]
    lines += [("ONNX", f"{provider}: {state}") for provider, state in found["onnxruntime_providers"].items()]
    lines.append(("disk", f"{found['disk_free'] / 1e9:,.0f} GB free here"))
    lines += [("set", f"{name}={value}") for name, value in found["environment"].items() if value is not None]
    lines += [("broken", f"{name}: {why}") for name, why in found["broken_commands"].items()]
    return lines
