"""From image files to pixels, as in section 2 of the paper: RGB, shorter side to 256, the middle 256 x 256.

This is the reference, with Pillow and without torch; `fast_images` is what `alexnet prepare` uses, equal within one
gray level. EXIF orientation is ignored, as in 2012, unless `apply_orientation` is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, _imaging

from alexnet_cli.errors import DataError
from alexnet_cli.recipe import SIDE

MAX_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB; from here on Pillow warns of a decompression bomb
MAX_ASPECT = 16  # only the middle of longer images is resized
STRIP = 2**20  # pixels converted at once, which bounds the memory that a large image needs
LARGE = 2**24  # pixels of an image after which the C library is told to return memory

ImageArray = npt.NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")

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

# Not every format of Pillow's: it would run Ghostscript for PostScript in a file called .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6]\s+(?:#|\d+\s+\d+\s)",
    re.DOTALL,
)


class OtherFormat(NamedTuple):
    """A format that Pillow reads only with a plug-in, or not at all."""

    name: str
    start: bytes
    """A pattern of the first bytes of such a file."""
    remedy: str = "convert it to JPEG"
    plugin: str = ""
    """The module that makes Pillow read it."""
    pillow_name: str = ""
    suffixes: tuple[str, ...] = ()


OTHER_FORMATS = (
    OtherFormat(
        "AVIF", rb"\0\0..ftyp(?:....){0,9}?avi[fs]", "convert it to JPEG, or install Pillow 11.3 or newer", "PIL._avif",
        "AVIF", (".avif",),
    ),
    OtherFormat(
        "HEIC", rb"\0\0..ftyp(?:he[iv]|mif|msf)", "convert it to JPEG, or install pillow-heif",
        "pillow_heif.HeifImagePlugin", "HEIF", (".heic", ".heif", ".hif"),
    ),
    OtherFormat(
        "JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL ", "convert it to JPEG, or install pillow-jxl-plugin", "pillow_jxl", "JXL",
        (".jxl",),
    ),
    OtherFormat("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", suffixes=(".jp2",)),
    OtherFormat(
        "a camera's raw file", rb"II\*\0....CR|\0\0..ftypcrx|FUJIFILMCCD-RAW |IIU\0|IIR[OS]|MMOR",
        suffixes=(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    ),
    OtherFormat("a video", rb"\0\0..ftyp|RIFF....AVI |\x1aE\xdf\xa3", "save a frame of it as JPEG"),
    OtherFormat("a Photoshop file", rb"8BPS\0", suffixes=(".psd",)),
    OtherFormat("a PDF file", rb"%PDF-"),
    OtherFormat("SVG", rb"(?:\xef\xbb\xbf)?\s*<(?:svg|(?:\?xml|!--|!DOCTYPE svg).*<svg)", suffixes=(".svg",)),
    OtherFormat("a web page", rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body|\?xml))", "download it again"),
    OtherFormat("a Git LFS pointer", rb"version https://git-lfs", "run git lfs pull"),
)  # fmt: skip
"""In this order: the first whose pattern matches counts."""

SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 254, 258, 262, 284, 339  # numbers of TIFF tags
CONVERT = "convert it to an 8-bit JPEG or PNG"

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without one, Pillow's errors would go to the terminal too
with contextlib.suppress(OSError, AttributeError):  # libtiff may be linked in such a way that it has no such name
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)  # it would print what is wrong with a file


def decode(data: bytes) -> ImageArray:
    """Decode an image file to uint8 H x W x 3 RGB, whatever its format and color mode.

    Gray, palette, CMYK and 16-bit images are converted. Transparent images are laid on white. An animation gives its
    first frame.

    Raises:
        DataError: the file is no image, truncated, damaged or too large.
    """
    with _open_image(data) as image:
        image.load()
        return to_rgb(image)


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image file, without decoding its pixels. Raises DataError as `decode` does."""
    with _open_image(data) as image:
        return image.height, image.width


def is_image(data: bytes) -> bool:
    """Whether the bytes start like a file of a known format, readable or not, and not like a list of paths."""
    return SIGNATURES.match(data[:1024]) is not None or _find_other_format(data) is not None


@functools.cache
def can_read(other: OtherFormat) -> bool:
    """Whether the plug-in for this format is installed. Imports it."""
    if not other.plugin:
        return False
    try:
        importlib.import_module(other.plugin)
    except ImportError:
        return False
    return True


def _find_other_format(data: bytes) -> OtherFormat | None:
    return next((other for other in OTHER_FORMATS if re.match(other.start, data[:1024], re.DOTALL)), None)


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
    other_format = _find_other_format(data)
    if other_format and not can_read(other_format):
        raise DataError(f"it is {other_format.name}: {other_format.remedy}")
    try:
        with Image.open(io.BytesIO(data), formats=(other_format.pillow_name,) if other_format else FORMATS) as image:
            if image.height * image.width > MAX_PIXELS:
                size = f"{image.height:,} x {image.width:,} pixels"
                raise DataError(f"it has {size}, more than {MAX_PIXELS:,}: a decompression bomb?")
            yield image
    except UnidentifiedImageError as error:
        if is_image(data):
            raise DataError(f"it is damaged, or of a rare kind: {CONVERT}") from error
        start = data[:16].decode("ascii", errors="replace")
        begins = f" (it begins with {start!r})" if start.isprintable() and start.isascii() else ""
        raise DataError(f"it is not an image of a known format{begins}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"it is a decompression bomb: {error}") from error
    except DataError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files, struct.error included
        raise DataError(f"it is damaged ({error or type(error).__name__})") from error


def to_rgb(image: Image.Image) -> ImageArray:
    """The pixels of an open image as a writable uint8 H x W x 3 array: torch takes no read-only ones.

    Raises:
        DataError: its pixels have an unknown range.
    """
    black, white = _find_levels(image)
    result = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image if rows >= image.height else image.crop((0, top, image.width, bottom))
        is_deep = image.mode.startswith("I")  # I;16, I;16B or I: scaled here, since Pillow's conversion would clip
        result[top:bottom] = _scale_gray(strip, black, white) if is_deep else _to_eight_bits(strip)
    return result


def _find_levels(image: Image.Image) -> tuple[int, int]:
    """The values of black and of white in an image of more than eight bits. Checks that the pixels have a known range.

    Raises:
        DataError: black and white are unknown, or the image is the preview of another.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if tags.get(SUBFILE_TYPE, 0) & 1:
        raise DataError(f"its first image is a preview, as in a camera's raw file: {CONVERT}")
    bits = max(tags.get(BITS_PER_SAMPLE, (16,)))
    if image.mode == "F":
        raise DataError(f"its pixels are floating-point numbers of unknown range: {CONVERT}")
    if 2 in tags.get(SAMPLE_FORMAT, ()) or bits > 16:
        raise DataError(f"its pixels are signed or 32-bit numbers of unknown range: {CONVERT}")
    is_deep_color = bits > 8 and not image.mode.startswith("I")
    if tags.get(PLANAR) == 2 and (is_deep_color or image.mode == "LA"):
        raise DataError(f"its colors are stored in planes that Pillow misreads: {CONVERT}")
    white = 2**bits - 1
    return (white, 0) if tags.get(PHOTOMETRIC) == 0 else (0, white)


def _scale_gray(image: Image.Image, black: int, white: int) -> ImageArray:
    """Pixels of more than eight bits as uint8 H x W x 1."""
    deep = np.asarray(image)
    scaled = np.rint((deep.astype(np.float32) - black) * (255 / (white - black)))
    gray: ImageArray = scaled.clip(0, 255).astype(np.uint8)
    gray[deep == image.info.get("transparency", -1)] = 255
    return gray.reshape(*gray.shape, 1)


def _to_eight_bits(image: Image.Image) -> ImageArray:
    """Pixels of eight bits or fewer as uint8 H x W x 3, transparent ones on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
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


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Yield every item with its result, in order, while threads work on the next `ahead` items."""
    running: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            running.append((item, pool.submit(function, item)))
            if len(running) > ahead:
                done, future = running.popleft()
                yield done, future.result()
        while running:
            done, future = running.popleft()
            yield done, future.result()
    finally:
        for _, future in running:
            future.cancel()


def _trim_heap() -> None:
    """Let glibc return freed memory: otherwise each thread keeps as much as its largest image took."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or no name for it
        ctypes.CDLL(None).malloc_trim(0)
