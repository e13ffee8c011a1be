"""What the user probably meant by words that the parser refused: the hint of its error."""

from __future__ import annotations

import os
import re
import shlex
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

WORDS = "alexnet.words"
"""Key of the typed words in the parser's `Context.meta`."""

OTHER_NAMES = {  # commands and options of other tools -> ours, the first that the command has
    "val": ("evaluate",), "test": ("evaluate",), "classify": ("predict",), "list": ("runs",), "compare": ("runs",),
    "model": ("weights",), "weights": ("init-from",), "checkpoint": ("weights", "resume"), "device": ("gpus",),
    "devices": ("gpus",), "batch": ("batch-size",), "learning-rate": ("lr",), "lr0": ("lr",), "workers": ("jobs",),
    "num-workers": ("jobs",),
}  # fmt: skip
LISTS = {"IDS": (r"[\d,]+", ","), "A,B": (r"[a-z\d,][a-z\d_,-]*", ","), "KEY=VALUE": (r"[^=-][^=]*", "=")}
"""Metavar of an option that takes several words as one -> what a word looks like, and what stands between two."""


def suggest_fix(error: Any) -> str:
    """Return a hint for an error of the parser, or "" if nothing is likely."""
    if unknown := re.match(r"No such command '([\w-]+)'", error.message):
        return _ask(*OTHER_NAMES.get(unknown[1], ()))
    context = getattr(error, "ctx", None)
    if context is None:
        return ""
    words = context.meta.get(WORDS, [])
    if option := re.match(r"No such option: (\S+)", error.message):
        if context.parent is None and option[1] in ("-q", "--quiet", "--json"):
            return f"options follow the command: alexnet COMMAND {option[1]}"
        return _suggest_option(context.command, option[1], _find_value(words, option[1]))
    if re.search(r"valid (number|float)", error.message) and getattr(error, "param", None):
        option = max(error.param.opts, key=len)
        value = _find_value(words, option)
        return _ask(f"{option} {value.replace(',', '.')}") if re.fullmatch(r"\d*,\d+", value) else ""
    if extra := re.match(r"Got unexpected extra argument\S* \((.*)\)$", error.message):
        return _suggest_for_extra(context.command, words, extra[1].split(" ")[0])
    return ""


def suggest_option_instead(command: Any, words: list[str], what: str) -> str:
    """Return a hint if an error is about a word such as batch=4, which a command took for a file, or ""."""
    settings = (word.partition("=") for word in words if "=" in word and not word.startswith("-") and word in what)
    return next((hint for key, _, value in settings if (hint := _suggest_option(command, key, value))), "")


def _ask(*words: str) -> str:
    return f"did you mean {' or '.join(words)}?" if words else ""


def _find_value(words: list[str], option: str) -> str:
    """Return the value that was typed for an option, or ""."""
    for word, following in zip(words, [*words, "-"][1:], strict=True):
        if word == option and not following.startswith("-"):
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""


def _suggest_option(command: Any, typed: str, value: str) -> str:
    """Return a hint for an unknown option: that of the same meaning, a key of the recipe, or one of a similar name."""
    from alexnet_cli.core.devices import suggest_gpus
    from alexnet_cli.recipe import FIELDS

    name = typed.strip("-").lower().replace("_", "-")
    options = {opt.strip("-"): param for param in command.params for opt in param.opts if opt.startswith("--")}
    if not name:
        return ""
    near = [option for option in (name, *OTHER_NAMES.get(name, ())) if option in options][:1]
    if not near and "set" in options and (key := name.replace("-", "_")) in FIELDS:
        return _ask(f"--set {key}={shlex.quote(value or 'VALUE')}")
    near = near or [option for option in options if option.startswith(name) or name.startswith(option)]
    near = near or get_close_matches(name, options, 3, 0.75)
    if len(near) == 1 and value and not getattr(options[near[0]], "is_flag", False):
        value = suggest_gpus(value) or value if near[0] == "gpus" else value
        return _ask(f"--{near[0]} {shlex.quote(value)}")
    return _ask(*(f"--{option}" for option in near))


def _suggest_for_extra(command: Any, words: list[str], extra: str) -> str:
    """Return a hint for a word too many: KEY=VALUE, the rest of a list, or the name of something that exists."""
    key, equals, value = extra.partition("=")
    if equals and (hint := _suggest_option(command, key, value)):
        return hint
    metavars = {opt: param.metavar for param in command.params for opt in param.opts}
    for place, option in enumerate(words[:-2]):
        pattern, separator = LISTS.get(metavars.get(option) or "", ("(?!)", ""))
        values = list(takewhile(re.compile(pattern).fullmatch, words[place + 1 :]))
        if values[1:2] == [extra]:
            return _ask(f"{option} {separator.join([values[0].rstrip(','), *values[1:]])}")
    return _suggest_for_name(command, extra)


def _suggest_for_name(command: Any, name: str) -> str:
    """Return a hint for the name of a data set, run, recipe or weights file that was typed without its option."""
    from alexnet_cli.core.data.shards import find_dataset
    from alexnet_cli.core.runs.run import Run
    from alexnet_cli.errors import AlexNetError
    from alexnet_cli.recipe import RECIPES

    def exists(find: Any) -> bool:
        try:
            return bool(find(name))
        except (AlexNetError, OSError, ValueError):
            return False

    if not name:
        return ""
    options = {opt for param in command.params for opt in param.opts}
    is_run = exists(Run.open)
    kinds = {
        "--data": exists(find_dataset),
        "-w": is_run or Path(name).suffix in (".safetensors", ".onnx"),
        "--resume": is_run,
        "--recipe": name in RECIPES or Path(name).suffix == ".toml",
    }
    if option := next((option for option, fits in kinds.items() if fits and option in options), None):
        return _ask(f"{option} {shlex.quote(name)}")
    if "--data" in options and os.path.isdir(name):
        return f"prepare the folder first: alexnet prepare {shlex.quote(name)}"
    return ""
