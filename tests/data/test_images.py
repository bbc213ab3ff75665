"""Decoding of real files, written by Pillow in every mode that folders of images hold."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from xdino.images import UnreadableImage, decode


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    """A smooth picture, uint8 [45, 60, 3]: every corner has a colour of its own."""
    down, across = np.mgrid[0:45, 0:60]
    return np.stack([across * 4, down * 5, 240 - across * 2 - down], axis=-1).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def eight_bit(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def assert_close(image: np.ndarray, reference: np.ndarray, levels: int = 2) -> None:
    assert image.dtype == np.uint8
    assert image.shape == reference.shape
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert np.abs(image.astype(int) - reference).max() <= levels


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg(rgb, mode, options):
    data = saved(Image.fromarray(rgb).convert(mode), "JPEG", quality=90, **options)
    assert_close(decode(data), eight_bit(Image.open(io.BytesIO(data))))
    luma = np.asarray(Image.open(io.BytesIO(data)).convert("L"))[..., None]
    assert_close(decode(data, channels=1), luma)


@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", mode) for mode in ("RGB", "L", "LA", "RGBA", "1", "P")]
    + [("TIFF", mode) for mode in ("RGB", "L", "LA", "RGBA", "1", "P", "CMYK")]
    + [("WEBP", mode) for mode in ("RGB", "L", "RGBA")],
)
def test_modes(rgb, mode, format):
    image = Image.fromarray(rgb).convert(mode)
    options = {"lossless": True} if format == "WEBP" else {}
    assert_close(decode(saved(image, format, **options)), eight_bit(image))


def test_transparency_is_dropped_not_composited(rgb):
    alpha = np.zeros((45, 60, 1), np.uint8)
    image = Image.fromarray(np.concatenate([rgb, alpha], axis=-1))
    assert_close(decode(saved(image, "PNG")), rgb)


def test_palette_with_a_transparent_entry(rgb):
    image = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE)
    for format in ("PNG", "GIF"):
        data = saved(image, format, transparency=3)
        assert_close(decode(data), eight_bit(image))


def png_16(samples: np.ndarray) -> bytes:
    """A PNG of uint16 [H, W, C], which Pillow writes for one channel only."""
    H, W, C = samples.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", W, H, 16, {1: 0, 3: 2}[C], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_is_scaled_not_clipped(rgb, channels):
    deep = rgb[..., :channels].astype(np.uint16) * 257
    expected = np.broadcast_to(rgb[..., :channels], rgb.shape)
    assert_close(decode(png_16(deep)), expected)
    if channels == 1:
        assert_close(decode(png_16(deep), channels=1), rgb[..., :1])
        assert_close(decode(saved(Image.fromarray(deep[..., 0]), "TIFF")), expected)
        dark = png_16(deep // 257)  # a dark 16-bit image must not turn bright
        assert decode(dark).max() <= 1


@pytest.mark.parametrize("scale", [1 / 255, 1.0, 257.0])
def test_float_tiff(rgb, scale):
    deep = rgb[..., 0].astype(np.float32) * np.float32(scale)
    expected = np.broadcast_to(rgb[..., :1], rgb.shape)
    assert_close(decode(saved(Image.fromarray(deep), "TIFF")), expected)


def test_float_tiff_with_other_ranges_is_stretched_and_nan_refused(rgb):
    deep = rgb[..., 0].astype(np.float32) - 1e6
    image = decode(saved(Image.fromarray(deep), "TIFF"))
    assert (image.min(), image.max()) == (0, 255)
    deep[0, 0] = np.nan
    with pytest.raises(UnreadableImage, match="not finite"):
        decode(saved(Image.fromarray(deep), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(rgb, orientation, format):
    turns = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,  # how the pixels were turned; the tag says how to turn back
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ]
    turn = turns[orientation - 1]
    image = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if turn is None else image.transpose(turn)
    data = saved(stored, format, exif=exif, **({"quality": 98} if format == "JPEG" else {}))
    assert_close(decode(data), rgb, levels=8 if format == "JPEG" else 0)


def test_a_damaged_exif_header_is_ignored(rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(saved(Image.fromarray(rgb), "JPEG", exif=exif))
    start = data.index(b"Exif\0\0") + 6
    data[start + 4 : start + 8] = b"\xff\xff\xff\xff"  # the directory is far outside
    assert decode(bytes(data)).shape == (45, 60, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(rgb, format):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), format)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImage):
            decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "empty"),
        (b"this is no image\n" * 20, "not an image"),
        (b"\xff\xd8\xff\xe0 a liar", "not an image|damaged"),
        (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
        (b"\0" * 4096, "not an image"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(data, sentence):
    with pytest.raises(UnreadableImage, match=sentence):
        decode(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_they_are_decoded(rgb, format):
    data = saved(Image.fromarray(rgb), format)
    with pytest.raises(UnreadableImage, match=r"60 x 45 pixels are more than the limit of 2,699"):
        decode(data, max_pixels=2_699)
    assert decode(data, max_pixels=2_700).shape == (45, 60, 3)


def test_a_png_that_announces_a_bomb_is_refused():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(UnreadableImage, match="3,600,000,000 pixels are more than the limit"):
        decode(data + b"\0\0\0\0IDAT")


def test_other_channel_counts_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4") as caught:
        decode(b"x", channels=4)
    assert not isinstance(caught.value, UnreadableImage)
