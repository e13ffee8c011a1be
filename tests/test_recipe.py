"""Recipes: the paper's numbers, the other recipes, TOML files, --set, and the errors with their hints."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from alexnet_cli import recipe as recipes
from alexnet_cli import recipe_io
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import RecipeError
from alexnet_cli.recipe import CAFFE, FAST, KRIZHEVSKY, PAPER, RECIPES, TINY, Recipe, format_toml


def changes(recipe: Recipe, base: Recipe = PAPER) -> dict[str, object]:
    """Return the values in which a recipe differs from its base."""
    old = asdict(base)
    return {key: value for key, value in asdict(recipe).items() if value != old[key] and key != "name"}


def test_paper_is_the_paper() -> None:
    """Sections 3 to 5, typed again from the text."""
    p = PAPER
    assert (p.lrn_k, p.lrn_size, p.lrn_alpha, p.lrn_beta) == (2, 5, 1e-4, 0.75)
    assert (p.pool_size, p.towers, p.activation, p.input_size) == (3, 2, "relu", 224)
    assert (p.batch_size, p.momentum, p.weight_decay, p.learning_rate) == (128, 0.9, 0.0005, 0.01)
    assert (p.dropout, p.epochs, p.plateau_drops, p.color_shift) == (0.5, 90, 3, 0.1)
    assert (p.weight_std, p.bias) == (0.01, 1)
    assert not p.lrn_alpha_divided
    assert not p.lrn_joint
    assert p.conv345_std == 0.03  # the one correction


def test_krizhevsky_is_net_145_as_run() -> None:
    assert changes(KRIZHEVSKY) == {
        "stage1_order": "norm-pool-relu", "within_norm_2": True, "lrn_alpha_divided": True,
        "crop_group": 32, "color_shift_epochs": 67, "color_shift_divide": 1.1,
        "bias_rate": 2.0, "bias_rate_drops": False, "bias_decay": False,
        "conv1_slow_epoch": 67, "conv1_freeze_epoch": 72,
        "schedule": "fixed", "drop_epochs": (25, 51, 79), "epochs": 91,
    }  # fmt: skip


def test_caffe_is_bvlc_alexnet() -> None:
    assert (CAFFE.input_size, CAFFE.lrn_k, CAFFE.lrn_joint, CAFFE.bias, CAFFE.fc67_std) == (227, 1, True, 0.1, 0.005)
    assert (CAFFE.batch_size, CAFFE.dropout_inverted, CAFFE.mean) == (256, True, "image-at-crop")


def test_tiny_is_fast_but_narrow_and_fast_is_the_same_network() -> None:
    assert set(changes(TINY, FAST)) <= {"width", "dropout", "batch_size", "epochs", "learning_rate"}
    assert TINY.width == 0.25
    same = ("towers", "width", "input_size", "lrn", "lrn_size", "lrn_k", "pool_size", "stage1_order", "activation")
    assert all(getattr(FAST, key) == getattr(PAPER, key) for key in same)


@pytest.mark.parametrize("name", list(RECIPES))
def test_toml_round_trip(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPES[name].to_toml(), encoding="utf-8")
    assert recipe_io.load_recipe(str(file)) == RECIPES[name] == recipe_io.load_recipe(name)
    changed = replace(RECIPES[name], cross_talk=("conv2", "fc6"), conv1_width=0.5)
    file.write_text(changed.to_toml(), encoding="utf-8")
    assert (
        recipe_io.load_recipe(str(file))
        == changed
        == recipe_io.recipe_from_dict(json.loads(json.dumps(asdict(changed))))
    )


def test_a_run_from_before_cross_talk_has_its_defaults() -> None:
    old = asdict(TINY)
    del old["cross_talk"], old["conv1_width"]
    assert recipe_io.recipe_from_dict(old) == TINY
    assert recipe_io.recipe_from_dict(old | {"name": "mine"}) == replace(TINY, name="mine")


def test_a_file_may_name_its_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "tiny"\ndropout = 0\n', encoding="utf-8")
    assert changes(recipe_io.load_recipe(str(file)), TINY) == {"dropout": 0.0}


def test_a_file_has_a_name_of_its_own_and_a_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nbase = "tiny"\ndropout = 0\n', encoding="utf-8")
    mine = recipe_io.load_recipe(str(file))
    assert mine.name == "mine"
    assert changes(mine, TINY) == {"dropout": 0.0}
    assert recipes.find_closest_recipe(mine) is TINY
    file.write_text(mine.to_toml(), encoding="utf-8")  # as a run keeps it: complete, without a base
    assert "base" not in file.read_text(encoding="utf-8").split()
    assert recipe_io.load_recipe(str(file)) == mine == recipe_io.recipe_from_dict(asdict(mine))


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ('base = "tinny"', "base = 'tinny' is no named recipe", "did you mean tiny? named recipes: paper, krizhevsky"),
        ("base = 3", "base = 3 is no named recipe", "named recipes: paper"),
        ('name = "fast"\nbase = "caffe"', "name = 'fast' is another recipe than base = 'caffe'", "a name of its own"),
        ('name = []\nbase = "caffe"', "name = []", "name"),
        ("crops = False", "is not TOML", "true and false in small letters"),
        ("colour_shift = 0.1", "no key is called colour_shift", "did you mean color_shift?"),
        ("colour_shift_epochs = 67", "no key is called colour_shift_epochs", "did you mean color_shift_epochs?"),
        ('crops = "no"', "crops = 'no' should be true or false", "such as crops = false"),
        ('towers = "two"', "towers = 'two' should be a whole number", "such as towers = 2"),
    ],
)
def test_invalid_files_are_refused_with_a_hint(text: str, what: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        recipe_io.load_recipe(str(file))
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_the_closest_recipe_has_the_same_name_or_most_values() -> None:
    assert recipes.find_closest_recipe(replace(TINY, name="paper")) is PAPER
    assert recipes.find_closest_recipe(replace(CAFFE, name="mine", epochs=3, seed=5)) is CAFFE


@pytest.mark.parametrize("name", list(RECIPES))
def test_values_are_formatted_as_toml(name: str) -> None:
    lines = [f"{key} = {format_toml(value)}" for key, value in asdict(RECIPES[name]).items()]
    assert recipe_io.recipe_from_dict(tomllib.loads("\n".join(lines))) == RECIPES[name]
    assert all("\n" not in line for line in lines)


def test_every_field_has_a_meaning_and_a_source() -> None:
    for field in fields(Recipe):
        about, source = recipes.describe_setting(field.name)
        assert about
        assert source in {"-", "2", "Caffe", "3.1", "3.2", "3.3", "3.4", "3.5", "4.1", "4.2", "5", "7", "code"}, (
            field.name
        )


def test_keys_with_few_values_list_them() -> None:
    assert recipes.describe_setting("frozen")[0].endswith("; one of: none, conv")
    assert recipes.describe_setting("input_size")[0].endswith("; one of: 224, 227")
    assert "one of" not in recipes.describe_setting("dropout")[0]


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [("dropout=0", "dropout", 0.0), ("lrn=none", "lrn", "none"), ("crops = false", "crops", False),
     ("crops=False", "crops", False), ("flips=TRUE", "flips", True), ("name=2012", "name", "2012"),
     ('lrn="none"', "lrn", "none"), ("drop_epochs=[3, 5]", "drop_epochs", (3, 5)),
     ('cross_talk=["conv2", "fc7"]', "cross_talk", ("conv2", "fc7")), ("cross_talk=[]", "cross_talk", ()),
     ('left_out_layers=["conv3"]', "left_out_layers", ("conv3",)),
     ("learning_rate=1e-3", "learning_rate", 0.001)],
)  # fmt: skip
def test_settings_of_the_command_line(setting: str, key: str, value: object) -> None:
    assert getattr(recipe_io.apply_changes(PAPER, recipe_io.parse_settings([setting])), key) == value


@pytest.mark.parametrize(
    ("setting", "what", "hint"),
    [
        ("droput=0", "no key is called droput", "did you mean dropout"),
        ("lr=0.1", "no key is called lr", "did you mean learning_rate"),
        ("input_divisor=1e300", "out of range", "at most 1e+06"),
        ("dropout", "is not key=value", "--set dropout=0"),
        ("dropout=2", "dropout = 2", "at most 0.99"),
        ("dropout=nan", "dropout = nan", "at least 0"),
        ("lrn=both", "lrn = 'both'", "across-maps, within-map, none"),
        ("epochs=1.5", "should be a whole number", "at most; such as --set epochs=90"),
        ("crops=1", "should be true or false", "otherwise the center; such as --set crops=false"),
        ("dropout=half", "dropout = 'half' should be a number", "such as --set dropout=0.5"),
        ("towers=two", "towers = 'two' should be a whole number", "footnote; such as --set towers=2"),
        ("base=tiny", "base is a key of recipe files", "--recipe"),
        ("lrn_size=4", "even", "odd"),
        ("drop_epochs=[5, 3]", "must rise", "[25, 51, 79]"),
        ("drop_epochs=5", "not a list", "such as --set 'drop_epochs=[25, 51, 79]'"),
        ("cross_talk=[conv3]", "'[conv3]' is not a list of layers", 'such as --set \'cross_talk=["conv3", "fc6",'),
        ("cross_talk=[3]", "cross_talk = [3] is not a list of layers", "--set 'cross_talk=["),
        ('cross_talk=["conf3"]', "cross_talk has 'conf3'", "did you mean conv3? layers: conv2, conv3"),
        ("left_out_layers=conv3", "is not a list of layers", "such as --set 'left_out_layers=[\"conv3\"]'"),
        ('left_out_layers=["conv5"]', "left_out_layers has 'conv5'", "layers: conv3, conv4"),
        ('cross_talk=["fc8"]', "cross_talk has 'fc8'", "layers: conv2, conv3, conv4, conv5, fc6, fc7"),
        ('cross_talk=["fc6", "conv3"]', "not in the network's order", '--set \'cross_talk=["conv3", "fc6"]\''),
        ('cross_talk=["fc6", "fc6"]', "not in the network's order", "write --set 'cross_talk=[\"fc6\"]'"),
        ("towers=3", "out of range", "at most 2"),
        ("learning_rate=inf", "out of range", "finite"),
        ("name=../up", "not a plain name", "letters"),
        ("seed=99999999999999999999", "out of range", "at most"),
    ],
)
def test_invalid_settings_are_refused_with_a_hint(setting: str, what: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_io.apply_changes(PAPER, recipe_io.parse_settings([setting]))
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_unknown_recipes_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_io.load_recipe("papr")
    assert "did you mean paper" in caught.value.hint
    file = tmp_path / "broken.toml"
    file.write_text("dropout = = 1", encoding="utf-8")
    with pytest.raises(RecipeError, match="is not TOML"):
        recipe_io.load_recipe(str(file))
    file.write_bytes("name = 'größer'".encode("cp1252"))
    with pytest.raises(RecipeError, match=r"broken\.toml is not UTF-8 text"):
        recipe_io.load_recipe(str(file))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_written_on_windows(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes("base = 'tiny'\r\ndropout = 0.25\r\n".encode(encoding))
    assert recipe_io.load_recipe(str(tmp_path / "mine.toml")) == replace(TINY, dropout=0.25)


def test_a_run_of_0_1_0_is_refused_with_the_new_key(tmp_path: Path) -> None:
    old = PAPER.to_toml().replace("color_shift", "colour_shift")
    (tmp_path / "recipe.toml").write_text(old, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.toml: no key is called colour_shift") as caught:
        Run(tmp_path).recipe  # noqa: B018 - reads the file
    assert caught.value.hint == "did you mean color_shift?"
