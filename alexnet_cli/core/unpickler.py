"""A pickle machine that can build numbers, strings, lists, tuples, dicts, arrays and nothing else.

A pickle is a program. This machine knows the instructions of protocol 2 only and calls only functions that its caller
listed, which are ours: nothing is imported, no attribute is set, and NumPy's own unpickling, which trusts what it
reads, is not involved. Python 2's strings come as bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt

INSTRUCTIONS = frozenset(
    name.encode("latin-1")[0]
    for name in "\x80.(012N\x88\x89IJKMLG\x8a\x8bFSTUVXBC]ael)t\x85\x86\x87}dsughjpqrcRb\x81ioQP"
)
NUMBERS = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8) if (kind, size) != ("f", 1)} | {"b1"}
LONGEST = 1000  # characters of a name
KEYS = (str, bytes, int, float, type(None))

Allowed = Mapping[tuple[str, str], Any]
Array = npt.NDArray[Any]


class Inert:
    """Stands where an object was that nobody needs; all that came with it is gone."""


class PickledType:
    """An array's element type, as it comes: first the kind, then the byte order."""

    def __init__(self, kind: object, *_: object) -> None:
        self.kind, self.order = text(kind), "="

    def build(self, state: object) -> None:
        """Take the byte order."""
        if isinstance(state, tuple) and len(state) > 1:
            self.order = text(state[1])

    def dtype(self) -> np.dtype[Any]:
        """The type. Raises ValueError for anything but numbers."""
        if self.kind not in NUMBERS or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"elements of type {self.order}{self.kind}")
        return np.dtype(self.order.replace("=", "<") + self.kind)


class PickledArray:
    """An array as it comes: first nothing, then its state."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def build(self, state: object) -> None:
        """Take version, shape, type, order and bytes."""
        self.state = state

    def array(self) -> Array:
        """The array, over the bytes of the pickle. Raises ValueError if shape, type and bytes disagree."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array without its state")
        _, shape, kind, fortran, raw = self.state
        if not isinstance(kind, PickledType) or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise ValueError("an array of something else than numbers")
        if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array of no possible shape")
        count = 1
        for n in shape:
            count *= n
        dtype = kind.dtype()
        if count * dtype.itemsize != len(raw):
            raise ValueError(f"an array of {'x'.join(map(str, shape))} {dtype} with {len(raw):,} bytes")
        return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def scalar(kind: object, raw: object = b"") -> object:
    """NumPy's number from its bytes; Inert for what is none."""
    try:
        assert isinstance(kind, PickledType)
        assert isinstance(raw, bytes)
        return np.frombuffer(raw, kind.dtype())[0].item()
    except (AssertionError, ValueError, IndexError):
        return Inert()


def latin1(characters: object, encoding: object = "latin1") -> bytes:
    """Bytes, which Python 3 spells as text in protocol 2."""
    if not isinstance(characters, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it turns something into bytes that is no text")
    return characters.encode("latin-1")


def container(items: object = ()) -> dict[Any, Any]:
    """A dict in the place of an OrderedDict."""
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError("an OrderedDict of something else than pairs")
    found: dict[Any, Any] = {}
    for item in items:
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise pickle.UnpicklingError("an OrderedDict of something else than pairs")
        _put(found, item[0], item[1])
    return found


NUMPY: Allowed = {
    **{
        (f"numpy.{core}.multiarray", name): made
        for core in ("core", "_core")
        for name, made in (("_reconstruct", PickledArray), ("scalar", scalar))
    },
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): PickledType,
    ("collections", "OrderedDict"): container,
    ("_codecs", "encode"): latin1,
}


def text(value: object) -> str:
    """A name, as Python 2 or 3 pickled it; ValueError for anything else, or longer than any name."""
    if not isinstance(value, str | bytes) or len(value) > LONGEST:
        raise ValueError(f"{type(value).__name__} where a name should be")
    return value.decode("latin-1") if isinstance(value, bytes) else value


def load(file: IO[bytes], allowed: Allowed, persistent: Callable[[object], object] | None = None) -> Any:
    """What the pickle at the file's place builds; `allowed` maps (module, name) to our own function, or to a value.

    A name that maps to None, or whose module maps so with the name "*", becomes Inert.

    Raises:
        pickle.UnpicklingError: it asks for something else, or is damaged.
    """
    machine = _Machine(file, allowed, persistent)
    try:
        return machine.load()
    except pickle.UnpicklingError:
        raise
    except EOFError as error:
        raise pickle.UnpicklingError("it ends too early") from error
    except (MemoryError, RecursionError) as error:
        raise pickle.UnpicklingError("it asks for more memory than there is") from error
    except Exception as error:  # a damaged pickle makes any instruction fail, in any way
        raise pickle.UnpicklingError(f"it is no such pickle ({type(error).__name__})") from error


class _Machine(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: function for code, function in pickle._Unpickler.dispatch.items() if code in INSTRUCTIONS
    }

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, file: IO[bytes], allowed: Allowed, persistent: Callable[[object], object] | None) -> None:
        super().__init__(file, encoding="bytes")
        self.allowed, self.persistent = allowed, persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if (module, "*") in self.allowed:
            return Inert
        raise pickle.UnpicklingError(f"it wants to use {module[:60]}.{name[:60]}, which no tensor needs")

    def persistent_load(self, pid: object) -> object:
        if self.persistent is None:
            raise pickle.UnpicklingError("it refers to something outside itself")
        return self.persistent(pid)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if function is Inert:
            self.stack[-1] = Inert()
            return
        if not callable(function) or not any(function is known for known in self.allowed.values()):
            raise pickle.UnpicklingError("it calls something that is no function of ours")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, PickledArray | PickledType):
            made.build(state)
        elif not isinstance(made, Inert | dict):
            raise pickle.UnpicklingError("it changes something that it did not make")

    def load_newobj(self) -> None:
        self.stack.pop()
        self._inert(self.stack.pop())

    def load_obj(self) -> None:
        self._inert(self.pop_mark()[0])

    def load_inst(self) -> None:
        module, name = self.readline()[:-1].decode("ascii"), self.readline()[:-1].decode("ascii")
        self.pop_mark()
        self._inert(self.find_class(module, name))

    def _inert(self, made: object) -> None:
        if made is not Inert:
            raise pickle.UnpicklingError("it makes an object that is no array")
        self.append(Inert())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def load_dict(self) -> None:
        items = self.pop_mark()
        found: dict[Any, Any] = {}
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(found, key, value)
        self.append(found)

    dispatch.update({
        pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build, pickle.NEWOBJ[0]: load_newobj,
        pickle.OBJ[0]: load_obj, pickle.INST[0]: load_inst, pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict,
    })  # fmt: skip


def _put(target: object, key: object, value: object) -> None:
    """Set an entry of a dict. Keys are plain: the hash of nested tuples can take for ever."""
    if not isinstance(target, dict):
        if isinstance(target, Inert):
            return
        raise pickle.UnpicklingError("it sets an entry of something that is no dict")
    if isinstance(key, KEYS):
        target[key] = value
