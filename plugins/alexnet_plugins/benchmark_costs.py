"""What a step costs over several devices, on paper: docs/parallel.md shows these tables and says what they mean.

A step is computing, plus exchanging activations, during which nothing else is done, plus what of the exchange of
gradients outlasts the backward pass that it runs beside. Towers of more than two devices are replicas of pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from alexnet_cli.core.architecture import layer_widths
from alexnet_cli.core.network import Network, parameters_by_name
from alexnet_cli.recipe import PAPER, Recipe

Parallel = Literal["tower", "data", "hybrid"]
WAYS: tuple[Parallel, ...] = ("tower", "data", "hybrid")
COUNTS = (2, 4, 8, 16, 32, 64)
FLOAT, HALF = 4, 2  # bytes
CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
CLASSES = 1000
LAYERS = (*CONVOLUTIONS, "fc6", "fc7", "fc8")
BATCH = PAPER.batch_size
FLOP = 4.35e9  # to train on an image, as `alexnet benchmark train` counts


@dataclass(frozen=True)
class Link:
    """What lies between devices: bytes a second that each sends while it receives as many, seconds before the first."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Device:
    """Floating-point operations a second that it keeps up, and seconds a step that it takes besides.

    A CPU moves what it sends itself, and does not compute meanwhile.
    """

    speed: float
    besides: float
    overlaps: bool = True


LINKS = (Link("NVLink", 200e9, 10e-6), Link("PCIe 4", 20e9, 15e-6), Link("Ethernet, 25 Gbit/s", 2.8e9, 50e-6))
GPU = Device(50e12, 1e-3)


def parameters(recipe: Recipe) -> dict[str, int]:
    """Layer -> parameters of the whole network."""
    with torch.device("meta"):
        network = Network(recipe, CLASSES)
    counts: Counter[str] = Counter()
    for name, parameter in parameters_by_name(network):
        counts[name.partition(".")[0]] += parameter.numel()
    return counts


def activations(recipe: Recipe, batch: int, devices: int, way: Parallel, size: int = FLOAT) -> dict[str, float]:
    """Layer -> bytes that each device sends of what the network computes, forward and back; `size` is of a number.

    The logits and their gradients are float32 in any case.
    """
    c = {layer: recipe.towers * n for layer, n in layer_widths(recipe).items()}
    if way == "tower":
        images = batch / (devices / 2)  # of a pair
        halves = {"conv3": 13 * 13 * c["conv2"] / 2, "fc6": 6 * 6 * c["conv5"] / 2, "fc7": c["fc6"] / 2}
        return {layer: 2 * images * n * size for layer, n in halves.items()} | {"fc8": images * CLASSES * FLOAT}
    if way == "hybrid":
        others, images = devices - 1, batch / devices  # of one
        return {
            "fc6": 2 * others * images * 6 * 6 * c["conv5"] * size,
            "fc7": 2 * others * batch * c["fc6"] / devices * size,
            "fc8": others / devices * 2 * batch * CLASSES * FLOAT + others * images * CLASSES * FLOAT,
        }
    return {}


def gradients(recipe: Recipe, devices: int, way: Parallel, size: int = FLOAT) -> dict[str, float]:
    """Layer -> bytes of gradients that each device sends, around a ring; `size` is of a number."""
    counts = parameters(recipe)
    replicas, split = (devices // 2, 2) if way == "tower" else (devices, 1)
    kept = CONVOLUTIONS if way == "hybrid" else tuple(counts)
    ring = 2 * (replicas - 1) / replicas
    sent = {layer: ring * counts[layer] / split * size for layer in kept}
    if way == "tower":
        sent["fc8"] += ring * CLASSES / 2 * size  # both towers hold the whole bias
    return sent if ring else {}


def sent(recipe: Recipe, batch: int, devices: int, way: Parallel, size: int = FLOAT) -> dict[str, float]:
    """Layer -> bytes that each device sends in a step; activations have `size` bytes, gradients are float32."""
    found = Counter(activations(recipe, batch, devices, way, size))
    for layer, count in gradients(recipe, devices, way).items():
        found[layer] += count  # type: ignore[assignment]  # counts of bytes need not be whole
    return dict(found)


def messages(devices: int, way: Parallel) -> tuple[int, int]:
    """How many messages follow one another, of activations and of gradients; each exchange goes along a tree.

    The gradients of a layer go together.
    """
    deep = math.ceil(math.log2(devices))
    if way == "tower":  # fc8 is a sum, which goes up the tree and down
        return 3 * 2 + 2, len(LAYERS) * 2 * (deep - 1)
    if way == "hybrid":  # two to say how many images each has; fc6 and fc7 both ways; the sum; the logits' gradient
        return (2 + 4 + 2 + 1) * deep, len(CONVOLUTIONS) * 2 * deep
    return 0, len(LAYERS) * 2 * deep


def step(
    device: Device, link: Link, batch: int, devices: int, way: Parallel, size: int = HALF, gradient_size: int = FLOAT
) -> float:
    """Seconds of a step of recipe `paper` on a batch over all devices."""
    computing = batch * FLOP / device.speed / devices
    waiting = sum(activations(PAPER, batch, devices, way, size).values()) / link.bandwidth
    behind = sum(gradients(PAPER, devices, way, gradient_size).values()) / link.bandwidth
    before, after = (count * link.latency for count in messages(devices, way))
    backward = computing * 2 / 3
    late = max(0.0, behind + after - backward) if device.overlaps else behind + after
    return device.besides + computing + waiting + before + late


def alone(device: Device, batch: int) -> float:
    """Seconds of a step on one device."""
    return device.besides + batch * FLOP / device.speed


def here(rate: float, exchange: float, way: Parallel, size: int, batch: int = 64) -> float:
    """Images per second to expect of two processes on the CPU that computes `rate` of them in one process.

    `exchange` is the seconds that it takes to send what conv3 needs, there and back, which tells the bandwidth.
    """
    link = Link("between processes", activations(PAPER, batch, 2, "tower", size)["conv3"] / exchange, 0.0)
    return batch / step(Device(rate / 2 * FLOP, 0.0, overlaps=False), link, batch, 2, way, size)


def bytes_table(batch: int = BATCH) -> str:
    """MB that each device sends in a step of recipe `paper` in float32, by layer, as Markdown."""
    columns = {f"{way}, {n}": sent(PAPER, batch, n, way) for n in (2, 8, 64) for way in WAYS}
    rows = [
        [layer, *(f"{found[layer] / 1e6:.2f}" if layer in found else "" for found in columns.values())]
        for layer in LAYERS
    ]
    rows.append(["all", *(f"{sum(found.values()) / 1e6:.1f}" for found in columns.values())])
    low = [sum(sent(PAPER, batch, n, way, HALF).values()) / 1e6 for n in (2, 8, 64) for way in WAYS]
    rows.append(["all, bf16", *(f"{total:.1f}" for total in low)])
    return markdown(["MB", *columns], rows)


def speed_table(each: int | None = None) -> str:
    """How many times as fast as one device, on each link, as Markdown; `each`: images of a device, else 128 in all."""
    rows = []
    for link in LINKS:
        for way, gradient_size, name in [*((way, FLOAT, way) for way in WAYS), ("data", HALF, "data, `--compress`")]:
            cells = []
            for devices in COUNTS:
                images = each * devices if each else BATCH
                many = step(GPU, link, images, devices, way, HALF, gradient_size)
                cells.append(f"{alone(GPU, BATCH) * images / BATCH / many:.1f}")
            rows.append([link.name, name, *cells])
    return markdown(["link", "way", *(str(n) for n in COUNTS)], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table as text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)
