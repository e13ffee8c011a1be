"""Every number of the paper, once: the frozen `Recipe` and the named recipes. Fields follow the paper's sections.

Sources: a bare section number is the 2012 paper; "code" is the authors' released cuda-convnet configuration of
net #145, which made the paper's ILSVRC-2012 numbers; "Caffe" is bvlc_alexnet; "-" is ours. recipe_io.py reads files.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from alexnet_cli.errors import RecipeError, suggest_name

SIDE = 256  # section 2: a prepared image is 256 x 256 pixels

Order = Literal["relu-norm-pool", "norm-pool-relu", "relu-pool-norm"]
CrossTalkLayer = Literal["conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]
MiddleLayer = Literal["conv3", "conv4"]  # neither normalized nor pooled

_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_EXAMPLE_EPOCHS = [25, 51, 79]


def setting(default: Any, source: str, about: str, low: float | None = None, high: float | None = None) -> Any:
    """Return a recipe field: its value in recipe `paper`, the source of that value, its meaning and its range."""
    return field(default=default, metadata={"source": source, "about": about, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to build and how to train it. The defaults are recipe `paper`."""

    name: str = setting("paper", "-", "name of the recipe")

    # 3 The architecture
    activation: Literal["relu", "tanh", "sigmoid"] = setting("relu", "3.1", "nonlinearity of layers 1 to 7")
    towers: int = setting(2, "3.2", "2, or 1 for the one-GPU network of the paper's footnote", 1, 2)
    cross_talk: tuple[CrossTalkLayer, ...] = setting(
        ("conv3", "fc6", "fc7"), "3.2", "layers whose filters see both towers; layer 8 always does"
    )
    left_out_layers: tuple[MiddleLayer, ...] = setting(
        (), "7", "layers that are left out, of conv3 and conv4; the next one then sees both towers instead"
    )
    width: float = setting(1.0, "-", "fraction of the paper's channels in every layer but the last", 1 / 64, 4)
    conv1_width: float = setting(0.0, "-", "fraction of the paper's channels in layer 1; 0 = width", 0, 4)
    input_size: Literal[224, 227] = setting(224, "3.5", "side of the crop in pixels (227: Caffe, unpadded)")
    edge_padding: bool = setting(True, "code", "zeros right of and below 224 pixels: maps of 55 in layer 1, else 54")
    lrn: Literal["across-maps", "within-map", "none"] = setting("across-maps", "3.3", "kind of response normalization")
    lrn_size: int = setting(5, "3.3", "n: adjacent maps in the sum (across) or side of the window (within)", 1, 255)
    lrn_k: float = setting(2.0, "3.3", "k: the constant in the denominator", 1e-6)
    lrn_alpha: float = setting(1e-4, "3.3", "alpha, for inputs in 0..255", 0)
    lrn_beta: float = setting(0.75, "3.3", "beta: the power of the denominator", 0)
    lrn_alpha_divided: bool = setting(False, "3.3", "divide alpha by the number of terms, as the code and Caffe do")
    lrn_joint: bool = setting(False, "3.5", "normalize across both towers' maps, as Caffe does")
    within_norm_2: bool = setting(False, "code", "one more normalization, within each map (5x5), in stage 2")
    stage1_order: Order = setting("relu-norm-pool", "3.5", "order of the operations after convolution 1")
    stage2_order: Order = setting("relu-norm-pool", "3.5", "order of the operations after convolution 2")
    pool_size: int = setting(3, "3.4", "side of the pooling window; 3 overlaps at stride 2, 2 does not", 2, 3)
    pool_ceil: Literal["all", "pool5"] = setting(
        "all", "code", "poolings whose last window may hang over the edge (pool5: the ONNX model zoo's maps)"
    )

    # 4 Reducing overfitting
    crops: bool = setting(True, "4.1", "random crops in training; otherwise the center")
    crop_group: int = setting(1, "4.1", "consecutive images that share a crop and a reflection", 1)
    flips: bool = setting(True, "4.1", "random horizontal reflections in training")
    color_shift: float = setting(0.1, "4.1", "std of the shift along each principal axis, relative to the axis", 0)
    color_shift_epochs: int = setting(0, "4.1", "epochs with the color shift; 0 = all", 0)
    color_shift_divide: float = setting(1.0, "4.1", "divide the shifted image by this", 0.1)
    dropout: float = setting(0.5, "4.2", "probability of dropping a unit of layers 6 and 7", 0, 0.99)
    dropout_inverted: bool = setting(False, "4.2", "rescale in training (as Caffe does) instead of at test time")

    # 2 The dataset
    mean: Literal["image", "image-at-crop", "rgb"] = setting(
        "image", "2", "what is subtracted: the mean image's center, its part under the crop, or the mean color"
    )
    input_divisor: float = setting(1.0, "2", "divide the mean-subtracted input by this", 1e-3, 1e6)

    # 5 Details of learning
    batch_size: int = setting(128, "5", "images per step, over all devices", 1)
    epochs: int = setting(90, "5", "passes over the training set, at most", 1)
    learning_rate: float = setting(0.01, "5", "initial learning rate; the highest one if one-cycle", 0)
    momentum: float = setting(0.9, "5", "fraction of the velocity kept at each step", 0, 0.9999)
    weight_decay: float = setting(0.0005, "5", "fraction of each weight subtracted per step, times the rate", 0)
    bias_rate: float = setting(1.0, "5", "learning rate of biases, as a multiple of the weights'", 0)
    bias_rate_drops: bool = setting(True, "5", "the learning rate of biases drops with the schedule")
    bias_decay: bool = setting(True, "5", "apply weight decay to biases too")
    schedule: Literal["plateau", "fixed", "one-cycle"] = setting(
        "plateau", "5", "divide the rate by ten when validation error stops falling or at fixed epochs, or one cycle"
    )
    plateau_epochs: int = setting(5, "5", "epochs without a new lowest validation error before a drop", 1)
    plateau_drops: int = setting(3, "5", "drops before training ends", 0)
    drop_epochs: tuple[int, ...] = setting((), "5", "epochs after which the fixed schedule divides by ten")
    conv1_slow_epoch: int = setting(0, "code", "layer 1 learns at a tenth after this epoch; 0 = never", 0)
    conv1_freeze_epoch: int = setting(0, "code", "layer 1 is frozen after this epoch; 0 = never", 0)
    frozen: Literal["none", "conv"] = setting(
        "none", "-", "layers that are not trained (conv: 1 to 5), for fine-tuning"
    )
    label_smoothing: float = setting(0.0, "-", "fraction of the target spread over all classes", 0, 0.99)
    init: Literal["gaussian", "scaled"] = setting(
        "gaussian", "5", "N(0, std), or N(0, 2 / inputs) with all biases 0 (He et al. 2015)"
    )
    conv1_scale: float = setting(1.0, "-", "factor on the initial weights of layer 1", 0)
    weight_std: float = setting(0.01, "5", "std of initial weights", 0)
    conv345_std: float = setting(0.03, "code", "std of initial weights in layers 3 to 5; the paper's text has 0.01", 0)
    fc67_std: float = setting(0.01, "5", "std of initial weights in layers 6 and 7", 0)
    bias: float = setting(1.0, "5", "initial biases of layers 2, 4, 5, 6, 7; the others start at 0")
    precision: Literal["fp32", "tf32", "bf16"] = setting("fp32", "code", "precision of the matrix products")
    seed: int = setting(0, "-", "random seed (initial weights, data order, augmentation, dropout)", 0, 2**31 - 1)

    def __post_init__(self) -> None:
        """Raise RecipeError for the first value that has the wrong type or is out of range."""
        for f in fields(self):
            object.__setattr__(self, f.name, check_value(f.name, getattr(self, f.name)))
        if self.lrn_size % 2 == 0:
            raise RecipeError(f"recipe: lrn_size = {self.lrn_size} is even", "use an odd number, such as 5")
        if list(self.drop_epochs) != sorted(set(self.drop_epochs)):
            raise RecipeError(f"recipe: drop_epochs = {list(self.drop_epochs)} must rise", "such as [25, 51, 79]")

    @property
    def dropout_factor(self) -> float:
        """What multiplies layers 6 and 7 at test time (section 4.2): 1 - dropout, or 1 if training rescales instead."""
        return 1.0 if self.dropout_inverted else 1 - self.dropout

    def to_toml(self) -> str:
        """Return the recipe as a TOML document that `recipe_io.load_recipe` reads back to an equal recipe."""
        return tomli_w.dumps(asdict(self))


FIELDS = {f.name: f for f in fields(Recipe)}
FIELD_TYPES = get_type_hints(Recipe)


def check_value(key: str, value: Any, typed: bool = False) -> Any:
    """Return the value of a recipe key, converted to its type (an int to a float, a list to a tuple).

    `typed` says that the value came from --set, so that the hint's example does too.

    Raises:
        RecipeError: the value has the wrong type or is out of range.
    """
    kind, default, meta = FIELD_TYPES[key], FIELDS[key].default, FIELDS[key].metadata

    def format_example(example: Any) -> str:
        return f"such as {format_set_option(key, example) if typed else f'{key} = {format_toml(example)}'}"

    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            allowed = ", ".join(str(v) for v in get_args(kind))
            raise RecipeError(f"recipe: {key} = {value!r} is not one of its values", f"use one of: {allowed}")
        return value
    if get_origin(kind) is tuple and (layers := get_args(get_args(kind)[0])):
        return _check_layers(key, value, layers, format_example)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(type(v) is int and v > 0 for v in value):
            raise RecipeError(f"recipe: {key} = {value!r} is not a list of epochs", format_example(_EXAMPLE_EPOCHS))
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        example = format_example(not default if kind is bool else default)
        raise RecipeError(f"recipe: {key} = {value!r} should be {_KIND_NAMES[kind]}", f"{meta['about']}; {example}")
    if kind is str and not re.fullmatch(r"[\w.-]*\w[\w.-]*", value):
        raise RecipeError(f"recipe: {key} = {value!r} is not a plain name", "use letters, digits, '-' and '_'")
    _check_range(
        key, value, meta["low"], sys.float_info.max if kind is float and meta["high"] is None else meta["high"]
    )
    return value


def _check_layers(key: str, value: Any, layers: Sequence[str], format_example: Callable[[Any], str]) -> tuple[str, ...]:
    """Return a list of layers as a tuple. Raises RecipeError unless each is one of `layers`, once, in their order."""
    if not isinstance(value, list | tuple) or not all(isinstance(layer, str) for layer in value):
        raise RecipeError(
            f"recipe: {key} = {value!r} is not a list of layers", format_example(FIELDS[key].default or layers[:1])
        )
    for layer in value:
        if layer not in layers:
            hint = f"{suggest_name(layer, layers)}layers: {', '.join(layers)}"
            raise RecipeError(f"recipe: {key} has {layer!r}, which is not one of its layers", hint)
    if list(value) != (ordered := [layer for layer in layers if layer in value]):
        what = f"recipe: {key} = {list(value)} is not in the network's order"
        raise RecipeError(what, f"write {format_example(ordered).removeprefix('such as ')}")
    return tuple(value)


def _check_range(key: str, value: Any, low: float | None, high: float | None) -> None:
    if (low is None or value >= low) and (high is None or value <= high):  # False for NaN
        return
    limits = [] if low is None else [f"at least {low:g}"]
    if high is not None:
        limits.append("finite" if high == sys.float_info.max else f"at most {high:g}")
    raise RecipeError(f"recipe: {key} = {value!r} is out of range", f"it must be {' and '.join(limits)}")


def format_toml(value: Any) -> str:
    """Return a value as TOML writes it, on one line: `true`, `"relu"`, `[25, 51, 79]`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_toml, value))}]"
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()


def format_set_option(key: str, value: Any) -> str:
    """Return the words that set a key on the command line: `--set crops=false`."""
    return f"--set {shlex.quote(f'{key}={value if isinstance(value, str) else format_toml(value)}')}"


PAPER = Recipe()

KRIZHEVSKY = replace(
    PAPER,
    name="krizhevsky",
    stage1_order="norm-pool-relu",
    within_norm_2=True,
    lrn_alpha_divided=True,
    crop_group=32,
    color_shift_epochs=67,
    color_shift_divide=1.1,
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
    color_shift=0.0,
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

PAPER_TEXT_VALUES = {"conv345_std": 0.01}  # the paper's text, where recipe `paper` differs from it

RECIPES: Mapping[str, Recipe] = {r.name: r for r in (PAPER, KRIZHEVSKY, CAFFE, FAST, TINY)}


def compare_recipes(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two recipes differ, each with both values."""
    return {key: (ours, theirs) for key in FIELDS if (ours := getattr(recipe, key)) != (theirs := getattr(other, key))}


def find_closest_recipe(recipe: Recipe) -> Recipe:
    """Return the named recipe of the same name, or else the one that shares most values."""
    return RECIPES.get(recipe.name) or min(RECIPES.values(), key=lambda named: len(compare_recipes(recipe, named)))


def describe_setting(key: str) -> tuple[str, str]:
    """Return what a key means, with its values if they are few, and the source of its value in recipe `paper`."""
    meta, kind = FIELDS[key].metadata, FIELD_TYPES[key]
    about = str(meta["about"])
    if get_origin(kind) is Literal:
        about += f"; one of: {', '.join(str(value) for value in get_args(kind))}"
    return about, str(meta["source"])
