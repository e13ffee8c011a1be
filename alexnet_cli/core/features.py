"""A network as a feature extractor: the activations of layer 6 or 7 for many pictures, in one .npz file. No torch.

features        float32 N x units (4096 at full width)   as the next layer sees them: after the nonlinearity and times
                                                         dropout's test-time factor (section 4.2), averaged over views
paths           N strings; pictures that could not be read are left out
labels, wnids   N strings: the likeliest class           indices, probabilities   int64 and float32, of the same
layer, weights  what it is of
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_cli.core.predict import Classifier, Prediction
from alexnet_cli.errors import StorageError


@contextmanager
def writing(path: Path, classifier: Classifier, layer: str) -> Iterator[Callable[[Prediction], None]]:
    """A function that takes predictions; when the block ends well, `path` appears whole, otherwise not at all.

    Rows go to the disk as they come, so that any number of pictures fits.

    Raises:
        StorageError: the file cannot be written.
    """
    rows, whole = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("rows", "tmp"))
    kept: list[Prediction] = []
    try:
        with rows.open("wb") as file:

            def add(prediction: Prediction) -> None:
                if prediction.features is None:
                    return
                try:
                    file.write(prediction.features.tobytes())
                except OSError as error:
                    raise _unwritable(path, error) from error
                kept.append(Prediction(prediction.path, prediction.top[:1]))

            yield add
        units = rows.stat().st_size // 4 // len(kept) if kept else 0
        values = np.memmap(rows, np.float32, "r", shape=(len(kept), units)) if kept else np.empty((0, 0), np.float32)
        with whole.open("wb") as file:
            np.savez(file, **_arrays(kept, values), layer=np.array(layer), weights=np.array(str(classifier.path)))
        whole.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        for left in (rows, whole):
            left.unlink(missing_ok=True)


def _arrays(kept: list[Prediction], values: Any) -> dict[str, Any]:
    best = [prediction.top[0] for prediction in kept]
    return {
        "features": values,
        "paths": np.array([prediction.path for prediction in kept], np.str_),
        "labels": np.array([label.label for label in best], np.str_),
        "wnids": np.array([label.wnid or "" for label in best], np.str_),
        "indices": np.array([label.index for label in best], np.int64),
        "probabilities": np.array([label.probability for label in best], np.float32),
    }


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}", "choose another -o, or free some space")
