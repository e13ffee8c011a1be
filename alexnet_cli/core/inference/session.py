"""A network opened in ONNX Runtime, from an .onnx file or straight from a model file. No torch.

What a caller must know (names, crop, recipe) comes out of the file's metadata and from nowhere else.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.devices import count_cores, has_gpu, int8_saturates, preload_cuda
from alexnet_cli.core.inference import onnx_metadata
from alexnet_cli.core.model import model_file
from alexnet_cli.errors import MissingError, WeightsError, is_out_of_memory
from alexnet_cli.recipe import Recipe

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# An ONNX file as protobuf (onnx.proto): fields of a model, a graph and a tensor, types of a tensor, types of a field.
GRAPH, METADATA, INITIALIZER = 7, 14, 5
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9
TYPES: dict[int | memoryview | None, str] = {1: "<f4", 3: "i1", 10: "<f2"}
VARINT, BYTES, SIZES = 0, 2, {1: 8, 5: 4}
IN_MEMORY = b"j\x12\n\x08location\x12\x06memoryp\x01"  # external_data {location: "memory"}, data_location: EXTERNAL
LARGEST, LARGE = 2**31, 2**16  # bytes of a file; of a constant that is not copied

Array = npt.NDArray[np.float32]
Constants = dict[str, npt.NDArray[Any]]
Crops = npt.NDArray[np.uint8] | Array
"""N x 3 x S x S, RGB, 0..255."""

ModelSource = Path | model_file.Model
FeatureLayer = Literal["fc6", "fc7"]
ConvLayer = Literal["conv1", "conv2", "conv3", "conv4", "conv5"]


class Session:
    """A network ready to classify crops of `crop` pixels. `device` is where it really runs: "cpu" or "cuda".

    `fallback` says why it is not the GPU although there is one; empty otherwise.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        gpu: int = 0,
        threads: int | None = None,
        few: bool = False,
        layer: FeatureLayer | ConvLayer | None = None,
    ) -> None:
        """Open `source`: an .onnx file, any other model file, or a model in memory.

        `few`: open faster for a handful of images, at the price of some throughput; "auto" is then the CPU, which
        has answered before CUDA is loaded. `gpu`: which one of several. `layer`: the layer whose activations
        `features` or `responses` returns.

        Raises:
            WeightsError: the file is missing, damaged or not a network of this toolkit.
            MissingError: provider "cuda" was asked for and cannot be opened.
        """
        if isinstance(source, Path) and source.suffix.lower() != ".onnx":
            source = model_file.read_model(source)
        self.source, self.layer = source, layer
        self.path = source if isinstance(source, Path) else source.path
        content, self._constants = _read(source, layer)
        with _contained() as said:
            providers = _providers("cpu" if few and provider == "auto" else provider, gpu)
            # ONNX Runtime by itself would count every core of the machine, allowed or not.
            self._session, self._kept = self._open(content, providers, threads or count_cores(), few)
        self.device = "cuda" if self._session.get_providers()[0] == CUDA else "cpu"
        self.fallback = _reason(said[0]) if len(providers) > 1 and self.device == "cpu" else ""
        if provider == "cuda" and self.device == "cpu":
            why = self.fallback or "no NVIDIA GPU, or ONNX Runtime was built without CUDA"
            raise MissingError(f"ONNX Runtime cannot open a session on the GPU: {why}", "see `alexnet doctor`")
        self.info = _checked(self.path, self._session, layer)
        self.about = self.info.about

    def _open(self, content: bytes, providers: list[Any], threads: int, few: bool) -> tuple[Any, list[Any]]:
        """The ONNX Runtime session, and the values that must live as long as it does."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # whatever goes wrong is in the exception too
        options.intra_op_num_threads = threads
        # Prepacking copies every weight into the order of the matrix product: time that only many images repay.
        options.add_session_config_entry("session.disable_prepacking", "1" if few else "0")
        options.add_session_config_entry("session.load_model_format", "ONNX")  # no other, whatever a file begins with
        # Between two batches the cores belong to whoever decodes the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Slower and right, where the fast product of int8 would be wrong.
        options.add_session_config_entry("session.x64quantprecision", "1" if int8_saturates() else "0")
        try:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in self._constants.values()]
            if values:
                options.add_external_initializers(list(self._constants), values)
            return onnxruntime.InferenceSession(content, options, providers=providers), values
        except Exception as error:
            what = f"{self.path} cannot be opened: {_words(error)}"
            raise WeightsError(what, "the file is damaged; export it again") from error

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
        """Float323 x 256 x 256."""
        if isinstance(self.source, model_file.Model):
            return self.source.mean
        if "mean" not in self._constants:
            raise WeightsError(f"{self.path} holds no mean image", "export it again")
        return self._constants["mean"].astype(np.float32)

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
        try:
            results = self._session.run(outputs, {"input": crops.astype(np.float32, copy=False)}, options)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = f"{self.path} cannot be run: {_words(error)}"
            raise WeightsError(what, "if the file is damaged, export it again") from error
        return [result.astype(np.float32, copy=False) for result in results]


def _read(source: ModelSource, layer: str | None) -> tuple[bytes, Constants]:
    """The graph of a model or an ONNX file, with a layer's activations as one more output; and large constants."""
    if isinstance(source, Path):
        path = source
        content, constants = _read_file(path)
    else:
        from alexnet_cli.core.inference import onnx_graph

        path = source.path
        proto, constants = onnx_graph.build_apart(source)
        content = proto.SerializeToString()
    if layer is None:
        return content, constants
    import onnx

    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's, which is no dependency of ours
        raise WeightsError(f"{path} cannot be opened: {error}", "the file is damaged; export it again") from error
    recipe = onnx_metadata.read_metadata(path, {entry.key: entry.value for entry in proto.metadata_props}).recipe
    name = _activations(layer, recipe)
    if not any(name in node.output for node in proto.graph.node):
        hint = "give the run, the checkpoint or the .safetensors file that it was made from"
        raise WeightsError(f"{path} does not keep the activations of {layer} apart", hint)
    proto.graph.output.add(name=name)
    return proto.SerializeToString(), constants


def _read_file(path: Path) -> tuple[bytes, Constants]:
    """An ONNX file without its large constants, and these by name, as views of the mapped file.

    ONNX Runtime by itself copies every weight before the first image: with the 240 MB of float32, `predict` takes 1.2
    instead of 0.85 s of CPU time. So a note replaces each large constant: the session gets it from memory.

    Raises:
        WeightsError: the file cannot be read, is damaged, or keeps values in other files.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist", "name a run, or an .onnx file; `alexnet export` writes one")
    content, metadata, constants = bytearray(), bytearray(), Constants()
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is larger than 2 GB")
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for number, value, field in _fields(data):
            if number == METADATA:
                metadata += field
            elif number == GRAPH and isinstance(value, memoryview):
                parts = [_take_constant(*part, constants) for part in _fields(value)]
                content += _message(GRAPH, b"".join(parts))
            else:
                content += field
    except (OSError, ValueError) as error:
        what = f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}"
        raise WeightsError(what, "the file is damaged or no ONNX file; `alexnet export` writes one") from error
    # A tensor, wherever it stands, names another file or an address in memory under this key.
    if content.count(b"location") > len(constants):
        hint = "open only files that `alexnet export` wrote; for another program's file: alexnet import-weights"
        raise WeightsError(f"{path} is refused: it has tensors that lie in another file", hint)
    return bytes(content + metadata), constants


def _take_constant(number: int, value: int | memoryview, field: memoryview, constants: Constants) -> bytes | memoryview:
    """Move a large constant from a field of a graph to `constants`; returns the field without the values."""
    if number != INITIALIZER or not isinstance(value, memoryview) or len(value) < LARGE:
        return field
    shape, parts, rest = list[int](), dict[int, int | memoryview](), bytearray()
    for number, part, whole in _fields(value):
        parts[number] = part
        if number == DIMS and isinstance(part, int):
            shape.append(part)
        if number != RAW_DATA:
            rest += whole
    name, kind, data = (parts.get(number) for number in (NAME, DATA_TYPE, RAW_DATA))
    if not isinstance(name, memoryview) or not isinstance(data, memoryview) or kind not in TYPES:
        return field  # another program's layout, which ONNX Runtime reads
    if str(name, "utf-8") in constants:
        raise ValueError(f"two constants are called {str(name, 'utf-8')}")
    constants[str(name, "utf-8")] = np.frombuffer(data, TYPES[kind]).reshape(shape)
    return _message(INITIALIZER, rest + IN_MEMORY)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """Number, value and all bytes of each field of a protobuf message. Raises ValueError where it is damaged."""
    end = 0
    while end < len(message):
        start = end
        tag, place = _varint(message, start)
        kind, value = tag & 7, 0
        if kind in (VARINT, BYTES):
            value, end = _varint(message, place)
        if kind == BYTES:
            place, end = end, end + value
        elif kind in SIZES:
            end = place + SIZES[kind]
        elif kind != VARINT:
            raise ValueError("it has a field of an unknown type")
        if end > len(message):
            raise ValueError("it ends too early")
        yield tag >> 3, value if kind == VARINT else message[place:end], message[start:end]


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """An integer of seven bits a byte, lowest first, and the place after it."""
    value = 0
    for index, byte in enumerate(message[place : place + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise ValueError("it ends within a number")


def _message(number: int, content: bytes | bytearray) -> bytes:
    """A field that holds a message; its length always takes five bytes, which is allowed and simple."""
    size = len(content)
    return bytes([number << 3 | BYTES, *(size >> shift & 127 | 128 for shift in (0, 7, 14, 21)), size >> 28]) + content


def _providers(provider: str, gpu: int) -> list[Any]:
    """What to offer ONNX Runtime, best first. With CUDA: true float32, and no search for the best kernel."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    if provider == "cpu" or CUDA not in onnxruntime.get_available_providers() or not has_gpu():
        return [CPU]
    preload_cuda()
    return [(CUDA, {"device_id": str(gpu), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}), CPU]


def _words(error: Exception) -> str:
    """What an exception of ONNX Runtime says; they have no base in common but this one."""
    return str(error).partition("\n")[0].rpartition(" : ")[2] or type(error).__name__


def _activations(layer: str, recipe: Recipe) -> str:
    """What a graph calls a convolution before its nonlinearity, a fully connected layer after it."""
    return layer if layer.startswith("conv") else f"{layer}.{recipe.activation}"


def _checked(path: Path, session: Any, layer: str | None) -> onnx_metadata.Info:
    try:
        text = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} has unreadable metadata: {error}", "the file is damaged; export it anew") from error
    info = onnx_metadata.read_metadata(path, text)
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
