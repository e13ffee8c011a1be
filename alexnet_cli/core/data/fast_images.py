"""The functions of `images`, faster: libjpeg-turbo in and out, and torch's antialiased uint8 resize.

Results are equal within one gray level (decoding is exact). Everything here releases the GIL, so threads scale.
libjpeg-turbo takes JPEG only; other formats, CMYK and damaged files go to `images`, which also words the errors.
"""

from __future__ import annotations

import simplejpeg
import torch
from torch.nn.functional import interpolate

from alexnet_cli.core.data import images
from alexnet_cli.core.data.images import JPEG_START, ImageArray

SUBSAMPLING = "420"  # as OpenCV wrote in Krizhevsky's own preparation
DIRECT_COLORS = ("YCbCr", "Gray", "RGB")
DAMAGE_WARNINGS = ("Corrupt JPEG data", "Premature end")  # of libjpeg-turbo: pixels are missing or wrong


def decode(data: bytes) -> ImageArray:
    """Decode an image file to uint8 H x W x 3 RGB.

    Raises:
        DataError: the file is no image, truncated, damaged or too large.
    """
    return decode_with_damage(data)[0]


def decode_with_damage(data: bytes) -> tuple[ImageArray, str]:
    """Decode as `decode` does. Also returns what is damaged in a JPEG that can be decoded; empty if nothing is."""
    damage = ""
    if data[:2] == JPEG_START:
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors in DIRECT_COLORS and height * width <= images.MAX_PIXELS:
                return simplejpeg.decode_jpeg(data, "RGB"), ""
        except ValueError as error:  # warnings too; Pillow decides whether the image can be used
            damage = str(error) if str(error).startswith(DAMAGE_WARNINGS) else ""
    return images.decode(data), damage


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image file, without decoding its pixels. Raises DataError as `decode` does."""
    if data[:2] == JPEG_START:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return height, width
        except ValueError:
            pass
    return images.read_size(data)


def resize_and_crop(rgb: ImageArray) -> ImageArray:
    """Resize the shorter side to 256 (antialiased bilinear) and cut out the middle: H x W x 3 -> 256 x 256 x 3."""
    rgb = images.crop_long_side(rgb)
    size = images.scaled_size(*rgb.shape[:2])
    if size == rgb.shape[:2]:
        return images.crop_center(rgb)
    # A permuted view is channels-last to torch, in and out, so nothing is copied: three times as fast. The batch
    # dimension has to come first, or its stride makes the result planar.
    batch = torch.from_numpy(rgb).unsqueeze(0).permute(0, 3, 1, 2)
    scaled = interpolate(batch, size=size, mode="bilinear", antialias=True)
    return images.crop_center(scaled[0].permute(1, 2, 0).numpy())


def encode(rgb: ImageArray, quality: int) -> bytes:
    """Encode uint8 H x W x 3 RGB as a JPEG file."""
    jpeg: bytes = simplejpeg.encode_jpeg(rgb, quality=quality, colorsubsampling=SUBSAMPLING, fastdct=False)
    return jpeg
