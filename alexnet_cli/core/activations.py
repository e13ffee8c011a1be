"""What one picture excites on its way through the network, layer by layer, and what it is taken for. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.images import Pixels
from alexnet_cli.core.predict import Label, ranked
from alexnet_cli.core.responses import answers
from alexnet_cli.core.session import Convolution, Layer, Session
from alexnet_cli.core.views import views
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import WeightsError

TOP = 5  # answers, as in figure 4 of the paper

Array = npt.NDArray[np.float32]
NONLINEAR: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: (0.5 + 0.5 * np.tanh(0.5 * x)).astype(np.float32),  # where exp(-x) would overflow, too
}
LOWEST_AND_REST = {"relu": (0.0, 0.0), "tanh": (-1.0, 0.0), "sigmoid": (0.0, 0.5)}


@dataclass(frozen=True)
class Activation:
    """What the units of a layer make of a picture, right after the nonlinearity: before normalisation and pooling."""

    layer: Convolution | Layer
    values: Array
    """Maps x rows x columns, tower 1 first; layers 6 and 7: units, as the next layer sees them."""
    towers: int
    lowest: float
    """What a unit can answer at least: 0, or with tanh as far below 0 as above."""
    rest: float
    """What a unit that hears nothing answers: 0, or half of what a sigmoid can answer."""

    @property
    def maps(self) -> bool:
        """Whether the units are arranged in maps."""
        return self.values.ndim == 3

    def units(self, tower: int) -> range:
        """The numbers of a tower's maps or units; towers count from 0."""
        each = len(self.values) // self.towers
        return range(tower * each, (tower + 1) * each)

    def peaks(self) -> Array:
        """Of each map the highest value; of a unit its own."""
        return self.values.max(axis=(1, 2)) if self.maps else self.values

    def active(self, tower: int | None = None) -> float:
        """The share of units, of a tower or of all, that answer more than at rest; each place of a map is a unit."""
        units = self.units(tower) if tower is not None else range(len(self.values))
        return float(np.mean(self.values[units.start : units.stop] > self.rest))

    def strongest(self, tower: int) -> list[int]:
        """A tower's maps or units by their highest value, strongest first; equal ones in their order."""
        units = self.units(tower)
        order = np.argsort(-self.peaks()[units.start : units.stop], kind="stable")
        return [units[i] for i in order.tolist()]


@dataclass(frozen=True)
class Course:
    """A picture from its pixels to its answers."""

    seen: Pixels
    """uint8 S x S x 3: the centre crop, 224 x 224 or 227 x 227."""
    layers: tuple[Activation, ...]
    top: tuple[Label, ...]


def course(model: Model, picture: Pixels) -> Course:
    """Follow the centre view of a decoded picture, uint8 256 x 256 x 3, through all layers.

    Raises:
        WeightsError: what the network computes is no number.
    """
    layers = tuple(_convolutions(model, picture))
    six, _ = _units(model, picture, "fc6")
    seven, chances = _units(model, picture, "fc7")
    seen = views(picture, model.recipe.input_size, 1)[0].transpose(1, 2, 0)
    return Course(seen, (*layers, six, seven), ranked(chances, model.classes, TOP))


def _convolutions(model: Model, picture: Pixels) -> Iterator[Activation]:
    recipe = model.recipe
    for layer in get_args(Convolution):
        before = answers(Session(model, few=True, layer=layer), [picture])[0]
        values = NONLINEAR[recipe.activation](before)
        yield Activation(layer, values, recipe.towers, *LOWEST_AND_REST[recipe.activation])


def _units(model: Model, picture: Pixels, layer: Layer) -> tuple[Activation, Array]:
    """Layer 6 or 7, and the probabilities of the classes."""
    session, recipe = Session(model, few=True, layer=layer), model.recipe
    chances, units = (values[0] for values in session.features(views(picture, session.crop, 1)))
    if not (np.isfinite(units).all() and np.isfinite(chances).all()):
        raise WeightsError(f"{session.path}: what the network computes is no number", "its weights are damaged")
    factor = 1 if recipe.dropout_inverted else 1 - recipe.dropout
    lowest, rest = LOWEST_AND_REST[recipe.activation]
    return Activation(layer, units, recipe.towers, factor * lowest, factor * rest), chances


def layer_records(found: Course, towers: list[int]) -> list[dict[str, Any]]:
    """The layers for programs; the strongest unit of each of these towers, none where all are at rest."""
    records = []
    for part in found.layers:
        best = [(tower, part.strongest(tower)[0]) for tower in towers]
        peaks = part.peaks()
        records.append({
            "layer": part.layer,
            "units": len(part.values),
            "side": part.values.shape[1] if part.maps else None,
            "active": part.active(),
            "strongest": [
                {
                    "tower": tower + 1,
                    "unit": unit if part.active(tower) else None,
                    "response": float(peaks[unit]),
                    "active": part.active(tower),
                }
                for tower, unit in best
            ],
        })  # fmt: skip
    return records
