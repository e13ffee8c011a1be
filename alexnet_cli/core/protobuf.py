"""Protocol buffers, read without a schema: the fields of a message in a memory map, nothing copied or trusted.

A field is a tag (its number and its wire type) and a value. Fields that nobody asks for are skipped, repeated numbers
may be packed or not, and a file that lies about a length is refused before anything is read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_cli.errors import WeightsError

VARINT, EIGHT, BYTES, OPEN, CLOSE, FOUR = range(6)
Kind = np.dtype[np.float32] | np.dtype[np.float64]
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float64]
NUMBERS: dict[int, Kind] = {FOUR: np.dtype("<f4"), EIGHT: np.dtype("<f8")}
FIELDS = 100_000  # in a whole file; a network has some hundreds
HIGHEST = 2**29  # readers keep 32 bits of a tag: in a longer one a number could hide
DIMENSIONS = 32

Value = int | memoryview | Numbers


def mapped(path: Path) -> memoryview:
    """The bytes of a file, mapped into memory. Raises WeightsError if it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is empty"
        raise WeightsError(f"{path} cannot be opened: {reason}", "name a weights file") from error


@dataclass
class Budget:
    """How many fields may still be read, of all messages of a file together."""

    left: int = FIELDS

    def spend(self) -> None:
        """Count a field. Raises ValueError when there are too many."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more parts than any network: over {FIELDS:,}")


class Field(NamedTuple):
    """A field's number, its value, and all its bytes (of a run of equal tags: of all of them).

    Varints are unsigned integers; fixed-width numbers arrays, a run being one; the rest is bytes.
    """

    number: int
    value: Value
    whole: memoryview


@dataclass(frozen=True)
class Message:
    """A message that is read anew, front to back, by each question. All raise ValueError where it is damaged."""

    data: memoryview
    budget: Budget = field(default_factory=Budget)

    def fields(self) -> Iterator[Field]:
        """The fields, in the file's order."""
        data, place, depth = self.data, 0, 0
        while place < len(data):
            self.budget.spend()
            start = place
            tag, place = _varint(data, place)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < HIGHEST:
                raise ValueError(f"a field of number {number}")
            value: Value
            if wire == BYTES:
                size, first = _varint(data, place)
                place = first + size
                if place > len(data):
                    raise ValueError(f"field {number} claims {size:,} bytes, {len(data) - first:,} are left")
                value = data[first:place]
            elif wire == VARINT:
                value, place = _varint(data, place)
            elif wire in NUMBERS:
                value, place = _run(data, start, place, NUMBERS[wire])
            elif wire in (OPEN, CLOSE):  # groups, given up before Caffe: what is inside belongs to nobody
                depth += 1 if wire == OPEN else -1
                if depth < 0:
                    raise ValueError(f"field {number} ends a group that did not begin")
                continue
            else:
                raise ValueError(f"field {number} has wire type {wire}, which does not exist")
            if not depth:
                yield Field(number, value, data[start:place])
        if depth:
            raise ValueError("a group that does not end")

    def all(self, number: int) -> list[Value]:
        """The values of a field."""
        return [field.value for field in self.fields() if field.number == number]

    def messages(self, number: int) -> Iterator[Message]:
        """The messages in a field."""
        return (Message(value, self.budget) for value in self.all(number) if isinstance(value, memoryview))

    def message(self, number: int) -> Message:
        """The last message in a field; an empty one if there is none."""
        return next(iter(list(self.messages(number))[-1:]), Message(memoryview(b""), self.budget))

    def text(self, number: int) -> str:
        """The last string in a field, or an empty one."""
        found = [bytes(v[:1000]).decode("utf-8", "replace") for v in self.all(number) if isinstance(v, memoryview)]
        return found[-1] if found else ""

    def integer(self, number: int, default: int = 0) -> int:
        """The last integer in a field."""
        return ([v for v in self.all(number) if isinstance(v, int)] or [default])[-1]

    def integers(self, number: int) -> list[int]:
        """The integers of a repeated field, packed or not. A message has few."""
        found: list[int] = []
        for value in self.all(number):
            if isinstance(value, int):
                found.append(value)
            place = 0
            while isinstance(value, memoryview) and place < len(value):
                one, place = _varint(value, place)
                found.append(one)
                if len(found) > DIMENSIONS:
                    break
            if len(found) > DIMENSIONS:
                raise ValueError(f"field {number} has more than {DIMENSIONS} integers")
        return found

    def number(self, number: int, default: float) -> float:
        """The last float in a field, to the seven digits that a float has."""
        found = self.numbers(number, np.dtype("<f4"))
        return float(f"{float(found[-1]):.7g}") if len(found) else default

    def numbers(self, number: int, kind: Kind) -> Numbers:
        """The numbers of a repeated field, packed or not; uncopied if they lie in one piece."""
        parts: list[Any] = []
        for value in self.all(number):
            if isinstance(value, memoryview):
                if len(value) % kind.itemsize:
                    raise ValueError(f"field {number} has {len(value):,} bytes, no whole number of floats")
                parts.append(np.frombuffer(value, kind))
            elif not isinstance(value, int):
                parts.append(value)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, kind), *parts])


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and the place after it."""
    if place < len(data) and data[place] < 0x80:  # the usual case
        return data[place], place + 1
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("it ends within a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
    raise ValueError("a number of more than ten bytes")


def _run(
    data: memoryview, start: int, place: int, kind: np.dtype[np.float32] | np.dtype[np.float64]
) -> tuple[Any, int]:
    """The numbers of consecutive fields with the tag at data[start:place], and the place after them."""
    tag, end = bytes(data[start:place]), place + kind.itemsize
    if end <= len(data) and data[end : end + len(tag)] != tag:  # one alone, the usual case
        return np.frombuffer(data, kind, 1, place), end
    record = np.dtype([("tag", np.void, len(tag)), ("number", kind)])
    whole, count, step = (len(data) - start) // record.itemsize, 0, 1
    if not whole:
        raise ValueError("it ends within a number")
    while count < whole:  # in growing pieces, so that a short run costs little
        piece = np.frombuffer(data, record, min(step, whole - count), start + count * record.itemsize)
        other = piece["tag"] != np.void(tag)
        if other.any():
            count += int(other.argmax())
            break
        count, step = count + len(piece), 2 * step
    records = np.frombuffer(data, record, count, start)
    return records["number"], start + count * record.itemsize
