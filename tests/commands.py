"""`alexnet` as tests call it: in this process where what it says and does is the matter, and not how it starts."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from alexnet_cli import cli


def alexnet(
    *words: str, folder: Path | None = None, plugins: Path | None = None, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; `plugins` holds distributions of others. A start of Python with torch takes seconds.

    What `main` changes of the process is put back: its answers to signals, its word to OpenMP.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    code: object = None
    answers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    said = os.environ.copy()
    os.environ.update(settings or {})
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.chdir(folder or Path.cwd()))
            stack.enter_context(contextlib.redirect_stdout(streams[0]))
            stack.enter_context(contextlib.redirect_stderr(streams[1]))
            if plugins:
                stack.enter_context(_found(plugins))
            cli.main(words)
    except SystemExit as end:
        code = end.code
    finally:
        for number, answer in answers.items():
            signal.signal(number, answer)
        os.environ.clear()
        os.environ.update(said)
    assert isinstance(code, int)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return subprocess.CompletedProcess(words, code, out, err)


@contextlib.contextmanager
def _found(folder: Path) -> Iterator[None]:
    """Modules and distributions of a folder can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", None)):
                del sys.modules[name]
