"""Every number of the paper, once: the frozen `Recipe` and the named recipes. Fields follow the paper's sections.

Sources: a bare section number is the 2012 paper; "code" is the authors' released cuda-convnet configuration of
net #145, which made the paper's ILSVRC-2012 numbers; "Caffe" is bvlc_alexnet.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from alexnet_cli.errors import RecipeError
from alexnet_cli.knob import checked, knob

LARGEST = 2**14  # bytes of a recipe file: one of 32 kilobytes can take gigabytes to parse (a key of 16,000 parts)
SIDE = 256  # section 2: pictures are 256 x 256 pixels

Order = Literal["relu-norm-pool", "norm-pool-relu", "relu-pool-norm"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to build and how to train it. The defaults are recipe `paper`."""

    name: str = knob("paper", "-", "name of the recipe")

    # 3 The architecture
    activation: Literal["relu", "tanh", "sigmoid"] = knob("relu", "3.1", "nonlinearity of layers 1 to 7")
    towers: int = knob(2, "3.2", "2, or 1 for the one-GPU network of the paper's footnote", 1, 2)
    width: float = knob(1.0, "-", "share of the paper's channels in every layer but the last", 1 / 64, 4)
    input_size: Literal[224, 227] = knob(224, "3.5", "side of the crop in pixels (227: Caffe, unpadded)")
    edge_padding: bool = knob(True, "code", "zeros right of and below 224 pixels: maps of 55 in layer 1, else 54")
    lrn: Literal["across-maps", "within-map", "none"] = knob("across-maps", "3.3", "response normalisation")
    lrn_size: int = knob(5, "3.3", "n: adjacent maps in the sum (across) or side of the window (within)", 1, 255)
    lrn_k: float = knob(2.0, "3.3", "k: the constant in the denominator", 1e-6)
    lrn_alpha: float = knob(1e-4, "3.3", "alpha, for inputs in 0..255", 0)
    lrn_beta: float = knob(0.75, "3.3", "beta: the power of the denominator", 0)
    lrn_alpha_divided: bool = knob(False, "3.3", "divide alpha by the number of terms, as the code and Caffe do")
    lrn_joint: bool = knob(False, "3.5", "normalise across both towers' maps, as Caffe does")
    within_norm_2: bool = knob(False, "code", "one more normalisation, within each map (5x5), in stage 2")
    stage1_order: Order = knob("relu-norm-pool", "3.5", "what follows convolution 1")
    stage2_order: Order = knob("relu-norm-pool", "3.5", "what follows convolution 2")
    pool_size: int = knob(3, "3.4", "side of the pooling window; 3 overlaps at stride 2, 2 does not", 2, 3)

    # 4 Reducing overfitting
    crops: bool = knob(True, "4.1", "random crops in training; otherwise the centre")
    crop_group: int = knob(1, "4.1", "images, one after the other, that share a crop and a reflection", 1)
    flips: bool = knob(True, "4.1", "random horizontal reflections in training")
    colour_shift: float = knob(0.1, "4.1", "deviation of the shift along each principal axis, in its own", 0)
    colour_shift_epochs: int = knob(0, "4.1", "epochs with the colour shift; 0 = all", 0)
    colour_shift_divide: float = knob(1.0, "4.1", "divide the shifted image by this", 0.1)
    dropout: float = knob(0.5, "4.2", "probability to drop a unit of layers 6 and 7", 0, 0.99)
    dropout_inverted: bool = knob(False, "4.2", "rescale in training (as Caffe does) instead of at test time")

    # 2 The dataset
    mean: Literal["image", "image-at-crop", "rgb"] = knob(
        "image", "2", "what is subtracted: the mean image's centre, its part under the crop, or the mean colour"
    )
    input_divisor: float = knob(1.0, "2", "divide the mean-subtracted input by this", 1e-3, 1e6)

    # 5 Details of learning
    batch_size: int = knob(128, "5", "images per step, over all devices", 1)
    epochs: int = knob(90, "5", "passes over the training set, at most", 1)
    learning_rate: float = knob(0.01, "5", "initial rate; the highest one if one-cycle", 0)
    momentum: float = knob(0.9, "5", "share of the velocity kept at each step", 0, 0.9999)
    weight_decay: float = knob(0.0005, "5", "share of each weight taken off, times the rate", 0)
    bias_rate: float = knob(1.0, "5", "rate of the biases, as a multiple of the weights'", 0)
    bias_rate_drops: bool = knob(True, "5", "biases follow the drops of the rate")
    bias_decay: bool = knob(True, "5", "weight decay on biases too")
    schedule: Literal["plateau", "fixed", "one-cycle"] = knob(
        "plateau", "5", "divide by ten when validation error stops falling, or at fixed epochs, or one cycle"
    )
    plateau_epochs: int = knob(5, "5", "epochs without a new lowest validation error before a drop", 1)
    plateau_drops: int = knob(3, "5", "drops before training ends", 0)
    drop_epochs: tuple[int, ...] = knob((), "5", "epochs after which the fixed schedule divides by ten")
    conv1_slow_epoch: int = knob(0, "code", "layer 1 learns at a tenth after this epoch; 0 = never", 0)
    conv1_freeze_epoch: int = knob(0, "code", "layer 1 is frozen after this epoch; 0 = never", 0)
    frozen: Literal["none", "conv"] = knob("none", "-", "layers that keep their values (conv: 1 to 5), for fine-tuning")
    label_smoothing: float = knob(0.0, "-", "share of the target spread over all classes", 0, 0.99)
    init: Literal["gaussian", "scaled"] = knob(
        "gaussian", "5", "N(0, std), or N(0, 2 / inputs) with all biases 0 (He et al. 2015)"
    )
    conv1_scale: float = knob(1.0, "-", "factor on the initial weights of layer 1", 0)
    weight_std: float = knob(0.01, "5", "deviation of the initial weights", 0)
    conv345_std: float = knob(0.03, "code", "the same in layers 3 to 5; the paper's text has 0.01", 0)
    fc67_std: float = knob(0.01, "5", "the same in layers 6 and 7", 0)
    bias: float = knob(1.0, "5", "initial biases of layers 2, 4, 5, 6, 7; the others start at 0")
    precision: Literal["fp32", "tf32", "bf16"] = knob("fp32", "code", "arithmetic of the matrix products")
    seed: int = knob(0, "-", "of initial values, order, crops, shifts and dropout", 0, 2**31 - 1)

    def __post_init__(self) -> None:
        """Raise RecipeError for the first value that is out of range or of the wrong kind."""
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name)))
        if self.lrn_size % 2 == 0:
            raise RecipeError(f"recipe: lrn_size = {self.lrn_size} is even", "use an odd number, such as 5")
        if list(self.drop_epochs) != sorted(set(self.drop_epochs)):
            raise RecipeError(f"recipe: drop_epochs = {list(self.drop_epochs)} must rise", "such as [25, 51, 79]")

    def to_toml(self) -> str:
        """The recipe as a TOML document that `load` reads back to an equal recipe."""
        return tomli_w.dumps(asdict(self) | {"drop_epochs": list(self.drop_epochs)})


_TYPES = get_type_hints(Recipe)
_FIELDS = {f.name: f for f in fields(Recipe)}


def _checked(key: str, value: Any, typed: bool = False) -> Any:
    return checked(key, _TYPES[key], _FIELDS[key].default, _FIELDS[key].metadata, value, typed)


PAPER = Recipe()

KRIZHEVSKY = replace(
    PAPER,
    name="krizhevsky",
    stage1_order="norm-pool-relu",
    within_norm_2=True,
    lrn_alpha_divided=True,
    crop_group=32,
    colour_shift_epochs=67,
    colour_shift_divide=1.1,
    bias_rate=2.0,
    bias_rate_drops=False,
    bias_decay=False,
    conv1_slow_epoch=67,
    conv1_freeze_epoch=72,
    schedule="fixed",
    drop_epochs=(25, 51, 79),
    epochs=91,
)

CAFFE = replace(
    PAPER,
    name="caffe",
    input_size=227,
    lrn_k=1.0,
    lrn_alpha_divided=True,
    lrn_joint=True,
    colour_shift=0.0,
    dropout_inverted=True,
    mean="image-at-crop",
    batch_size=256,
    bias_rate=2.0,
    bias_decay=False,
    schedule="fixed",
    drop_epochs=(20, 40, 60, 80),  # every 100,000 of 450,000 steps of 256 images
    conv345_std=0.01,
    fc67_std=0.005,
    bias=0.1,
)

FAST = replace(
    PAPER,
    name="fast",
    dropout_inverted=True,
    input_divisor=64.0,  # about the deviation of a pixel: scaled initial values expect unit inputs
    schedule="one-cycle",
    epochs=30,
    learning_rate=0.02,
    bias_decay=False,
    label_smoothing=0.1,
    init="scaled",
    conv1_scale=0.1,  # so that the kernels show what was learned, not the noise of the start; it learns no worse
    bias=0.0,
    precision="bf16",
)

TINY = replace(FAST, name="tiny", width=0.25, dropout=0.2, batch_size=64, epochs=15, learning_rate=0.03)

LETTER = {"conv345_std": 0.01}  # what the paper's text has, where recipe `paper` differs

RECIPES: Mapping[str, Recipe] = {r.name: r for r in (PAPER, KRIZHEVSKY, CAFFE, FAST, TINY)}


def load(name_or_file: str) -> Recipe:
    """A named recipe, or one from a TOML file: keys it leaves out are those of its `base`, its `name`, or `paper`."""
    try:
        return changed(*opened(name_or_file))
    except RecipeError as error:
        what = error.what.removeprefix("recipe: ")
        raise RecipeError(error.what if what == error.what else f"{name_or_file}: {what}", error.hint) from error


def opened(name_or_file: str) -> tuple[Recipe, dict[str, Any]]:
    """The named recipe to start from, and what a file changes of it."""
    if name_or_file in RECIPES:
        return RECIPES[name_or_file], {}
    path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(f"no recipe and no file is called {name_or_file}", _named_recipes(name_or_file))
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        hint = "text stands in quotes, true and false in small letters; a run's recipe.toml is a good start"
        raise RecipeError(f"{path} is not TOML: {error}", hint) from error
    base = values.pop("base", None)
    if base is None:
        return _base_of(values), values
    if not isinstance(base, str) or base not in RECIPES:
        raise RecipeError(f"{path}: base = {base!r} is no named recipe", _named_recipes(str(base)))
    if (name := values.get("name")) != base and name in list(RECIPES):  # it may be anything, a list too
        what = f"{path}: name = {name!r} is another recipe than base = {base!r}"
        raise RecipeError(what, "give it a name of its own")
    return RECIPES[base], values


def _named_recipes(typed: str) -> str:
    near = difflib.get_close_matches(typed, RECIPES, 1)
    return f"{f'did you mean {near[0]}? ' if near else ''}named recipes: {', '.join(RECIPES)}"


def _base_of(values: Mapping[str, Any]) -> Recipe:
    name = values.get("name")
    return RECIPES.get(name, PAPER) if isinstance(name, str) else PAPER


def from_values(values: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping, as the JSON of a model file holds it."""
    return changed(_base_of(values), values)


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some values replaced; unknown keys are refused with the nearest name."""
    for key in values:
        if key == "base":
            raise RecipeError("recipe: base is a key of recipe files alone", "--recipe says where to start")
        if key not in _TYPES:
            near = ["learning_rate"] if key == "lr" else difflib.get_close_matches(key, _TYPES, 1)
            guess = f"did you mean {near[0]}?" if near else "alexnet train --print-config lists all keys"
            raise RecipeError(f"recipe: no key is called {key}", guess)
    return replace(recipe, **values)


def differences(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, each with both values."""
    return {key: (value, there) for key in _FIELDS if (value := getattr(recipe, key)) != (there := getattr(other, key))}


def closest(recipe: Recipe) -> Recipe:
    """The named recipe that this is a variant of: that of its name, or else the one with most of its values."""
    return RECIPES.get(recipe.name) or min(RECIPES.values(), key=lambda named: len(differences(recipe, named)))


def parsed(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as typed after --set, each value read as TOML; a bare word is text, and True is true."""
    values: dict[str, Any] = {}
    for word in settings:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not text:
            raise RecipeError(f"--set {word} is not key=value", "such as --set dropout=0")
        plain = text.lower() if _TYPES.get(key) is bool else text
        try:
            values[key] = tomllib.loads(f"value = {plain}")["value"]
        except (ValueError, RecursionError):
            values[key] = text
        if _TYPES.get(key) is str and not isinstance(values[key], str):
            values[key] = text  # a name may look like a number
        if key in _TYPES:
            values[key] = _checked(key, values[key], typed=True)
    return values


def describe(key: str) -> tuple[str, str]:
    """What a key means, with its values if it has few, and where the value of recipe `paper` comes from."""
    meta, kind = _FIELDS[key].metadata, _TYPES[key]
    about = str(meta["about"])
    if get_origin(kind) is Literal:
        about += f"; one of: {', '.join(str(value) for value in get_args(kind))}"
    return about, str(meta["source"])
