"""From image files to pixels, as in section 2 of the paper: RGB, shorter side to 256, the middle 256 x 256.

This is the reference, with Pillow and without torch; `fast_images` is what `alexnet prepare` uses, equal within one
gray level. EXIF orientation is ignored, as in 2012, unless `apply_orientation` is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from alexnet_cli.errors import DataError
from alexnet_cli.recipe import SIDE

MAX_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB; from here on Pillow warns of a decompression bomb
MAX_SCANS = 100  # of a progressive JPEG, which has about ten; each scan costs a pass over all pixels
MAX_ASPECT = 16  # only the middle of longer images is resized
STRIP = 2**20  # pixels converted at once, which bounds the memory that a large image needs
LARGE = 2**24  # pixels of an image after which the C library is told to return memory

ImageArray = npt.NDArray[np.uint8]

EXIF_ORIENTATION = 0x0112  # number of the EXIF tag
TRANSFORMS: Mapping[int, Callable[[ImageArray], ImageArray]] = {
    2: lambda rgb: rgb[:, ::-1],
    3: lambda rgb: rgb[::-1, ::-1],
    4: lambda rgb: rgb[::-1],
    5: lambda rgb: rgb.transpose(1, 0, 2),
    6: lambda rgb: rgb.transpose(1, 0, 2)[:, ::-1],
    7: lambda rgb: rgb.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda rgb: rgb.transpose(1, 0, 2)[::-1],
}
"""What makes an image upright, by EXIF orientation; 1 is upright."""

JPEG_START = b"\xff\xd8"
JPEG_SCAN = b"\xff\xda"
JPEG_ORIENTATION_MARKERS = (b"Exif\0\0", b"tiff:Orientation")  # EXIF and XMP
JPEG_END = 0xD9

# Not every format of Pillow's: it would run Ghostscript for PostScript in a file called .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6]\s+(?:#|\d+\s+\d+\s)",
    re.DOTALL,
)

_warnings_lock = threading.Lock()  # warnings.catch_warnings is not thread-safe


def decode(data: bytes) -> ImageArray:
    """Decode an image file to uint8 H x W x 3 RGB, whatever its format and color mode.

    Gray, palette, CMYK and 16-bit images are converted. Alpha is dropped. An animation gives its first frame.

    Raises:
        DataError: the file is no image, truncated, damaged or too large.
    """
    with _open_image(data) as image:
        image.load()
        return _to_rgb(image)


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image file, without decoding its pixels. Raises DataError as `decode` does."""
    with _open_image(data) as image:
        return image.height, image.width


def is_image(data: bytes) -> bool:
    """Whether the bytes start like a file of a known image format."""
    return SIGNATURES.match(data[:1024]) is not None


def read_orientation(data: bytes) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 (upright) without valid EXIF, and for TIFF.

    Pillow applies the orientation of a TIFF by itself.
    """
    if data[:2] == JPEG_START:
        header = data[: data.find(JPEG_SCAN)]
        if not any(marker in header for marker in JPEG_ORIENTATION_MARKERS):
            return 1  # most JPEGs; asking Pillow is slow
    try:
        with _open_image(data) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            return int(orientation) if orientation in TRANSFORMS and image.format != "TIFF" else 1
    except DataError:
        return 1


def apply_orientation(rgb: ImageArray, data: bytes) -> ImageArray:
    """Turn the decoded image as the EXIF orientation in its file says."""
    transform = TRANSFORMS.get(read_orientation(data))
    return rgb if transform is None else np.ascontiguousarray(transform(rgb))


def resize_and_crop(rgb: ImageArray) -> ImageArray:
    """Resize the shorter side to 256 (antialiased bilinear) and cut out the middle: H x W x 3 -> 256 x 256 x 3.

    Computes in float32 and rounds once. With uint8, Pillow and torch round after each of the two passes, each in its
    own way, and can differ by two gray levels.
    """
    rgb = crop_long_side(rgb)
    height, width = scaled_size(*rgb.shape[:2])
    if (height, width) == rgb.shape[:2]:
        return crop_center(rgb)
    result = np.empty((SIDE, SIDE, 3), np.uint8)
    for channel in range(3):
        plane = Image.fromarray(np.ascontiguousarray(rgb[:, :, channel])).convert("F")
        scaled = plane.resize((width, height), Image.Resampling.BILINEAR)
        result[:, :, channel] = np.rint(crop_center(np.asarray(scaled)))
    return result


def scaled_size(height: int, width: int) -> tuple[int, int]:
    """Height and width after scaling the shorter side to 256; the longer one is rounded."""
    shorter = min(height, width)
    return (SIDE * height + shorter // 2) // shorter, (SIDE * width + shorter // 2) // shorter


def crop_center(rgb: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The middle 256 x 256. An odd margin is smaller at the top and at the left."""
    top, left = (rgb.shape[0] - SIDE) // 2, (rgb.shape[1] - SIDE) // 2
    return np.ascontiguousarray(rgb[top : top + SIDE, left : left + SIDE])


def crop_long_side(rgb: ImageArray) -> ImageArray:
    """The middle of an extremely long image: resizing a strip of 1 x 1,000,000 would need gigabytes."""
    height, width = rgb.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return np.ascontiguousarray(rgb[top : top + longest, left : left + longest])


@contextlib.contextmanager
def _open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image file with Pillow. Every error inside the block becomes a DataError with the reason."""
    if not data:
        raise DataError("the file is empty")
    _check_scans(data)
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below; odd EXIF does not matter here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            if image.height * image.width > MAX_PIXELS:
                size = f"{image.height:,} x {image.width:,} pixels"
                raise DataError(f"it has {size}, more than {MAX_PIXELS:,}: a decompression bomb?")
            yield image
    except UnidentifiedImageError as error:
        start = data[:16].decode("ascii", errors="replace")
        begins = f" (it begins with {start!r})" if start.isprintable() and start.isascii() else ""
        raise DataError(f"it is not an image of a known format{begins}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"it is a decompression bomb: {error}") from error
    except DataError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files, struct.error included
        raise DataError(f"it is damaged ({error or type(error).__name__})") from error


def _check_scans(data: bytes) -> None:
    """Raise DataError for a JPEG with so many scans that decoding would take minutes.

    The markers are followed up to the end of the image: a phone may have appended a film, whose bytes mean nothing.
    """
    if data[:2] != JPEG_START or data.count(JPEG_SCAN) <= MAX_SCANS:
        return
    position, scans = 2, 0
    while scans <= MAX_SCANS and (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        marker = data[position + 1]
        if marker == JPEG_END:
            return
        scans += marker == JPEG_SCAN[1]
        if marker == 0xFF:  # padding
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD7:  # markers without a length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    if scans > MAX_SCANS:
        raise DataError(f"it has more than {MAX_SCANS} scans: a decompression bomb?")


def _to_rgb(image: Image.Image) -> ImageArray:
    """The pixels as a writable H x W x 3 array: torch takes no read-only ones."""
    result = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        is_whole = rows >= image.height
        result[top:bottom] = _to_eight_bits(image if is_whole else image.crop((0, top, image.width, bottom)))
    return result


def _to_eight_bits(image: Image.Image) -> ImageArray:
    """The pixels as uint8 H x W x 3, or H x W x 1 for 16-bit gray."""
    if image.mode.startswith("I"):  # I;16, I;16B or I: scaled here, since Pillow's conversion would clip
        deep = np.asarray(image).clip(0, 65535).astype(np.uint32)
        deep *= 255
        deep += 32767
        return (deep // 65535).astype(np.uint8)[:, :, None]
    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers of unknown range")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # converted directly, Pillow warns about transparency given as bytes
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


class PixelBudget:
    """Limits the decoded pixels held by all threads: one image of the largest size, or many smaller ones."""

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        self.used = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Wait for room and hold it inside the block. An image larger than the whole budget is decoded alone."""
        with self.changed:
            self.changed.wait_for(lambda: self.used + pixels <= self.max_pixels or not self.used)
            self.used += pixels
        try:
            yield
        finally:
            if pixels >= LARGE:
                _trim_heap()
            with self.changed:
                self.used -= pixels
                self.changed.notify_all()


def _trim_heap() -> None:
    """Let glibc return freed memory: otherwise each thread keeps as much as its largest image took."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or no name for it
        ctypes.CDLL(None).malloc_trim(0)
