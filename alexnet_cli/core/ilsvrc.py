"""What the 1000 classes of ILSVRC 2012 are called, for sources that have their wnids only.

torchvision ships the names in the order of the sorted wnids, without the wnids. Its list is read from the
installed file as text, since importing it would load all of torch. The wnids themselves are in ilsvrc_wnids.txt:
a data set whose source has names of its own calls the same classes otherwise.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

WNIDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
"""Of the 1000 wnids, sorted and joined by line feeds: another thousand classes have other names."""
LIST = "_IMAGENET_CATEGORIES"


def is_ilsvrc(wnids: Sequence[str]) -> bool:
    """Whether these are the 1000 classes of ILSVRC 2012, in any order."""
    return len(wnids) == 1000 and hashlib.sha256("\n".join(sorted(wnids)).encode()).hexdigest() == WNIDS_SHA256


def ilsvrc_words(wnids: Iterable[str]) -> dict[str, str]:
    """Names by wnid of those that are classes of ILSVRC 2012; none without torchvision."""
    names = dict(zip(_wnids(), _torchvision(), strict=False))
    return {wnid: names[wnid] for wnid in wnids if wnid in names}


def sorted_classes() -> list[tuple[str, str]]:
    """Name and wnid of each of the 1000 classes, in the order of the wnids; without torchvision a wnid is the name."""
    wnids = _wnids()
    words = ilsvrc_words(wnids)
    return [(words.get(wnid, wnid), wnid) for wnid in wnids]


def _wnids() -> list[str]:
    return (Path(__file__).parent / "ilsvrc_wnids.txt").read_text(encoding="ascii").split()


def _torchvision() -> list[str]:
    package = importlib.util.find_spec("torchvision")
    for folder in package.submodule_search_locations or () if package else ():
        file = Path(folder) / "models" / "_meta.py"
        if not file.is_file():
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == LIST for t in node.targets):
                names = [str(name) for name in ast.literal_eval(node.value)]
                return names if len(names) == 1000 else []
    return []
