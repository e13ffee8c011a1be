"""The fast twin of `images`, for preparing: libjpeg-turbo in and out, torch's antialiased uint8 resize.

Same functions, same results within one gray level (decoding is equal); everything here releases the GIL,
so plain threads scale. What libjpeg-turbo does not take (PNG, CMYK, damaged files) goes to `images`,
which also words the reasons.
"""

from __future__ import annotations

import simplejpeg
import torch
from torch.nn.functional import interpolate

from alexnet_cli.core.data import images
from alexnet_cli.core.data.images import ImageArray

SUBSAMPLING = "420"  # what OpenCV wrote in Krizhevsky's own preparation
JPEG = b"\xff\xd8"  # how one begins
DAMAGED = ("Corrupt JPEG data", "Premature end")  # how libjpeg-turbo begins to say that pixels are missing or wrong
DIRECT = ("YCbCr", "Gray", "RGB")


def decode(data: bytes) -> ImageArray:
    """The picture in a file's bytes as uint8 H x W x 3 RGB.

    Raises:
        DataError: it is no picture, truncated, damaged or too large; `what` is the reason.
    """
    return decode_with_damage(data)[0]


def decode_with_damage(data: bytes) -> tuple[ImageArray, str]:
    """The same, and what is wrong with a JPEG that can be decoded all the same; mostly nothing."""
    wrong = ""
    if data[:2] == JPEG:
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors in DIRECT and height * width <= images.MAX_PIXELS:
                return simplejpeg.decode_jpeg(data, "RGB"), ""
        except ValueError as error:  # strict: warnings too; Pillow decides whether the picture is whole
            wrong = str(error) if str(error).startswith(DAMAGED) else ""
    return images.decode(data), wrong


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of the picture in a file's bytes, none of whose pixels are decoded; raises as `decode` does."""
    if data[:2] == JPEG:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return height, width
        except ValueError:
            pass
    return images.read_size(data)


def resize_and_crop(rgb: ImageArray) -> ImageArray:
    """Shorter side to 256 (antialiased bilinear), then the middle: uint8 H x W x 3 -> 256 x 256 x 3."""
    rgb = images.crop_long_side(rgb)
    size = images.scaled_size(*rgb.shape[:2])
    if size == rgb.shape[:2]:
        return images.crop_center(rgb)
    # A permuted view is channels-last to torch, in and out, so that nothing is copied: three times as fast. The
    # batch dimension has to come before, or its stride makes the result planar.
    picture = torch.from_numpy(rgb).unsqueeze(0).permute(0, 3, 1, 2)
    scaled = interpolate(picture, size=size, mode="bilinear", antialias=True)
    return images.crop_center(scaled[0].permute(1, 2, 0).numpy())


def encode(rgb: ImageArray, quality: int) -> bytes:
    """JPEG bytes of uint8 H x W x 3 RGB."""
    jpeg: bytes = simplejpeg.encode_jpeg(rgb, quality=quality, colorsubsampling=SUBSAMPLING, fastdct=False)
    return jpeg
