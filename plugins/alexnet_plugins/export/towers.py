"""How often the whole network and each tower alone are right, for the page of `export --format html`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.evaluation import baselines
from alexnet_cli.core.evaluation.evaluate import Classify, match_classes
from alexnet_cli.core.evaluation.towers import NETWORKS, WHOLE, count_sample
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.model_file import Model, silence_tower


def measure_towers(model: Model, data: Dataset, advance: Callable[[int], None]) -> dict[str, Any]:
    """Return what the page shows of the answers to at most SAMPLE validation images.

    For each of NETWORKS, in color and in gray: the share of right answers, the most frequent answer with its share, and
    a remark if guessing is as good. `constant` is the share of right answers of always saying the most frequent class.
    `advance` is called with the number of images that a batch had.

    Raises:
        DataError: the network does not know the classes of the data set.
    """
    output_of, split = match_classes(model.classes, data.classes, model.path), data.split("val")
    classify = {tower: _make_classifier(model if tower is None else silence_tower(model, tower)) for tower in NETWORKS}
    counts = count_sample(classify, model, split, output_of, advance)
    true = counts.evaluations[WHOLE].confusion.sum(axis=1)
    guessing, majority = baselines.guessing_error(len(true)), baselines.majority_error(true)
    shown = []
    for error in counts.list_errors():
        remark = baselines.describe_no_better(error.top1_error, error.top1_error_interval[1], guessing, majority)
        answers = counts.evaluations[error.without_tower, error.grayscale].confusion.sum(axis=0)
        shown.append({
            "right": 1 - error.top1_error, "answer": int(answers.argmax()),
            "share": int(answers.max()) / counts.images,
            "remark": remark.partition(" (")[0],  # without the baseline's error: the page says what is right
        })  # fmt: skip
    networks = list(zip(shown[:3], shown[3:], strict=True))  # each in color and in gray
    return {"images": counts.images, "constant": 1 - majority, "networks": networks}


def _make_classifier(model: Model) -> Classify:
    session = Session(model)

    def classify(images: Tensor) -> Any:
        return session.probabilities(
            np.concatenate([make_views(image, session.recipe.input_size, 1) for image in images.numpy()])
        )

    return classify
