"""PyTorch's .pth, read without PyTorch: the zip of today and the plain file of before 1.6. Nothing in it can run.

Either is a pickle that names tensors as pieces of storages, and the storages' bytes, of which only the ones that are
used are looked at, in the memory-mapped file.
"""

from __future__ import annotations

import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from alexnet_cli.core import state_dict
from alexnet_cli.core.foreign import Array, Foreign, Pixels, damaged, refused
from alexnet_cli.core.unpickler import NUMPY, Inert, container, load, text
from alexnet_cli.recipe import Recipe

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a plain file
ZIP, PLAIN = b"PK\x03\x04", b"\x80\x02\x8a\n" + MAGIC.to_bytes(10, "little") + b"."
ENTRIES = 20_000
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.")
KINDS = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "bf16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1",
    "ByteStorage": "<u1", "BoolStorage": "|b1",
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """A storage that a tensor lies in: its element type and its key in the file."""

    kind: str
    key: str


@dataclass(frozen=True)
class Tensor:
    """A piece of a storage, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read(path: Path, recipe: Recipe, pixels: Pixels) -> Foreign:
    """Read a state dict, or a checkpoint that has one, of a network built and fed as `recipe` and `pixels` say.

    Raises:
        WeightsError: it is damaged, wants to run code, or is another network.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content, find = _zip(path, data) if data[:4] == ZIP else _plain(data)
        tensors = {name: _filled(tensor, find) for name, tensor in _named(content).items()}
    except pickle.UnpicklingError as error:
        hint = "save the state dict alone: torch.save(network.state_dict(), FILE)"
        raise refused(path, f"not read, as {error}", hint) from error
    except (zipfile.BadZipFile, ValueError, OSError, KeyError, struct.error, NotImplementedError, EOFError) as error:
        raise damaged(path, error) from error
    if not tensors:
        raise refused(path, "it holds no state dict", "save one: torch.save(network.state_dict(), FILE)")
    return state_dict.network(path, "PyTorch", tensors, recipe, pixels)


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor | Inert:
    whole = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8
    if not isinstance(storage, Storage) or not whole or type(offset) is not int:
        return Inert()
    size, stride = cast(tuple[int, ...], size), cast(tuple[int, ...], stride)
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor has an impossible shape")
    return Tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


ALLOWED = {
    **NUMPY,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): lambda items=(): tuple(items),
    **{("torch", name): kind for name, kind in KINDS.items()},
}


def _storage(pid: object) -> Storage:
    if not isinstance(pid, tuple) or len(pid) < 5 or text(pid[0]) != "storage" or pid[1] not in KINDS.values():
        raise pickle.UnpicklingError("it refers to something that is no storage")
    return Storage(pid[1], text(pid[2]))


Find = Callable[[Storage], memoryview]


def _zip(path: Path, data: mmap.mmap) -> tuple[Any, Find]:
    """The content of a zip and where its storages are. Entries must be stored as they are, as PyTorch stores them."""
    place, count = data.find(b"PK\x01\x02"), 0
    while place >= 0 and count <= ENTRIES:
        place, count = data.find(b"PK\x01\x02", place + 4), count + 1
    if count > ENTRIES:
        raise ValueError(f"more than {ENTRIES:,} entries")
    with zipfile.ZipFile(path) as archive:
        entries = {}
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename[:80]} is compressed, which PyTorch never does")
            entries[entry.filename.partition("/")[2]] = entry
    view = memoryview(data)

    def bytes_of(name: str) -> memoryview:
        entry = entries[name]
        sizes = struct.unpack_from("<4s22xHH", data, entry.header_offset)
        if sizes[0] != ZIP:
            raise ValueError(f"there is no {name} where the directory says")
        start = entry.header_offset + 30 + sizes[1] + sizes[2]
        if start + entry.file_size > len(data):
            raise ValueError(f"{name} is not all there")
        return view[start : start + entry.file_size]

    if "byteorder" in entries and bytes(bytes_of("byteorder")[:6]) != b"little":
        raise ValueError("its numbers are big-endian")
    if "data.pkl" not in entries:
        raise ValueError("it has no data.pkl")
    with _Reader(bytes_of("data.pkl")) as file:
        content = load(cast(IO[bytes], file), ALLOWED, _storage)
    return content, lambda storage: bytes_of(f"data/{storage.key}")


class _Reader:
    """A piece of a file as a file to read from."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.data = memoryview(b"")

    def read(self, size: int) -> bytes:
        self.place += size
        return bytes(self.data[self.place - size : self.place])

    def readline(self) -> bytes:
        line = bytearray()
        while self.place < len(self.data) and not line.endswith(b"\n") and len(line) < 10_000:
            line += self.read(1)
        return bytes(line)


def _plain(data: mmap.mmap) -> tuple[Any, Find]:
    """The content of a plain file: magic, version, system, content, keys; then each storage, its length before it."""
    file = cast(IO[bytes], data)
    if load(file, {}) != MAGIC:
        raise ValueError("it does not begin as PyTorch's files do")
    load(file, {})
    load(file, {("collections", "OrderedDict"): container})
    kinds: dict[str, str] = {}

    def storage(pid: object) -> Storage:
        found = _storage(pid)
        kinds[found.key] = found.kind
        return found

    content = load(file, ALLOWED, storage)
    keys = load(file, {})
    if not isinstance(keys, list) or len(keys) > ENTRIES:
        raise ValueError("its list of storages is not readable")
    view, places, place = memoryview(data), {}, data.tell()
    for key in map(text, keys):
        (count,) = struct.unpack_from("<q", data, place)
        size = count * _itemsize(kinds[key])
        if count < 0 or place + 8 + size > len(data):
            raise ValueError(f"storage {key[:40]} is not all there")
        places[key] = view[place + 8 : place + 8 + size]
        place += 8 + size
    return content, lambda found: places[found.key]


def _itemsize(kind: str) -> int:
    return 2 if kind == "bf16" else np.dtype(kind).itemsize


def _filled(tensor: Tensor, find: Find) -> Array:
    """A tensor's numbers, where they lie. Raises ValueError if they reach beyond the storage."""
    kind = tensor.storage.kind
    raw = find(tensor.storage)
    dtype = np.dtype("<u2" if kind == "bf16" else kind)
    values = np.frombuffer(raw, dtype, len(raw) // dtype.itemsize)
    if 0 in tensor.size:
        return np.empty(tensor.size, np.float32)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
    elements = 1
    for n in tensor.size:
        elements *= n
    if last >= len(values) or elements > len(values):
        raise ValueError(f"a tensor of {'x'.join(map(str, tensor.size))} in a storage of {len(values):,}")
    strides = [step * dtype.itemsize for step in tensor.stride]
    found: Array = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides, writeable=False)
    if kind == "bf16":  # the upper half of a float32
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return found


def _named(content: Any) -> Mapping[str, Tensor]:
    """The tensors of a state dict by name, also where a checkpoint wraps it, without what wrappers prepend."""
    entries = _entries(content)
    for _ in range(3):
        inner = [entries[key] for key in WRAPPERS if isinstance(entries.get(key), dict)]
        entries = _entries(inner[0]) if inner else entries
    found = {}
    for name, value in entries.items():
        if isinstance(value, Tensor):
            while name.startswith(PREFIXES):
                name = name.partition(".")[2]
            found[name] = value
    return found


def _entries(content: Any) -> dict[str, Any]:
    """A dict's entries under plain strings; nothing for what is no dict."""
    if not isinstance(content, dict):
        return {}
    return {text(key): value for key, value in content.items() if isinstance(key, str | bytes)}
