"""Turn command-line arguments into decoded images: files, folders, patterns, lists, standard input. No torch.

Threads decode images ahead, so that a folder runs at the network's speed.
"""

from __future__ import annotations

import glob
import io
import os
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from alexnet_cli.core.data import images
from alexnet_cli.core.data.folders import has_image_suffix, walk_files
from alexnet_cli.core.data.images import ImageArray, PixelBudget, map_ahead
from alexnet_cli.core.devices import count_cores
from alexnet_cli.core.files import BYTE_ORDER_MARKS, MAX_BYTES, decode_text, read_file
from alexnet_cli.core.runs.run import runs_root
from alexnet_cli.errors import DataError

STDIN = "-"  # as an argument, and as the name of an image that came from there

ImageInput = str | bytes
"""The path of an image, or its bytes."""


def expand_inputs(
    arguments: Sequence[str], stdin: BinaryIO | None = None, run_images: list[str] | None = None
) -> list[ImageInput]:
    """Expand files, folders (all images below, sorted), patterns, `@FILE` (a list of paths) and `-` into images.

    A file that does not exist stays in the result, so that it gets a record with the reason.

    Args:
        arguments: what the user typed.
        stdin: for `-`: an image, or a list of paths, one per line or each followed by a zero byte.
        run_images: if given, receives the images below a folder that `alexnet` itself drew for runs, instead of the
            result.

    Raises:
        DataError: no argument leads to a file, or a list cannot be read.
    """
    expanded: list[ImageInput] = []
    for argument in arguments:
        if argument == STDIN:
            expanded += _expand_stdin(stdin or io.BytesIO(), run_images)
        elif os.path.lexists(argument):
            expanded += _expand_path(argument, run_images)
        elif argument.startswith("@"):
            expanded += _expand_list(f"the list {argument[1:]}", _read_list(argument[1:]), run_images)
        else:
            for path in sorted(glob.glob(argument, recursive=True)) or [argument]:
                expanded += _expand_path(path, run_images)
    if not any(isinstance(item, bytes) or os.path.isfile(item) for item in expanded):
        raise _no_image_error(arguments, [item for item in expanded if isinstance(item, str)])
    return expanded


def name_inputs(arguments: Sequence[str]) -> str:
    """Return what the name of a figure says of its images: what was typed, shortened to 80 bytes and a checksum."""
    words = ["stdin" if word == STDIN else re.sub(r"[^\w.]+", "-", word).strip("-.") for word in arguments]
    name = "+".join(words).encode("utf-8", "replace")
    if len(name) <= 80:
        return name.decode()
    return f"{name[:80].decode('utf-8', 'ignore')}-{zlib.crc32(name):08x}"


def _no_image_error(arguments: Sequence[str], paths: Sequence[str]) -> DataError:
    """Return the error for arguments without a file; `paths` are folders without images, and missing files."""
    listed = f"{', '.join(paths[:3])}{' …' if len(paths) > 3 else ''}"
    hint = "give image files, patterns or folders; @FILE or - (standard input) for a list of paths"
    if any("://" in path for path in paths):
        hint = "to classify an image from the web: curl -s URL | alexnet predict -"
    if not paths:
        what = f"no image found: {'standard input' if STDIN in arguments else 'the list'} is empty"
    elif any(os.path.lexists(path) for path in paths):
        what = f"no image found: {listed}"
    elif len(paths) > 1:
        what = f"none of these files exist: {listed}"
    else:
        what = f"{listed} {'matches no file' if glob.has_magic(listed) else 'does not exist'}"
    return DataError(what, hint)


def _expand_stdin(stdin: BinaryIO, run_images: list[str] | None) -> list[ImageInput]:
    data = stdin.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"standard input has more than {MAX_BYTES:,} bytes", "split the list into parts")
    return [data] if images.is_image(data) else list(_expand_list("standard input", data, run_images))


def _read_list(file: str) -> bytes:
    try:
        return read_file(Path(file))
    except (OSError, ValueError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read the list {file}: {reason}", "a list is a text file with one path per line"
        ) from error


def _expand_list(name: str, data: bytes, run_images: list[str] | None) -> Iterator[str]:
    """Yield the images of a list's entries, which are files and folders, not patterns.

    Raises:
        DataError: it is text of another encoding than UTF-8. Its single letters would be taken for names: "." and "/".
    """
    try:
        if b"\0" in data and not data.startswith(tuple(BYTE_ORDER_MARKS)):
            if re.search(rb"\0[^\0]\0", data):
                raise UnicodeError("every second byte is zero, as in UTF-16 without a byte order mark")
            entries = [os.fsdecode(entry) for entry in data.split(b"\0")]
        else:
            entries = [line.rstrip("\r") for line in decode_text(data, "surrogateescape").split("\n")]
    except UnicodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}", "save it as UTF-8, one path per line") from error
    for entry in entries:
        if entry.strip():
            yield from _expand_path(entry, run_images)


def _expand_path(path: str, run_images: list[str] | None) -> list[str]:
    """Return the images below a folder, sorted, then the folders that cannot be listed; or the path of a file."""
    if not os.path.isdir(path):
        return [path]
    unreadable: list[str] = []
    files = sorted(file for file in walk_files(Path(path), Path(path), unreadable) if has_image_suffix(file))
    if run_images is not None and (prefix := _find_runs(path)):
        run_images += [os.path.join(path, file) for file in files if file.startswith(prefix)]
        files = [file for file in files if not file.startswith(prefix)]
    return [os.path.join(path, file) for file in files] + unreadable or [path]


def _find_runs(folder: str) -> str:
    """Return the path of the runs below `folder`, with slashes, as `walk_files` gives; empty if they lie elsewhere."""
    root, resolved = Path(os.path.realpath(runs_root())), Path(os.path.realpath(folder))
    if root == resolved or not root.is_relative_to(resolved) or not any(root.glob("*/run.json")):
        return ""
    return f"{root.relative_to(resolved).as_posix()}/"


def load_image(source: ImageInput, exif_rotate: bool, budget: PixelBudget) -> ImageArray | str:
    """Return uint8 256 x 256 x 3, rotated as its EXIF says if `exif_rotate`; or why the image cannot be read."""
    try:
        if isinstance(source, str) and os.path.isdir(source):
            return "the folder has no readable image"
        data = source if isinstance(source, bytes) else read_file(Path(source))
        height, width = images.read_size(data)
        with budget.reserve(height * width):
            rgb = images.decode(data)
            return images.resize_and_crop(images.apply_orientation(rgb, data) if exif_rotate else rgb)
    except DataError as error:
        return error.what
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return getattr(error, "strerror", None) or str(error)


def prefetch(sources: Iterable[ImageInput], window: int, exif_rotate: bool) -> Generator[tuple[str, ImageArray | str]]:
    """Yield the name and `load_image` of every image, in order, while threads decode the next `window`."""
    budget = PixelBudget()
    with ThreadPoolExecutor(min(8, count_cores())) as pool:
        for source, rgb in map_ahead(pool, lambda item: load_image(item, exif_rotate, budget), sources, window):
            yield STDIN if isinstance(source, bytes) else source, rgb
