"""Decoding against Pillow, geometry against arithmetic, the fast engine against the plain one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from alexnet_cli.core.data import fast_images, images
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


def transparent() -> Image.Image:
    picture = scene().quantize(16)
    picture.info["transparency"] = bytes(range(16))
    return picture


PICTURES = {
    "rgb.jpg": saved(scene(), "JPEG", quality=90),
    "444.jpg": saved(scene(), "JPEG", quality=90, subsampling=0),
    "progressive.jpg": saved(scene(), "JPEG", progressive=True),
    "gray.jpg": saved(scene().convert("L"), "JPEG"),
    "cmyk.jpg": saved(scene().convert("CMYK"), "JPEG"),
    "png named.jpg": saved(scene(), "PNG"),
    "palette.png": saved(scene().quantize(16), "PNG"),
    "transparent palette.png": saved(transparent(), "PNG", transparency=bytes(range(16))),
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
