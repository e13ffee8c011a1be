"""Every module can be imported, and the main commands work, where Python has no more than on Windows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
import matplotlib, onnxruntime, scipy, torch, torchvision  # which know what the system is that they are on

class NoSuchModule:
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoSuchModule())
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)
for name in (
    "fork", "forkpty", "symlink", "posix_fadvise", "sched_getaffinity", "getloadavg", "getuid", "geteuid", "getgid",
    "killpg", "setsid", "mkfifo", "uname", "pread", "pwrite", "nice", "sysconf", "fchown", "chown",
):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGPIPE", "SIGSTOP", "SIGCONT"):
    if hasattr(signal, name):
        delattr(signal, name)

import importlib, multiprocessing, pkgutil
import alexnet_cli, alexnet_plugins
from alexnet_cli.cli import main

multiprocessing.set_start_method("spawn")
for package in (alexnet_cli, alexnet_plugins):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith(("__main__", ".triton_kernels")):
            importlib.import_module(module.name)
for words in (
    "prepare colors -q",
    "train --recipe tiny --set width=0.0625 --epochs 2 -b 16 --name a -q",
    "train --resume a --set epochs=3 -q",
    "evaluate -q", "predict colors/val/red/00.jpg -q", "export -w a/checkpoints/last -o b.onnx -q", "report -q",
):
    try:
        main(words.split())
    except SystemExit as end:
        assert end.code == 0, words
"""


@pytest.mark.slow
def test_without_what_windows_lacks(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "colors")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "HOME": str(tmp_path / "missing")},
        capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"red" in done.stdout
    assert (tmp_path / "runs" / "latest").read_bytes() == b"a\n"
    assert (tmp_path / "runs" / "a" / "report.html").is_file()
    assert (tmp_path / "b.onnx").is_file()
