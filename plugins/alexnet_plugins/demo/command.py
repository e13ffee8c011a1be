"""`alexnet demo`: run the main commands on a small drawn data set, and show each command line."""

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
from alexnet_cli.errors import AlexNetError, UsageError, storage_errors
from alexnet_cli.options import JsonFlag, QuietFlag

MARKER = ".alexnet-demo"  # marks a folder whose OUTPUTS the demo may replace
ERROR_FILE = ".error.json"  # error of the command that failed
STDERR = 2
USER_SETTINGS = {"ALEXNET_DATA", "ALEXNET_RUNS_DIR"}  # not passed on: the demo stays in its folder
OUTPUTS = ("pictures", "prepared/pictures", "runs/demo")
CLASSIFIED = ("red-ring/000.jpg", "blue-cross/001.jpg", "green-disc/002.jpg")
COMMANDS = (
    ("prepare", "pictures"),
    ("train", "--recipe", "tiny", "--name", "demo"),
    ("evaluate",),
    ("predict", *(f"pictures/val/{name}" for name in CLASSIFIED)),
    ("visualize-filters",),
    ("export",),
    ("report",),
)
NEXT = "alexnet prepare YOUR_FOLDER && alexnet train --recipe tiny"


@dataclass(frozen=True)
class CommandRunner:
    """Runs `alexnet` commands in the demo's folder."""

    folder: Path
    json: bool
    quiet: bool

    def run(self, words: tuple[str, ...]) -> None:
        """Run `alexnet WORDS` in the folder.

        Raises:
            AlexNetError: the command failed; the error has its exit code.
        """
        command = [sys.executable, "-m", "alexnet_cli", *words, *(["-q"] if self.quiet else [])]
        environment = {name: value for name, value in os.environ.items() if name not in USER_SETTINGS}
        error_file = self.folder.resolve() / ERROR_FILE
        environment |= {"TORCHELASTIC_ERROR_FILE": str(error_file), "ALEXNET_DEMO": "1"}  # see cli.py
        output = subprocess.DEVNULL if self.quiet else STDERR if self.json else None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        child = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output)
        previous_handler = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            code = _wait(child)
        finally:
            signal.signal(signal.SIGTERM, previous_handler)
        if code:
            raise self._read_error(words, code, error_file)

    def _read_error(self, words: tuple[str, ...], code: int, error_file: Path) -> AlexNetError:
        """Return the error that the command wrote to the file, with a hint that works outside the folder."""
        change_folder = f"cd {shlex.quote(str(self.folder))}"
        what, hint = f"exit code {code}", f"run the command by itself: {change_folder}"
        with suppress(OSError, ValueError, KeyError):
            record = jsonlib.loads(error_file.read_text(encoding="utf-8"))["alexnet"]
            what, hint = record["what"], record["hint"]
            if hint.startswith("alexnet "):
                hint = f"{change_folder} && {hint}"
            error_file.unlink()
        error = AlexNetError(f"the demo stopped in `{_format_command(words)}`: {what}", hint)
        error.exit_code = code if code > 0 else 128 - code
        return error


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Return the exit code of the child. Ctrl-C reaches the child too, which may need time to save a checkpoint."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to work in")] = Path("alexnet-demo"),
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Run the main commands on a small drawn data set.

    Prepares, trains, evaluates, predicts, visualizes, exports and reports, and shows each command line. Takes a few
    minutes on a laptop and downloads nothing.
    """
    from alexnet_plugins.demo.images import CLASSES, draw_dataset

    reporter = Reporter("demo", json=json, quiet=quiet)
    started = time.monotonic()
    folder = _make_folder(output)
    runner = CommandRunner(folder, json, quiet)
    reporter.line("demo", f"drawing images of {len(CLASSES)} classes, such as {CLASSES[-1]}")
    images = draw_dataset(folder / "pictures")
    reporter.line("drew", f"{images:,} images in {folder / 'pictures'}")
    if not quiet:
        typer.echo(f"\n$ cd {shlex.quote(str(folder))}", err=True)
    for words in COMMANDS:
        if not quiet:
            typer.echo(f"\n$ {_format_command(words)}", err=True)
        runner.run(words)
    _report(reporter, folder, time.monotonic() - started)


def _format_command(words: tuple[str, ...]) -> str:
    return shlex.join(("alexnet", *words))


def _make_folder(folder: Path) -> Path:
    """Create the demo's folder with its marker, and remove what an earlier demo made there, but nothing else."""
    with storage_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder", "choose another folder with -o")
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise UsageError(
                f"{folder} is not empty, and `alexnet demo` did not make it", "choose another folder with -o"
            )
        for name in OUTPUTS:
            path = folder / name
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(f"made by `alexnet demo`, which replaces {', '.join(OUTPUTS)}\n", encoding="utf-8")
    return folder


def _report(reporter: Reporter, folder: Path, seconds: float) -> None:
    """Show the final error, the files, and the next command."""
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
        f"top-1 error {result['top1_error']:.1%} on {result['images']} validation images."
    )
    width = max(map(len, files))
    for name, path in files.items():
        reporter.show(f"  {name:{width}}  {path}")
    reporter.show(f"Next, with your own images, one folder per class:\n  {NEXT}")
