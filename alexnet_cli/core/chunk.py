"""A few pictures on their way through one thread of a preparation: decoded, resized, encoded and measured."""

from __future__ import annotations

from typing import NamedTuple

from alexnet_cli.core import census, fast_images, images
from alexnet_cli.core.images import Pixels
from alexnet_cli.core.listing import Item
from alexnet_cli.core.memory import Memory
from alexnet_cli.core.plan import Plan
from alexnet_cli.core.statistics import PixelSums
from alexnet_cli.errors import DataError


class Chunk(NamedTuple):
    """Pictures for one thread: their shard, rows in the split and keys, and whether the shard ends with them."""

    shard: int
    rows: list[int]
    keys: list[str]
    items: list[Item]
    last: bool


class Packed(NamedTuple):
    """A chunk's JPEGs, or for a picture that was refused the reason; of those that were not, facts, sums, and name and
    damage of those that have some.
    """

    jpegs: list[bytes | str]
    damaged: list[tuple[str, str]]
    facts: list[census.Fact]
    sums: PixelSums


def process(chunk: Chunk, plan: Plan, memory: Memory, measure: bool) -> Packed:
    """Do it all for every picture of a chunk, in the memory that threads share; `measure`: have them in the sums."""
    packed, pictures = Packed([], [], [], PixelSums()), []
    for row, item in zip(chunk.rows, chunk.items, strict=True):
        try:
            picture, fact, wrong = _picture(row, item, plan, memory)
        except DataError as error:
            packed.jpegs.append(error.what)
        except OSError as error:
            packed.jpegs.append(f"it cannot be read: {error.strerror or error}")
        else:
            packed.jpegs.append(fast_images.encode(picture, plan.quality))
            packed.facts.append(fact)
            packed.damaged.extend([(item.name, wrong)] if wrong else [])
            pictures.append(picture)
    if measure:
        packed.sums.add(pictures)
    return packed


def _picture(row: int, item: Item, plan: Plan, memory: Memory) -> tuple[Pixels, census.Fact, str]:
    """Uint8 256 x 256 x 3, the fact of it, and what is wrong with it. All of its pixels are gone when this returns."""
    data = item.read()
    height, width = fast_images.size(data)
    with memory.taken(height * width):
        rgb, wrong = fast_images.examined(data)
        if plan.exif_rotate:
            rgb = images.upright(rgb, data)
        return fast_images.to_256(rgb), census.fact(row, rgb, data, images.orientation(data)), wrong
