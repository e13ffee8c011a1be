"""Caffe's .caffemodel and .binaryproto, parsed by Google's runtime.

A network holds its layers as `layer` (since September 2014) or as the older `layers`. The weights lie as here; the
channels of a picture are BGR. Caffe rounds pooling up and clips windows at the edge, as this network does, and
subtracts the part of the mean that lies under the crop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import CAFFE
from alexnet_plugins.import_weights import imported
from alexnet_plugins.import_weights.imported import CAFFE_MEAN, Array, ImportedNetwork, corrupt, unsupported

# The part of caffe.proto that is read; the runtime skips all other fields. Packed floats (data, double_data) are
# declared as bytes, which is what they are in the file: NumPy reads them without a Python object per number.
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
IDLE = {  # what does nothing to a picture at test time
    "Data", "ImageData", "Input", "DummyData", "HDF5Data", "MemoryData", "WindowData", "Dropout", "Softmax",
    "SoftmaxWithLoss", "Accuracy", "Split", "Flatten", "Silence", "MultinomialLogisticLoss",
    5, 12, 24, 29, 32, 9, 6, 20, 21, 1, 22, 8, 36, 16,
}  # fmt: skip
WITHIN_CHANNEL = 1  # of LRNParameter.norm_region


def _message_classes() -> dict[str, Any]:
    """The classes of the messages in PROTO, by name."""
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="alexnet/caffe.proto", package="caffe", syntax="proto2")
    for message, fields in MESSAGE.findall(PROTO):
        made = file.message_type.add(name=message)
        for label, kind, name, number, default in FIELD.findall(fields):
            field = made.field.add(name=name, number=int(number), default_value=default or None)
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


def read(path: Path) -> ImportedNetwork:
    """Read a .caffemodel.

    Raises:
        WeightsError: it is damaged, or another network.
    """
    try:
        return _network(path, MESSAGES["NetParameter"].FromString(path.read_bytes()))
    except (DecodeError, ValueError, OverflowError) as error:
        raise corrupt(path, error) from error


def read_blob(path: Path) -> Array:
    """The array in a .binaryproto, such as a mean image. Raises WeightsError if it is damaged."""
    try:
        return _array(MESSAGES["BlobProto"].FromString(path.read_bytes()))
    except (DecodeError, ValueError, OverflowError) as error:
        raise corrupt(path, error) from error


def _array(blob: Any) -> Array:
    """The numbers of a BlobProto in the shape that it gives, in the new way or the old. Raises ValueError."""
    double = blob.HasField("double_data")
    values = np.frombuffer(blob.double_data if double else blob.data, "<f8" if double else "<f4")
    return imported.array(values, list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width])


def _network(path: Path, net: Any) -> ImportedNetwork:
    old = not net.layer
    every = net.layers if old else net.layer
    if not every:
        raise WeightsError(f"{path} is no .caffemodel: it holds no layers", "name a weights file")
    for layer in every:
        if old and layer.HasField("layer"):
            raise unsupported(
                path, "its layers have Caffe's form of 2013", "turn it with Caffe's upgrade_net_proto_binary"
            )
        if layer.type not in IDLE and layer.type not in WORDS:
            raise unsupported(path, f"layer {layer.name} is of type {layer.type}, which this network does not have")
    layers = [layer for layer in every if layer.type in WORDS]
    words = [WORDS[layer.type] for layer in layers]
    of = {word: [layer for layer, its in zip(layers, words, strict=True) if its == word] for word in WORDS.values()}
    weighted = [[layer for layer in of[word] if layer.blobs] for word in ("conv", "fc")]
    tensors: dict[str, tuple[Array, Array]] = {}
    for name, layer in imported.named(path, *weighted).items():
        if len(layer.blobs) != 2:
            raise unsupported(path, f"{name} has {len(layer.blobs)} tensors, this network's have a weight and a bias")
        tensors[name] = imported.shaped(path, name, *map(_array, layer.blobs))
        if layer.HasField("convolution_param"):  # not where the weights alone were kept
            settings = layer.convolution_param
            imported.geometry(path, name, [1, *settings.stride][-1], [0, *settings.pad][-1])
    for layer in of["pool"]:
        _check_pooling(path, layer)
    order, shown = imported.orders(path, words)
    if not shown and "caffenet" in net.name.lower():
        order = {"stage1_order": "relu-pool-norm", "stage2_order": "relu-pool-norm"}
    norms = imported.same(path, [_norm(layer.lrn_param) for layer in of["norm"]])
    crop, mean = _transform(path, [layer for layer in every if layer.type in IDLE], net.input_dim[2:3])
    grid = {"input_size": crop, "edge_padding": crop != 224}
    recipe = imported.built(path, CAFFE, {"mean": "rgb"} | grid | norms | order)
    form = "Caffe, old `layers`" if old else "Caffe, `layer`"
    return ImportedNetwork(path, form, tensors, recipe, "bgr", mean, shown)


def _check_pooling(path: Path, layer: Any) -> None:
    settings = layer.pooling_param
    if settings.pool or settings.pad or (settings.kernel_size, settings.stride) != (3, 2):
        size, what = settings.kernel_size, "average" if settings.pool else "maximum"
        what = f"{what} of {size}x{size} at stride {settings.stride}, padded by {settings.pad}"
        raise unsupported(path, f"{layer.name} takes the {what}; this network the maximum of 3x3 at stride 2")


def _norm(settings: Any) -> dict[str, Any]:
    """Recipe values of a response normalization; what is left out has Caffe's defaults."""
    within = settings.norm_region == WITHIN_CHANNEL
    return {
        "lrn": "within-map" if within else "across-maps",
        "lrn_size": settings.local_size,
        "lrn_alpha": imported.decimal(settings.alpha),
        "lrn_beta": imported.decimal(settings.beta),
        "lrn_k": 1.0 if within else imported.decimal(settings.k),  # Caffe ignores k within a map
    }


def _transform(path: Path, data: Sequence[Any], inputs: Sequence[int]) -> tuple[int, tuple[float, float, float]]:
    """Side of the crop and mean color (RGB), as far as the net's input or layers that read pictures tell them."""
    crop, mean = [227, *inputs][-1], CAFFE_MEAN
    for layer in data:
        settings = layer.transform_param
        crop = settings.crop_size or crop
        if settings.scale != 1.0:
            raise unsupported(path, f"{layer.name} multiplies pixels by {settings.scale:g}")
        if len(settings.mean_value) == 3:
            blue, green, red = settings.mean_value
            mean = (red, green, blue)
    if crop not in (224, 227):
        raise unsupported(path, f"it takes crops of {crop} pixels, this network 227 or 224")
    return crop, mean
