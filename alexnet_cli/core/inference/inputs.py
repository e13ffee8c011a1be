"""What is to be classified, as it is typed: files, folders, patterns, lists, stdin -> decoded pictures. No torch.

Pictures are decoded in threads ahead of whoever takes them, so that a folder runs at the network's speed.
"""

from __future__ import annotations

import glob
import io
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from alexnet_cli.core.data import images
from alexnet_cli.core.data.folders import has_image_suffix, walk_files
from alexnet_cli.core.data.images import ImageArray, PixelBudget
from alexnet_cli.core.devices import count_cores
from alexnet_cli.core.files import LARGEST, check_bytes, read_file
from alexnet_cli.core.runs.run import runs_root
from alexnet_cli.errors import DataError

STANDARD = "-"  # standard input, and the name of a picture that came from there

ImageInput = str | bytes
"""The path of a picture, or the bytes of one."""


def expand_inputs(
    inputs: Sequence[str], stdin: BinaryIO | None = None, ours: list[str] | None = None
) -> list[ImageInput]:
    """Files, folders (all pictures below, sorted), patterns, `@FILE` (a list of paths) and `-` -> pictures.

    `stdin` holds a picture, or a list of paths: one a line, or, so that a name can hold anything, each ended by a
    zero byte. What is not there stays among the results, so that it gets a record with the reason. What was drawn for
    runs that lie below a folder goes to `ours` instead, if that is given.

    Raises:
        DataError: there is no file at all among them, or a list cannot be read.
    """
    sources: list[ImageInput] = []
    for text in inputs:
        if text == STANDARD:
            sources += _given(stdin or io.BytesIO(), ours)
        elif text.startswith("@") and not os.path.lexists(text):
            sources += _listed(_content(text[1:]), ours)
        elif not os.path.lexists(text) and (found := sorted(glob.glob(text, recursive=True))):
            sources += [path for name in found for path in _below(name, ours)]
        else:
            sources += _below(text, ours)
    if not any(isinstance(source, bytes) or os.path.isfile(source) for source in sources):
        raise _nothing(inputs, [source for source in sources if isinstance(source, str)])
    return sources


def _nothing(inputs: Sequence[str], named: Sequence[str]) -> DataError:
    """The error of inputs without a single file: `named` are folders without pictures, and what does not exist."""
    several = f"{', '.join(named[:3])}{' …' if len(named) > 3 else ''}"
    hint = (
        "give files, patterns or folders with pictures in them; @FILE, or - for standard input, lists files and folders"
    )
    if not named:
        what = f"no picture found: {'standard input is empty' if STANDARD in inputs else 'the list is empty'}"
    elif any(os.path.lexists(name) for name in named):
        what = f"no picture found: {several}"
    elif len(named) > 1:
        what = f"none of these exists: {several}"
    else:
        what = f"{several} {'matches nothing' if glob.has_magic(several) else 'does not exist'}"
    if any("://" in name for name in named):
        hint = "of an address: curl -s URL | alexnet predict -"
    return DataError(what, hint)


def _given(stdin: BinaryIO, ours: list[str] | None) -> list[ImageInput]:
    data = stdin.read(LARGEST + 1)
    try:
        check_bytes(len(data), LARGEST)
    except DataError as error:
        raise DataError(f"standard input has more than {LARGEST:,} bytes", "give a list in pieces") from error
    return [data] if images.is_image(data) else list(_listed(data, ours))


def _content(file: str) -> bytes:
    try:
        return read_file(Path(file))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the list {file} cannot be read: {reason}", "it holds one path a line") from error
    except DataError as error:
        raise DataError(f"the list {file} cannot be read: {error.what}", "it holds one path a line") from error


def _listed(data: bytes, ours: list[str] | None) -> Iterator[str]:
    """The pictures of a list's entries, which are files and folders, not patterns."""
    lines = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    for line in lines:
        if line.strip():
            yield from _below(os.fsdecode(line), ours)


def _below(name: str, ours: list[str] | None) -> list[str]:
    """The pictures below a folder, sorted, then what cannot be listed there; of anything else the name itself."""
    if not os.path.isdir(name):
        return [name]
    refused: list[str] = []
    files = sorted(file for file in walk_files(Path(name), Path(name), refused) if has_image_suffix(file))
    if ours is not None and (runs := _runs_below(name)):
        ours += [os.path.join(name, file) for file in files if file.startswith(runs)]
        files = [file for file in files if not file.startswith(runs)]
    return [os.path.join(name, file) for file in files] + refused or [name]


def _runs_below(name: str) -> str:
    """How the folder of runs is called from a folder that it lies below, with a slash; empty if it does not."""
    root, folder = (Path(os.path.realpath(path)) for path in (runs_root(), name))
    if root == folder or not root.is_relative_to(folder) or not any(root.glob("*/run.json")):
        return ""
    return f"{root.relative_to(folder)}{os.sep}"


def load_image(source: ImageInput, exif_rotate: bool, budget: PixelBudget) -> ImageArray | str:
    """uint8 256 x 256 x 3, turned as its EXIF says if asked; or why not."""
    try:
        if isinstance(source, str) and os.path.isdir(source):
            return "a folder without readable pictures"
        data = source if isinstance(source, bytes) else read_file(Path(source))
        height, width = images.read_size(data)
        with budget.reserve(height * width):
            rgb = images.decode(data)
            return images.resize_and_crop(images.apply_orientation(rgb, data) if exif_rotate else rgb)
    except DataError as error:
        return error.what
    except (OSError, ValueError) as error:  # a name can hold what no file system takes
        return getattr(error, "strerror", None) or str(error)


def prefetch(sources: Iterable[ImageInput], window: int, exif_rotate: bool) -> Generator[tuple[str, ImageArray | str]]:
    """Every picture's name and pixels (or why there are none), in order, the next `window` decoded meanwhile."""
    remaining, budget = iter(sources), PixelBudget()
    waiting: deque[tuple[ImageInput, Future[ImageArray | str]]] = deque()
    with ThreadPoolExecutor(min(8, count_cores())) as pool:
        try:
            waiting.extend((s, pool.submit(load_image, s, exif_rotate, budget)) for s in islice(remaining, window))
            while waiting:
                source, future = waiting.popleft()
                waiting.extend((s, pool.submit(load_image, s, exif_rotate, budget)) for s in islice(remaining, 1))
                yield STANDARD if isinstance(source, bytes) else source, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
