"""Decoding of real files, written by Pillow in every mode that folders of images hold."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from xdino.data.decode import HEAD, SUFFIXES, UnreadableImage, decode, recognised


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


SMIN, SMAX = 340, 341  # TIFF's SMinSampleValue and SMaxSampleValue


@pytest.mark.parametrize("peak", [0.5, 1.0, 1.0001, 1.5, 30.0])
def test_float_pixels_run_from_0_to_1_whatever_the_brightest_of_them_is(rgb, peak):
    deep = rgb[..., 0].astype(np.float32) / 255
    deep[0, 0] = peak
    for format in ("TIFF", "PPM"):
        image = decode(saved(Image.fromarray(deep), format))
        assert_close(image[1:], np.broadcast_to(rgb[1:, :, :1], image[1:].shape))
        assert image[0, 0, 0] == round(min(peak, 1) * 255)


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1000.0, 3000.0), (10.0, 11.0)])
def test_float_pixels_follow_the_range_that_the_file_declares(rgb, low, high):
    deep = (rgb[..., 0] / 255 * (high - low) + low).astype(np.float32)
    declared = saved(Image.fromarray(deep), "TIFF", tiffinfo={SMIN: low, SMAX: high})
    assert_close(decode(declared), np.broadcast_to(rgb[..., :1], rgb.shape))
    with pytest.raises(UnreadableImage, match=r"not between 0 and 1, black and white.*SMinSample"):
        decode(saved(Image.fromarray(deep), "TIFF"))


def test_pixels_that_are_not_finite_are_refused(rgb):
    deep = rgb[..., 0].astype(np.float32) / 255
    deep[0, 0] = np.nan
    with pytest.raises(UnreadableImage, match="not finite"):
        decode(saved(Image.fromarray(deep), "TIFF"))


def tiff(samples: np.ndarray, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian TIFF of one channel in one strip, whatever Pillow can write."""
    H, W = samples.shape
    raw = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    tags = {256: W, 257: H, 258: 8 * samples.itemsize, 259: 1, 262: photometric, 277: 1, 278: H,
            279: len(raw), 339: sample_format}  # fmt: skip
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = (struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4) + raw


@pytest.mark.parametrize(
    ("kind", "white", "sample_format"),
    [(np.uint16, 2**16 - 1, 1), (np.uint32, 2**32 - 1, 1), (np.int32, 2**31 - 1, 2),
     (np.int16, 2**15 - 1, 2)],
)  # fmt: skip
def test_deep_integers_run_over_their_type(rgb, kind, white, sample_format):
    deep = np.rint(rgb[..., 0].astype(np.float64) / 255 * white).astype(kind)
    expected = np.broadcast_to(rgb[..., :1], rgb.shape)
    assert_close(decode(tiff(deep, sample_format=sample_format)), expected, 1)
    dark = decode(tiff((deep // 2).astype(kind), sample_format=sample_format))
    assert_close(dark, expected // 2, 1)
    if kind is np.uint16:
        assert_close(decode(tiff(deep, photometric=0)), 255 - expected, 1)


def test_float_white_is_zero(rgb):
    deep = (rgb[..., 0] / 255).astype(np.float32)
    expected = np.broadcast_to(rgb[..., :1], rgb.shape)
    assert_close(decode(tiff(deep, photometric=0, sample_format=3)), 255 - expected, 1)


def test_32_bit_pixels_that_would_all_be_black_are_refused(rgb):
    with pytest.raises(UnreadableImage, match="use less than one 256th"):
        decode(tiff(rgb[..., 0].astype(np.uint32)))
    assert decode(tiff(np.zeros((4, 5), np.uint32))).max() == 0  # one that is black is black


def test_a_pgm_of_12_bits_is_scaled_by_its_maxval(rgb):
    deep = (rgb[..., 0].astype(np.uint16) * 16).astype(">u2")
    data = b"P5\n60 45\n4095\n" + deep.tobytes()
    assert_close(decode(data), np.broadcast_to(rgb[..., :1], rgb.shape), 1)


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


def exif_header(order: str = "<", kind: int = 3, orientation: int = 6) -> bytes:
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}[kind], orientation)
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 1)
    return start + struct.pack(order + "HHI", 0x0112, kind, 1) + value + bytes(4)


def with_exif(data: bytes, exif: bytes, prefix: bytes = b"Exif\0\0", fill: int = 0) -> bytes:
    body = prefix + exif
    segment = b"\xff" * fill + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return data[:2] + segment + data[2:]


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])  # by simplejpeg, by Pillow
@pytest.mark.parametrize(
    "odd",
    [
        {"exif": exif_header()},
        {"exif": exif_header(">")},
        {"exif": exif_header(kind=4)},
        {"exif": exif_header(">", kind=4)},
        {"exif": exif_header(), "fill": 1},
        {"exif": exif_header(), "fill": 5},
        {"exif": exif_header(), "prefix": b"Exif\0\0Exif\0\0"},
    ],
)
def test_orientation_is_found_however_a_jpeg_writes_it(rgb, mode, odd):
    plain = saved(Image.fromarray(rgb).convert(mode), "JPEG", quality=98)
    expected = decode(plain).transpose(1, 0, 2)[:, ::-1]
    assert (decode(with_exif(plain, **odd)) == expected).all()


JUNK = b"II*\0\x08\0\0\0\x02\0\x12\x01" + b"\xff" * 30


@pytest.mark.parametrize("junk", [b"", b"junk", JUNK, exif_header(orientation=9)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_exif_that_cannot_be_parsed_leaves_the_pixels_as_they_are(rgb, format, junk):
    image = Image.fromarray(rgb)
    if format == "TIFF":  # a directory of EXIF that lies outside of the file
        data = saved(image, format, tiffinfo={0x8769: 0x7FFFFFF0})
    elif format == "PNG":
        data = with_chunk(saved(image, format), b"eXIf", junk)
    elif format == "JPEG":
        data = with_exif(saved(image, format), junk)
    elif format == "WEBP":
        data = saved(image, format, exif=b"Exif\0\0" + junk)
    else:  # which Pillow only writes when it can be parsed
        exif = Image.Exif()
        exif[0x010F] = "a camera with a long name, so that there is room"
        data = saved(image, format, exif=exif)
        start = data.index(exif.tobytes()[6:])
        data = data[:start] + junk.ljust(60, b"\xff") + data[start + 60 :]
    assert (decode(data) == decode(saved(image, format))).all()


def with_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with a chunk put in behind its header."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"note\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iTXt", b"note\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iCCP", b"profile\0\0 no zlib at all"),
        (b"zTXt", b"note\0\7 another method"),
        (b"gAMA", b""),
        (b"pHYs", b"1"),
        (b"acTL", b"\0\0"),
    ],
)
def test_large_or_broken_chunks_beside_the_pixels_of_a_png(rgb, kind, body):
    data = saved(Image.fromarray(rgb), "PNG")
    assert (decode(with_chunk(data, kind, body)) == rgb).all()
    turned = with_chunk(with_chunk(data, kind, body), b"eXIf", exif_header())
    assert (decode(turned) == rgb.transpose(1, 0, 2)[:, ::-1]).all()


def test_a_jpeg_with_a_broken_profile_and_a_broken_index_of_pictures(rgb):
    plain = saved(Image.fromarray(rgb).convert("CMYK"), "JPEG")
    for body in (b"MPF\0II*\0" + b"\xff" * 40, b"ICC_PROFILE\0\x09\x01", b"Photoshop 3.0\0" + b"8"):
        segment = b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body
        assert (decode(plain[:2] + segment + plain[2:]) == decode(plain)).all()


# Every format that counts, and none besides


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_of_a_format_that_is_read(rgb, suffix):
    format = {".pfm": "PPM", ".apng": "PNG"}.get(suffix) or Image.registered_extensions()[suffix]
    picture = Image.fromarray(rgb if suffix != ".pfm" else (rgb[..., 0] / 255).astype(np.float32))
    assert decode(saved(picture, format)).shape == (45, 60, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "JPEG2000",
                                    "PPM", "QOI"])  # fmt: skip
def test_formats_are_recognised_by_their_first_bytes(rgb, format):
    data = saved(Image.fromarray(rgb), format)
    suffix = recognised(data[:HEAD])
    assert suffix in SUFFIXES
    assert Image.registered_extensions()[suffix] == format
    for text in (b"", b"BM is how this sentence starts, and P5 is none", b"a list\nof paths\n"):
        assert recognised(text[:HEAD]) is None


@pytest.mark.parametrize("format", ["EPS", "PDF", "PSD", "ICO", "FITS", "WMF"])
def test_documents_under_an_images_name_start_nothing(rgb, format, monkeypatch):
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    data = {
        "PSD": b"8BPS\0\1" + bytes(40),
        "FITS": b"SIMPLE  =                    T" + b" " * 2850,
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    }.get(format) or saved(Image.fromarray(rgb), format)
    with pytest.raises(UnreadableImage):
        decode(data)


@pytest.mark.parametrize(
    "raised", [RuntimeError, SyntaxError, struct.error, AssertionError, KeyError, MemoryError,
               ZeroDivisionError, NotImplementedError, RecursionError, BufferError]
)  # fmt: skip
def test_whatever_a_decoder_raises_is_an_unreadable_image(rgb, raised, monkeypatch):
    def broken(*arguments: object) -> None:
        raise raised("first line\nsecond line")

    data = saved(Image.fromarray(rgb), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", broken)
    with pytest.raises(UnreadableImage) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_damaged_avif_is_an_unreadable_image(rgb):
    data = bytearray(saved(Image.fromarray(rgb), "AVIF"))
    start = data.index(b"mdat") + 4
    data[start : start + 60] = b"\xff" * 60
    with pytest.raises(UnreadableImage, match="damaged"):
        decode(bytes(data))


def test_a_jpeg_of_thousands_of_scans_is_refused(rgb):
    data = saved(Image.fromarray(np.tile(rgb, (30, 30, 1))), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[start:-2] * 5000 + data[-2:]
    with pytest.raises(UnreadableImage, match="scans"):
        decode(bomb, max_pixels=3_000_000)
    assert decode(data, max_pixels=3_000_000).shape == (1350, 1800, 3)


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
