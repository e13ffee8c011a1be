"""A network opened in ONNX Runtime, from an .onnx file or from a model file. No torch.

Class names, crop size and recipe come from the file's metadata.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.devices import count_cores, has_gpu, preload_cuda
from alexnet_cli.core.files import map_file
from alexnet_cli.core.inference import onnx_metadata
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.architecture import check_layers
from alexnet_cli.errors import MissingError, WeightsError, is_out_of_memory
from alexnet_cli.recipe import SIDE, Recipe

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# An ONNX file as protobuf (onnx.proto): fields of a model, a graph and a tensor, types of a tensor, types of a field.
GRAPH, METADATA, INITIALIZER = 7, 14, 5
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9
TYPES: dict[int | memoryview | None, str] = {1: "<f4", 3: "i1", 10: "<f2"}
VARINT, BYTES, SIZES = 0, 2, {1: 8, 5: 4}
EXTERNAL_DATA, KEY, VALUE, IS_EXTERNAL = 13, 1, 2, b"p\x01"  # field of a tensor, its fields, data_location: EXTERNAL
MAX_BYTES = 2**31  # of a file: protobuf's limit
LARGE_BYTES = 2**16  # of a constant that is mapped instead of copied
FOLDER = "session.model_external_initializers_file_folder_path"

Array = npt.NDArray[np.float32]
Constants = dict[str, npt.NDArray[Any]]
Crops = npt.NDArray[np.uint8] | Array
"""N x 3 x S x S, RGB, 0..255."""

ModelSource = Path | model_file.Model
LayerChoice = Sequence[str] | Callable[[Recipe], Sequence[str]]
"""Names of `architecture.layer_names`, or a function that chooses them once the recipe is read from the file."""


class Session:
    """A network that classifies crops.

    Attributes:
        classes: in the order of the outputs.
        layers: names of the layers whose activations can be read.
        recipe: of the network.
        info: how the weights were made (run, epoch, step).
        exif_rotate: whether images are rotated as their EXIF orientation says.
        metadata: the rest of the file's metadata.
        device: where it runs, "cpu" or "cuda".
        fallback_reason: why a GPU that is there is not used; empty otherwise.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        gpu: int = 0,
        threads: int | None = None,
        fast_start: bool = False,
        layers: LayerChoice = (),
    ) -> None:
        """Open a network.

        Args:
            source: an .onnx file, any other model file, or a model in memory.
            provider: where to run; "auto" is the GPU if there is one.
            gpu: index of the GPU.
            threads: CPU threads; one per core by default.
            fast_start: open faster for a few images, with less throughput; "auto" is then the CPU, which is done
                before CUDA is loaded.
            layers: the layers whose activations will be wanted.

        Raises:
            WeightsError: the file is missing, corrupt or not a network of this toolkit, or lacks one of the layers.
            UsageError: the network has no such layer.
            MissingError: provider is "cuda" and the GPU cannot be used.
        """
        if isinstance(source, Path) and source.suffix.lower() != ".onnx":
            source = model_file.read_model(source)
        self.source = source
        self.path = source if isinstance(source, Path) else source.path
        identity = _identify(source)
        content, self._constants, self.layers = _read_source(source, layers)
        with _capture_native_stderr() as captured:
            providers = _make_providers("cpu" if fast_start and provider == "auto" else provider, gpu)
            # ONNX Runtime by itself would use all cores of the machine, even those that are not allowed.
            self._session, self._values = self._open(content, providers, threads or count_cores(), fast_start)
        if _identify(source) != identity:  # ONNX Runtime has opened it by its name, and mapped another's weights
            raise WeightsError(f"{self.path} was replaced while it was opened", "try again")
        self.device = "cuda" if self._session.get_providers()[0] == CUDA else "cpu"
        self.fallback_reason = _explain_fallback(captured[0]) if len(providers) > 1 and self.device == "cpu" else ""
        if provider == "cuda" and self.device == "cpu":
            reason = self.fallback_reason or "no NVIDIA GPU, or ONNX Runtime was built without CUDA"
            raise MissingError(f"ONNX Runtime cannot use the GPU: {reason}", "see `alexnet doctor`")
        self.metadata = _read_metadata(self.path, self._session)
        self.classes, self.recipe, self.info = self.metadata.classes, self.metadata.recipe, self.metadata.info
        self.exif_rotate = self.metadata.exif_rotate

    def _open(self, content: bytes, providers: list[Any], threads: int, fast_start: bool) -> tuple[Any, list[Any]]:
        """Return the ONNX Runtime session, and the values that must live as long as it does."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # every error is raised as an exception too
        options.intra_op_num_threads = threads
        # Prepacking copies every weight into the order of the matrix product, which pays off with many images only.
        options.add_session_config_entry("session.disable_prepacking", "1" if fast_start else "0")
        options.add_session_config_entry("session.load_model_format", "ONNX")  # no other, whatever a file begins with
        # Between two batches the cores are free for the threads that decode images.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            values: list[Any] = []
            if isinstance(self.source, Path):
                options.add_session_config_entry(FOLDER, os.fsencode(self.path.resolve().parent))
            elif self._constants:
                values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in self._constants.values()]
                options.add_external_initializers(list(self._constants), values)
            return onnxruntime.InferenceSession(content, options, providers=providers), values
        except Exception as error:
            what = f"{self.path} cannot be opened: {_format_runtime_error(error)}"
            raise WeightsError(what, "the file is corrupt; export it again") from error

    def mean(self) -> Array:
        """Return the mean image, float32 3 x 256 x 256. Raises WeightsError if the file has only its center."""
        if isinstance(self.source, model_file.Model):
            return self.source.mean
        mean = self._constants.get("mean")
        if mean is None or mean.size != 3 * SIDE * SIDE:
            what = f"{self.path} no longer has the whole mean image, which ten views of this network need"
            raise WeightsError(what, "another tool changed it; use --views 1, or the file that `alexnet export` wrote")
        return mean.reshape(3, SIDE, SIDE).astype(np.float32)

    def logits(self, crops: Crops) -> Array:
        """N x 3 x S x S, RGB, 0..255 -> N x classes."""
        return self._run(["logits"], crops)[0]

    def probabilities(self, crops: Crops) -> Array:
        """N x 3 x S x S, RGB, 0..255 -> N x classes; each row sums to 1."""
        return self._run(["probabilities"], crops)[0]

    def activations(self, crops: Crops) -> dict[str, Array]:
        """Return the activations of the session's layers: N x maps x rows x columns, or N x units in layers 6 to 8."""
        return self._run_layers([], crops)[1]

    def probabilities_and_activations(self, crops: Crops) -> tuple[Array, dict[str, Array]]:
        """N x classes, and what `activations` returns, in one pass."""
        [probabilities], activations = self._run_layers(["probabilities"], crops)
        return probabilities, activations

    def _run_layers(self, outputs: list[str], crops: Crops) -> tuple[list[Array], dict[str, Array]]:
        """Return some outputs, and each layer's activations; dropout's are times its test-time factor (section 4.2)."""
        keep = np.float32(self.recipe.dropout_factor)
        names = {layer: _output_name(layer, self.recipe) for layer in self.layers}
        unique = list(dict.fromkeys(names.values()))
        values = self._run([*outputs, *unique], crops)
        by_name = dict(zip(unique, values[len(outputs) :], strict=True))
        activations = {
            layer: by_name[name] * keep if layer.startswith("drop") else by_name[name] for layer, name in names.items()
        }
        return values[: len(outputs)], activations

    def _run(self, outputs: list[str], crops: Crops) -> list[Array]:
        batch = self._session.get_inputs()[0].shape[0]
        if isinstance(batch, int) and 0 < batch != len(crops):  # a tool has fixed it, often to 1
            starts = range(0, len(crops), batch)
            parts = [crops[start : start + batch] for start in starts]
            results = [self._run(outputs, np.resize(part, (batch, *crops.shape[1:]))) for part in parts]
            return [np.concatenate(values)[: len(crops)] for values in zip(*results, strict=True)]
        try:
            results = self._session.run(outputs, {"input": crops.astype(np.float32, copy=False)})
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = f"{self.path} cannot be run: {_format_runtime_error(error)}"
            raise WeightsError(what, "if the file is corrupt, export it again") from error
        return [result.astype(np.float32, copy=False) for result in results]


def _read_source(source: ModelSource, choice: LayerChoice) -> tuple[bytes, Constants, tuple[str, ...]]:
    """Return the serialized graph with the chosen layers as further outputs, its large constants, and the layers."""
    if isinstance(source, Path):
        path = source
        content, constants = _read_file(path)
    else:
        from alexnet_cli.core.inference import onnx_graph

        path, constants = source.path, Constants()
        content = onnx_graph.build_graph(source, external=constants).SerializeToString()
    if not choice:
        return content, constants, ()
    import onnx

    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception as error:  # of protobuf, which is not a direct dependency
        raise WeightsError(f"{path} cannot be opened: {error}", "the file is corrupt; export it again") from error
    recipe = onnx_metadata.parse_metadata(path, {entry.key: entry.value for entry in proto.metadata_props}).recipe
    layers = tuple(choice(recipe) if callable(choice) else choice)
    check_layers(recipe, layers)
    names = {name for node in proto.graph.node for name in node.output}
    outputs = {output.name for output in proto.graph.output}
    for layer in layers:
        name = _output_name(layer, recipe)
        if name not in names:
            hint = "export it again, or use the run, checkpoint or .safetensors file that it was exported from"
            raise WeightsError(f"{path} does not expose the activations of {layer}", hint)
        if name not in outputs:
            outputs.add(name)
            proto.graph.output.add(name=name)
    return proto.SerializeToString(), constants, layers


def _identify(source: ModelSource) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced. None for a model in memory and a missing file."""
    if isinstance(source, Path):
        with contextlib.suppress(OSError):
            status = source.stat()
            return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _read_file(path: Path) -> tuple[bytes, Constants]:
    """Return an ONNX file without its large constants, and these by name, as views of the mapped file.

    ONNX Runtime by itself copies all weights before the first image: with the 240 MB of float32, `predict` then takes
    0.35 s more. So the graph only says where in the file each large constant is, and ONNX Runtime maps it.

    Raises:
        WeightsError: the file cannot be read, is corrupt, or refers to other files.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist", "name a run, or an .onnx file that `alexnet export` wrote")
    content, metadata, constants, name = bytearray(), bytearray(), Constants(), os.fsencode(path.resolve().name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is larger than 2 GB")
        for number, value, field in _fields(map_file(path)):
            if number == METADATA:
                metadata += field
            elif number == GRAPH and isinstance(value, memoryview):
                parts = [_take_constant(*part, constants, name) for part in _fields(value)]
                content += _message(GRAPH, b"".join(parts))
            else:
                content += field
    except (OSError, ValueError) as error:
        what = f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}"
        raise WeightsError(what, "the file is corrupt or not ONNX; `alexnet export` writes one") from error
    # The key under which a tensor anywhere in the file names another file or an address in memory.
    if content.count(b"location") > len(constants) * (1 + name.count(b"location")):
        hint = "open only files that `alexnet export` wrote; for another program's file: alexnet import-weights"
        raise WeightsError(f"{path} refers to other files, which is not allowed", hint)
    return bytes(content + metadata), constants


def _take_constant(
    number: int, value: int | memoryview, field: memoryview, constants: Constants, file_name: bytes
) -> bytes | memoryview:
    """Add a large constant in a field of a graph to `constants`. Returns the field with its place for the values."""
    if number != INITIALIZER or not isinstance(value, memoryview) or len(value) < LARGE_BYTES:
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
        raise ValueError(f"two constants have the name {str(name, 'utf-8')}")
    constants[str(name, "utf-8")] = np.frombuffer(data, TYPES[kind]).reshape(shape)
    place = {b"location": file_name, b"offset": b"%d" % _find_offset(data), b"length": b"%d" % len(data)}
    entries = [_message(KEY, key) + _message(VALUE, text) for key, text in place.items()]
    return _message(INITIALIZER, rest + b"".join(_message(EXTERNAL_DATA, entry) for entry in entries) + IS_EXTERNAL)


def _find_offset(data: memoryview) -> int:
    """Return how many bytes of the mapped file come before a part of it."""
    views = data, memoryview(data.obj)
    part, whole = (np.frombuffer(view, np.uint8).__array_interface__["data"][0] for view in views)
    return int(part - whole)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """Yield number, value and all bytes of each field of a protobuf message. Raises ValueError where it is corrupt."""
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
    """Return an integer, seven bits per byte with the lowest first, and the index after it."""
    value = 0
    for index, byte in enumerate(message[place : place + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise ValueError("it ends inside a number")


def _message(number: int, content: bytes | bytearray) -> bytes:
    """Return a field that holds a message or a text. Its length always takes five bytes, which protobuf allows."""
    size = len(content)
    return bytes([number << 3 | BYTES, *(size >> shift & 127 | 128 for shift in (0, 7, 14, 21)), size >> 28]) + content


def _make_providers(provider: str, gpu: int) -> list[Any]:
    """Return the ONNX Runtime providers to try, best first. CUDA computes in true float32, without a kernel search."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    if provider == "cpu" or CUDA not in onnxruntime.get_available_providers() or not has_gpu():
        return [CPU]
    preload_cuda()
    return [(CUDA, {"device_id": str(gpu), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}), CPU]


def _format_runtime_error(error: Exception) -> str:
    """Return the first line of an ONNX Runtime error, without its error code."""
    return str(error).partition("\n")[0].rpartition(" : ")[2] or type(error).__name__


def _output_name(layer: str, recipe: Recipe) -> str:
    """Return the graph's name for a layer. Dropout has no node: its factor is in the weights of the next layer."""
    return "logits" if layer == "fc8" else layer.replace("drop", recipe.activation)


def _read_metadata(path: Path, session: Any) -> onnx_metadata.OnnxMetadata:
    """Return the metadata of an open session. Raises WeightsError where it does not fit inputs and outputs."""
    try:
        text = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise WeightsError(
            f"{path} has unreadable metadata: {error}", "the file is corrupt; export it again"
        ) from error
    metadata = onnx_metadata.parse_metadata(path, text)
    shapes = {v.name: list(v.shape[1:]) for v in (*session.get_inputs(), *session.get_outputs())}
    side, classes = metadata.recipe.input_size, len(metadata.classes)
    expected = {"input": [3, side, side], "logits": [classes], "probabilities": [classes]}
    if not expected.items() <= shapes.items():  # other outputs, such as a layer's activations, do no harm
        raise WeightsError(f"{path}: its inputs and outputs do not fit its metadata", "export it again")
    return metadata


def _explain_fallback(messages: str) -> str:
    """Return the library that ONNX Runtime did not find, if its messages name one."""
    missing = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open", messages)
    return f"{missing[1]} is missing" if missing else "CUDA could not be started"


@contextlib.contextmanager
def _capture_native_stderr() -> Iterator[list[str]]:
    """Keep ONNX Runtime's own messages off the terminal. Yields a list that holds them afterwards.

    ONNX Runtime writes to the file descriptor, during import already, where no setting has an effect. Lines of others
    are passed on.
    """
    captured = [""]
    try:
        terminal = os.dup(2)
    except OSError:  # there is no stderr
        yield captured
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield captured
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            file.seek(0)
            captured[0] = file.read().decode(errors="replace")
            if others := [line for line in captured[0].splitlines() if "onnxruntime" not in line and line.strip()]:
                os.write(2, ("\n".join(others) + "\n").encode())
