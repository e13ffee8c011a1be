"""`alexnet demo`: the whole story on pictures drawn here, with every command shown as one would type it."""

from __future__ import annotations

import json as jsonlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, StorageError, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag

MARKER = ".alexnet-demo"  # says that the folder, and what is named below, is the demo's own
ERROR = ".error.json"  # how a command of the story has failed
STDERR = 2
FOREIGN = {"ALEXNET_DATA", "ALEXNET_RUNS_DIR"}  # the demo keeps to its folder
MADE = ("pictures", "prepared/pictures", "runs/demo")
SHOWN = ("red-ring/000.jpg", "blue-cross/001.jpg", "green-disc/002.jpg")
STORY = (
    ("prepare", "pictures"),
    ("train", "--recipe", "tiny", "--name", "demo"),
    ("evaluate",),
    ("predict", *(f"pictures/val/{name}" for name in SHOWN)),
    ("visualize-filters",),
    ("export",),
)
NEXT = "alexnet prepare YOUR_FOLDER && alexnet train --recipe tiny"


@dataclass(frozen=True)
class Stage:
    """How the commands of the story are run: where, and what becomes of their output."""

    folder: Path
    json: bool
    quiet: bool

    def run(self, words: tuple[str, ...]) -> None:
        """Run `alexnet WORDS` in the folder, as a user would.

        Raises:
            AlexNetError: with the exit code of the command, if that is not 0.
        """
        command = [sys.executable, "-m", "alexnet_cli", *words, *(["-q"] if self.quiet else [])]
        own = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        error = self.folder.resolve() / ERROR
        own |= {"TORCHELASTIC_ERROR_FILE": str(error), "ALEXNET_DEMO": "1"}  # see cli.py
        output = subprocess.DEVNULL if self.quiet else STDERR if self.json else None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        child = subprocess.Popen(command, cwd=self.folder, env=own, stdout=output)
        before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            code = _waited(child)
        finally:
            signal.signal(signal.SIGTERM, before)
        if code:
            raise self._failure(words, code, error)

    def _failure(self, words: tuple[str, ...], code: int, left: Path) -> AlexNetError:
        """How a command ended: what it left to say, and its hint as one would type it from outside of the folder."""
        there = f"cd {shlex.quote(str(self.folder))}"
        what, hint = f"ended with exit code {code}", f"to try it alone: {there}"
        with suppress(OSError, ValueError, KeyError):
            told = jsonlib.loads(left.read_text(encoding="utf-8"))["alexnet"]
            what, hint = told["what"], told["hint"]
            if hint.startswith("alexnet "):
                hint = f"{there} && {hint}"
            left.unlink()
        error = AlexNetError(f"the demo stopped in `{_typed(words)}`: {what}", hint)
        error.exit_code = code if code > 0 else 128 - code
        return error


def _waited(child: subprocess.Popen[bytes]) -> int:
    """The exit code of the child. Ctrl-C reaches the child too: it is given the time to save what it has."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to work in.")] = Path("alexnet-demo"),
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Live through the whole story on pictures it draws.

    Draws a small set, then prepares, trains, evaluates, predicts, visualizes and exports on it. Takes a few minutes
    on a laptop, downloads nothing, and prints each command line before it runs.
    """
    from alexnet_plugins.demo_pictures import CLASSES, draw

    reporter = Reporter("demo", json=json, quiet=quiet)
    started = time.monotonic()
    folder = _fresh(output)
    stage = Stage(folder, json, quiet)
    reporter.line("demo", f"draws pictures of {len(CLASSES)} classes, such as {CLASSES[-1]}, a few seconds")
    images = draw(folder / "pictures")
    reporter.line("drew", f"{images:,} pictures in {folder / 'pictures'}")
    if not quiet:
        typer.echo(f"\n$ cd {shlex.quote(str(folder))}", err=True)
    for words in STORY:
        if not quiet:
            typer.echo(f"\n$ {_typed(words)}", err=True)
        stage.run(words)
    _report(reporter, folder, time.monotonic() - started)


def _typed(words: tuple[str, ...]) -> str:
    return shlex.join(("alexnet", *words))


def _fresh(folder: Path) -> Path:
    """The demo's folder, with a marker in it. What an earlier demo made there is taken away, nothing else."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder", "choose another one with -o")
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise UsageError(f"{folder} is not empty and no demo made it", "choose another folder with -o")
        for name in MADE:
            path = folder / name
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(f"made by `alexnet demo`, which replaces {', '.join(MADE)}\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}", "choose another folder with -o") from error
    return folder


def _report(reporter: Reporter, folder: Path, seconds: float) -> None:
    """What was reached, the files that are left, and what to try next."""
    run = folder / "runs" / "demo"
    files = {
        "evaluation": run / "eval" / "val-1.json",
        "filters": run / "figures" / "conv1.png",
        "report": run / "report.html",
        "network": run / "alexnet.onnx",
    }
    result: dict[str, Any] = jsonlib.loads(files["evaluation"].read_text(encoding="utf-8"))
    reporter.result({
        "folder": str(folder), "seconds": seconds, "top1_error": result["top1_error"],
        "files": {name: str(path) for name, path in files.items()},
    })  # fmt: skip
    reporter.show(
        f"\nDone in {int(seconds) // 60} min {int(seconds) % 60} s: "
        f"top-1 error {result['top1_error']:.1%} on {result['images']} pictures it never saw."
    )
    width = max(map(len, files))
    for name, path in files.items():
        reporter.show(f"  {name:{width}}  {path}")
    reporter.show(f"Next: the same with pictures of your own, a folder of them for each class:\n  {NEXT}")
