"""AlexNet as a plain PyTorch module, for research: each layer of the paper is a submodule with its own name.

Equal to `network.Network`, which trains, within rounding. That one is fast and fuses steps. Here nothing is fused or in
place, so that hooks, attribution methods, `torch.func`, `torch.fx` and `torch.export` work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli import recipe_io
from alexnet_cli.core.data import images as image_files
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.views import make_views, mean_correction
from alexnet_cli.core.files import read_file
from alexnet_cli.core.model.architecture import (
    EDGE_PADDING,
    LayerSpec,
    Step,
    check_layers,
    layer_names,
    layer_specs,
    norm_spec,
    step_name,
    tensor_shapes,
)
from alexnet_cli.core.model.layers import ResponseNorm, TowerLinear, make_activation, make_pooling
from alexnet_cli.core.model.model_file import Model, write_model
from alexnet_cli.core.model.network import evaluation_mode, initial_tensors
from alexnet_cli.core.model.response_norm import normalize_plain
from alexnet_cli.errors import DataError, UsageError
from alexnet_cli.recipe import SIDE, Recipe

CANNOT_SAVE = (
    "set net.classes to the names of new classes; remove hooks, pruning and parametrizations; save other networks with "
    "torch.save"
)

ImageLike = str | Path | IO[bytes] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any] | Tensor
"""A file, its content, or pixels: a PIL image, an array H x W (x 3 or 4), a tensor 3 x H x W.

Arrays and tensors are uint8 in 0..255, or floats in 0..1.
"""


class AlexNet(nn.Module):
    """The network of a recipe. Mean-subtracted float N x 3 x S x S, as `preprocess` returns it -> logits N x classes.

    The submodules have the names in `layers`: conv1 relu1 norm1 pool1 ... drop7 fc8, in the recipe's order; tanh1 where
    the activation is tanh. Both towers lie side by side in a layer's maps and units, tower 1 first. The keys of the
    `state_dict` are those of a model file.

    Attributes:
        recipe: every number of the network.
        towers: 2, or 1 for the one-tower network of the footnote in section 3.2.
        layers: names of the layers, in order.
        mean: the mean image that `preprocess` subtracts, 3 x 256 x 256, RGB, 0..255.
        info: where the loaded weights come from (data, epoch, step, metrics); {} for a new network.
    """

    mean: Tensor
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    conv4: nn.Conv2d
    conv5: nn.Conv2d
    fc6: nn.Linear
    fc7: nn.Linear
    fc8: nn.Linear

    def __init__(
        self,
        recipe: Recipe | str = "paper",
        classes: int | Sequence[ClassName | str] = 1000,
        mean: npt.NDArray[np.float32] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """A network with the initial values of its recipe and seed.

        Args:
            recipe: a recipe, the name of one, or a TOML file.
            classes: how many, or their names.
            mean: the mean image of the training set, `Dataset.mean_image()`; zeros by default.
            info: where the weights come from.

        Raises:
            UsageError: a class name is no text, there are none, or the mean image has another shape.
        """
        super().__init__()
        self.recipe = recipe if isinstance(recipe, Recipe) else recipe_io.load_recipe(str(recipe))
        self.classes = classes
        self.towers, self.layers, self.info = self.recipe.towers, layer_names(self.recipe), dict(info or {})
        device, image = torch.get_default_device(), np.zeros((3, SIDE, SIDE)) if mean is None else np.asarray(mean)
        if image.shape != (3, SIDE, SIDE):
            raise UsageError(f"the mean image is {_format_shape(image.shape)}", f"it is 3 x {SIDE} x {SIDE}")
        with torch.device("meta"):  # PyTorch's own initial values would be drawn for nothing
            for spec in layer_specs(self.recipe, len(self.classes)):
                self.add_module(spec.name, _make_layer(spec, self.towers))
                for step in spec.then:
                    self.add_module(step_name(self.recipe, spec.name, step), _make_step(step, spec, self.recipe))
            self.register_buffer("mean", torch.empty(image.shape))
        if device.type != "meta":
            tensors = dict(initial_tensors(self.recipe, len(self.classes)))
            self.load_state_dict(tensors | {"mean": torch.tensor(image, dtype=torch.float32)}, assign=True)
            self.to(device)

    @classmethod
    def from_model(cls, model: Model) -> AlexNet:
        """The network of a model file, in evaluation mode on the CPU."""
        with torch.device("meta"):
            network = cls(model.recipe, model.classes, info=model.info)
        tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in model.tensors.items()}
        network.load_state_dict(tensors, assign=True)
        return network.eval()

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """Names (and wnids) in the order of the logits. May be set: to names, or their number."""
        return self._classes

    @classes.setter
    def classes(self, classes: int | Sequence[ClassName | str]) -> None:
        if isinstance(classes, int | np.integer):
            classes = [f"class {i}" for i in range(classes)]
        if not classes or isinstance(classes, str) or not all(isinstance(name, ClassName | str) for name in classes):
            raise UsageError(f"{classes!r} are no classes", "give their number, or a list of names")
        self._classes = tuple(name if isinstance(name, ClassName) else ClassName(name) for name in classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits; softmax is left to the caller. One image without a batch dimension works too."""
        self._check_input(x)
        for layer in self.layers:
            x = self._run_layer(layer, x)
        return x

    def activations(self, x: Tensor, layers: str | Iterable[str], tower: int | None = None) -> dict[str, Tensor]:
        """The output of each of these layers, by name. Later layers are not computed. Differentiable.

        Args:
            x: as for the network itself.
            layers: a name of `self.layers`, or several: conv1 is before the nonlinearity, relu1 after it.
            tower: 1 or 2 for the maps and units of one tower; both by default.

        Raises:
            UsageError: there is no such layer or tower, or x has another shape or type.
        """
        wanted = [layers] if isinstance(layers, str) else list(layers)
        check_layers(self.recipe, wanted, tower)
        self._check_input(x)
        outputs: dict[str, Tensor] = {}
        for layer in self.layers:
            if outputs.keys() >= set(wanted):
                break
            x = self._run_layer(layer, x)
            if layer in wanted:
                outputs[layer] = x if tower is None else x.chunk(self.towers, _map_dimension(x))[tower - 1]
        return {layer: outputs[layer] for layer in wanted}

    @contextmanager
    def without_tower(self, tower: int) -> Iterator[None]:
        """Switch a tower off inside the block: its maps and units in layers 1 to 7 are zero after the nonlinearity."""
        check_layers(self.recipe, (), tower)

        def silence(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            dimension = _map_dimension(output)
            parts = list(output.chunk(self.towers, dimension))
            parts[tower - 1] = torch.zeros_like(parts[tower - 1])
            return torch.cat(parts, dimension)

        with ExitStack() as stack:
            for layer in self.layers:
                if layer.startswith(self.recipe.activation):
                    # First of all hooks, so that others see what the next layer sees.
                    stack.enter_context(self.get_submodule(layer).register_forward_hook(silence, prepend=True))
            yield

    def preprocess(self, images: ImageLike | Iterable[ImageLike], views: int = 1) -> Tensor:
        """Images to the network's input, exactly as `alexnet predict` does it, on the network's device.

        The shorter side becomes 256, the middle 256 x 256 is cut out, then the center of S x S pixels (S = 224, or 227
        in recipe `caffe`), and the mean image is subtracted.

        Args:
            images: one or many, see `ImageLike`; an array N x H x W x 3 or a tensor N x 3 x H x W is many.
            views: 1, the center; or 10, the corners and the center and their mirrors (section 4.1).

        Returns:
            N*views x 3 x S x S. For ten views: `net(x).softmax(1).unflatten(0, (-1, 10)).mean(1)`.

        Raises:
            DataError: an image cannot be read.
            UsageError: it is no image, or views is neither 1 nor 10.
        """
        if views not in (1, 10):
            raise UsageError(f"views is {views!r}", "use 1 (center) or 10 (the paper's ten views)")
        side = self.recipe.input_size
        many = [images] if _is_one_image(images) else images
        crops = [make_views(self._load_image(image), side, views) for image in many]  # type: ignore[union-attr, arg-type]
        if not crops:
            raise UsageError("there are no images to preprocess", "give at least one")
        x = torch.from_numpy(np.stack(crops)).to(self.mean.device).float()
        if views > 1 and self.recipe.mean == "image-at-crop":
            x += torch.from_numpy(mean_correction(self.mean.float().cpu().numpy(), side, views)).to(x.device)
        return self.subtract_mean(x.flatten(0, 1))

    def subtract_mean(self, crops: Tensor) -> Tensor:
        """Center crops N x 3 x S x S, RGB, 0..255, to the network's input: minus the mean image, divided as trained."""
        side = self.recipe.input_size
        low = (SIDE - side) // 2
        mean = self.mean.float()[:, low : low + side, low : low + side]
        if self.recipe.mean == "rgb":
            mean = self.mean.double().mean((1, 2), keepdim=True).float()
        return ((crops.float() - mean) / self.recipe.input_divisor).to(self.mean.dtype)

    def save(self, path: str | Path) -> None:
        """Write a model file, NAME.safetensors, which `alexnet.load` and every command with -w reads.

        Raises:
            UsageError: the path has another suffix or is in no folder, or the file could not say what this network
                computes, see `to_model`.
            StorageError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UsageError(f"{path} does not end in .safetensors", f"such as {path.stem or 'alexnet'}.safetensors")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist", "create it first")
        write_model(self.to_model(path), path)

    def to_model(self, path: Path = Path("network in memory")) -> Model:
        """The content of a model file, in float32. Not the origin in `info`: the weights may have changed since.

        Raises:
            UsageError: recipe, class names and weights do not make this network: a layer was replaced, has a hook that
                changes its output, or does not fit the class names.
        """
        tensors = {name: tensor.detach().float().cpu().numpy() for name, tensor in self.state_dict().items()}
        expected = tensor_shapes(self.recipe, len(self.classes))
        for name in expected.keys() | tensors.keys():
            shape = tensors[name].shape if name in tensors else None
            if shape != expected.get(name):
                what = f"{name} is {_format_shape(shape)}, but the recipe with {len(self.classes)} classes needs "
                raise UsageError(what + _format_shape(expected.get(name)), CANNOT_SAVE)
        info = {"exif_rotate": self._should_rotate}
        tensors = {name: np.ascontiguousarray(tensors[name]) for name in expected}
        model = Model(path, tensors, self.recipe, self.classes, info)
        if not self._equals(AlexNet.from_model(model)):
            raise UsageError("the network computes something else than its recipe and weights", CANNOT_SAVE)
        return model

    @torch.no_grad()
    def _equals(self, other: AlexNet) -> bool:
        """Whether two networks give the same logits for an image of noise, within rounding."""
        side = self.recipe.input_size
        noise = torch.randn(1, 3, side, side, generator=torch.Generator("cpu").manual_seed(2012), device="cpu")
        x = noise * 60 / self.recipe.input_divisor
        with evaluation_mode(self):
            logits = self(x.to(self.mean.device, self.mean.dtype)).float().cpu()
        expected = other(x)
        tolerance = (1e-3 if self.mean.dtype.itemsize > 2 else 0.1) * expected.abs().max()
        return bool((logits - expected).abs().max() <= tolerance)

    def extra_repr(self) -> str:
        """Recipe and classes, for `print(net)`."""
        return f"recipe {self.recipe.name}, {len(self.classes)} classes"

    def _run_layer(self, layer: str, x: Tensor) -> Tensor:
        if layer == "conv1" and self.recipe.input_size == 224 and self.recipe.edge_padding:
            x = functional.pad(x, (0, EDGE_PADDING, 0, EDGE_PADDING))
        elif layer == "fc6":
            x = x.flatten(-3)
        # A view, since tools that hook tensors (Captum) need two for the output of a layer and the input of the next.
        output: Tensor = getattr(self, layer)(x.view_as(x))
        return output

    def _check_input(self, x: Any) -> None:
        if isinstance(x, torch.fx.Proxy):  # a placeholder while torch.fx traces
            return
        side = self.recipe.input_size
        expected = f"the network takes float N x 3 x {side} x {side}, as net.preprocess returns it"
        if not isinstance(x, Tensor):
            raise UsageError(f"the input is a {type(x).__name__}: {expected}")
        if not x.is_floating_point():
            raise UsageError(f"the input is {str(x.dtype).removeprefix('torch.')}: {expected}")
        if x.ndim not in (3, 4) or x.shape[-3:] != (3, side, side):
            raise UsageError(f"the input is {_format_shape(x.shape)}: {expected}")

    @property
    def _should_rotate(self) -> bool:
        return bool(self.info.get("exif_rotate", False))

    def _load_image(self, image: ImageLike) -> image_files.ImageArray:
        """uint8 256 x 256 x 3."""
        should_rotate = self._should_rotate
        if hasattr(image, "read"):
            image = image.read()
        if isinstance(image, Tensor | np.ndarray):
            rgb = image_files.to_rgb(_make_pil_image(image))
        elif isinstance(image, Image.Image):
            rgb = image_files.to_rgb(ImageOps.exif_transpose(image) if should_rotate else image)
        elif isinstance(image, str | Path | bytes | bytearray | memoryview):
            name = f"{image}: " if isinstance(image, str | Path) else ""
            try:
                data = read_file(Path(image)) if isinstance(image, str | Path) else bytes(image)
                rgb = image_files.decode(data)
            except DataError as error:
                raise DataError(f"{name}{error.what}", error.hint or "give the path of an image") from error
            except OSError as error:
                raise DataError(f"{name}{error.strerror}", "check the path") from error
            rgb = image_files.apply_orientation(rgb, data) if should_rotate else rgb
        else:
            raise UsageError(f"{type(image).__name__} is no image", "give a path, bytes, a PIL image, array or tensor")
        return image_files.resize_and_crop(rgb)


class PlainDropout(nn.Module):
    """Dropout of layers 6 and 7 (section 4.2). In evaluation all units are used, times 1 - p (unscaled if inverted)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.p, self.factor = recipe.dropout, recipe.dropout_factor

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape. PyTorch's operator is the inverted form; the factor undoes its scaling."""
        return functional.dropout(x, self.p, self.training) * self.factor


def _make_layer(spec: LayerSpec, towers: int) -> nn.Module:
    """One of the layers with weights; a convolution that sees its own tower only is grouped."""
    if not spec.is_conv:
        is_whole = spec.towers == 1 or spec.sees_both
        return nn.Linear(spec.inputs, spec.biases) if is_whole else TowerLinear(spec.inputs, spec.biases, range(towers))
    groups = 1 if spec.name == "conv1" or spec.sees_both else towers
    padding = 0 if spec.name == "conv1" else spec.padding[0]  # `_run_layer` pads the input of conv1, on two sides only
    return nn.Conv2d(spec.inputs * groups, spec.biases, spec.kernel, spec.stride, padding, groups=groups)


def _make_step(step: Step, spec: LayerSpec, recipe: Recipe) -> nn.Module:
    """What follows a layer with weights."""
    if step == "activation":
        return make_activation(recipe)
    if step == "pool":
        return make_pooling(recipe, ceil=spec.pool_ceil)
    if step == "dropout":
        return PlainDropout(recipe)
    return ResponseNorm(norm_spec(recipe, step), function=normalize_plain)


def _map_dimension(x: Tensor) -> int:
    """The dimension of maps or units, with or without a batch."""
    return -3 if x.ndim >= 3 else -1


def _is_one_image(images: Any) -> bool:
    if isinstance(images, Tensor | np.ndarray):
        return images.ndim < 4
    is_file = isinstance(images, str | bytes | bytearray | memoryview) or hasattr(images, "read")
    return is_file or not isinstance(images, Iterable)


def _make_pil_image(pixels: Tensor | npt.NDArray[Any]) -> Image.Image:
    """A PIL image of an array H x W (x channels) or a tensor channels x H x W."""
    shape = _format_shape(pixels.shape)
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu().float() if pixels.is_floating_point() else pixels.detach().cpu()
        pixels = (pixels.movedim(0, -1) if pixels.ndim == 3 else pixels).numpy()
    if pixels.dtype.kind == "f":
        if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN fails too
            what = f"the image has floats from {pixels.min():.3g} to {pixels.max():.3g}"
            raise UsageError(what, "floats are taken as 0 to 1; give uint8 for 0 to 255")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    has_channels = pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4)
    if pixels.dtype != np.uint8 or not pixels.size or not (has_channels or pixels.ndim == 2):
        hint = "an image is uint8 or floats 0 to 1: an array H x W x 3, or a tensor 3 x H x W"
        raise UsageError(f"{pixels.dtype} {shape} is no image", hint)
    return Image.fromarray(pixels.squeeze(2) if has_channels and pixels.shape[2] == 1 else pixels)


def _format_shape(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a single number"
