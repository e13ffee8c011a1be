"""Pictures to pixels, as in section 2 of the paper: RGB, shorter side to 256, the middle 256x256. No torch.

This is the definition, with Pillow; `fast_images` is its fast twin for preparing, equal within one gray
level. EXIF orientation is ignored, as it was in 2012; `upright` follows it where that is asked for.
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

MAX_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB, where Pillow begins to suspect a decompression bomb
STRIP = 2**20  # pixels that are converted at once, so that a large picture is in memory as little as can be
LARGE = 2**24  # pixels from which on the C library is told to give back what an image took
MAX_ASPECT = 16  # of a picture longer than this many times its width only the middle is resized

ImageArray = npt.NDArray[np.uint8]

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
TURNED: Mapping[int, Callable[[ImageArray], ImageArray]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}

EXIF = (
    b"Exif\0\0",
    b"tiff:Orientation",
)  # what a JPEG holds before its pixels where Pillow finds one; the latter is XMP's
SCAN = b"\xff\xda"  # how a JPEG's pixels begin

# Not all that Pillow knows: PostScript in a file called .jpg would be run by Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")

BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6]\s+(?:#|\d+\s+\d+\s)",
    re.DOTALL,
)
MOST_SCANS = (
    100  # of a progressive JPEG, which has about ten; each costs a pass over all pixels, a few bytes long or not
)

_opening = threading.Lock()  # warnings.catch_warnings is not thread-safe


def decode(data: bytes) -> ImageArray:
    """The picture in a file's bytes as uint8 H x W x 3 RGB, whatever its real format and color mode.

    Gray, palette, CMYK and 16-bit pictures are converted; alpha is dropped; of an animation the first
    frame counts.

    Raises:
        DataError: it is no picture, truncated, damaged or too large; `what` is the reason.
    """
    with _reasons(data), _opened(data) as image:
        image.load()
        return _rgb(image)


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of the picture in a file's bytes, none of whose pixels are decoded; raises as `decode` does."""
    with _reasons(data), _opened(data) as image:
        return image.height, image.width


def is_image(data: bytes) -> bool:
    """Whether a file's bytes begin as those of a known format do."""
    return BEGINNINGS.match(data[:1024]) is not None


@contextlib.contextmanager
def _reasons(data: bytes) -> Iterator[None]:
    """Every error inside becomes a DataError that says why the picture cannot be used."""
    if not data:
        raise DataError("the file is empty")
    try:
        yield
    except UnidentifiedImageError as error:
        start = data[:16].decode("ascii", errors="replace")
        begins = f" (it begins with {start!r})" if start.isprintable() and start.isascii() else ""
        raise DataError(f"it is not a picture of a known format{begins}") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files, struct.error included
        raise DataError(f"it is damaged ({error or type(error).__name__})") from error


def read_orientation(data: bytes) -> int:
    """The EXIF orientation in a picture's file, 1 to 8: 1 is upright, and what damaged EXIF counts as.

    So does a TIFF, which Pillow turns by itself.
    """
    if data[:2] == b"\xff\xd8" and not any(word in data[: data.find(SCAN)] for word in EXIF):
        return 1  # a JPEG without any: most are, and Pillow takes its time
    try:
        with _opened(data) as image:
            found = image.getexif().get(ORIENTATION, 1)
        return int(found) if found in TURNED and image.format != "TIFF" else 1
    except Exception:  # Pillow's readers raise nearly anything
        return 1


def apply_orientation(rgb: ImageArray, data: bytes) -> ImageArray:
    """The picture turned as the EXIF orientation in its file says: phones store some of theirs lying down."""
    turn = TURNED.get(read_orientation(data))
    return rgb if turn is None else np.ascontiguousarray(turn(rgb))


def resize_and_crop(rgb: ImageArray) -> ImageArray:
    """Shorter side to 256 (antialiased bilinear), then the middle: uint8 H x W x 3 -> 256 x 256 x 3.

    It is computed in float32 and rounded once. On uint8 Pillow and torch round after each of the two passes,
    each in its own way, and would now and then be two gray levels apart.
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
    """Height and width once the shorter side is 256; the longer one is rounded."""
    shorter = min(height, width)
    return (SIDE * height + shorter // 2) // shorter, (SIDE * width + shorter // 2) // shorter


def crop_center(rgb: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The middle 256 x 256; an odd margin is smaller at the top and at the left (floor)."""
    top, left = (rgb.shape[0] - SIDE) // 2, (rgb.shape[1] - SIDE) // 2
    return np.ascontiguousarray(rgb[top : top + SIDE, left : left + SIDE])


def crop_long_side(rgb: ImageArray) -> ImageArray:
    """The middle of an extremely long picture, so that a strip of 1 x 1,000,000 needs no gigabytes."""
    height, width = rgb.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return np.ascontiguousarray(rgb[top : top + longest, left : left + longest])


def check_size(height: int, width: int) -> None:
    """Refuse a picture whose pixels would fill the memory, before they are decoded.

    Raises:
        DataError: it has more than MAX_PIXELS.
    """
    if height * width > MAX_PIXELS:
        raise DataError(f"it measures {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}: a decompression bomb?")


def check_scans(data: bytes) -> None:
    """Refuse a JPEG of so many scans that decoding it would not end soon.

    Raises:
        DataError: it has more than MOST_SCANS.
    """
    if data[:2] != b"\xff\xd8" or data.count(b"\xff\xda") <= MOST_SCANS:
        return
    place, scans = 2, 0
    while scans <= MOST_SCANS and (place := data.find(b"\xff", place)) >= 0 and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xD9:  # the end of the picture: what follows, such as a phone's film, is not decoded
            return
        scans += marker == 0xDA
        stuffed = marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7
        place += (1 if marker == 0xFF else 2) if stuffed else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if scans > MOST_SCANS:
        raise DataError(f"it has more than {MOST_SCANS} scans: a decompression bomb?")


def _opened(data: bytes) -> Image.Image:
    check_scans(data)
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is checked below; odd EXIF does not matter here
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise DataError(f"it is a decompression bomb: {error}") from error
    check_size(image.height, image.width)
    return image


def _rgb(image: Image.Image) -> ImageArray:
    """A copy, because torch takes no read-only arrays."""
    result = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        whole = rows >= image.height
        result[top:bottom] = _eight_bits(image if whole else image.crop((0, top, image.width, bottom)))
    return result


def _eight_bits(image: Image.Image) -> ImageArray:
    """H x W x 3, or H x W x 1 where all three are the same."""
    if image.mode.startswith("I"):
        # 16 bits a pixel (Pillow calls them I;16, I;16B or I): scaled, where Pillow's own conversion
        # would clip.
        deep = np.asarray(image).clip(0, 65535).astype(np.uint32)
        deep *= 255
        deep += 32767
        gray = (deep // 65535).astype(np.uint8)
        return gray[:, :, None]
    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers of unknown range")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # by way of RGBA, or Pillow warns about transparency given as bytes
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


class PixelBudget:
    """Bounds the decoded pixels of all threads: room for the largest image, or for many smaller ones."""

    def __init__(self, most: int = MAX_PIXELS) -> None:
        self.most, self.used, self.changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Wait for so much room and hold it inside the block; an image larger than all of it comes alone."""
        with self.changed:
            self.changed.wait_for(lambda: self.used + pixels <= self.most or not self.used)
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
    """Let glibc return what is freed to the system; each thread would keep as much as its largest picture took."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or no name for it
        ctypes.CDLL(None).malloc_trim(0)
