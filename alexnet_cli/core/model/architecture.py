"""The geometry of the network (sections 3.2 to 3.5): one table, made from the recipe. No torch.

Everything that needs a kernel, a padding or the side of a map reads it here: the network, the ONNX graph, receptive
fields, importers, parameter counts and the report. For the paper's recipe and 1000 classes:

    layer   kernel        inputs of a filter   maps per tower   side   then
    conv1   11 x 11 / 4   3                    48               55     relu, norm, pool to 27
    conv2   5 x 5         own tower: 48        128              27     relu, norm, pool to 13
    conv3   3 x 3         both towers: 256     192              13     relu
    conv4   3 x 3         own tower: 192       192              13     relu
    conv5   3 x 3         own tower: 192       128              13     relu, pool to 6
    fc6     -             both towers: 9216    2048             -      relu, dropout
    fc7     -             both towers: 4096    2048             -      relu, dropout
    fc8     -             both towers: 4096    1000 classes, a sum over towers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from alexnet_cli.errors import UsageError, suggest_name
from alexnet_cli.recipe import SIDE, Recipe

CONV_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
LAYERS = (*CONV_LAYERS, "fc6", "fc7", "fc8")
PARAMETERS = tuple(f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias"))

PER_TOWER = {"conv1": 48, "conv2": 128, "conv3": 192, "conv4": 192, "conv5": 128, "fc6": 2048, "fc7": 2048}
ONE_TOWER = PER_TOWER | {"conv5": 256, "fc6": 4096, "fc7": 4096}  # the one-GPU network of the footnote in 3.2
KERNELS = {"conv1": 11, "conv2": 5, "conv3": 3, "conv4": 3, "conv5": 3}
STRIDES = {"conv1": 4, "conv2": 1, "conv3": 1, "conv4": 1, "conv5": 1}
POOL_STRIDE = 2
SHAPE_KEYS = ("towers", "width", "conv1_width", "cross_talk", "left_out_layers")  # recipe keys that change the weights
EDGE_PADDING = 3  # zero columns right, zero rows below 224 pixels: the last of 55 windows reaches pixel 226

Step = Literal["activation", "norm", "within-norm", "pool", "dropout"]
"""What can follow a layer: the nonlinearity, response normalization, net #145's extra one, pooling, dropout."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One of the layers with weights. Sides are in pixels, of square kernels and maps; 1 in layers 6 to 8."""

    name: str
    towers: int
    """How many towers have maps of this layer; 1 for fc8, whose logits are a sum over towers."""
    maps: int
    """Feature maps (units in layers 6 and 7) in each tower; the number of classes in fc8."""
    inputs: int
    """Input channels (units) that one filter sees."""
    sees_both: bool
    """Whether a filter sees the maps of both towers."""
    kernel: int = 1
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    """Zeros left and above, right and below."""
    input_side: int = 1
    side: int = 1
    then: tuple[Step, ...] = ()
    pooled_side: int | None = None
    """Side of the maps after pooling, if they are pooled."""
    pool_ceil: bool = True
    """Whether the last pooling window may hang over the edge, as in the authors' code; otherwise it is left out."""

    @property
    def is_conv(self) -> bool:
        """Whether this is one of the convolutional layers."""
        return self.name in CONV_LAYERS

    @property
    def weights(self) -> int:
        """Number of weights, both towers together."""
        return self.biases * self.inputs * self.kernel**2

    @property
    def biases(self) -> int:
        """Number of biases: one per map (unit), both towers together."""
        return self.maps * self.towers

    @property
    def parameters(self) -> int:
        """Number of weights and biases, both towers together."""
        return self.weights + self.biases

    @property
    def multiplications(self) -> int:
        """Multiply-accumulates for one image, both towers together."""
        return self.weights * self.side**2


class NormSpec(NamedTuple):
    """Response normalization with its numbers: x / (k + alpha * sum of squares) ** beta."""

    kind: Literal["across-maps", "within-map", "none"]
    size: int
    """Adjacent maps in the sum, or the side of its window within a map."""
    k: float
    alpha: float
    """Factor of one square; the input was divided."""
    beta: float
    groups: int
    """Groups of maps that are normalized across by themselves: the towers, or 1 for all maps."""


def norm_spec(recipe: Recipe, step: Step) -> NormSpec:
    """The numbers of response normalization, step "norm", or of net #145's extra one, "within-norm"."""
    if step == "within-norm":  # "cnorm2" in the authors' code
        recipe = replace(
            recipe, lrn="within-map", lrn_size=5, lrn_k=1.0, lrn_alpha=1e-3, lrn_beta=0.75, lrn_alpha_divided=True
        )
    # Alpha is meant for inputs in 0..255: activations shrink with the input, their squares twice.
    alpha = recipe.lrn_alpha * recipe.input_divisor**2
    if recipe.lrn_alpha_divided:
        alpha /= recipe.lrn_size if recipe.lrn == "across-maps" else recipe.lrn_size**2
    groups = 1 if recipe.lrn_joint else recipe.towers
    return NormSpec(recipe.lrn, recipe.lrn_size, recipe.lrn_k, alpha, recipe.lrn_beta, groups)


def layer_widths(recipe: Recipe) -> dict[str, int]:
    """Maps (units) of each hidden layer in one tower."""
    table = PER_TOWER if recipe.towers == 2 else ONE_TOWER
    widths = dict.fromkeys(table, recipe.width) | {"conv1": recipe.conv1_width or recipe.width}
    return {layer: max(1, round(maps * widths[layer])) for layer, maps in table.items()}


def list_layers(recipe: Recipe) -> list[str]:
    """The names of the layers with weights, in order: all eight but those that the recipe leaves out."""
    return [layer for layer in LAYERS if layer not in recipe.left_out_layers]


def layer_specs(recipe: Recipe, classes: int) -> tuple[LayerSpec, ...]:
    """The layers of the network of a recipe, in order."""
    widths, specs = layer_widths(recipe), list[LayerSpec]()
    channels, side = 3, int(recipe.input_size)  # input of the next layer: channels per tower, side of the maps
    meet = False  # whether the towers meet before the next layer
    for layer in LAYERS:
        meet = meet or layer in (*recipe.cross_talk, "fc8")
        if layer in recipe.left_out_layers:
            continue
        sees_both, meet = recipe.towers > 1 and meet, False
        inputs = channels * (recipe.towers if sees_both else 1)
        then = _following_steps(recipe, layer)
        if layer in CONV_LAYERS:
            before, after = _padding(recipe, layer)
            output_side = (side + before + after - KERNELS[layer]) // STRIDES[layer] + 1
            pool_ceil = recipe.pool_ceil == "all" or layer == "conv5"
            moves = output_side - recipe.pool_size + (POOL_STRIDE - 1 if pool_ceil else 0)
            pooled = moves // POOL_STRIDE + 1 if "pool" in then else None
            spec = LayerSpec(
                name=layer, towers=recipe.towers, maps=widths[layer], inputs=inputs, sees_both=sees_both,
                kernel=KERNELS[layer], stride=STRIDES[layer], padding=(before, after), input_side=side,
                side=output_side, then=then, pooled_side=pooled, pool_ceil=pool_ceil,
            )  # fmt: skip
            channels, side = spec.maps, spec.pooled_side or spec.side
        else:
            towers, maps = (1, classes) if layer == "fc8" else (recipe.towers, widths[layer])
            inputs *= side**2  # flattened maps in layer 6
            spec = LayerSpec(name=layer, towers=towers, maps=maps, inputs=inputs, sees_both=sees_both, then=then)
            channels, side = maps, 1
        specs.append(spec)
    return tuple(specs)


def _padding(recipe: Recipe, layer: str) -> tuple[int, int]:
    """Zeros before and after the input maps of a convolution."""
    if layer == "conv1":
        return 0, EDGE_PADDING if recipe.input_size == 224 and recipe.edge_padding else 0
    # 2 x 2 pooling leaves larger maps: layers 2 and 5 pad one less, so that layer 6 sees 6 x 6 either way.
    less = 1 if recipe.pool_size == 2 and layer in ("conv2", "conv5") else 0
    return (KERNELS[layer] // 2 - less,) * 2


def _following_steps(recipe: Recipe, layer: str) -> tuple[Step, ...]:
    if layer == "fc8":
        return ()
    if layer in ("fc6", "fc7"):
        return ("activation", "dropout") if recipe.dropout else ("activation",)
    orders = {"conv1": recipe.stage1_order, "conv2": recipe.stage2_order, "conv5": "relu-pool"}
    steps: list[Step] = []
    for word in orders.get(layer, "relu").split("-"):
        if word == "relu":
            steps.append("activation")
        elif word == "pool":
            steps.append("pool")
        else:
            steps += ["norm"] if recipe.lrn != "none" else []
            steps += ["within-norm"] if layer == "conv2" and recipe.within_norm_2 else []
    return tuple(steps)


def step_name(recipe: Recipe, layer: str, step: Step) -> str:
    """The name of what follows a layer: "relu1", "norm1", "within_norm2", "pool1", "drop6"."""
    names = {"activation": recipe.activation, "within-norm": "within_norm", "dropout": "drop"}
    return f"{names.get(step, step)}{layer[-1]}"


def layer_names(recipe: Recipe) -> tuple[str, ...]:
    """Every name whose output can be read, in the network's order: conv1, relu1, norm1, pool1, ... drop7, fc8."""
    specs = layer_specs(recipe, 1)
    return tuple(
        name for spec in specs for name in (spec.name, *(step_name(recipe, spec.name, step) for step in spec.then))
    )


def last_step_name(recipe: Recipe, layer: str) -> str:
    """The name of a layer as the next one sees it, after all that follows: "pool1", "drop7"."""
    [spec] = [spec for spec in layer_specs(recipe, 1) if spec.name == layer]
    return step_name(recipe, layer, spec.then[-1]) if spec.then else layer


def check_layers(recipe: Recipe, layers: Sequence[str], tower: int | None = None) -> None:
    """Raise UsageError if the network has no such layer, or a layer has no such tower. Towers count from 1."""
    names = layer_names(recipe)
    for layer in layers:
        if layer not in names:
            hint = f"{suggest_name(layer, names)}layers: {' '.join(names)}"
            raise UsageError(f"the network has no layer {layer!r}", hint)
    if tower is not None and tower not in range(1, recipe.towers + 1):
        what = f"the network has no tower {tower!r}"
        raise UsageError(what, f"towers: {' '.join(str(number + 1) for number in range(recipe.towers))}")
    if tower is not None and "fc8" in layers:
        raise UsageError("fc8 has no towers: its logits are a sum over them", "read fc8 without a tower")


def describe_kernel(spec: LayerSpec) -> str:
    """Kernel and stride of a convolution, in words: "11×11 / 4"; empty for layers 6 to 8."""
    stride = f" / {spec.stride}" if spec.stride > 1 else ""
    return f"{spec.kernel}×{spec.kernel}{stride}" if spec.is_conv else ""


def describe_step(recipe: Recipe, step: Step) -> str:
    """What follows a layer, in words: "normalization across 5 maps"."""
    if step == "activation":
        return {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid"}[recipe.activation]
    if step == "pool":
        return f"pooling {recipe.pool_size}×{recipe.pool_size} / {POOL_STRIDE}"
    if step == "dropout":
        return f"dropout {recipe.dropout:g}"
    norm = norm_spec(recipe, step)
    if norm.kind == "within-map":
        return f"normalization within {norm.size}×{norm.size}"
    return f"normalization across {norm.size} maps{' of both towers' if norm.groups < recipe.towers else ''}"


def tensor_shapes(recipe: Recipe, classes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model file, layer by layer, both towers side by side; `mean` comes last."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in layer_specs(recipe, classes):
        kernel = (spec.kernel, spec.kernel) if spec.is_conv else ()
        shapes[f"{spec.name}.weight"] = (spec.biases, spec.inputs, *kernel)
        shapes[f"{spec.name}.bias"] = (spec.biases,)
    return shapes | {"mean": (3, SIDE, SIDE)}


class Window(NamedTuple):
    """A sliding window along one axis: its `size` and `stride`, the padding `before`, the `inputs` it runs over."""

    size: int
    stride: int
    before: int
    inputs: int


def sliding_windows(recipe: Recipe, layer: str) -> list[Window]:
    """The windows between the crop and a layer, its own included, in order. Layers 6 and 7 see all of pool 5."""
    windows, side = list[Window](), 0
    for spec in layer_specs(recipe, 1):
        if not spec.is_conv:
            return [*windows, Window(side, 1, 0, side)]
        windows.append(Window(spec.kernel, spec.stride, spec.padding[0], spec.input_side))
        side = spec.side
        if spec.name == layer:
            break
        for step in spec.then:
            if step == "pool":
                windows.append(Window(recipe.pool_size, POOL_STRIDE, 0, side))
                side = spec.pooled_side or side
            elif step in ("norm", "within-norm") and (norm := norm_spec(recipe, step)).kind == "within-map":
                windows.append(Window(norm.size, 1, norm.size // 2, side))
    return windows


def receptive_field(recipe: Recipe, layer: str, place: int, clipped: bool = True) -> tuple[int, int]:
    """The pixels that a place in a map sees, along one axis of the 256 x 256 image: the first, and one past the last.

    `place` is the row or column in the map of the center crop; 0 in layers 6 and 7, which have no maps. The field is
    clipped at padding and at the border of the crop, unless `clipped` is false.
    """
    first, end = place, place + 1
    for window in reversed(sliding_windows(recipe, layer)):
        first, end = first * window.stride - window.before, (end - 1) * window.stride - window.before + window.size
        if clipped:
            first, end = max(0, first), min(window.inputs, end)
    corner = (SIDE - recipe.input_size) // 2
    return corner + first, corner + end
