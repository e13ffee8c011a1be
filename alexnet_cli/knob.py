"""One value of a recipe: what it may be, how TOML spells it, and what to say of one that it cannot be."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, get_args, get_origin

import tomli_w

from alexnet_cli.errors import RecipeError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
DROPS = [25, 51, 79]  # the example of a list of epochs


def knob(default: Any, source: str, about: str, low: float | None = None, high: float | None = None) -> Any:
    """A recipe field: its default in recipe `paper`, where that comes from, what it means, and its range."""
    return field(default=default, metadata={"source": source, "about": about, "low": low, "high": high})


def spelled(value: Any) -> str:
    """A value as TOML has it, in one line: `true`, `"relu"`, `[25, 51, 79]`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(spelled, value))}]"
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()


def setting(key: str, value: Any) -> str:
    """The words that give a key a value on the command line: `--set crops=false`."""
    return f"--set {shlex.quote(f'{key}={value if isinstance(value, str) else spelled(value)}')}"


def checked(key: str, kind: Any, default: Any, meta: Mapping[str, Any], value: Any, typed: bool = False) -> Any:
    """The value as one of its kind.

    `default` and `meta` are those of the field; `typed` if the value was said with --set, as the example then is.

    Raises:
        RecipeError: it is of another kind or out of range; the hint says what is right, with an example.
    """

    def such(example: Any) -> str:
        return f"such as {setting(key, example) if typed else f'{key} = {spelled(example)}'}"

    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            allowed = ", ".join(str(v) for v in get_args(kind))
            raise RecipeError(f"recipe: {key} = {value!r} is not one of its values", f"use one of: {allowed}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(type(v) is int and v > 0 for v in value):
            raise RecipeError(f"recipe: {key} = {value!r} is not a list of epochs", such(DROPS))
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        example = such(not default if kind is bool else default)
        raise RecipeError(f"recipe: {key} = {value!r} should be {KINDS[kind]}", f"{meta['about']}; {example}")
    if kind is str and not re.fullmatch(r"[\w.-]*\w[\w.-]*", value):
        raise RecipeError(f"recipe: {key} = {value!r} is not a plain name", "letters, digits, '-' and '_' do well")
    low, high = meta.get("low"), meta.get("high")
    high = sys.float_info.max if kind is float and high is None else high
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        ends = [] if low is None else [f"at least {low:g}"]
        if high is not None:
            ends.append("finite" if high == sys.float_info.max else f"at most {high:g}")
        raise RecipeError(f"recipe: {key} = {value!r} is out of range", f"it must be {' and '.join(ends)}")
    return value
