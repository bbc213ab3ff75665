"""A data set written once into plain tar files, for many runs: the packed cache.

WebDataset's convention (`tars` reads it, and so does everybody else): one sample is an image and,
where there are classes, a `.cls` with the class's number, under the folders and names that the
images had. A last member, `__xdino_pack__`, says how the tar was made.

Raw packs hold the very bytes of the files, so that a run sees the same crops as from the folder.
Shrunk packs (`shorter_side`) hold re-encoded JPEGs (of images of bands TIFFs and arrays, whose numbers
keep their meaning), which are faster to decode and not what the papers trained on: crops of a small
part come from fewer pixels, and everything was compressed twice. Whatever comes out of one therefore
carries "(shrunk to 256)" in the name of its data.
"""

import dataclasses
import io
import json
import posixpath
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from xdino.config.bands import Bands
from xdino.data.decode import (
    ARRAYS,
    HEAD,
    SUFFIXES,
    UnreadableImage,
    decode,
    recognised,
    shrink_bands,
)
from xdino.data.files import FileSource
from xdino.data.listing import is_hidden
from xdino.data.source import Source, fingerprint
from xdino.data.sources import open_source, splits_of
from xdino.data.tars import PACK_MEMBER
from xdino.errors import RunFailed, UsageError, asked, reason
from xdino.runtime.atomic import written_beside

LONGEST_JPEG = 65_500  # pixels a side that the format can say

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packed:
    """What was written. unreadable: (where, why) of images that were kept as they are.

    notices: sentences about files that were not packed.
    """

    files: list[Path] = field(default_factory=list)
    images: int = 0
    shrunk: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def __add__(self, other: "Packed") -> "Packed":
        names = [field.name for field in dataclasses.fields(self)]
        return Packed(*(getattr(self, name) + getattr(other, name) for name in names))


def pack(
    data: str,
    out: str | Path,
    shorter_side: int | None = None,
    quality: int = 95,
    shards: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Packed:
    """Write the images of `data` into a tar, or into a folder of `shards` tars a split.

    Args:
        data: as for `open_source`; train and val are both packed where there are both.
        out: the tar file, or with `shards` a folder that is empty or not there yet.
        shorter_side: pixels; larger images are shrunk to it (bicubic, antialiased) and re-encoded.
            Smaller ones, and those that cannot be read, are kept byte for byte.
        quality: of the re-encoded JPEGs, 1 to 100.
        workers: threads.
        progress: called with (images done, images in all).

    Raises:
        UsageError: no such data, `out` is there already, or values out of range.
        RunFailed: a file cannot be read or written.
    """
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality must be from 1 to 100, got {quality}")
    if shorter_side is not None and shorter_side < 1:
        raise UsageError(f"--shorter-side must be at least 1 pixel, got {shorter_side}")
    with asked(f"--out {out}"):
        _check_out(Path(out), shards)
    sources = {split: _labelled_if_it_can_be(data, split) for split in splits_of(data)}
    total = sum(map(len, sources.values()))
    layout = list(_layout(Path(out), sources, shards))
    done = Packed(notices=[told for source in sources.values() for told in source.notices()])

    def tell(images: int) -> None:
        if progress is not None:
            progress(done.images + images, total)

    try:
        for path, parts in layout:
            writer = _Writer(data, parts, shorter_side, quality, max(1, workers))
            done += writer.write(path, tell)
    except OSError as error:
        raise RunFailed(f"cannot write {out}: {reason(error)}") from error
    return done


def _check_out(out: Path, shards: int | None) -> None:
    if shards is None:
        if out.suffix != ".tar":
            raise UsageError(f"--out must end in .tar, got {out}; --shards N writes into a folder")
        if out.exists():
            raise UsageError(f"{out} is there already: choose another --out, or remove it")
    else:
        if shards < 1:
            raise UsageError(f"--shards must be at least 1, got {shards}")
        if out.suffix == ".tar":
            raise UsageError(f"--shards writes several files: name a folder, not {out}")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UsageError(f"{out} is there already: choose another --out, or an empty folder")


def _labelled_if_it_can_be(data: str, split: str | None) -> Source:
    try:
        return open_source(data, split, labelled=True)
    except UsageError:  # no class folders, say; what is wrong besides, the next line says
        return open_source(data, split)


@dataclass(frozen=True)
class _Part:
    """Images `indices` of a split's source; `prefix`: the folder they lie below in the tar."""

    split: str | None
    source: Source
    indices: np.ndarray
    prefix: bytes = b""


def _layout(
    out: Path, sources: dict[str | None, Source], shards: int | None
) -> Iterator[tuple[Path, list[_Part]]]:
    """Which images go into which file."""
    if shards is None:
        parts = [
            _Part(split, source, np.arange(len(source)), _prefix(split, source))
            for split, source in sources.items()
        ]
        yield out, parts
        return
    for split, source in sources.items():
        if shards > len(source):
            raise UsageError(f"--shards is {shards}, but {source.name} has {len(source)} images")
        for number, indices in enumerate(np.array_split(np.arange(len(source)), shards)):
            name = f"{split or 'images'}-{number:05}.tar"
            prefix = b"" if split else _prefix(split, source)
            yield out / name, [_Part(split, source, indices, prefix)]


def _prefix(split: str | None, source: Source) -> bytes:
    """The folder that a split's images lie below in a tar.

    A list of paths has no splits, whatever its folders are called: they must not become some.
    """
    if split is not None:
        return f"{split}/".encode()
    if source.labels is None and isinstance(source, FileSource) and source.listed:
        return b"all/"
    return b""


@dataclass(frozen=True)
class _Writer:
    """Writes one tar."""

    data: str
    parts: list[_Part]
    side: int | None
    quality: int
    workers: int

    def write(self, path: Path, tell: Callable[[int], object]) -> Packed:
        done = 0
        shrunk = 0
        unreadable: list[tuple[str, str]] = []
        with written_beside(path) as beside, _tar(beside) as tar:
            for part in self.parts:
                names = _member_names(part)
                labels = part.source.labels
                for index, name, item in zip(
                    part.indices.tolist(), names, self._encoded(part), strict=True
                ):
                    stem, suffix = posixpath.splitext(name)
                    if item.why:
                        unreadable.append((part.source.describe(index), item.why))
                    shrunk += item.shrunk
                    suffix = item.suffix.encode() or _suffix(suffix.lower(), item.data)
                    _add(tar, stem + suffix, item.data)
                    if labels is not None:
                        _add(tar, stem + b".cls", str(labels[index]).encode())
                    done += 1
                    tell(done)
            told = self._told(done, shrunk, unreadable)
            _add(tar, PACK_MEMBER.encode(), (json.dumps(told, indent=2) + "\n").encode())
        return Packed([path], done, shrunk, unreadable)

    def _encoded(self, part: _Part) -> Iterator["_Item"]:
        """Image files in order, some made ahead by threads."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="xdino-pack")
        ahead: deque[Future[_Item]] = deque()
        try:
            for index in part.indices.tolist():
                ahead.append(pool.submit(_item, part.source, index, self.side, self.quality))
                if len(ahead) > 4 * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _told(self, images: int, shrunk: int, unreadable: list[tuple[str, str]]) -> dict[str, Any]:
        """What the pack says of itself."""
        sides = {part.source.shrunk_to for part in self.parts} | {self.side}
        side = min((s for s in sides if s is not None), default=None)
        bands = any(isinstance(part.source.channels, Bands) for part in self.parts)
        kind = "TIFF, or NPY as before" if bands else "JPEG 4:2:0"
        resample = f"bicubic, antialiased; {kind}; smaller images are kept byte for byte"
        return {
            "made_by": f"xdino {metadata.version('xdino')} pack",
            "source": self.data,
            "splits": {
                part.split or "all": {
                    "fingerprint": fingerprint(part.source),
                    "images_of_the_source": len(part.source),
                    "first": int(part.indices[0]),
                    "images": len(part.indices),
                    "classes": part.source.classes,
                }
                for part in self.parts
            },
            "channels": self.parts[0].source.channels,
            "shorter_side": side,
            "quality": self.quality if self.side is not None else None,
            "how": resample if side is not None else "the files' own bytes",
            "images": images,
            "shrunk": shrunk,
            "unreadable": len(unreadable),
            "first_unreadable": [f"{where}: {why}" for where, why in unreadable[:100]],
        }


def _tar(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape")


def _suffix(own: bytes, data: bytes) -> bytes:
    """A suffix by which the member is found again: its own, else that of what it holds."""
    if own.decode("utf-8", "replace") in SUFFIXES + ARRAYS:
        return own
    return (recognised(data[:HEAD]) or SUFFIXES[0]).encode()


def _add(tar: tarfile.TarFile, name: bytes, data: bytes) -> None:
    """One member; equal images make equal tars, so nothing says who wrote them and when."""
    member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _member_names(part: _Part) -> Iterator[bytes]:
    """Names of a part's members: no dot before the suffix's, no two samples of one stem in a row.

    WebDataset cuts a name at its first dot, so "a.b.jpg" and "a.c.jpg" would be one sample.
    """
    folder: bytes | None = None
    taken: set[bytes] = set()
    for index in part.indices.tolist():
        own = part.source.member(index)
        pieces = [p for p in own.split(b"/") if p not in (b"", b".", b"..")]
        pieces[:-1] = [b"_" + p if is_hidden(p) else p for p in pieces[:-1]]
        here = part.prefix + b"".join(p + b"/" for p in pieces[:-1])
        if here != folder:
            folder, taken = here, set()
        base, suffix = posixpath.splitext(pieces[-1])
        stem = wanted = base.replace(b".", b"_")
        number = 1
        while stem in taken:
            number += 1
            stem = b"%s_%d" % (wanted, number)
        taken.add(stem)
        yield here + stem + suffix


# One image


@dataclass(frozen=True)
class _Item:
    """data: an image file. suffix: of one that was made. why: it was kept as it is, unreadable."""

    data: bytes
    suffix: str = ""
    why: str = ""

    @property
    def shrunk(self) -> bool:
        return bool(self.suffix)


def _item(source: Source, index: int, side: int | None, quality: int) -> _Item:
    try:
        data = source.encoded(index)
    except OSError as error:
        raise RunFailed(
            f"{source.describe(index)} cannot be read ({reason(error)}); the pack was not finished"
        ) from error
    if side is None:
        return _Item(data)
    try:
        small = shrink(data, side, quality, source.channels, source.max_pixels)
    except UnreadableImage as error:
        return _Item(data, why=str(error))
    return _Item(data) if small is None else _Item(*small)


def shrink(
    data: bytes, side: int, quality: int, channels: int, max_pixels: int
) -> tuple[bytes, str] | None:
    """An image file -> a JPEG whose shorter side has `side` pixels, and its suffix; None if it has no
    more. Of `Bands` see `shrink_bands`.

    Raises UnreadableImage as `decode`.
    """
    if isinstance(channels, Bands):
        return shrink_bands(data, side, int(channels), max_pixels)
    image = decode(data, channels, max_pixels)
    short, long = min(image.shape[:2]), max(image.shape[:2])
    longer = round(side * long / short)
    if short <= side or longer > LONGEST_JPEG:
        return None
    size = (side, longer) if image.shape[1] == short else (longer, side)
    picture = Image.fromarray(image if channels == 3 else image[..., 0])
    small = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).reshape(
        size[1], size[0], channels
    )
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(small),
        quality,
        "RGB" if channels == 3 else "GRAY",
        "420" if channels == 3 else "Gray",
    )
    return jpeg, ".jpg"
