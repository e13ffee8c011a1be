"""A network opened in ONNX Runtime, from an .onnx file or straight from a model file. No torch.

What a caller must know (names, crop, recipe) comes out of the file's metadata and from nowhere else.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import onnx_mapped, onnx_metadata, onnx_wire, weights
from alexnet_cli.core.devices import cores, gpu_present, int8_saturates, load_cuda
from alexnet_cli.core.sources import ClassName
from alexnet_cli.errors import AlexNetError, MissingError, WeightsError, is_out_of_memory
from alexnet_cli.recipe import SIDE, Recipe

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
AT_ONCE = 3 * 10**8  # numbers that a file's network may compute in one pass, 1.2 GB: its pictures go in pieces of that

Array = npt.NDArray[np.float32]
Crops = npt.NDArray[np.uint8] | Array
"""N x 3 x S x S, RGB, 0..255."""

Source = Path | weights.Model
Layer = Literal["fc6", "fc7"]
Convolution = Literal["conv1", "conv2", "conv3", "conv4", "conv5"]


class Session:
    """A network ready to classify crops of `crop` pixels. `device` is where it really runs: "cpu" or "cuda".

    `fallback` says why it is not the GPU although there is one; empty otherwise.
    """

    def __init__(
        self,
        source: Source,
        *,
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        gpu: int = 0,
        threads: int | None = None,
        few: bool = False,
        layer: Layer | Convolution | None = None,
    ) -> None:
        """Open `source`: an .onnx file, any other model file, or a model in memory.

        `few`: open faster for a handful of pictures, at the price of some throughput; an .onnx file is then mapped
        and must not be overwritten in place meanwhile, and "auto" is the CPU, which has answered before CUDA is
        loaded. `gpu`: which one of several. `layer`: whose activations `features` or `responses` gives.

        Raises:
            WeightsError: the file is missing, damaged or not a network of this toolkit.
            MissingError: provider "cuda" was asked for and cannot be opened.
        """
        if isinstance(source, Path) and source.suffix.lower() != ".onnx":
            source = weights.read(source)
        self.source, self.layer = source, layer
        self.path = source if isinstance(source, Path) else source.path
        if isinstance(source, Path) and not source.is_file():
            raise WeightsError(f"{source} does not exist", "name a run, or an .onnx file; `alexnet export` writes one")
        self._most = max(1, AT_ONCE // onnx_wire.check(source)) if isinstance(source, Path) else AT_ONCE
        with _contained() as said:
            providers = _providers("cpu" if few and provider == "auto" else provider, gpu)
            # ONNX Runtime by itself would count every core of the machine, allowed or not.
            self._session, self._kept = _open(source, providers, threads or cores(), few, layer)
        self.device = "cuda" if self._session.get_providers()[0] == CUDA else "cpu"
        self.fallback = _reason(said[0]) if len(providers) > 1 and self.device == "cpu" else ""
        if provider == "cuda" and self.device == "cpu":
            why = self.fallback or "no NVIDIA GPU, or ONNX Runtime was built without CUDA"
            raise MissingError(f"ONNX Runtime cannot open a session on the GPU: {why}", "see `alexnet doctor`")
        self.info = _checked(self.path, self._session, layer)
        self.about = self.info.about

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """The classes, in the order of the outputs."""
        return self.info.classes

    @property
    def crop(self) -> int:
        """Side of a crop in pixels: 224 or 227."""
        return self.info.recipe.input_size

    @property
    def exif_rotate(self) -> bool:
        """Whether pictures are turned as their EXIF orientation says."""
        return self.info.exif_rotate

    @property
    def recipe(self) -> Recipe:
        """What the network is."""
        return self.info.recipe

    def mean(self) -> Array:
        """Float32 3 x 256 x 256 (3 x 1 x 1 in a file whose recipe subtracts a colour)."""
        if isinstance(self.source, weights.Model):
            return self.source.mean
        found = onnx_mapped.constant(self.source, "mean")
        if found is not None and found.shape in {(3, SIDE, SIDE), (3, 1, 1)}:
            return found.astype(np.float32)
        raise WeightsError(f"{self.path} holds no mean image", "export it anew")

    def logits(self, crops: Crops) -> Array:
        """N x 3 x S x S, RGB, 0..255 -> N x classes."""
        return self._run(["logits"], crops)[0]

    def probabilities(self, crops: Crops) -> Array:
        """N x 3 x S x S, RGB, 0..255 -> N x classes; each row sums to 1."""
        return self._run(["probabilities"], crops)[0]

    def features(self, crops: Crops) -> tuple[Array, Array]:
        """The same, and N x units of `layer` as the next layer sees them: rectified, times dropout's factor (4.2)."""
        assert self.layer, "the session was opened without a layer"
        probabilities, units = self._run(["probabilities", _activations(self.layer, self.recipe)], crops)
        return probabilities, units * np.float32(1 if self.recipe.dropout_inverted else 1 - self.recipe.dropout)

    def responses(self, crops: Crops) -> Array:
        """Units of layer 6 or 7 as `features` has them, or N x maps x rows x columns of a convolution before its
        nonlinearity. What comes after that layer is not computed.
        """
        import onnxruntime

        assert self.layer, "the session was opened without a layer"
        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = True
        units = self._run([_activations(self.layer, self.recipe)], crops, options)[0]
        halved = self.layer.startswith("fc") and not self.recipe.dropout_inverted
        return units * np.float32(1 - self.recipe.dropout) if halved else units

    def _run(self, outputs: list[str], crops: Crops, options: Any = None) -> list[Array]:
        pieces = [crops[i : i + self._most] for i in range(0, len(crops), self._most)] or [crops]
        results = zip(*(self._pass(outputs, piece, options) for piece in pieces), strict=True)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in results]

    def _pass(self, outputs: list[str], crops: Crops, options: Any) -> list[Array]:
        try:
            results = self._session.run(outputs, {"input": crops.astype(np.float32, copy=False)}, options)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = f"{self.path} cannot be run: {_words(error)}"
            raise WeightsError(what, "if it is damaged, export it anew") from error
        return [result.astype(np.float32, copy=False) for result in results]


def _providers(provider: str, gpu: int) -> list[Any]:
    """What to offer ONNX Runtime, best first. With CUDA: true float32, and no search for the best kernel."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    if provider == "cpu" or CUDA not in onnxruntime.get_available_providers() or not gpu_present():
        return [CPU]
    load_cuda()
    return [(CUDA, {"device_id": str(gpu), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}), CPU]


def _open(source: Source, providers: list[Any], threads: int, few: bool, layer: str | None) -> tuple[Any, list[Any]]:
    """The ONNX Runtime session, and what must live as long as it does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # whatever goes wrong is in the exception too
    options.intra_op_num_threads = threads
    # Prepacking copies every weight into the order of the matrix product: time that only many pictures repay.
    options.add_session_config_entry("session.disable_prepacking", "1" if few else "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # no other, whatever a file begins with
    # Between two batches the cores belong to whoever decodes the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Slower and right, where the fast product of int8 would be wrong.
    options.add_session_config_entry("session.x64quantprecision", "1" if int8_saturates() else "0")
    path = source if isinstance(source, Path) else source.path
    try:
        found = onnx_mapped.mapped(source) if isinstance(source, Path) and few and layer is None else None
        if isinstance(source, Path) and layer is None and found is None:
            return onnxruntime.InferenceSession(str(source), options, providers=providers), []
        content, apart = found or _graph(source, layer)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in apart.values()]
        if values:
            options.add_external_initializers(list(apart), values)
        return onnxruntime.InferenceSession(content, options, providers=providers), values
    except AlexNetError:
        raise
    except Exception as error:
        what = f"{path} cannot be opened: {_words(error)}"
        raise WeightsError(what, "the file is damaged; export it anew") from error


def _words(error: Exception) -> str:
    """What an exception of ONNX Runtime says; they have no base in common but this one."""
    return str(error).partition("\n")[0].rpartition(" : ")[2] or type(error).__name__


def _graph(source: Source, layer: str | None) -> tuple[bytes, dict[str, Any]]:
    """The graph of a model, or of an ONNX file, with one more output for a layer's activations."""
    apart: dict[str, Array] = {}
    if isinstance(source, weights.Model):
        from alexnet_cli.core import onnx_graph

        proto, apart = onnx_graph.build_apart(source)
        recipe = source.recipe
    else:
        import onnx

        proto = onnx.load(source, load_external_data=False)
        recipe = onnx_metadata.read(source, {entry.key: entry.value for entry in proto.metadata_props}).recipe
    if layer is not None:
        name = _activations(layer, recipe)
        if not any(name in node.output for node in proto.graph.node):
            hint = "give the run, the checkpoint or the .safetensors file that it was made from"
            raise WeightsError(f"{source} does not keep the activations of {layer} apart", hint)
        proto.graph.output.add(name=name)
    return proto.SerializeToString(), dict(apart)


def _activations(layer: str, recipe: Recipe) -> str:
    """What a graph calls a convolution before its nonlinearity, a fully connected layer after it."""
    return layer if layer.startswith("conv") else f"{layer}.{recipe.activation}"


def _checked(path: Path, session: Any, layer: str | None) -> onnx_metadata.Info:
    try:
        text = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} has unreadable metadata: {error}", "the file is damaged; export it anew") from error
    info = onnx_metadata.read(path, text)
    shapes = {v.name: list(v.shape[1:]) for v in (*session.get_inputs(), *session.get_outputs())}
    if layer is not None:
        shapes.pop(_activations(layer, info.recipe))
    side, classes = info.recipe.input_size, len(info.classes)
    if shapes != {"input": [3, side, side], "logits": [classes], "probabilities": [classes]}:
        raise WeightsError(f"{path}: its inputs and outputs do not fit its metadata", "export it anew")
    return info


def _reason(said: str) -> str:
    """The library that is missing, if ONNX Runtime named one among all it said."""
    found = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open", said)
    return f"{found[1]} is missing" if found else "CUDA could not be started"


@contextlib.contextmanager
def _contained() -> Iterator[list[str]]:
    """Keep ONNX Runtime's native messages off the terminal; yields a list that holds them afterwards.

    It writes to the file descriptor, at import already, where no setting reaches. What others write meanwhile
    is passed on.
    """
    said = [""]
    try:
        terminal = os.dup(2)
    except OSError:  # no stderr, nothing to keep clean
        yield said
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield said
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            file.seek(0)
            said[0] = file.read().decode(errors="replace")
            if others := [line for line in said[0].splitlines() if "onnxruntime" not in line and line.strip()]:
                os.write(2, ("\n".join(others) + "\n").encode())
