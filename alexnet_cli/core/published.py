"""What has been published for ILSVRC 2012, to be put beside an evaluation: errors of one network on its 50,000
validation images. The paper gives no centre-view error for that set (39.0 and 18.3 % are of ILSVRC-2010). No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alexnet_cli.core.ilsvrc import is_ilsvrc
from alexnet_cli.core.sources import ClassName
from alexnet_cli.recipe import Recipe

IMAGES = 50_000


@dataclass(frozen=True)
class Figure:
    """Errors as shares of the images, whose they are, and with how many views."""

    source: str
    views: int
    top1_error: float
    top5_error: float


PAPER = Figure("the paper, one network", 10, 0.407, 0.182)
FIGURES = {
    "krizhevsky": Figure("the authors' log of net #145", 10, 0.40664, 0.18210),
    "caffe": Figure("bvlc_alexnet of Caffe", 1, 0.429, 0.198),
    "caffenet": Figure("bvlc_reference_caffenet of Caffe", 1, 0.426, 0.196),
}


def published(recipe: Recipe, data: Sequence[ClassName]) -> Figure | None:
    """The figure of the recipe, or else the paper's, if the classes are those of ILSVRC 2012."""
    if not is_ilsvrc([name.wnid or "" for name in data]):
        return None
    pools_first = recipe.name == "caffe" and recipe.stage1_order == "relu-pool-norm"
    return FIGURES.get("caffenet" if pools_first else recipe.name, PAPER)
