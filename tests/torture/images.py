"""Image files of every readable format, mutated at random: each must decode or be UnreadableImage.

    PYTHONPATH=ssl python tests/torture/images.py SEED COUNT

Image `i` of a seed is the same on any machine with the same Pillow, so that `made(seed, i)` brings
an offender back. A file that hangs ends the process with a traceback of where.
"""

import io
import struct
import sys
import warnings
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image, PngImagePlugin
from trials import judge

from xdino.data.decode import UnreadableImage, decode

MAX_PIXELS = 4_000_000  # of a decoded image here
_MEMORY = 1 << 29  # bytes that decoding may take at most: a hundred for each of those pixels

_MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"),
    "GIF": ("1", "L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "DIB": ("L", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"),
    "WEBP": ("L", "RGB", "RGBA"),
    "AVIF": ("L", "RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB", "I;16", "F"),
    "PCX": ("1", "L", "P", "RGB"),
    "SGI": ("L", "RGB", "RGBA"),
    "QOI": ("RGB", "RGBA"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
}
_OPTIONS: dict[str, list[dict[str, object]]] = {
    "JPEG": [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}],
    "TIFF": [
        {"compression": kind}
        for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
    ],
    "WEBP": [{}, {"lossless": True}],
    "TGA": [{}, {"compression": "tga_rle"}],
    "GIF": [{}, {"interlace": 0}, {"save_all": True}],
    "PNG": [{}, {"save_all": True}],
}
_TAGS = (
    *(256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330),
    *(338, 339, 340, 341, 34665, 34853, 700),
)
_ABSURD = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


# Whole files


@lru_cache(maxsize=1)
def originals() -> tuple[bytes, ...]:
    """Small files in every format, mode and compression that this Pillow writes."""
    Image.init()
    down, across = np.mgrid[0:37, 0:53]
    rgb = np.stack([across * 4, down * 6, 240 - across * 2], axis=-1).astype(np.uint8)
    found = []
    for format, modes in _MODES.items():
        for mode in modes:
            for options in _OPTIONS.get(format, [{}]):
                buffer = io.BytesIO()
                metadata = {"exif": _exif()} if format in ("JPEG", "PNG", "WEBP", "AVIF") else {}
                try:
                    _picture(rgb, mode).save(buffer, format, **options, **metadata)
                except (OSError, KeyError, ValueError, SystemError, RuntimeError):
                    continue  # not every mode goes with every compression
                found.append(buffer.getvalue())
    return tuple(found)


def _picture(rgb: np.ndarray, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(rgb[..., 0].astype(np.int32) << 23)
    if mode == "LAB":
        return Image.frombytes("LAB", (rgb.shape[1], rgb.shape[0]), rgb.tobytes())
    if mode == "F":
        return Image.fromarray(rgb[..., 0].astype(np.float32) / 255)
    return Image.fromarray(rgb).convert(mode)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return exif


# Mutations: (random numbers, file, another file) -> file


def _truncate(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: rng.integers(0, len(data) + 1)]


def _flip(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    raw = bytearray(data)
    for place in rng.integers(0, len(raw), rng.integers(1, 17)):
        raw[place] = rng.integers(0, 256)
    return bytes(raw)


def _flip_head(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    raw = bytearray(data)
    for place in rng.integers(0, min(64, len(raw)), rng.integers(1, 5)):
        raw[place] ^= 1 << rng.integers(0, 8)
    return bytes(raw)


def _splice(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: rng.integers(1, len(data))] + other[rng.integers(0, len(other)) :]


def _insert(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    place = rng.integers(0, len(data))
    return data[:place] + rng.bytes(rng.integers(1, 300)) + data[place:]


def _cut_out(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    start = rng.integers(0, len(data))
    return data[:start] + data[start + rng.integers(1, 100) :]


def _repeat(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    start = rng.integers(0, len(data))
    piece = data[start : start + rng.integers(1, 200)]
    return data[:start] + piece * int(rng.integers(2, 50)) + data[start:]


def _absurd(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A number in the header becomes one that no picture has."""
    raw = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        code = "BHI"[rng.integers(0, 3)]
        size = struct.calcsize(code)
        value = _ABSURD[rng.integers(0, len(_ABSURD))] & ((1 << 8 * size) - 1)
        place = rng.integers(0, max(1, min(160, len(raw)) - size))
        raw[place : place + size] = struct.pack("<>"[rng.integers(0, 2)] + code, value)
    return bytes(raw)


def _other_head(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    length = int(rng.integers(2, 40))
    return other[:length] + data[length:]


def _noise(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: rng.integers(0, 24)] + rng.bytes(rng.integers(0, 2000))


def _png_chunk(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A PNG with a chunk changed, put in or repeated, and its checksum made right."""
    if data[:4] != b"\x89PNG":
        return _flip(rng, data, other)
    chunks, position = [], 8
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunks.append(
            (data[position + 4 : position + 8], data[position + 8 : position + 8 + length])
        )
        position += 12 + length
    place = int(rng.integers(0, len(chunks)))
    kind, body = chunks[place]
    names = (b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"eXIf",
             b"acTL", b"fcTL", b"fdAT", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"caBX", b"abcD")  # fmt: skip
    bodies = (
        rng.bytes(rng.integers(0, 60)),
        _flip(rng, body or b"\0", other),
        b"x\0\0" + zlib.compress(bytes(2_000_000)),
        b"",
    )
    made = (
        names[rng.integers(0, len(names))] if rng.random() < 0.7 else kind,
        bodies[rng.integers(0, len(bodies))],
    )
    if rng.random() < 0.5:
        chunks.insert(place, made)
    else:
        chunks[place] = made
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _tiff_entry(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """An entry of a TIFF's directory, or of an EXIF header's, changed."""
    start = max(data.find(b"II*\0"), data.find(b"MM\0*"))
    if start < 0:
        return _flip(rng, data, other)
    order = "<" if data[start : start + 1] == b"I" else ">"
    raw = bytearray(data)
    try:
        (directory,) = struct.unpack_from(order + "I", data, start + 4)
        (count,) = struct.unpack_from(order + "H", data, start + directory)
        for _ in range(rng.integers(1, 4)):
            entry = start + directory + 2 + 12 * int(rng.integers(0, max(1, count)))
            tag = int(rng.choice(_TAGS))
            value = _ABSURD[rng.integers(0, len(_ABSURD))]
            if rng.random() < 0.3:
                struct.pack_into(order + "H", raw, entry, tag)
            if rng.random() < 0.3:
                struct.pack_into(order + "H", raw, entry + 2, int(rng.integers(0, 14)))
            if rng.random() < 0.3:
                struct.pack_into(order + "I", raw, entry + 4, value)
            struct.pack_into(order + "I", raw, entry + 8, value)
    except struct.error:
        return _flip(rng, data, other)
    return bytes(raw)


def _jpeg_segment(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A JPEG with a segment put in front: metadata of all kinds, mostly damaged."""
    if data[:2] != b"\xff\xd8":
        return _flip(rng, data, other)
    bodies = (
        b"Exif\0\0" + rng.bytes(40),
        b"Exif\0\0Exif\0\0" + _exif().tobytes()[6:],
        b"Exif\0\0MM\0*" + rng.bytes(60),
        b"MPF\0II*\0" + rng.bytes(60),
        b"ICC_PROFILE\0" + rng.bytes(60),
        b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>" + rng.bytes(60),
        b"Adobe" + rng.bytes(7),
        b"JFIF\0" + rng.bytes(9),
        rng.bytes(rng.integers(0, 100)),
    )
    body = bodies[rng.integers(0, len(bodies))]
    marker = int(rng.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xC0, 0xC4, 0xDB, 0xDD]))
    fill = b"\xff" * int(rng.integers(1, 5))
    return data[:2] + fill + struct.pack(">BH", marker, len(body) + 2) + body + data[2:]


def _big_text(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * int(rng.integers(1, 3_000_000)), zip=bool(rng.integers(0, 2)))
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def _whole(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data


_MUTATIONS = (
    *(_truncate, _flip, _flip_head, _splice, _insert, _cut_out, _repeat, _absurd, _absurd),
    *(_other_head, _noise, _png_chunk, _tiff_entry, _jpeg_segment, _whole),
)


def made(seed: int, i: int) -> bytes:
    """File `i` of a seed."""
    rng = np.random.default_rng((seed, i))
    files = originals()
    data, other = (files[rng.integers(0, len(files))] for _ in range(2))
    for _ in range(rng.integers(1, 4)):
        mutate = _MUTATIONS[rng.integers(0, len(_MUTATIONS))]
        data = mutate(rng, data, other) or data
    return _big_text(rng, data, other) if rng.random() < 0.002 else data


def _outcome(data: bytes, channels: int) -> str:
    try:
        image = decode(data, channels, MAX_PIXELS)
    except UnreadableImage as error:
        told = str(error)
    else:
        _check(image, channels)
        return "decoded"
    assert told
    assert "\n" not in told
    return "unreadable"


def _check(image: np.ndarray, channels: int) -> None:
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == channels
    assert 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS
    assert image.flags.c_contiguous
    assert image.flags.writeable


def run(seed: int, count: int) -> dict[str, int]:
    """Decode files 0 to `count` of a seed. Anything but "decoded" and "unreadable" is a defect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge(
            f"images, seed {seed}, file",
            ("decoded", "unreadable"),
            range(count),
            _MEMORY,
            lambda i: _outcome(made(seed, i), 1 + 2 * (i % 2)),
        )


if __name__ == "__main__":
    print(run(int(sys.argv[1]), int(sys.argv[2])))
