"""`alexnet train --print-config`: where each value comes from, what differs from the paper, values to be pasted."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alexnet_cli import recipe as recipes
from alexnet_cli import recipe_io
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import PAPER, TINY
from alexnet_plugins.train.setup import check_placement, find_sources
from commands import alexnet


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nbase = "tiny"\ndropout = 0.5\nepochs = 30\n', encoding="utf-8")
    return str(file)


def test_each_value_is_whose_it_is(recipe_file: str) -> None:
    found = find_sources(recipe_file)
    assert {key for key, source in found.items() if source == recipe_file} == {"name", "dropout", "epochs"}
    assert {key for key, source in found.items() if source == "tiny"} == {"width", "batch_size", "learning_rate"}
    assert (found["init"], found["precision"], found["momentum"]) == ("fast", "fast", "paper")
    assert (found["conv345_std"], found["edge_padding"], found["seed"]) == ("code", "code", "-")


def test_named_recipes_have_values_of_others() -> None:
    caffe, krizhevsky = find_sources("caffe"), find_sources("krizhevsky")
    assert (caffe["epochs"], caffe["bias"], caffe["crops"], caffe["precision"]) == ("Caffe", "Caffe", "paper", "code")
    assert (krizhevsky["crop_group"], krizhevsky["epochs"], krizhevsky["bias"]) == ("code", "code", "paper")
    assert set(find_sources("paper").values()) == {"paper", "code", "-"}


def test_what_differs_from_the_paper_comes_last_and_can_be_pasted(recipe_file: str) -> None:
    shown = alexnet("train", "--print-config", "--recipe", recipe_file, "--set", "crops=False", "--lr", "0.02").stdout
    same, _, other = shown.partition("recipe mine: different from the paper")
    rows = [re.match(r"(\w+) +(\S+)  ", line) for text in (same, other) for line in text.splitlines()[1:]]
    recipe = recipe_io.apply_changes(recipe_io.load_recipe(recipe_file), {"crops": False, "learning_rate": 0.02})
    lines = [f"{row[1]} = {row[2]}" for row in rows if row and row[1] in asdict(recipe)]
    assert recipe_io.recipe_from_dict(tomllib.loads("\n".join(lines))) == recipe
    listed = {row[1] for row in rows if row and f"\n{row[1]} " in other}
    different = set(recipes.compare_recipes(recipe, PAPER)) | {"conv345_std"}
    assert different == listed & set(asdict(recipe))
    assert re.search(r"(?m)^crops +false +true +--set ", other)
    assert re.search(r"(?m)^learning_rate +0\.02 +0\.01 +option ", other)
    assert re.search(r"(?m)^- +no source", shown)


def test_json_has_sources_and_plain_values(recipe_file: str) -> None:
    (told,) = alexnet("train", "--print-config", "--recipe", recipe_file, "--json").stdout.splitlines()
    rows = {row["key"]: row for row in json.loads(told)["values"]}
    assert list(rows) == list(asdict(TINY))
    assert (rows["crops"]["value"], rows["crops"]["from"], rows["crops"]["section"]) == (True, "paper", "4.1")
    assert (rows["width"]["value"], rows["width"]["from"], rows["width"]["paper"]) == (0.25, "tiny", 1.0)
    assert (rows["dropout"]["from"], rows["conv345_std"]["paper"]) == (recipe_file, 0.01)


def test_layers_6_and_7_of_separate_towers_are_not_split_over_three_devices() -> None:
    three: Any = SimpleNamespace(ranks=SimpleNamespace(size=3, replicas=1, columns=object()))
    check_placement(three, replace(PAPER, width=0.75), 128, None, False)
    with pytest.raises(UsageError, match="3 devices cannot hold whole towers") as caught:
        check_placement(three, replace(PAPER, width=0.75, cross_talk=("conv3", "fc6")), 128, None, False)
    assert "an even number of devices" in caught.value.hint
