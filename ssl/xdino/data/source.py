"""What every source of images is, and the fingerprint that tells one from another.

A source is a numbered row of images. It knows names and labels and reads one image at a time;
order, crops and batches are `loader`'s business. A source is complete or refused: a missing file or
a truncated archive is an error with the mend in it, never a smaller data set.
"""

import abc
import hashlib
import io
import os
from collections.abc import Iterator
from itertools import takewhile

import numpy as np
from PIL import Image

from xdino.config import MAX_PIXELS
from xdino.config.bands import MOST, Bands
from xdino.data.decode import allow_pixels, bands_in, decode, pages_in, usual
from xdino.data.listing import ByteStrings, left_out_sentence, printable
from xdino.errors import UsageError
from xdino.runtime import rng

_SAMPLED, _PIECE = 64, 1 << 16  # images whose first and last bytes a fingerprint reads
_COUNTED = 9  # images whose bands are counted where nobody says how many there are
SENSORS = (b".tif", b".tiff", b".npy")  # suffixes of what may hold other bands than a photograph


class Source(abc.ABC):
    """N images. `labels`: int64 [N] indices into `classes`, or None.

    `batch_reads` is how many images make one task of a worker: few where reading one takes
    milliseconds, many where handing over a task costs as much as the image.
    left_out: how many files were not taken for images, by suffix.
    """

    batch_reads = 4
    max_pixels = MAX_PIXELS  # of an image; a larger one is unreadable
    shrunk_to: int | None = None  # shorter side in pixels, where images are not the original ones

    def __init__(
        self,
        name: str,
        channels: int,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        if channels not in (1, 3) and not isinstance(channels, Bands):
            raise UsageError(f"channels must be 1 or 3, got {channels}")
        self.name, self.channels = printable(os.fsencode(name)), channels
        self.labels, self.classes = labels, classes
        self.left_out: dict[str, int] = {}
        self.remarks: list[str] = []

    def notices(self) -> list[str]:
        """What a person should hear once about what was read: sentences, none as a rule."""
        left_out = [left_out_sentence(self.name, self.left_out)] if self.left_out else []
        return self.remarks + left_out

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> np.ndarray:
        """uint8 [H, W, C]. Raises UnreadableImage or OSError for an image that cannot be read."""

    def encoded(self, index: int) -> bytes:
        """Image `index` as an image file's bytes: those that are stored, else lossless PNG."""
        image = self.read(index)
        return png(image if image.shape[2] == 3 else image[..., 0])

    def member(self, index: int) -> bytes:
        """The name of image `index` below the source's root, folders and suffix included."""
        return f"{index:08}.png".encode()

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """How a person finds image `index`: its path, or its number in the file that holds it.

        In letters that can be printed and written anywhere; `FileSource.path` opens files.
        """

    @abc.abstractmethod
    def _content(self) -> Iterator[bytes]:
        """What tells this source from another, wherever it lies, for `fingerprint`."""

    def stamps(self) -> bytes:
        """Names, sizes and times of change; of arrays their content. Changes with any of the files.

        Unlike a fingerprint it also changes when equal files are written again.
        """
        return b"\0".join(self._content())


class StoredSource(Source):
    """Images that lie somewhere as image files' bytes.

    described: `names_and_sizes` of them, once it is known. lies_apart: any one costs as little as the
    next.
    """

    described: bytes | None = None
    lies_apart = False

    @abc.abstractmethod
    def encoded(self, index: int) -> bytes: ...

    @abc.abstractmethod
    def _ends(self, index: int, most: int) -> bytes:
        """The first and the last bytes of image `index`, at most `most` of each."""

    @abc.abstractmethod
    def sizes(self) -> np.ndarray:
        """Bytes of each image file: int64 [N], -1 where there is none."""

    def ends(self, index: int, most: int) -> bytes:
        """The first and the last bytes of image `index`, at most `most` of each."""
        return self._ends(index, most)

    def read(self, index: int) -> np.ndarray:
        return decode(self.encoded(index), self.channels, self.max_pixels)

    def _check_size(self, size: int) -> None:
        if size > (1 << 28) + 16 * self.max_pixels:  # more than any format needs for them
            raise OSError(f"{size:,} bytes are more than {self.max_pixels:,} pixels need")

    def _described(self, told: bytes) -> Iterator[bytes]:
        """What `names_and_sizes` says, and a sample of the contents."""
        yield told
        # What is sampled follows from names and sizes, so that it is the same on any machine.
        for index in rng.sample(told, _SAMPLED, len(self)).tolist():
            try:
                yield self._ends(index, _PIECE)
            except OSError:
                yield b"unreadable"


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def limit_pixels(source: Source, max_pixels: int) -> None:
    """From now on images of `source` with more than `max_pixels` pixels are unreadable."""
    source.max_pixels = max_pixels
    allow_pixels(max_pixels)


# Bands


def settle_bands(source: Source, asked: int | None) -> None:
    """Let `source` read the bands that were asked for, or those that its images have.

    asked: a plain number or None leave photographs what they are; of sensors' images (TIFFs that are
    no photographs, arrays) most of a sample say how many bands there are.

    Raises:
        UsageError: no images of bands, more than `MOST` of them, or not those that `asked` speaks of.
    """
    if asked is not None and not isinstance(asked, Bands):
        return
    if not isinstance(source, StoredSource):
        if asked is not None and (asked not in (0, source.channels) or asked.range):
            raise only_pictures(source.name)
        return
    if asked:
        source.channels = asked
        return
    counts = _count_bands(source, all_kinds=asked is not None)
    count = usual(counts)
    if count is None and (many := [c for c in counts if c is not None and c > MOST]):
        raise UsageError(
            f"the images of {source.name} have {many[0]:,} bands, and at most {MOST} are possible: "
            "write fewer"
        )
    if asked is not None and count is None:
        raise UsageError(
            f"nobody says how many bands the images of {source.name} have, and none of a sample tells: "
            "set model.in_chans"
        )
    if not count and asked is None:
        source.remarks += _unread_pages(source)
    if count:
        source.channels = (Bands(0) if asked is None else asked).counted(count)


def _unread_pages(source: StoredSource) -> list[str]:
    """A sentence where the first image has several pages, of which one is read."""
    if not len(source) or not source.member(0).lower().endswith(SENSORS):
        return []
    try:
        pages = pages_in(source.encoded(0))
    except OSError:
        return []
    if pages < 2:
        return []
    return [
        f"{source.describe(0)} has {pages} pages, of which the first is read"
        + (f" (--model.in_chans {pages} takes them for bands)" if pages <= MOST else "")
    ]


def only_pictures(name: str) -> UsageError:
    return UsageError(
        f"{name} holds pictures of 8 bits, grey or in colour, and bands of a sensor are asked for (by "
        "data.range, data.rgb or model.in_chans, or by the weights): name other images"
    )


def _count_bands(source: StoredSource, all_kinds: bool) -> list[int | None]:
    """Of a sample, neighbours where they lie in one tar; 0 for photographs, unless they count, too."""
    n = len(source)
    chosen = range(min(n, _COUNTED))
    if source.lies_apart and n > _COUNTED:
        chosen = range(0, n, -(-n // _COUNTED))
    counts: list[int | None] = []
    for index in chosen:
        if not all_kinds and not source.member(index).lower().endswith(SENSORS):
            counts.append(0)
            continue
        try:
            counts.append(bands_in(source.encoded(index), all_kinds))
        except OSError:
            counts.append(None)
    return counts


# Fingerprints


def fingerprint(source: Source) -> str:
    """16 hexadecimal digits: the same for the same images, names and labels on any machine.

    Files count by their names below the folder that they share, by their sizes, and by the
    beginnings and ends of a sample of them. Where they lie, and when they were written, is nothing.
    """
    digest = hashlib.blake2b(str(len(source)).encode(), digest_size=8)
    for part in source._content():
        digest.update(part)
    if source.labels is not None:
        digest.update(source.labels.tobytes())
        digest.update("\0".join(source.classes or ()).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def names_and_sizes(names: ByteStrings, sizes: np.ndarray) -> bytes:
    """A digest of names below the folder that they share, and of the sizes."""
    shared, between = _shared_folder(names), b""
    told = hashlib.blake2b(digest_size=32)
    for name in names:
        told.update(between + name[shared:])
        between = b"\0"
    told.update(np.ascontiguousarray(sizes, np.dtype("<i8")).tobytes())
    return told.digest()


def _shared_folder(names: ByteStrings) -> int:
    """The length of the folders, with their last slash, that all names start with."""
    if not len(names):
        return 0
    low, high = min(names), max(names)  # what these two start with, all do
    same = takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return low.rfind(b"/", 0, sum(1 for _ in same)) + 1
