"""`alexnet benchmark prepare`: packing, and what else makes 256 x 256 JPEGs of a folder of pictures.

Ours writes shards durably and measures mean and axes on the way; the peers write one file a picture and no more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_cli.core.stopwatch import Contest, Pass

SIDE, QUALITY = 256, 95


@contextlib.contextmanager
def contest(source: Path, paths: list[Path], workers: int, scratch: Path, notes: list[str]) -> Iterator[Contest]:
    """The contestants on the same files with the same workers; `source` holds them as a data set."""
    from alexnet_cli.core.stopwatch import Contest

    with ExitStack() as stack:
        # Processes that are started fresh: a forked one would inherit the locks of torch's threads.
        context = multiprocessing.get_context("spawn")
        processes = stack.enter_context(ProcessPoolExecutor(workers, context))
        peers = {f"Pillow, {workers} processes": _files(by_pillow, processes, paths, scratch / "pillow")}
        missing = []
        if importlib.util.find_spec("cv2"):
            peers[f"OpenCV, {workers} processes"] = _files(by_opencv, processes, paths, scratch / "opencv")
        else:
            missing.append("OpenCV")
        peers["limit: codec and resize alone"] = _limit(paths, workers, stack)
        yield Contest("prepare", _ours(source, workers, scratch), peers, notes, missing)


def _ours(source: Path, workers: int, scratch: Path) -> Pass:
    from alexnet_cli.core.packing import pack
    from alexnet_cli.core.plan import Plan
    from alexnet_cli.core.sources import recognise

    numbers = itertools.count()

    def run() -> int:
        output = scratch / f"ours{next(numbers)}"
        images = sum(step.images for step in pack(Plan(recognise(source), output, QUALITY), workers))
        shutil.rmtree(output)
        return images

    return run


def _files(
    work: Callable[[Path, list[Path]], None], processes: ProcessPoolExecutor, paths: list[Path], out: Path
) -> Pass:
    """One output file a picture; a process takes 16 at a time, as our threads do."""
    out.mkdir(parents=True)
    pieces = [paths[start : start + 16] for start in range(0, len(paths), 16)]

    def run() -> int:
        list(processes.map(partial(work, out), pieces))
        return len(paths)

    return run


def by_pillow(out: Path, paths: list[Path]) -> None:
    """Open, resize the shorter side to 256, cut the middle, save."""
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        width, height = rgb.size
        scale = SIDE / min(width, height)
        wide, high = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
        rgb = rgb.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - SIDE) // 2, (high - SIDE) // 2
        rgb.crop((left, top, left + SIDE, top + SIDE)).save(out / path.name, "JPEG", quality=QUALITY)


def by_opencv(out: Path, paths: list[Path]) -> None:
    """The same with OpenCV; its averaging resize is the one that does not alias."""
    import cv2

    cv2.setNumThreads(1)
    for path in paths:
        bgr: Any = cv2.imread(str(path), cv2.IMREAD_COLOR)
        height, width = bgr.shape[:2]
        scale = SIDE / min(width, height)
        size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
        bgr = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
        left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
        middle = bgr[top : top + SIDE, left : left + SIDE]
        cv2.imwrite(str(out / path.name), middle, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def _limit(paths: list[Path], workers: int, stack: ExitStack) -> Pass:
    """Nothing but decode, resize, encode: bytes already in memory, results dropped."""
    from alexnet_cli.core import fast_images

    files = [path.read_bytes() for path in paths]
    pool = stack.enter_context(ThreadPoolExecutor(workers))

    def convert(piece: list[bytes]) -> None:
        for data in piece:
            fast_images.encode(fast_images.to_256(fast_images.decode(data)), QUALITY)

    def run() -> int:
        list(pool.map(convert, [files[start : start + 16] for start in range(0, len(files), 16)]))
        return len(files)

    return run
