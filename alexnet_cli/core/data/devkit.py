"""The development kit of ILSVRC 2012: words of the classes and the labels of the validation pictures.

`data/meta.mat` lists the classes by ILSVRC2012_ID and `data/ILSVRC2012_validation_ground_truth.txt` gives one
such id a validation picture. These ids follow neither the order of the wnids nor that of the words.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alexnet_cli.errors import DataError

FOLDER = "ILSVRC2012_devkit_t12"
META = "data/meta.mat"
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
LIMIT = 1 << 26  # bytes of either file
INCOMPLETE = "download ILSVRC2012_devkit_t12.tar.gz again"


@dataclass(frozen=True)
class Devkit:
    """What the kit says: words by wnid, `tench, Tinca tinca`; wnid of each validation picture by its stem.

    `wnids`: the wnid of each ILSVRC2012_ID, which count from 1.
    """

    path: Path
    words: dict[str, str]
    truth: dict[str, str]
    wnids: dict[int, str]


def find_devkit(folder: Path) -> Path | None:
    """The kit in a folder, packed or not."""
    names = (FOLDER, f"{FOLDER}.tar.gz", f"{FOLDER}.tgz", f"{FOLDER}.tar")
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_devkit(path: Path) -> Devkit:
    """Read the kit, an archive or the folder it unpacks to.

    Raises:
        DataError: a file is missing, damaged, or contradicts the other.
    """
    files = _unpacked(path) if path.is_dir() else _packed(path)
    for name in (META, TRUTH):
        if name not in files:
            raise DataError(f"{path} has no {name}", INCOMPLETE)
    words, wnids = _classes(path, files[META])
    truth = {}
    for number, line in enumerate(files[TRUTH].split(), 1):
        identity = int(line) if line.isdigit() else 0
        if identity not in wnids:
            raise DataError(f"{path}, {TRUTH}, line {number}: {line!r} is no class of meta.mat", INCOMPLETE)
        truth[f"ILSVRC2012_val_{number:08d}"] = wnids[identity]
    return Devkit(path, words, truth, wnids)


def _unpacked(path: Path) -> dict[str, bytes]:
    try:
        return {name: (path / name).read_bytes() for name in (META, TRUTH) if (path / name).is_file()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def _packed(path: Path) -> dict[str, bytes]:
    """The two files, read in memory: nothing is unpacked to disk, links are not followed."""
    try:
        with tarfile.open(path) as archive:
            return dict(_wanted(archive))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path} is damaged: {error}", INCOMPLETE) from error


def _wanted(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        name = "/".join(PurePosixPath(member.name).parts[-2:])
        if name in (META, TRUTH) and member.isreg() and member.size <= LIMIT:
            content = archive.extractfile(member)
            if content is not None:
                yield name, content.read()


def _classes(path: Path, meta: bytes) -> tuple[dict[str, str], dict[int, str]]:
    """Words by wnid, and wnid by id, of the classes; the table also has the groups that they belong to."""
    from scipy.io import loadmat  # takes a fifth of a second to import

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        words = {str(wnid): str(text) for wnid, text in zip(leaves["WNID"], leaves["words"], strict=True)}
        wnids = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    except Exception as error:  # whatever SciPy raises for a damaged file: it has no error of its own
        raise DataError(f"{path}, {META} has no usable table of synsets ({error!r:.200})", INCOMPLETE) from error
    if not len(wnids) == len(words) == len(leaves) > 0:
        raise DataError(f"{path}, {META} names {len(leaves)} classes, some of them twice", INCOMPLETE)
    return words, wnids
