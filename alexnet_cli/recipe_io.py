"""Read recipes: a name or a TOML file, the values of a model file's JSON, `--set KEY=VALUE`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alexnet_cli.core.files import read_text
from alexnet_cli.errors import DataError, RecipeError, suggest_name
from alexnet_cli.recipe import FIELD_TYPES, PAPER, RECIPES, Recipe, check_value

LARGEST_FILE = 2**14  # bytes; tomllib can need gigabytes for 32 kilobytes (a dotted key of 16,000 parts)


def load_recipe(name_or_file: str) -> Recipe:
    """Return a named recipe, or the one in a TOML file. Keys missing there come from its `base`, `name`, or `paper`.

    Raises:
        RecipeError: the recipe does not exist, the file is not TOML, or a key or value is wrong.
    """
    try:
        return apply_changes(*read_recipe(name_or_file))
    except RecipeError as error:
        what = error.what.removeprefix("recipe: ")
        raise RecipeError(error.what if what == error.what else f"{name_or_file}: {what}", error.hint) from error


def read_recipe(name_or_file: str) -> tuple[Recipe, dict[str, Any]]:
    """Return the named recipe to start from, and the values that a TOML file changes (none for a name)."""
    if name_or_file in RECIPES:
        return RECIPES[name_or_file], {}
    path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(f"no recipe and no file is called {name_or_file}", _list_recipes(name_or_file))
    try:
        values = tomllib.loads(read_text(path, LARGEST_FILE))
    except DataError as error:
        raise RecipeError(error.what, error.hint) from error
    except (ValueError, RecursionError) as error:
        hint = "write text in quotes, and true and false in small letters; a run's recipe.toml is an example"
        raise RecipeError(f"{path} is not TOML: {error}", hint) from error
    base = values.pop("base", None)
    if base is None:
        return _find_base(values), values
    if not isinstance(base, str) or base not in RECIPES:
        raise RecipeError(f"{path}: base = {base!r} is no named recipe", _list_recipes(str(base)))
    if (name := values.get("name")) != base and name in list(RECIPES):  # a list: `name` may be unhashable
        what = f"{path}: name = {name!r} is another recipe than base = {base!r}"
        raise RecipeError(what, "give it a name of its own")
    return RECIPES[base], values


def _list_recipes(typed: str) -> str:
    return f"{suggest_name(typed, RECIPES)}named recipes: {', '.join(RECIPES)}"


def _find_base(values: Mapping[str, Any]) -> Recipe:
    name = values.get("name")
    return RECIPES.get(name, PAPER) if isinstance(name, str) else PAPER


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a mapping describes, such as the JSON in a model file's metadata."""
    return apply_changes(_find_base(values), values)


def apply_changes(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some values replaced.

    Raises:
        RecipeError: a key is unknown (the hint has the nearest one) or a value is wrong.
    """
    for key in values:
        if key == "base":
            raise RecipeError("recipe: base is a key of recipe files only", "use --recipe to choose the base")
        if key not in FIELD_TYPES:
            guess = suggest_name(key, FIELD_TYPES, ["learning_rate"] * (key == "lr")).rstrip()
            raise RecipeError(f"recipe: no key is called {key}", guess or "alexnet train --print-config lists all keys")
    return replace(recipe, **values)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse the `key=value` words of --set; each value is TOML, but text needs no quotes and True means true."""
    values: dict[str, Any] = {}
    for word in settings:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not text:
            raise RecipeError(f"--set {word} is not key=value", "such as --set dropout=0")
        try:
            values[key] = tomllib.loads(f"value = {text.lower() if FIELD_TYPES.get(key) is bool else text}")["value"]
        except (ValueError, RecursionError):
            values[key] = text
        if FIELD_TYPES.get(key) is str and not isinstance(values[key], str):
            values[key] = text  # a name may look like a number
        if key in FIELD_TYPES:
            values[key] = check_value(key, values[key], typed=True)
    return values
