"""The ranges of a network's activations on training pictures: what int8 needs to know beforehand. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from alexnet_cli.core import onnx_int8
from alexnet_cli.core.devices import cores
from alexnet_cli.core.onnx_int8 import Range

PICTURES = 256  # lowest and highest values change the logits by less than 1 % of their spread beyond 64
BATCH = 8


def ranges(proto: onnx.ModelProto, crops: npt.NDArray[np.uint8]) -> dict[str, Range]:
    """Lowest and highest value of each tensor that `onnx_int8` quantises, over uint8 N x 3 x S x S, N > 0."""
    names = onnx_int8.points(proto)
    run = _opened(proto, names)
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for start in range(0, len(crops), BATCH):
        values = run.run(names, {"input": crops[start : start + BATCH].astype(np.float32)})
        low = np.minimum(low, [value.min() for value in values])
        high = np.maximum(high, [value.max() for value in values])
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _opened(proto: onnx.ModelProto, names: list[str]) -> Any:
    """A session on the CPU that yields these tensors as well."""
    import onnxruntime

    telling = onnx.ModelProto()
    telling.CopyFrom(proto)
    telling.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, cores()
    return onnxruntime.InferenceSession(telling.SerializeToString(), options, providers=["CPUExecutionProvider"])
