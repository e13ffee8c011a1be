"""What `alexnet train --print-config` shows: every value of a recipe, where it comes from, what the paper has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alexnet_cli.console import Reporter
from alexnet_cli.recipe import (
    CAFFE,
    FAST,
    KRIZHEVSKY,
    PAPER,
    PAPER_TEXT_VALUES,
    TINY,
    Recipe,
    describe_setting,
    format_toml,
)
from alexnet_cli.recipe_io import read_recipe

LINEAGE = {  # of each named recipe, who changed what of which other one: the last word first
    "krizhevsky": (("code", KRIZHEVSKY, PAPER),),
    "caffe": (("Caffe", CAFFE, PAPER),),
    "fast": (("fast", FAST, PAPER),),
    "tiny": (("tiny", TINY, FAST), ("fast", FAST, PAPER)),
}
LEGEND = """\
value    as TOML spells it, for a recipe file; --set KEY=VALUE changes one, without quotes
from     paper; code (the authors' own); Caffe; recipe fast or tiny; --set; option; a file, a run or other weights
section  of the paper, or code: what only the authors' code says
-        of no source: the paper has no such value"""


def origins(name_or_file: str) -> dict[str, str]:
    """Where each value of a recipe comes from, by key: the file that lists it, or whoever its base has it from."""
    base, values = read_recipe(name_or_file)
    return {key: _origin(key, base) for key in vars(base)} | dict.fromkeys(values, name_or_file)


def _origin(key: str, named: Recipe) -> str:
    for who, recipe, before in LINEAGE.get(named.name, ()):
        own = getattr(recipe, key) != getattr(before, key)
        if own or (who, key) == ("Caffe", "epochs"):  # 450,000 steps of 256 images are 90 epochs, too
            return who
    source = describe_setting(key)[1]
    return "paper" if source[0].isdigit() else source


def show_config(reporter: Reporter, recipe: Recipe, sources: Mapping[str, str]) -> None:
    """Every value, where it comes from, and what the paper's text has; what differs from that comes last."""
    paper = asdict(PAPER) | PAPER_TEXT_VALUES
    rows: list[dict[str, Any]] = []
    for key, value in asdict(recipe).items():
        about, section = describe_setting(key)
        row = {"value": value, "from": sources[key], "paper": paper[key], "section": section, "meaning": about}
        rows.append({"key": key, **row})
    reporter.result({"event": "config", "values": rows})
    other = [row for row in rows if row["value"] != row["paper"]]
    columns = ["value", "from", "section", "meaning"]
    _show(reporter, f"recipe {recipe.name}: as in the paper", columns, [row for row in rows if row not in other])
    if other:
        _show(reporter, f"recipe {recipe.name}: otherwise than in the paper", ["value", "paper", *columns[1:]], other)
    reporter.show(LEGEND)


def _show(reporter: Reporter, title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for column in columns:
        table.add_column(column)
    for row in rows:
        told = (format_toml(row[column]) if column in {"value", "paper"} else row[column] for column in columns)
        table.add_row(row["key"], *(Text(text) for text in told))
    reporter.show(table)
    reporter.show("")
