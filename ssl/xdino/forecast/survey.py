"""What lies in a data set, looked at before anything is trained on it.

Counts are exact. Sizes and colours come from the files' headers; of many files from a sample of them
that depends on their number alone, so that two looks say the same. Decoding, the one proof that an
image can be read, is tried on a smaller sample, or on all.
"""

import hashlib
import io
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from xdino.config.bands import Bands
from xdino.data import Source, UnreadableImage, decode, open_source
from xdino.data.decode import layout_of
from xdino.data.source import StoredSource
from xdino.data.sources import splits_of
from xdino.errors import UsageError, reason
from xdino.plan.measured import too_dim
from xdino.runtime import rng

HEADERS, DECODED = 2000, 200  # images of a sample
SECONDS_OF_DECODING = 10.0  # and no longer than this for the second
ALL_COMPARED = 100_000  # images up to which every one is compared with every other
NAMED = 20  # unreadable images, and groups of equal ones, that are kept by name
STRETCHED = 3.0  # longer side over the shorter one, from which crops see a part of an image only
TINY = 32  # pixels of the shorter side
ENDS = 4096  # bytes of a file's beginning and end that are compared before all of it

# What would read files of a suffix, or what they are.
_VIDEO = "videos: take frames out of them with ffmpeg"
_RAW = "camera RAW: rawpy develops them into images"
_HEIF = "pillow-heif reads them: write them as JPEG or PNG"
_TOLD = {
    (".heic", ".heif", ".hif"): _HEIF,
    (
        ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".raf", ".orf",
        ".rw2", ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".raw",
    ): _RAW,
    (".jxl",): "JPEG XL: pillow-jxl-plugin reads them",
    (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"): _VIDEO,
    (".dcm", ".dicom"): "DICOM: pydicom reads them; choose a window and write 8 or 16 bits",
    (".nii",): "NIfTI volumes: nibabel reads them; write slices",
    (".svs", ".ndpi", ".mrxs", ".scn"): "whole slides: openslide reads them; write tiles",
    (".czi", ".nd2", ".lif", ".oib", ".oif"): "microscope stacks: bioio reads them; write planes",
    (".exr", ".hdr"): "high dynamic range: OpenEXR or imageio reads them",
    (".psd", ".ai", ".eps", ".svg", ".pdf"): "drawings and documents: write them as images",
    (".npy", ".npz", ".h5", ".hdf5", ".mat", ".parquet", ".arrow", ".tfrecord", ".lmdb"):
        "arrays: write their images into a folder",
    (".zip", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"): "archives: unpack them",
}  # fmt: skip
HINTS = {suffix: hint for suffixes, hint in _TOLD.items() for suffix in suffixes}
_PILLOW_AVIF = "AVIF: Pillow from 11.3 on reads them, this one does not"


@dataclass(frozen=True)
class Quantiles:
    """Of a number that each image has."""

    least: float
    low: float  # the twentieth part is below
    median: float
    high: float  # the twentieth part is above
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        return cls(*np.quantile(np.asarray(values, float), [0, 0.05, 0.5, 0.95, 1]).tolist())


@dataclass(frozen=True)
class Survey:
    """What was found. Counts are of the images of `split`, those that pretraining would take.

    Args:
        data, images, bytes: what it is called; how many; of all the files (pixels of named sources).
        splits: images of every part that pretraining or an evaluation would open.
        classes: of folders that can be classes, the images of each; None where there are none.
        formats: images by suffix.
        left_out: files that are not read, by suffix; `hints`: what would read them, by suffix.
        sampled: images whose headers were looked at; the next five are of these.
        shorter, longer: sides in pixels, as the image is shown. stretched, tiny: how many are
            `STRETCHED` times longer than high or wide, or below `TINY` pixels.
        colours: "colour", "grey", with " and transparency" or " of 16 bits and more"; "4 bands of uint8".
        decoded: images that were decoded whole; unreadable: where, why, of these and of the headers.
        compared: images that were compared by content; equal: groups of equal ones, `NAMED` at most;
            copies: images that another one equals already.
        decode_seconds: of one image, on one core.
        notices: what opening it would say.
    """

    data: str
    images: int
    bytes: int
    splits: Mapping[str, int]
    classes: Mapping[str, int] | None
    formats: Mapping[str, int]
    left_out: Mapping[str, int]
    hints: Mapping[str, str]
    sampled: int
    shorter: Quantiles | None
    longer: Quantiles | None
    stretched: int
    tiny: int
    colours: Mapping[str, int]
    decoded: int
    unreadable: Sequence[tuple[str, str]]
    unreadable_count: int
    compared: int
    equal: Sequence[Sequence[str]]
    copies: int
    decode_seconds: float
    notices: Sequence[str] = ()

    @property
    def grey(self) -> bool:
        """Whether every image that was looked at is grey."""
        return bool(self.colours) and all(name.startswith("grey") for name in self.colours)

    @property
    def channels(self) -> int:
        return 1 if self.grey else 3


def survey(data: str, everything: bool = False) -> Survey:
    """Look at `data`, anything that pretraining takes.

    everything: headers and pixels of every image, however long it takes.

    Raises:
        UsageError: as pretraining would, where there is nothing to train on.
    """
    source, classes = _opened(data)
    n = len(source)
    looked = np.arange(n) if everything else rng.sample(_key(n), HEADERS, n)
    heads = _Headers.of(source, looked)
    chosen = looked if everything else looked[rng.sample(_key(len(looked)), DECODED, len(looked))]
    decoded, bad, seconds = _decoded(source, chosen, None if everything else SECONDS_OF_DECODING)
    unreadable = heads.bad | bad
    groups, compared = _equal(source)
    return Survey(
        data=source.name,
        images=n,
        bytes=_bytes(source),
        splits=_splits(data, n),
        classes=classes,
        formats=_by_suffix(source),
        left_out=dict(sorted(source.left_out.items(), key=lambda item: (-item[1], item[0]))),
        hints=_hints(source, [why for _, why in unreadable.values()]),
        sampled=len(looked),
        shorter=Quantiles.of(heads.shorter) if heads.shorter else None,
        longer=Quantiles.of(heads.longer) if heads.longer else None,
        stretched=sum(b >= STRETCHED * a for a, b in zip(heads.shorter, heads.longer, strict=True)),
        tiny=sum(a < TINY for a in heads.shorter),
        colours=dict(heads.colours.most_common()),
        decoded=decoded,
        unreadable=[unreadable[i] for i in sorted(unreadable)][:NAMED],
        unreadable_count=len(unreadable),
        compared=compared,
        equal=[[source.describe(i) for i in group[:NAMED]] for group in groups[:NAMED]],
        copies=sum(len(group) - 1 for group in groups),
        decode_seconds=seconds,
        notices=[*source.notices(), *too_dim(source)],
    )


def _key(n: int) -> bytes:
    return hashlib.blake2b(str(n).encode(), digest_size=16).digest()


# What is there


def _opened(data: str) -> tuple[Source, dict[str, int] | None]:
    """What pretraining would open, and the images of each class, where folders can be classes."""
    source = open_source(data, "train")
    try:
        labelled = open_source(data, "train", labelled=True)
    except UsageError:
        return source, None
    if labelled.labels is None or labelled.classes is None or len(labelled) != len(source):
        return source, None
    counts = np.bincount(labelled.labels, minlength=len(labelled.classes))
    return source, dict(zip(labelled.classes, counts.tolist(), strict=True))


def _splits(data: str, train: int) -> dict[str, int]:
    found = {"train": train}
    if "val" in splits_of(data):
        try:
            found["val"] = len(open_source(data, "val"))
        except UsageError:  # an empty folder: training does without it
            found["val"] = 0
    return found


def _bytes(source: Source) -> int:
    if isinstance(source, StoredSource):
        return int(source.sizes().clip(min=0).sum())
    return source.read(0).size * len(source)


def _by_suffix(source: Source) -> dict[str, int]:
    if not isinstance(source, StoredSource):
        return {"pixels": len(source)}
    names = (source.member(i) for i in range(len(source)))
    counts = Counter(os.path.splitext(name)[1].lower().decode("utf-8", "replace") for name in names)
    return {suffix or "none": count for suffix, count in counts.most_common()}


def _hints(source: Source, whys: Iterable[str]) -> dict[str, str]:
    found = {suffix: HINTS[suffix] for suffix in source.left_out if suffix in HINTS}
    if any("cannot be read" in why for why in whys) and "AVIF" not in Image.OPEN:
        avif = [s for s in _by_suffix(source) if s in (".avif", ".avifs")]
        found |= dict.fromkeys(avif, _PILLOW_AVIF)
    return found


# Headers


@dataclass
class _Headers:
    """Of the images that were looked at."""

    shorter: list[int] = field(default_factory=list)
    longer: list[int] = field(default_factory=list)
    colours: Counter[str] = field(default_factory=Counter)
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, indices: np.ndarray) -> "_Headers":
        found = cls()
        for index in indices.tolist():
            try:
                height, width, colour = _header(source, index)
            except (UnreadableImage, OSError) as error:
                found.bad[index] = (source.describe(index), reason(error))
                continue
            found.shorter.append(min(height, width))
            found.longer.append(max(height, width))
            found.colours[colour] += 1
        return found


def _header(source: Source, index: int) -> tuple[int, int, str]:
    """Height and width in pixels, and how it is coloured; no pixel of a file is decoded."""
    if not isinstance(source, StoredSource):
        pixels = source.read(index)
        return pixels.shape[0], pixels.shape[1], "grey" if pixels.shape[2] == 1 else "colour"
    data = source.encoded(index)
    if not data:
        raise UnreadableImage("the file is empty")
    if isinstance(source.channels, Bands):
        found = layout_of(data)
        count = f"{found.bands} band{'s' * (found.bands > 1)}"
        return found.height, found.width, f"{count} of {found.kind}"
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width, _colour(image)
    except Exception:  # noqa: BLE001 - Pillow's readers raise nearly anything over damaged files
        pixels = decode(data)  # says what is wrong, or knows better
        return pixels.shape[0], pixels.shape[1], "colour"


def _colour(image: Image.Image) -> str:
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;"):
        return "grey of 16 bits and more"
    name = "grey" if mode in ("1", "L", "LA", "La") else "colour"
    clear = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return f"{name} and transparency" if clear else name


# Pixels


def _decoded(
    source: Source, indices: np.ndarray, seconds: float | None
) -> tuple[int, dict[int, tuple[str, str]], float]:
    """How many were decoded, which cannot be, and what one takes on one core."""
    bad: dict[int, tuple[str, str]] = {}
    spent: list[float] = []

    def read(index: int) -> None:
        began = time.thread_time()
        try:
            source.read(index)
        except (UnreadableImage, OSError) as error:
            bad[index] = (source.describe(index), reason(error))
        else:
            spent.append(time.thread_time() - began)

    ends = None if seconds is None else time.monotonic() + seconds
    done = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "xdino-survey") as pool:
        for batch in _batches(indices.tolist(), 32):
            if ends is not None and time.monotonic() > ends:
                break
            list(pool.map(read, batch))
            done += len(batch)
    return done, bad, float(np.mean(spent)) if spent else 0.0


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


# Equal images


def _equal(source: Source) -> tuple[list[list[int]], int]:
    """Groups of images that are equal byte by byte, and how many images were compared.

    Only those of one size can be equal, and of these only those that begin and end alike.
    """
    n = len(source)
    chosen = rng.sample(_key(n), ALL_COMPARED, n)
    if isinstance(source, StoredSource):
        sizes = source.sizes()
        same: dict[bytes, list[int]] = defaultdict(list)
        for index in chosen.tolist():
            same[int(sizes[index]).to_bytes(8, "little", signed=True)].append(index)
        groups = _divided(same.values(), lambda i: source.ends(i, ENDS))
        groups = _divided(groups, source.encoded)
    else:
        groups = _divided([chosen.tolist()], lambda i: source.read(i).tobytes())
    return sorted(groups, key=lambda group: (-len(group), group[0])), len(chosen)


def _divided(groups: Iterable[list[int]], content: Callable[[int], bytes]) -> list[list[int]]:
    """Each group of two and more, divided by what `content` says of its images."""
    found = []
    for group in groups:
        if len(group) < 2:
            continue
        by: dict[bytes, list[int]] = defaultdict(list)
        for index in group:
            try:
                told = content(index)
            except OSError:
                continue  # unreadable: named elsewhere
            by[hashlib.blake2b(told, digest_size=16).digest()].append(index)
        found += [equals for equals in by.values() if len(equals) > 1]
    return found
