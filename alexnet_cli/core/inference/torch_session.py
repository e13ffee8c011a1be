"""The network in PyTorch with the interface of `session.Session`: the reference for ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from alexnet_cli.core.devices import list_gpus, try_gpu
from alexnet_cli.core.inference.session import Crops, LayerChoice
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.alexnet import AlexNet
from alexnet_cli.core.model.architecture import check_layers

Array = npt.NDArray[np.float32]


class TorchSession:
    """A network that classifies crops, on the GPU if there is one. Attributes are those of `session.Session`."""

    def __init__(self, source: Path | model_file.Model, device: str | None = None, layers: LayerChoice = ()) -> None:
        """Open a model file or a model in memory.

        Raises:
            WeightsError: the file cannot be used.
            UsageError: the network has none of these layers.
        """
        self.model = model_file.read_model(source) if isinstance(source, Path) else source
        self.path, self.info, self.exif_rotate = self.model.path, self.model.info, self.model.exif_rotate
        self.classes, self.recipe = self.model.classes, self.model.recipe
        self.layers = tuple(layers(self.recipe) if callable(layers) else layers)
        check_layers(self.recipe, self.layers)
        has_gpu = device is None and bool(list_gpus())
        self.fallback_reason = try_gpu(0) if has_gpu else ""
        self.device = device or ("cuda" if has_gpu and not self.fallback_reason else "cpu")
        if self.device != "cpu":
            torch.backends.cudnn.allow_tf32 = False  # the same float32 as in ONNX Runtime
        self.network = AlexNet.from_model(self.model).to(self.device)

    def mean(self) -> Array:
        """Return the mean image, float32 3 x 256 x 256."""
        return self.model.mean

    def logits(self, crops: Crops) -> Array:
        """N x 3 x S x S, RGB, 0..255 -> N x classes."""
        return self._logits(crops).cpu().numpy()

    def probabilities(self, crops: Crops) -> Array:
        """N x 3 x S x S, RGB, 0..255 -> N x classes; each row sums to 1."""
        return torch.softmax(self._logits(crops), 1).cpu().numpy()

    def probabilities_and_activations(self, crops: Crops) -> tuple[Array, dict[str, Array]]:
        """As `session.Session.probabilities_and_activations`."""
        with torch.inference_mode():
            outputs = self.network.activations(self._make_input(crops), [*self.layers, "fc8"])
        probabilities = torch.softmax(outputs["fc8"].float(), 1).cpu().numpy()
        return probabilities, {layer: outputs[layer].float().cpu().numpy() for layer in self.layers}

    @torch.inference_mode()
    def _logits(self, crops: Crops) -> torch.Tensor:
        logits: torch.Tensor = self.network(self._make_input(crops))
        return logits.float()

    def _make_input(self, crops: Crops) -> torch.Tensor:
        return self.network.subtract_mean(torch.from_numpy(crops).to(self.device))
