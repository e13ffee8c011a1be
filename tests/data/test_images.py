"""Decoding against Pillow, geometry against arithmetic, the fast engine against the plain one."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps, features

from alexnet_cli.core.data import fast_images, folders, images
from alexnet_cli.errors import DataError

ENGINES = [images, fast_images]


def saved(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def scene(width: int = 90, height: int = 60) -> Image.Image:
    """Smooth colors with a few sharp edges."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x // 9 + y // 7) % 2 * 200], -1)
    return Image.fromarray(rgb.astype(np.uint8))


PICTURES = {
    "rgb.jpg": saved(scene(), "JPEG", quality=90),
    "444.jpg": saved(scene(), "JPEG", quality=90, subsampling=0),
    "progressive.jpg": saved(scene(), "JPEG", progressive=True),
    "gray.jpg": saved(scene().convert("L"), "JPEG"),
    "cmyk.jpg": saved(scene().convert("CMYK"), "JPEG"),
    "png named.jpg": saved(scene(), "PNG"),
    "palette.png": saved(scene().quantize(16), "PNG"),
    "alpha.png": saved(scene().convert("RGBA"), "PNG"),
    "gray alpha.png": saved(scene().convert("LA"), "PNG"),
    "one bit.png": saved(scene().convert("1"), "PNG"),
    "animated.gif": saved(scene(), "GIF", save_all=True, append_images=[scene(90, 60).rotate(90)]),
    "picture.bmp": saved(scene(), "BMP"),
    "picture.webp": saved(scene(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PICTURES)
def test_decoding_equals_pillow(engine: object, name: str) -> None:
    decoded = engine.decode(PICTURES[name])  # type: ignore[attr-defined]
    picture = Image.open(io.BytesIO(PICTURES[name]))
    expected = np.asarray((picture.convert("RGBA") if picture.mode == "P" else picture).convert("RGB"))
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("name", PICTURES)
def test_strips_do_not_change_the_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images.decode(PICTURES[name])
    monkeypatch.setattr(images, "STRIP", 7 * 90)
    np.testing.assert_array_equal(images.decode(PICTURES[name]), whole)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strip", [2**20, 300])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(
    engine: object, format: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "STRIP", strip)
    deep = np.linspace(0, 65535, 300 * 4).astype(np.uint16).reshape(4, 300)
    decoded = engine.decode(saved(Image.fromarray(deep), format))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(decoded, np.repeat(np.rint(deep / 257.0)[..., None], 3, 2))


def fading() -> npt.NDArray[np.uint8]:
    """The scene with an alpha that grows from left to right."""
    alpha = np.broadcast_to(np.linspace(0, 255, 90).astype(np.uint8)[None, :, None], (60, 90, 1))
    return np.concatenate([np.asarray(scene()), alpha], -1)


def lay_on_white(rgba: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    alpha = rgba[..., -1:] / 255
    return np.broadcast_to(rgba[..., :-1] * alpha + 255 * (1 - alpha), (*rgba.shape[:2], 3))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strip", [2**20, 7 * 90])
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_alpha_is_laid_on_white(
    engine: object, format: str, options: dict[str, bool], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "STRIP", strip)
    decoded = engine.decode(saved(Image.fromarray(fading(), "RGBA"), format, **options))  # type: ignore[attr-defined]
    assert np.abs(decoded - lay_on_white(fading())).max() <= 1
    assert (decoded[:, 0] == 255).all()
    np.testing.assert_array_equal(decoded[:, -1], fading()[:, -1, :3])


def test_black_on_transparent_gray_is_seen() -> None:
    gray = np.stack([np.zeros((60, 90), np.uint8), fading()[..., 3]], -1)
    decoded = images.decode(saved(Image.fromarray(gray, "LA"), "PNG"))
    np.testing.assert_array_equal(decoded, lay_on_white(gray).round())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: npt.NDArray[np.generic], color: int, transparent: bytes, palette: bytes = b"") -> bytes:
    """A PNG with a tRNS chunk, by the specification: one transparent color, or an alpha for each in the palette."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)
    chunks = png_chunk(b"IHDR", header) + (png_chunk(b"PLTE", palette) if palette else b"")
    chunks += png_chunk(b"tRNS", transparent) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_transparent_color_is_white() -> None:
    gray = np.array([[0, 7, 100], [7, 8, 255]], np.uint8)
    white_where_seven = np.where(gray == 7, 255, gray)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(images.decode(png(gray, 0, b"\0\x07")), white_where_seven)
    deep = gray.astype(np.uint16) * 257
    np.testing.assert_array_equal(images.decode(png(deep, 0, struct.pack(">H", 7 * 257))), white_where_seven)
    rgb = np.stack([gray, gray, gray[::-1]], -1)
    expected = np.where((rgb == rgb[0, 1]).all(-1, keepdims=True), 255, rgb)
    np.testing.assert_array_equal(images.decode(png(rgb, 2, b"".join(b"\0%c" % n for n in rgb[0, 1]))), expected)
    alphas = np.array([0, 51, 255], np.uint8)
    expected = lay_on_white(np.stack([np.array([[0, 50, 200]]), alphas[None]], -1)).round()
    indexed = png(np.array([[0, 1, 2]], np.uint8), 3, alphas.tobytes(), bytes([0, 0, 0, 50, 50, 50, 200, 200, 200]))
    np.testing.assert_array_equal(images.decode(indexed), expected)


def tiff(data: bytes, bits: int, photometric: int = 1, samples: int = 1, **tags: int) -> bytes:
    """A little-endian TIFF of 6 x 4 uncompressed pixels, by the specification."""
    numbers = {"subfile": 254, "planar": 284, "sample_format": 339}
    entries = {256: 6, 257: 4, 258: bits, 259: 1, 262: photometric, 273: 8, 277: samples, 278: 4, 279: len(data)}
    entries |= {numbers[name]: value for name, value in tags.items()}
    start = 8 + len(data) + len(data) % 2
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    if samples > 1:  # of bits a sample, there is one number for each, after the directory
        place = start + 2 + len(directory) + 4
        directory = directory.replace(
            struct.pack("<HHII", 258, 4, 1, bits), struct.pack("<HHII", 258, 3, samples, place)
        )
    head = b"II*\0" + struct.pack("<I", start) + data + bytes(len(data) % 2)
    return head + struct.pack("<H", len(entries)) + directory + bytes(4) + struct.pack("<H", bits) * samples


def packed_bits(values: npt.NDArray[np.int64], bits: int) -> bytes:
    """Rows of numbers as TIFF packs them: the highest bit first, each row filled up to a whole byte."""
    return b"".join(
        np.packbits([int(digit) for value in row for digit in f"{value:0{bits}b}"]).tobytes() for row in values
    )


RAMP = np.linspace(0, 1, 24).reshape(4, 6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_a_tiff_is_scaled_by_its_bits(engine: object, bits: int, photometric: int) -> None:
    values = np.rint(RAMP * (2**bits - 1)).astype(np.int64)
    data = values.astype("<u2").tobytes() if bits == 16 else packed_bits(values, bits)
    if (bits, photometric) == (12, 0):  # Pillow does not read it
        with pytest.raises(DataError, match="of a rare kind: convert it"):
            engine.decode(tiff(data, bits, photometric))  # type: ignore[attr-defined]
        return
    decoded = engine.decode(tiff(data, bits, photometric))  # type: ignore[attr-defined]
    white = 2**bits - 1
    expected = np.rint((values if photometric else white - values) * 255 / white)
    np.testing.assert_array_equal(decoded, expected[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(bytes(48), 16, sample_format=2), "signed"),
        (tiff(bytes(24), 8, sample_format=2), "signed"),
        (tiff(bytes(96), 32), "32-bit"),
        (tiff(bytes(96), 32, sample_format=3), "floating-point"),
        (tiff(packed_bits(np.zeros((4, 6), np.int64), 10), 10), "rare kind: convert it"),
        (tiff(bytes(144), 16, 2, 3, planar=2), "planes that Pillow misreads"),
        (tiff(bytes(24), 8, subfile=1), "preview"),
        (b"Pf\n6 4\n-1.0\n" + bytes(96), "floating-point"),
    ],
)
def test_pixels_of_unknown_range_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        fast_images.decode(data)


@pytest.mark.parametrize("maxval", [15, 255, 1023, 4095])
def test_a_pgm_is_scaled_by_its_maxval(maxval: int) -> None:
    values = np.rint(RAMP * maxval).astype(np.uint8 if maxval < 256 else ">u2")
    decoded = images.decode(b"P5 6 4 %d\n" % maxval + values.tobytes())
    assert np.abs(decoded[..., 0] - values.astype(np.float64) * 255 / maxval).max() <= 0.51


STARTS = {
    b"\0\0\0\x20ftypavif\0\0\0\0avifmif1": "it is AVIF: convert it to JPEG",
    b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf": "it is AVIF: convert it to JPEG",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "it is HEIC: convert it to JPEG",
    b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "it is HEIC: convert it to JPEG",
    b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc": "it is HEIC: convert it to JPEG",
    b"\xff\x0a\xfa\x1f": "it is JPEG XL: convert it to JPEG",
    b"\0\0\0\x0cJXL \r\n\x87\n": "it is JPEG XL: convert it to JPEG",
    b"\0\0\0\x0cjP  \r\n\x87\n": "it is JPEG 2000: convert it to JPEG",
    b"II*\0\x10\0\0\0CR\x02\0": "it is a camera's raw file: convert it to JPEG",
    b"\0\0\0\x18ftypcrx \0\0\0\1": "it is a camera's raw file: convert it to JPEG",
    b"\0\0\0\x20ftypisom\0\0\2\0": "it is a video",
    b"RIFF\0\0\1\0AVI LIST": "it is a video",
    b"8BPS\0\1": "it is a Photoshop file: convert it to JPEG",
    b"%PDF-1.7\n": "it is a PDF file: convert it to JPEG",
    b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg width="9" height="9"/>': "it is SVG: convert it to JPEG",
    b"\xef\xbb\xbf<svg/>": "it is SVG: convert it to JPEG",
    b"\r\n<!DOCTYPE HTML><html><svg/></html>": "it is a web page: download it again",
    b"<html><head><title>404 Not Found": "it is a web page: download it again",
    b'<?xml version="1.0"?><Error><Code>AccessDenied': "it is a web page: download it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "it is a Git LFS pointer: run git lfs pull",
}


@pytest.mark.parametrize("start", STARTS)
def test_other_formats_are_named_by_their_content(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "can_read", lambda other: False)
    for function in (fast_images.decode, fast_images.read_size):
        with pytest.raises(DataError) as error:
            function(start + bytes(100))
        assert error.value.what.startswith(STARTS[start])
    assert images.is_image(start)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_can() -> None:
    data = saved(scene(), "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(fast_images.decode(data) - np.asarray(scene()).astype(np.int16)).mean() < 2
    assert fast_images.read_size(data) == (60, 90)
    assert folders.has_image_suffix("a/photo.AVIF")


def test_a_plugin_of_pillow_is_imported_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the right name that reads a PNG after the first 24 bytes of a HEIC file."""
    start = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (tmp_path / "pillow_heif").mkdir()
    (tmp_path / "pillow_heif" / "__init__.py").touch()
    (tmp_path / "pillow_heif" / "HeifImagePlugin.py").write_text(
        "from PIL import Image, PngImagePlugin\nimport io\n"
        "Image.OPEN['HEIF'] = (lambda file, name: PngImagePlugin.PngImageFile(io.BytesIO(file.read()[24:])), None)\n"
    )
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    for name in ("pillow_heif", "pillow_heif.HeifImagePlugin"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    images.can_read.cache_clear()
    assert not folders.has_image_suffix("photo.heic")
    for name in ("pillow_heif", "pillow_heif.HeifImagePlugin"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    images.can_read.cache_clear()
    try:
        assert folders.has_image_suffix("photo.HEIC")
        np.testing.assert_array_equal(images.decode(start + PICTURES["alpha.png"]), np.asarray(scene()))
    finally:
        for name in ("pillow_heif", "pillow_heif.HeifImagePlugin"):
            sys.modules.pop(name, None)
        images.can_read.cache_clear()


@pytest.mark.skipif(sys.platform == "win32", reason="Pillow has libtiff inside")
def test_libraries_write_nothing_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    whole = saved(scene(), "TIFF", compression="tiff_adobe_deflate")
    for damaged in (whole[:60] + bytes(20) + whole[80:], tiff(bytes(24), 8, 2, 9)):
        with pytest.raises(DataError):
            images.decode(damaged)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just a text", "known format"),
        (bytes(1000), "known format"),
        (PICTURES["rgb.jpg"][:-200], "truncated"),
        (PICTURES["rgb.jpg"][:300], "Truncated"),
        (PICTURES["png named.jpg"][:150], "truncated"),
        (PICTURES["png named.jpg"][:20], "damaged"),
        (saved(Image.new("1", (20_000, 10_000)), "PNG"), "bomb"),
        (saved(Image.new("1", (10_000, 9_000)), "PNG"), "bomb"),
        (saved(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
    ],
)
def test_reasons_of_bad_files(engine: object, data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        engine.decode(data)  # type: ignore[attr-defined]


def test_damage_of_a_decodable_jpeg_is_reported() -> None:
    cut = PICTURES["rgb.jpg"][:-200] + b"\xff\xd9"
    rgb, wrong = fast_images.decode_with_damage(cut)
    assert wrong == "Corrupt JPEG data: premature end of data segment"
    np.testing.assert_array_equal(rgb, images.decode(cut))
    assert [name for name, data in PICTURES.items() if fast_images.decode_with_damage(data)[1]] == []


@pytest.mark.parametrize("name", PICTURES)
def test_read_size(name: str) -> None:
    assert (
        fast_images.read_size(PICTURES[name])
        == images.read_size(PICTURES[name])
        == images.decode(PICTURES[name]).shape[:2]
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_orientation_is_ignored(engine: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(scene(90, 60), "JPEG", exif=exif)
    assert engine.decode(data).shape == (60, 90, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_apply_orientation_equals_pillow(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(90, 60), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(images.apply_orientation(images.decode(data), data), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 9])
def test_read_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert images.read_orientation(saved(scene(90, 60), kind, exif=exif)) == (orientation if 1 < orientation < 9 else 1)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    jpeg = saved(scene(90, 60), "JPEG")
    jpeg = jpeg[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + jpeg[2:]
    assert images.read_orientation(jpeg) == Image.open(io.BytesIO(jpeg)).getexif().get(0x0112, 1)


def test_damaged_exif_turns_nothing() -> None:
    rgb = images.decode(saved(scene(), "PNG"))
    np.testing.assert_array_equal(images.apply_orientation(rgb, b"no picture"), rgb)


def test_sizes_and_center() -> None:
    assert images.scaled_size(375, 500) == (256, 341)  # 341.33
    assert images.scaled_size(500, 333) == (384, 256)  # 384.38
    assert images.scaled_size(64, 64) == (256, 256)
    ramp = np.repeat(np.arange(261, dtype=np.uint16)[None, :, None], 256, 0).astype(np.uint8)
    assert images.crop_center(ramp)[0, 0, 0] == 2  # (261 - 256) // 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [(256, 256), (1, 1), (3, 700), (5000, 2), (300, 257), (64, 64)])
def test_any_size_becomes_256(engine: object, size: tuple[int, int]) -> None:
    flat = np.full((*size, 3), (10, 130, 250), np.uint8)
    result = engine.resize_and_crop(flat)  # type: ignore[attr-defined]
    assert result.shape == (256, 256, 3)
    assert (result == flat[0, 0]).all()


def triangle_filter(line: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Antialiased bilinear resampling of a line of numbers, written out from its definition."""
    scale = len(line) / size
    support = max(scale, 1.0)
    result = np.empty(size)
    for place in range(size):
        middle = (place + 0.5) * scale
        weights = np.maximum(0, 1 - np.abs((np.arange(len(line)) + 0.5 - middle) / support))
        result[place] = (weights * line).sum() / weights.sum()
    return result


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("length", [100, 700])
def test_resizing_is_the_antialiased_triangle_filter(engine: object, length: int) -> None:
    line = np.random.default_rng(0).integers(0, 256, length).astype(np.float64)
    square = np.repeat(np.repeat(line[None, :, None], length, 0), 3, 2).astype(np.uint8)
    result = engine.resize_and_crop(square)[128, :, 0]  # type: ignore[attr-defined]
    assert np.abs(result - triangle_filter(line, 256)).max() <= 1.0


def test_encoding_keeps_the_image() -> None:
    rgb = images.resize_and_crop(np.asarray(scene(40, 30)))
    again = images.decode(fast_images.encode(rgb, 95))
    assert np.abs(again.astype(int) - rgb).mean() < 3
    assert len(fast_images.encode(rgb, 50)) < len(fast_images.encode(rgb, 95))
    header = Image.open(io.BytesIO(fast_images.encode(rgb, 95)))
    assert header.size == (256, 256)


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_engines_agree_on_real_images(samples: Path, every: int) -> None:
    files = sorted(samples.glob("*/*.JPEG"))
    assert len(files) == 500
    for file in files[::every]:
        data = file.read_bytes()
        plain, fast = images.decode(data), fast_images.decode(data)
        np.testing.assert_array_equal(plain, fast, err_msg=file.name)
        difference = np.abs(images.resize_and_crop(plain).astype(np.int16) - fast_images.resize_and_crop(fast))
        assert difference.max() <= 1, file.name
