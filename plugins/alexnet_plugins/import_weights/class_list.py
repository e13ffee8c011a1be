"""Reads the class names of --classes: ILSVRC's development kit, or a list as text, JSON, Python or YAML.

Every form becomes lines with up to three columns: the number of the output, a wnid and a name. Numbers are a column
only if each from 0 or 1 on is there once, and the rest of the lines differs: `7 of clubs` and `type 1` are names.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_cli.core.data.classes import (
    ClassName,
    find_ilsvrc_wnids,
    ilsvrc_classes,
    ilsvrc_wnids,
    is_ilsvrc,
    name_classes,
    simplify_name,
)
from alexnet_cli.core.data.devkit import read_devkit
from alexnet_cli.core.files import read_text
from alexnet_cli.errors import WeightsError

MAX_BYTES = 2**22
HINT = "give a text file with one class per line: a name, or a wnid and a name"
BETWEEN = r"(?:\s*[,;:=|]\s*|\s+)"  # two columns
NUMBER_FIRST = re.compile(rf"""["']?([0-9]{{1,6}})["']?{BETWEEN}(.*\S)""")
NUMBER_LAST = re.compile(rf"""(.*\S){BETWEEN}["']?([0-9]{{1,6}})["']?""")
WNID_FIRST = re.compile(rf"""["']?(n\d{{8}})["']?(?:{BETWEEN}(.*))?""")
WNID_LAST = re.compile(rf"""(.*\S){BETWEEN}["']?(n\d{{8}})["']?""")
HEADER = re.compile(
    r"\W*(?:(?:class|label|category|synset|wnid|words?|names?|ids?|idx|index|number)(?:es)?[\W_]*)+", re.I
)
YAML_NAMES = re.compile(r"^names:[ \t]*(.*(?:\n[ \t-].*)*)", re.MULTILINE)
ASSIGNMENT = re.compile(r"[\w\s.$]+=\s*(?=[\[{])")  # of a list in Python or JavaScript
KEYS = ("names", "id2label", "classes")  # that hold the list in larger JSON files


def read_class_list(path: Path, count: int) -> list[ClassName]:
    """Return the names of `count` outputs. Names without wnids that are ILSVRC's, in its order, get their wnids.

    Raises:
        DataError: the file or kit cannot be read.
        WeightsError: it is no list of `count` different classes.
    """
    if path.is_dir() or path.suffix in (".gz", ".tgz", ".tar"):
        kit = read_devkit(path)
        lines = [f"{kit.wnids[i]} {kit.words[kit.wnids[i]]}" for i in sorted(kit.wnids)]
    else:
        lines = _split_lines(path, read_text(path, MAX_BYTES).strip())
    if len(lines) == count + 1 and HEADER.fullmatch(lines[0]):
        del lines[0]
    if len(lines) != count:
        what = f"{path} lists {len(lines):,} classes, the network has {count:,}"
        raise WeightsError(what, "give the list of this network, with one class per line")
    return _name_classes(path, *_split_columns(lines))


def is_reordered(classes: Sequence[ClassName]) -> bool:
    """Return whether these are ILSVRC's 1000 classes, known by wnid or by name, in another order than the wnids'."""
    wnids = [entry.wnid for entry in classes if entry.wnid]
    if len(wnids) == len(classes):
        return is_ilsvrc(wnids) and wnids != ilsvrc_wnids()
    names, known = ([simplify_name(entry.name) for entry in entries] for entries in (classes, ilsvrc_classes()))
    in_place = sum(name == other for name, other in zip(names, known, strict=False))
    return len(names) == 1000 and in_place < 500 <= len(set(names) & set(known))


def _split_lines(path: Path, text: str) -> list[str]:
    """Return one line per class. Raises WeightsError for a list or dictionary that is damaged, or of other things."""
    if block := YAML_NAMES.search(text):
        text = block[1].strip()
    text = ASSIGNMENT.sub("", text, count=1).rstrip(" ;") if ASSIGNMENT.match(text) else text
    if text[:1] in ("[", "{"):
        return [_to_line(path, entry) for entry in _list_entries(_parse(path, text))]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if all(line.startswith("- ") for line in lines):  # YAML
        lines = [line[2:].strip() for line in lines]
    if len(lines) > 1 and all(line.endswith(",") for line in lines[:-1]):  # inside of a list or dictionary
        lines = [line.rstrip(", ") for line in lines]
    return lines


def _parse(path: Path, text: str) -> Any:
    """Return the list or dictionary in JSON, Python, or YAML without quotes."""
    if "'" not in text and '"' not in text and text[-1] in "]}":
        return [item.strip() for item in text[1:-1].split(",")]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes in names
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        what = f"{path} begins like a list or dictionary, but is neither JSON nor Python"
        raise WeightsError(what, HINT) from error


def _list_entries(value: Any) -> list[list[Any]]:
    """Return the columns of each entry of a list or dictionary; a set has no order, and is one entry."""
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if isinstance(value.get(key), list | dict)), value)
    if isinstance(value, dict):
        if all(type(item) is int for item in value.values()):  # numbers by name
            return [[number, name] for name, number in value.items()]
        return [[key, *(item if isinstance(item, list) else [item])] for key, item in value.items()]
    return [item if isinstance(item, list) else [item] for item in (value if isinstance(value, list) else [value])]


def _to_line(path: Path, columns: Sequence[Any]) -> str:
    for column in columns:
        if type(column) not in (str, int):
            raise WeightsError(f"{path} has {str(column)[:50]} where a class name should be", HINT)
    return "\t".join(" ".join(str(column).split()) for column in columns)


def _split_columns(lines: list[str]) -> tuple[list[str], list[str | None]]:
    """Return name ("" if there is none) and wnid of each output."""
    numbers, lines = _split_numbers(lines)
    names, wnids = list[str](), list[str | None]()
    for line in lines:
        if match := WNID_FIRST.fullmatch(line):
            wnid, name = match[1], match[2] or ""
        elif match := WNID_LAST.fullmatch(line):
            name, wnid = match[1], match[2]
        else:
            wnid, name = None, line
        names.append(name)
        wnids.append(wnid)
    if all(wnids):
        _, names = _split_numbers(names)  # the development kit's ids: not the numbers of outputs
    names = [_unquote(name.replace("\t", ", ")) for name in names]  # a list of synonyms
    order = sorted(range(len(lines)), key=numbers.__getitem__)
    return [names[i] for i in order], [wnids[i] for i in order]


def _split_numbers(lines: list[str]) -> tuple[list[int], list[str]]:
    """Return the number and the rest of each line; the line's own number if the file does not count its classes."""
    for pattern, number, rest in ((NUMBER_FIRST, 1, 2), (NUMBER_LAST, 2, 1)):
        matches = [match for line in lines if (match := pattern.fullmatch(line))]
        numbers = [int(match[number]) for match in matches]
        names = [match[rest] for match in matches]
        is_column = sorted(numbers) in (list(range(len(lines))), list(range(1, len(lines) + 1)))
        if is_column and len(set(names)) > len(names) / 2:  # ILSVRC has two cranes
            return numbers, names
    return list(range(len(lines))), lines


def _unquote(name: str) -> str:
    quote = name[:1]
    if len(name) > 1 and quote in ("'", '"') and name[-1] == quote:
        return name[1:-1].replace(f"\\{quote}", quote).replace(quote * 2, quote).strip()
    return name


def _name_classes(path: Path, names: list[str], wnids: Sequence[str | None]) -> list[ClassName]:
    if not any(wnids):
        wnids = find_ilsvrc_wnids(names) or wnids
    known = {entry.wnid: entry.name for entry in ilsvrc_classes()}
    names = [name or known.get(wnid, wnid or "") for name, wnid in zip(names, wnids, strict=True)]
    if "" in names:
        raise WeightsError(f"{path} has no name for output {names.index('')}, counting from 0", HINT)
    keys = [wnid for wnid in wnids if wnid]
    classes = list(map(ClassName, names, wnids))
    if len(set(keys)) == len(names):
        classes = list(name_classes(keys, dict(zip(keys, names, strict=True))))
    for same in (keys, [entry.name for entry in classes]):
        for text, times in Counter(same).most_common(1):
            if times > 1:
                hint = "give each class another name, or a wnid before its name"
                raise WeightsError(f"{path} lists {text} {times} times", hint)
    return classes
