"""Reads Caffe's .caffemodel and .binaryproto with Google's protobuf library.

A network has its layers in `layer` (since September 2014) or in the older `layers`. Weights are laid out as in this
toolkit, input channels are BGR. Caffe rounds pooling up and clips windows at the edge, as this network does. It
subtracts the part of the mean image that lies under the crop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from alexnet_cli.core.model.architecture import POOL_STRIDE
from alexnet_cli.errors import WeightsError
from alexnet_plugins.import_weights import imported
from alexnet_plugins.import_weights.imported import CAFFE_MEAN, Array, ImportedNetwork, corrupt, unsupported

# The part of caffe.proto that is read; the library skips all other fields. Packed floats (data, double_data) are
# declared as bytes, as they are in the file: NumPy reads them without one Python object per number.
PROTO = """
message BlobShape { repeated int64 dim = 1; }
message BlobProto {
  optional int32 num = 1 [default = 1];
  optional int32 channels = 2 [default = 1];
  optional int32 height = 3 [default = 1];
  optional int32 width = 4 [default = 1];
  optional bytes data = 5;
  optional BlobShape shape = 7;
  optional bytes double_data = 8;
}
message ConvolutionParameter {
  repeated uint32 pad = 3;
  repeated uint32 stride = 6;
}
message LRNParameter {
  optional uint32 local_size = 1 [default = 5];
  optional float alpha = 2 [default = 1];
  optional float beta = 3 [default = 0.75];
  optional int32 norm_region = 4;
  optional float k = 5 [default = 1];
}
message PoolingParameter {
  optional int32 pool = 1;
  optional uint32 kernel_size = 2;
  optional uint32 stride = 3 [default = 1];
  optional uint32 pad = 4;
}
message TransformationParameter {
  optional float scale = 1 [default = 1];
  optional uint32 crop_size = 3;
  repeated float mean_value = 5;
}
message LayerParameter {
  optional string name = 1;
  optional string type = 2;
  repeated BlobProto blobs = 7;
  optional TransformationParameter transform_param = 100;
  optional ConvolutionParameter convolution_param = 106;
  optional LRNParameter lrn_param = 118;
  optional PoolingParameter pooling_param = 121;
}
message V1LayerParameter {
  optional bytes layer = 1;
  optional string name = 4;
  optional int32 type = 5;
  repeated BlobProto blobs = 6;
  optional ConvolutionParameter convolution_param = 10;
  optional LRNParameter lrn_param = 18;
  optional PoolingParameter pooling_param = 19;
  optional TransformationParameter transform_param = 36;
}
message NetParameter {
  optional string name = 1;
  repeated V1LayerParameter layers = 2;
  repeated int32 input_dim = 4;
  repeated LayerParameter layer = 100;
}
"""
MESSAGE = re.compile(r"message (\w+) \{(.*?)\}", re.DOTALL)
FIELD = re.compile(r"(optional|repeated) (\w+) (\w+) = (\d+)(?: \[default = (.+)\])?;")
WORDS = {
    "Convolution": "conv", "InnerProduct": "fc", "ReLU": "relu", "LRN": "norm", "Pooling": "pool",
    4: "conv", 14: "fc", 18: "relu", 15: "norm", 17: "pool",
}  # fmt: skip
NO_EFFECT = {  # layers that change nothing at test time
    "Data", "ImageData", "Input", "DummyData", "HDF5Data", "MemoryData", "WindowData", "Dropout", "Softmax",
    "SoftmaxWithLoss", "Accuracy", "Split", "Flatten", "Silence", "MultinomialLogisticLoss",
    5, 12, 24, 29, 32, 9, 6, 20, 21, 1, 22, 8, 36, 16,
}  # fmt: skip
WITHIN_CHANNEL = 1  # of LRNParameter.norm_region


def _message_classes() -> dict[str, Any]:
    """Return the classes of the messages in PROTO, by name."""
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="alexnet/caffe.proto", package="caffe", syntax="proto2")
    for message, fields in MESSAGE.findall(PROTO):
        message_type = file.message_type.add(name=message)
        for label, kind, name, number, default in FIELD.findall(fields):
            field = message_type.field.add(name=name, number=int(number), default_value=default or None)
            field.label = field_type.Label.Value(f"LABEL_{label.upper()}")
            if kind[0].isupper():
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}")) for name in names}


MESSAGES = _message_classes()


def read_network(path: Path) -> ImportedNetwork:
    """Read a .caffemodel.

    Raises:
        WeightsError: it is damaged, or another network.
    """
    try:
        return _convert(path, MESSAGES["NetParameter"].FromString(path.read_bytes()))
    except (DecodeError, ValueError, OverflowError) as error:
        raise corrupt(path, error) from error


def read_blob(path: Path) -> Array:
    """Return the array in a .binaryproto, such as a mean image. Raises WeightsError if it is damaged."""
    try:
        return _to_array(MESSAGES["BlobProto"].FromString(path.read_bytes()))
    except (DecodeError, ValueError, OverflowError) as error:
        raise corrupt(path, error) from error


def _to_array(blob: Any) -> Array:
    """Return the numbers of a BlobProto in its shape, given in the new way or the old. Raises ValueError."""
    is_double = blob.HasField("double_data")
    values = np.frombuffer(blob.double_data if is_double else blob.data, "<f8" if is_double else "<f4")
    shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
    return imported.reshape_array(values, shape)


def _convert(path: Path, net: Any) -> ImportedNetwork:
    is_old = not net.layer
    all_layers = net.layers if is_old else net.layer
    if not all_layers:
        raise WeightsError(f"{path} is not a .caffemodel: it has no layers", "give a weights file")
    for layer in all_layers:
        if is_old and layer.HasField("layer"):
            hint = "convert it with Caffe's upgrade_net_proto_binary"
            raise unsupported(path, "it is in Caffe's format of 2013", hint)
        if layer.type not in NO_EFFECT and layer.type not in WORDS:
            raise unsupported(path, f"layer {layer.name} is of type {layer.type}, which this network does not have")
    layers = [layer for layer in all_layers if layer.type in WORDS]
    words = [WORDS[layer.type] for layer in layers]
    by_word: dict[str, list[Any]] = {word: [] for word in WORDS.values()}
    for word, layer in zip(words, layers, strict=True):
        by_word[word].append(layer)
    tensors = _read_tensors(path, by_word)
    for layer in by_word["pool"]:
        _check_pooling(path, layer)
    orders, is_shown = imported.find_stage_orders(path, words)
    if not is_shown and "caffenet" in net.name.lower():
        orders = {"stage1_order": "relu-pool-norm", "stage2_order": "relu-pool-norm"}
    norm = imported.merge_settings(path, [_norm_settings(layer.lrn_param) for layer in by_word["norm"]])
    data_layers = [layer for layer in all_layers if layer.type in NO_EFFECT]
    crop, mean = _read_transform(path, data_layers, net.input_dim[2:3])
    values = {"mean": "rgb", "input_size": crop, "edge_padding": crop != 224} | norm | orders
    file_format = "Caffe, old `layers`" if is_old else "Caffe, `layer`"
    recipe = imported.build_recipe(path, values)
    return ImportedNetwork(path, file_format, tensors, recipe, "bgr", mean, is_shown)


def _read_tensors(path: Path, by_word: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Array, Array]]:
    """Return weight and bias of each layer, once its geometry is this network's."""
    with_weights = [[layer for layer in by_word[word] if layer.blobs] for word in ("conv", "fc")]
    tensors: dict[str, tuple[Array, Array]] = {}
    for name, layer in imported.name_layers(path, *with_weights).items():
        if len(layer.blobs) != 2:
            raise unsupported(path, f"{name} has {len(layer.blobs)} tensors, in this network a weight and a bias")
        tensors[name] = imported.check_tensors(path, name, *map(_to_array, layer.blobs))
        if layer.HasField("convolution_param"):  # missing where only weights were kept
            settings = layer.convolution_param
            imported.check_geometry(path, name, [1, *settings.stride][-1], [0, *settings.pad][-1])
    return tensors


def _check_pooling(path: Path, layer: Any) -> None:
    settings = layer.pooling_param
    if settings.pool or settings.pad or (settings.kernel_size, settings.stride) != (3, POOL_STRIDE):
        kind = "average" if settings.pool else "max"
        size = f"{settings.kernel_size}x{settings.kernel_size}"
        what = f"{layer.name} is {kind} pooling of {size}, stride {settings.stride}, padding {settings.pad}"
        raise unsupported(path, f"{what}; this network has max pooling of 3x3, stride {POOL_STRIDE}, without padding")


def _norm_settings(settings: Any) -> dict[str, Any]:
    """Return the recipe values of a response normalization; missing fields have Caffe's defaults."""
    is_within = settings.norm_region == WITHIN_CHANNEL
    return {
        "lrn": "within-map" if is_within else "across-maps",
        "lrn_size": settings.local_size,
        "lrn_alpha": imported.to_decimal(settings.alpha),
        "lrn_beta": imported.to_decimal(settings.beta),
        "lrn_k": 1.0 if is_within else imported.to_decimal(settings.k),  # Caffe ignores k within a map
    }


def _read_transform(
    path: Path, data_layers: Sequence[Any], input_sides: Sequence[int]
) -> tuple[int, tuple[float, float, float]]:
    """Return side of the crop (227 if the file has none) and mean color (RGB, 0..255; ILSVRC's if it has none)."""
    crop, mean = [227, *input_sides][-1], CAFFE_MEAN
    for layer in data_layers:
        settings = layer.transform_param
        crop = settings.crop_size or crop
        if settings.scale != 1.0:
            raise unsupported(path, f"{layer.name} multiplies pixels by {settings.scale:g}")
        if len(settings.mean_value) == 3:
            blue, green, red = settings.mean_value
            mean = (red, green, blue)
    if crop not in (224, 227):
        raise unsupported(path, f"its crops have {crop} pixels, in this network 227 or 224")
    return crop, mean
