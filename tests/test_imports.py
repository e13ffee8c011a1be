"""Imports run downwards only, package by package: a row may import the rows below its own, never itself or above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "alexnet_cli" / "core"
PLUGINS = ROOT / "plugins" / "alexnet_plugins"

ROWS = (
    {"report", "training"},
    {"evaluation", "analysis", "export"},
    {"parallel", "inference"},
    {"runs", "model"},
    {"data"},
    {"files", "signals", "drawing", "devices", "intervals"},
)
WITHOUT_TORCH = ("data", "model/architecture.py", "model/model_file.py", "runs", "inference")
WITH_TORCH = {
    "data/augment.py", "data/loader.py", "data/fast_images.py", "data/prepare.py", "inference/torch_session.py",
}  # fmt: skip
SHELL_MODULES = {"recipe", "recipe_io", "errors"}  # of alexnet_cli, which core may import
MEASURES_TORCH = {"benchmark"}  # the plugin that times other libraries


def imported_names(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_of(path: Path, package: str) -> set[str]:
    """First names below a package that a file imports: "data" of alexnet_cli.core.data.shards."""
    prefix = f"{package}."
    return {name.removeprefix(prefix).split(".")[0] for name in imported_names(path) if name.startswith(prefix)}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_package_has_a_row() -> None:
    assert {path.relative_to(CORE).parts[0].removesuffix(".py") for path in python_files(CORE)} == set().union(*ROWS)


@pytest.mark.parametrize("path", python_files(CORE), ids=relative)
def test_core(path: Path) -> None:
    package = path.relative_to(CORE).parts[0].removesuffix(".py")
    row = next(number for number, row in enumerate(ROWS) if package in row)
    below = set().union(*ROWS[row + 1 :], {package})
    assert parts_of(path, "alexnet_cli.core") <= below, "imports run downwards only"
    assert parts_of(path, "alexnet_cli") <= SHELL_MODULES | {"core", "__version__"}
    assert not {name.split(".")[0] for name in imported_names(path)} & {"typer", "rich", "click", "alexnet_plugins"}


@pytest.mark.parametrize("path", python_files(PLUGINS), ids=relative)
def test_plugins(path: Path) -> None:
    plugin = path.relative_to(PLUGINS).parts[0].removesuffix(".py")
    assert parts_of(path, "alexnet_plugins") <= {plugin}, "plugins never import one another"
    assert "cli" not in parts_of(path, "alexnet_cli")
    tops = {name.split(".")[0] for name in imported_names(path)}
    assert not tops & {"torchvision", "onnxruntime", "click"} or plugin in MEASURES_TORCH


def test_init_files_are_empty() -> None:
    for path in [*CORE.rglob("__init__.py"), *PLUGINS.rglob("__init__.py")]:
        assert not path.read_text(encoding="utf-8"), f"{relative(path)} re-exports"


def test_what_needs_no_torch_imports_none() -> None:
    files = [
        path
        for place in WITHOUT_TORCH
        for path in ([CORE / place] if place.endswith(".py") else python_files(CORE / place))
    ]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in files
        if path.relative_to(CORE).as_posix() not in WITH_TORCH
    ]
    code = f"import sys, {', '.join(modules)}; assert not {{'torch', 'onnxruntime'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_shell_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'onnx', 'onnxruntime', 'scipy'}"
    code = f"import sys, alexnet_cli.cli, alexnet_cli.options; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
