"""Names of classes: of a data set or a model file, in words.txt, and of the 1000 classes of ILSVRC 2012. No torch.

torchvision has the names of ILSVRC's classes in the order of the sorted wnids, without the wnids. That list is parsed
from its source file, because importing it would load torch. The wnids are in ilsvrc_wnids.txt.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alexnet_cli.core.files import read_text

WNID = re.compile(r"n\d{8}")
"""A WordNet id, by which ImageNet names a class."""
WORDS_START = re.compile(r"""\s*["']?(n\d{8})["']?[\s,;:]+""")
QUOTED = re.compile(r"""^(["'])(.*)\1$""")
WNIDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
"""sha256 of the 1000 wnids of ILSVRC 2012, sorted and joined by line feeds."""
TORCHVISION_LIST = "_IMAGENET_CATEGORIES"


class ClassName(NamedTuple):
    """The name of a class, and its WordNet id if it has one (`n02123045`)."""

    name: str
    wnid: str | None = None


def parse_classes(names: Sequence[Any], wnids: Sequence[Any]) -> tuple[ClassName, ...]:
    """Return the classes that a file lists. Raises ValueError if they are not names and wnids."""
    if not names or len(names) != len(wnids):
        raise ValueError(f"{len(names)} class names for {len(wnids)} wnids")
    for name, wnid in zip(names, wnids, strict=True):
        if not isinstance(name, str) or not isinstance(wnid, str | None):
            raise ValueError(f"{name!r} ({wnid!r}) is not a class name")
    return tuple(map(ClassName, names, wnids))


def name_classes(keys: Sequence[str], words: Mapping[str, str]) -> tuple[ClassName, ...]:
    """Return short, distinct class names.

    `keys`: folder name or wnid of each class. `words`: names by key; the first one is used: "tabby, tabby cat" gives
    "tabby". If two classes share it ("crane", a bird and a machine), they get all their words, then their wnids.
    """
    full = [words.get(key, key) for key in keys]
    short = [text.partition(",")[0].strip() if key in words else text for key, text in zip(keys, full, strict=True)]
    counts = Counter(short)
    names = [text if counts[first] > 1 else first for first, text in zip(short, full, strict=True)]
    counts = Counter(names)
    classes = []
    for key, name in zip(keys, names, strict=True):
        wnid = key if WNID.fullmatch(key) else None
        classes.append(ClassName(f"{name} ({wnid})" if wnid and counts[name] > 1 else name, wnid))
    return tuple(classes)


def make_names_unique(classes: Sequence[ClassName]) -> list[str]:
    """Return the class names. A name that several classes share gets the wnid, or else the index of the class."""
    counts = Counter(name for name, _ in classes)
    return [name if counts[name] == 1 else f"{name} ({wnid or f'class {i}'})" for i, (name, wnid) in enumerate(classes)]


def read_words(path: Path) -> dict[str, str]:
    """Return names by wnid from words.txt in a folder or in its train/, with lines `n02123045<TAB>tabby, tabby cat`.

    A space, comma or semicolon may separate the two, and each may have quotes.
    """
    for file in (path / "words.txt", path / "train" / "words.txt"):
        if file.is_file():
            lines = (WORDS_START.sub(r"\1\t", line) for line in read_text(file).splitlines())
            pairs = (line.partition("\t") for line in lines)
            return {wnid.strip(): QUOTED.sub(r"\2", text.strip()) for wnid, _, text in pairs if text.strip()}
    return {}


def is_ilsvrc(wnids: Sequence[str]) -> bool:
    """Return whether these are the 1000 classes of ILSVRC 2012, in any order."""
    return len(wnids) == 1000 and hashlib.sha256("\n".join(sorted(wnids)).encode()).hexdigest() == WNIDS_SHA256


def ilsvrc_words(wnids: Iterable[str]) -> dict[str, str]:
    """Return names by wnid of those that are classes of ILSVRC 2012; none without torchvision."""
    names = dict(zip(ilsvrc_wnids(), _torchvision_names(), strict=False))
    return {wnid: names[wnid] for wnid in wnids if wnid in names}


def ilsvrc_classes() -> list[ClassName]:
    """Return the 1000 classes in the order of their wnids; without torchvision the wnid is the name."""
    wnids = ilsvrc_wnids()
    words = ilsvrc_words(wnids)
    return [ClassName(words.get(wnid, wnid), wnid) for wnid in wnids]


def find_ilsvrc_wnids(names: Sequence[str]) -> list[str]:
    """Return the 1000 wnids if `names` are ILSVRC's classes in words, in the order of the wnids; otherwise none.

    Lists differ in a few names, and some have "crane" and "maillot" twice: up to a tenth of the names may differ.
    """
    known = [simplify_name(name) for name in _torchvision_names()]
    equal = sum(simplify_name(name) == other for name, other in zip(names, known, strict=False))
    return ilsvrc_wnids() if len(names) == 1000 and equal >= 900 else []


def simplify_name(name: str) -> str:
    """Return the letters of the first synonym, small: "great_white_shark" and "Great white shark, ..." are one."""
    return re.sub(r"[^a-z]", "", name.partition(",")[0].lower())


def ilsvrc_wnids() -> list[str]:
    """Return the wnids of the 1000 classes of ILSVRC 2012, sorted."""
    return (Path(__file__).parent / "ilsvrc_wnids.txt").read_text(encoding="ascii").split()


def _torchvision_names() -> list[str]:
    """Return the names in torchvision's source; none if it is not installed or has changed."""
    package = importlib.util.find_spec("torchvision")
    for folder in package.submodule_search_locations or () if package else ():
        file = Path(folder) / "models" / "_meta.py"
        if not file.is_file():
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == TORCHVISION_LIST for target in node.targets
            ):
                names = [str(name) for name in ast.literal_eval(node.value)]
                return names if len(names) == 1000 else []
    return []
