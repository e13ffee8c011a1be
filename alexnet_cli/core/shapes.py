"""What each layer's tensors measure (sections 3.2 and 3.5), from the recipe alone. No torch."""

from __future__ import annotations

from alexnet_cli.recipe import SIDE, Recipe

PER_TOWER = {"conv1": 48, "conv2": 128, "conv3": 192, "conv4": 192, "conv5": 128, "fc6": 2048, "fc7": 2048}
ONE_TOWER = PER_TOWER | {"conv5": 256, "fc6": 4096, "fc7": 4096}  # the one-GPU network of the footnote in 3.2
KERNELS = {"conv1": 11, "conv2": 5, "conv3": 3, "conv4": 3, "conv5": 3}

Shapes = dict[str, tuple[int, ...]]


def widths(recipe: Recipe) -> dict[str, int]:
    """Channels (units) of each hidden layer in one tower."""
    table = PER_TOWER if recipe.towers == 2 else ONE_TOWER
    return {layer: max(1, round(n * recipe.width)) for layer, n in table.items()}


def tensor_shapes(recipe: Recipe, classes: int) -> Shapes:
    """Name -> shape of every tensor of a model file, layer by layer, both towers side by side; `mean` comes last."""
    own = widths(recipe)
    both = {layer: recipe.towers * n for layer, n in own.items()}
    seen = {
        "conv1": 3,
        "conv2": own["conv1"],
        "conv3": both["conv2"],
        "conv4": own["conv3"],
        "conv5": own["conv4"],
        "fc6": both["conv5"] * 6 * 6,
        "fc7": both["fc6"],
        "fc8": both["fc7"],
    }
    shapes: Shapes = {}
    for layer, inputs in seen.items():
        units = both.get(layer, classes)
        shapes[f"{layer}.weight"] = (units, inputs, *[KERNELS[layer]] * 2) if layer in KERNELS else (units, inputs)
        shapes[f"{layer}.bias"] = (units,)
    return shapes | {"mean": (3, SIDE, SIDE)}
