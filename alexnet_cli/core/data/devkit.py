"""The development kit of ILSVRC 2012: names of the classes and labels of the validation images. No torch.

`data/meta.mat` lists the classes by ILSVRC2012_ID. `data/ILSVRC2012_validation_ground_truth.txt` has one such id per
validation image. The ids are not in the order of the wnids.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alexnet_cli.core.files import decode_text
from alexnet_cli.errors import DataError

FOLDER = "ILSVRC2012_devkit_t12"
META = "data/meta.mat"
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
LARGEST = 1 << 26  # bytes of either file
INCOMPLETE_HINT = "download ILSVRC2012_devkit_t12.tar.gz again"


@dataclass(frozen=True)
class Devkit:
    """Content of the kit."""

    words: dict[str, str]
    """Names by wnid, such as "tench, Tinca tinca"."""
    truth: dict[str, str]
    """wnid of each validation image, by the stem of its file name."""
    wnids: dict[int, str]
    """wnid of each ILSVRC2012_ID; ids count from 1."""


def find_devkit(folder: Path) -> Path | None:
    """Return the kit in a folder, archive or unpacked; None if there is none."""
    names = (FOLDER, f"{FOLDER}.tar.gz", f"{FOLDER}.tgz", f"{FOLDER}.tar")
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_devkit(path: Path) -> Devkit:
    """Read the kit from an archive or from the folder it unpacks to.

    Raises:
        DataError: a file is missing or damaged, or the two files disagree.
    """
    files = _read_folder(path) if path.is_dir() else _read_archive(path)
    for name in (META, TRUTH):
        if name not in files:
            raise DataError(f"{path} has no {name}", INCOMPLETE_HINT)
    words, wnids = _parse_classes(path, files[META])
    truth = {}
    try:
        lines = decode_text(files[TRUTH]).split()
    except UnicodeError as error:
        raise DataError(f"{path}, {TRUTH} is not UTF-8 text: {error}", INCOMPLETE_HINT) from error
    for number, line in enumerate(lines, 1):
        class_id = int(line) if line.isdigit() else 0
        if class_id not in wnids:
            raise DataError(f"{path}, {TRUTH}, line {number}: {line!r} is not an id in meta.mat", INCOMPLETE_HINT)
        truth[f"ILSVRC2012_val_{number:08d}"] = wnids[class_id]
    return Devkit(words, truth, wnids)


def _read_folder(path: Path) -> dict[str, bytes]:
    try:
        return {name: (path / name).read_bytes() for name in (META, TRUTH) if (path / name).is_file()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def _read_archive(path: Path) -> dict[str, bytes]:
    """Read the two files in memory: nothing is unpacked to disk, links are not followed."""
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = "/".join(PurePosixPath(member.name).parts[-2:])
                if name in (META, TRUTH) and member.isreg() and member.size <= LARGEST:
                    content = archive.extractfile(member)
                    files[name] = content.read() if content else b""
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path} is damaged: {error}", INCOMPLETE_HINT) from error
    return files


def _parse_classes(path: Path, meta: bytes) -> tuple[dict[str, str], dict[int, str]]:
    """Return names by wnid, and wnids by id. The table's groups of classes (with children) are left out."""
    from scipy.io import loadmat  # takes a fifth of a second to import

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        words = {str(wnid): str(text) for wnid, text in zip(leaves["WNID"], leaves["words"], strict=True)}
        wnids = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    except Exception as error:  # SciPy has no exception class for a damaged file
        raise DataError(f"{path}, {META} has no usable table of synsets ({error!r:.200})", INCOMPLETE_HINT) from error
    if not len(wnids) == len(words) == len(leaves) > 0:
        raise DataError(f"{path}, {META} lists {len(leaves)} classes, some of them twice", INCOMPLETE_HINT)
    return words, wnids
