"""What another program subtracted from pictures: a .npy, Caffe's .binaryproto, or cuda-convnet's batches.meta."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.caffemodel import blob
from alexnet_cli.core.cuda_convnet import entries, unpickled
from alexnet_cli.core.foreign import Array, damaged
from alexnet_cli.core.protobuf import Message, mapped
from alexnet_cli.core.unpickler import PickledArray
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import SIDE

PICKLE, NPY = b"\x80\x02", b"\x93NUMPY"


def read(path: Path, bgr: bool) -> npt.NDArray[np.float32]:
    """Float32 3 x 256 x 256, RGB, 0..255; `bgr` says that the file has blue first. A colour fills every pixel.

    Raises:
        WeightsError: it is damaged, or no mean of pictures of 256 x 256.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is no file", "name a mean file")
    start = bytes(mapped(path)[:6])
    try:
        if start == NPY:
            found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif start[:2] == PICKLE:
            meta = entries(unpickled(path)).get("data_mean")
            if not isinstance(meta, PickledArray):
                raise ValueError("it has no data_mean")
            found = meta.array()
        else:
            found = blob(Message(mapped(path)))
    except (ValueError, OSError, EOFError, OverflowError) as error:
        raise damaged(path, error) from error
    if found.dtype.kind not in "fiu" or found.size not in (3, 3 * SIDE * SIDE):
        shape = "x".join(map(str, found.shape))
        raise WeightsError(f"{path} is {shape} {found.dtype}, no mean of 3x256x256 pixels or 3 colours", "try another")
    mean = np.broadcast_to(found.reshape(3, -1).astype(np.float32), (3, SIDE * SIDE)).reshape(3, SIDE, SIDE)
    if not (np.isfinite(mean).all() and mean.min() >= 0 and mean.max() <= 255):
        raise WeightsError(f"{path} has values outside 0..255", "the mean of pictures in 0..255 is needed")
    return np.ascontiguousarray(mean[::-1] if bgr else mean)
