"""Pictures as data: URIs, so that a page needs no file beside it. No torch."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 160  # pixels of a photograph on the page
QUALITY = 85
ZOOM = 8  # of kernels
COLOURS = 128  # of a drawing; a confusion matrix has few


def photograph(pixels: npt.NDArray[np.uint8]) -> str:
    """uint8 S x S x 3, reduced to SIDE."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return _uri("image/jpeg", file.getvalue())


def enlarged(pixels: npt.NDArray[np.uint8]) -> str:
    """uint8 H x W x 3, each pixel a square of ZOOM: what prints the page may smooth."""
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)).save(file, "PNG", optimize=True)
    return _uri("image/png", file.getvalue())


def drawing(image: Image.Image) -> str:
    """A picture of few colours, made small."""
    file = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return _uri("image/png", file.getvalue())


def svg(text: str) -> str:
    """A drawing of lines. As an image: inside of the page its style and its names would become those of the page."""
    return _uri("image/svg+xml", text.encode("utf-8"))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
