"""Video object segmentation on DAVIS-2017 by propagating the first frame's mask.

Nothing is trained: the label of a patch is the mean of those of the patches that look most alike in
the first frame and in the frames just before, within a neighbourhood (Jabri et al. 2020,
https://arxiv.org/abs/2006.14613; DINO, https://arxiv.org/abs/2104.14294, section 4.2.2 and the
published `eval_video_segmentation.py`).

The folder, as DAVIS-2017 (480p, semi-supervised) is distributed:

    FOLDER/ImageSets/2017/val.txt                    names of videos, one a line
    FOLDER/JPEGImages/480p/VIDEO/00000.jpg ...       frames, all of one size; any image format
    FOLDER/Annotations/480p/VIDEO/00000.png ...      masks of the frames' size; the first is needed,
                                                     the others are scored against

Masks are palette or grey images whose value is the label, 0 background and 255 void. Those that were
drawn by other means say their objects as the first of a video does (`Labels`): 255 is an object where
nothing else is drawn, grey levels with gaps between them and colours are numbered. Objects that the
first frame does not show are neither followed nor scored, as in the official measure, and named.

Letters: M context frames, N patches of a frame, D width, K labels with the background, (h, w) patch
grid, H x W pixels, C channels.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from xdino.backbone import IMAGENET_STD, Backbone
from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.atomic import written_beside
from xdino_eval import image_files
from xdino_eval.features import Progress, autocast, device_of, evaluating
from xdino_eval.image_files import DAMAGED, printable
from xdino_eval.results import Row
from xdino_eval.suite.davis_scores import VOID, ObjectScore, score_video, summary
from xdino_eval.transform import EvalTransform

# The published evaluation divides red by 0.228, where every other one of DINO has 0.229.
PUBLISHED_STD = (0.228, 0.224, 0.225)
MULTIPLE = 64  # the longer side of a frame is rounded down to
LARGEST = 2**26  # affinities that are held at a time
LATER = 254  # the label of what the first frame of drawn masks does not show
MOST_OBJECTS = 100  # of a video whose masks are drawn; more are smoothed edges


@dataclass(frozen=True)
class Propagation:
    """context: frames before the one in hand, besides the first. radius: of the neighbourhood, in
    patches; 0 = the whole frame. topk: patches that vote. temperature: of the affinities."""

    context: int = 7
    radius: int = 12
    topk: int = 5
    temperature: float = 0.1


@dataclass(frozen=True)
class Labels:
    """What the pixels of a video's masks mean: values (of colours: `_values`) -> labels. None: a
    value is its label."""

    numbers: dict[int, int] | None = None

    def of(self, values: np.ndarray) -> np.ndarray:
        """int64 [H, W] -> uint8 [H, W]; `LATER` for what the first frame does not show."""
        if self.numbers is None:
            return values.astype(np.uint8)
        codes = np.array(sorted(self.numbers))
        labels = np.array([self.numbers[code] for code in codes.tolist()], np.uint8)
        place = np.searchsorted(codes, values).clip(max=len(codes) - 1)
        return np.where(codes[place] == values, labels[place], LATER).astype(np.uint8)


@dataclass(frozen=True)
class Video:
    """frames: the files in order. masks: one for each frame, or the first frame's alone."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    labels: Labels = field(default_factory=Labels)

    @property
    def scored(self) -> bool:
        return len(self.masks) == len(self.frames) > 2


# --- the data set -----------------------------------------------------------------------------


def open_davis(folder: Path | str, split: str = "val") -> list[Video]:
    """The videos of a split, every file of which is there and of the right size.

    Raises:
        UsageError: something is missing, or a mask or frame is of another size than it should be.
    """
    folder = Path(folder)
    listed = folder / "ImageSets" / "2017" / f"{split}.txt"
    needed = {listed: listed.is_file()}
    for place in ("JPEGImages", "Annotations"):
        needed[folder / place / "480p"] = (folder / place / "480p").is_dir()
    for path, there in needed.items():
        if not there:
            raise UsageError(
                f"{path} is missing: a DAVIS-2017 folder holds ImageSets/2017/{split}.txt, "
                "JPEGImages/480p/VIDEO/*.jpg and Annotations/480p/VIDEO/*.png"
            )
    with asked(f"{listed} cannot be read"):
        # A name in no encoding is a name all the same.
        told = listed.read_text(encoding="utf-8-sig", errors="surrogateescape")
    names = [line.strip() for line in told.splitlines() if line.strip()]
    if not names:
        raise UsageError(f"{listed} names no video")
    return [_open_video(folder, name, listed) for name in names]


def _open_video(folder: Path, name: str, listed: Path) -> Video:
    if Path(name).name != name or name == "..":
        raise UsageError(f'{listed} names "{name}", which is no name of a video')
    place = folder / "JPEGImages" / "480p" / name
    if not place.is_dir():
        raise UsageError(f"there is no folder {place}")
    frames = image_files.listed(place)
    if not frames:
        raise UsageError(f"{place} holds no frame (*.jpg)")
    for one, two in pairwise(sorted(frames, key=lambda path: path.stem)):
        if one.stem == two.stem:
            raise UsageError(f"{one} and {two.name} are two frames of one name")
    masks = _masks(folder / "Annotations" / "480p" / name, frames)
    size = image_files.shown_size(frames[0])
    for path in (*frames, *masks):
        if image_files.shown_size(path) != size:
            found = " x ".join(map(str, image_files.shown_size(path)))
            what = "mask" if path in masks else "frame"
            raise UsageError(
                f"the {what} {path} has {found} pixels, and the first frame of {name} "
                f"{size[0]} x {size[1]}"
            )
    kinds = {path: _kind(path) for path in masks}
    for path, kind in kinds.items():
        if kind != kinds[masks[0]]:
            raise UsageError(
                f"{path} is a {kind} image and the first mask of {name} a {kinds[masks[0]]} image"
            )
    return Video(name, tuple(frames), masks, labels_of(masks[0]))


def _masks(folder: Path, frames: list[Path]) -> tuple[Path, ...]:
    """The mask of each frame, or of the first alone where one is missing."""
    found = {path.stem: path for path in image_files.listed(folder)} if folder.is_dir() else {}
    masks = {stem: path for stem, path in found.items() if path.suffix.lower() == ".png"}
    if frames[0].stem not in masks:
        first = folder / f"{frames[0].stem}.png"
        raise UsageError(f"{first}, the mask of the first frame of {folder.name}, is missing")
    whole = all(frame.stem in masks for frame in frames)
    return tuple(masks[frame.stem] for frame in (frames if whole else frames[:1]))


KINDS = {
    "P": "palette", "L": "grey", "1": "grey", "LA": "grey", "I": "grey", "I;16": "grey",
    "I;16B": "grey", "RGB": "colour", "RGBA": "colour",
}  # fmt: skip


def _kind(path: Path) -> str:
    """Whether a mask is a palette, grey or colour image, by its header."""
    try:
        with Image.open(path) as image:
            mode = image.mode
    except DAMAGED as error:
        raise UsageError(f"{path} cannot be read as a mask: {image_files.why(error)}") from None
    if mode not in KINDS:
        raise UsageError(f"{path} is no mask of labels: its pixels are {mode}")
    return KINDS[mode]


def labels_of(path: Path) -> Labels:
    """What the pixels of a video's masks mean, by its first.

    Raises:
        UsageError: unreadable, or more grey levels or colours than there are objects.
    """
    objects = np.unique(_values(path, UsageError))
    objects = objects[objects > 0].tolist()
    kind, palette = _kind(path), _pascal_numbers()
    if kind == "colour" and palette.keys() >= set(objects):
        return Labels(palette)  # a palette mask that was saved in its colours
    labels = [value for value in objects if value != VOID]
    # Gaps in a palette mask are as distributed: objects that come later.
    numbered = kind == "palette" or labels == [*range(1, len(labels) + 1)]
    numbered &= objects != [VOID] and max(labels, default=0) <= MOST_OBJECTS
    if kind != "colour" and numbered:
        return Labels()
    if len(objects) > MOST_OBJECTS:
        raise UsageError(
            f"{path} is no mask of labels: it holds {len(objects):,} colours or grey levels, and "
            "each stands for an object; are its edges smoothed?"
        )
    return Labels({0: 0, **{value: label for label, value in enumerate(objects, 1)}})


def _pascal_numbers() -> dict[int, int]:
    red, green, blue = (pascal_palette()[channel::3] for channel in range(3))
    colours = zip(red, green, blue, strict=True)
    return {(r << 16) + (g << 8) + b: label for label, (r, g, b) in enumerate(colours)}


def _values(path: Path, failure: type[UsageError | RunFailed] = RunFailed) -> np.ndarray:
    """int64 [H, W]: palette indices, grey levels, or 65536 red + 256 green + blue."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image).astype(np.int64)
    except DAMAGED as error:
        raise failure(f"{path} cannot be read as a mask: {image_files.why(error)}") from None
    if values.ndim == 2:
        return values
    if values.shape[2] == 2:  # grey and transparency
        return values[..., 0]
    return (values[..., 0] << 16) + (values[..., 1] << 8) + values[..., 2]


def read_mask(path: Path, labels: Labels = Labels()) -> np.ndarray:
    """Labels, uint8 [H, W].

    Raises:
        RunFailed: the file is damaged.
    """
    return labels.of(_values(path))


def read_frame(path: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, C].

    Raises:
        RunFailed: the file is damaged.
    """
    try:
        return image_files.read(path, channels)
    except UsageError as error:
        raise RunFailed(str(error)) from None


def palette_of(path: Path) -> list[int]:
    """The colours of a mask's labels, for masks that are written beside it; PASCAL's if it has none."""
    try:
        with Image.open(path) as image:
            colours = image.getpalette()
    except DAMAGED as error:
        raise RunFailed(f"{path} cannot be read as a mask: {image_files.why(error)}") from None
    return colours or pascal_palette()


def pascal_palette() -> list[int]:
    """768 values: label n is coloured by spreading its bits over red, green and blue from the top."""
    bits = [[(label >> place) & 1 for place in range(8)] for label in range(256)]
    return [
        sum(b[3 * level + channel] << (7 - level) for level in range(3) if 3 * level + channel < 8)
        for b in bits
        for channel in range(3)
    ]


def write_mask(path: Path, labels: np.ndarray, palette: list[int]) -> None:
    """uint8 [H, W] as a palette PNG, which is what the official scorer reads."""
    image = Image.fromarray(labels)
    image.putpalette(palette)
    with written_beside(path) as beside:
        image.save(beside, format="PNG")


# --- frames -----------------------------------------------------------------------------------


def frame_size(height: int, width: int, side: int = 480, patch: int = 1) -> tuple[int, int]:
    """(height, width) that a frame is shown at: the shorter side at `side`, the longer rounded
    down to a multiple of 64; a square loses in width. Both are multiples of the patch (`whole`): a
    patch that lies in the frame by a part would lend its label to the part beyond."""
    side = whole(side, patch)
    longer = side * max(height, width) // min(height, width) // MULTIPLE * MULTIPLE
    longer = max(longer // patch * patch, patch)
    return (longer, side) if height > width else (side, longer)


def whole(side: int, patch: int) -> int:
    """The multiple of the patch nearest to `side`, one at least."""
    return max((side + patch // 2) // patch, 1) * patch


def resize_linear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [height, width, C], bilinear without antialiasing.

    To the bit what OpenCV's `resize` gives, which the published evaluation uses: weights of 11 bits,
    sums shortened by 4 and 16 bits on the way. Near ties between patches follow every level.
    """
    rows, columns = (
        _taps(before, after)
        for before, after in ((image.shape[0], height), (image.shape[1], width))
    )
    x = image.astype(np.int32)
    across = (
        x[:, columns.first] * columns.weight[:, None] + x[:, columns.second] * columns.rest[:, None]
    ) >> 4  # [H, width, C]
    down = (across[rows.first] * rows.weight[:, None, None]) >> 16
    down += (across[rows.second] * rows.rest[:, None, None]) >> 16
    return ((down + 2) >> 2).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Taps:
    """The two pixels each output pixel lies between, and their weights in 1/2048; int32."""

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray
    rest: np.ndarray


def _taps(before: int, after: int) -> Taps:
    # OpenCV divides twice: the last bit of the position may decide what a weight is rounded to.
    position = ((np.arange(after) + 0.5) * (1 / (after / before)) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int32)
    fraction = position - first.astype(np.float32)
    weights = (np.rint(part * np.float32(2048)) for part in (np.float32(1) - fraction, fraction))
    weight, rest = (values.astype(np.int32) for values in weights)
    return Taps(first.clip(0, before - 1), (first + 1).clip(0, before - 1), weight, rest)


# --- propagation ------------------------------------------------------------------------------


def propagate(
    target: Tensor, sources: Tensor, labels: Tensor, grid: tuple[int, int], how: Propagation
) -> Tensor:
    """The labels of a frame's patches from those of the context, `[N, K]`.

    A patch sums the labels of the `topk` patches with the largest exp(cosine / temperature) among
    all context frames and within `radius` of its place, weighted by it. Ties with the last vote too.

    Args:
        target: patch tokens `[N, D]`. sources: `[M, N, D]`. labels: `[M, N, K]`.
    """
    M, N, _ = sources.shape
    target, sources = F.normalize(target, dim=-1), F.normalize(sources, dim=-1).flatten(0, 1)
    votes = labels.flatten(0, 1)
    out = []
    for rows in torch.arange(N, device=target.device).split(max(1, LARGEST // (M * N))):
        affinity = (target[rows] @ sources.T / how.temperature).exp()  # [rows, M N]
        if how.radius:
            affinity *= neighbours(rows, grid, min(how.radius, max(grid))).repeat(1, M)
        last = affinity.topk(min(how.topk, M * N), dim=1).values[:, -1:]
        affinity[affinity < last] = 0
        affinity /= affinity.sum(1, keepdim=True)
        out.append(affinity @ votes)
    return torch.cat(out)


def neighbours(rows: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """bool [rows, N]: which patches lie at most `radius` rows and columns from those in `rows`."""
    h, w = grid
    place = torch.arange(h * w, device=rows.device)
    far = (rows[:, None] // w - place // w).abs().maximum((rows[:, None] % w - place % w).abs())
    return far <= radius


def decide(labels: Tensor, patch: int) -> np.ndarray:
    """Soft labels `[h, w, K]` -> uint8 [h * patch, w * patch]: stretched, levelled, the largest.

    Levelled: each label's map runs from 0 to 1, or a small object would never win.
    """
    maps = labels.permute(2, 0, 1)[None]
    maps = F.interpolate(maps, scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = torch.where(high > low, high - low, 1)
    maps = torch.where(high > 0, (maps - low) / span, maps)
    return maps.argmax(0).to(torch.uint8).cpu().numpy()


def one_hot(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """uint8 [H, W] -> float32 [h, w, K], by the nearest pixel; `VOID` is background."""
    labels = np.where(mask == VOID, 0, mask).astype(np.uint8)
    small = Image.fromarray(labels).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    indices = torch.from_numpy(np.array(small)).long()
    return F.one_hot(indices, int(labels.max()) + 1).float()


def segment(
    backbone: Backbone,
    video: Video,
    how: Propagation,
    side: int = 480,
    precision: str = "fp32",
) -> Iterator[np.ndarray]:
    """The labels of every frame, uint8 [H, W] each; those of the first are the given mask.

    Args:
        side: the shorter side of a frame as it is shown to the network, in pixels.

    Raises:
        RunFailed: a file is damaged, or a patch token is not finite.
    """
    device, patch = device_of(backbone), backbone.require_patches()
    transform = transform_of(backbone)
    mask = read_mask(video.masks[0], video.labels)
    height, width = mask.shape

    def tokens(path: Path) -> Tensor:  # [h, w, D]
        image = resize_linear(
            read_frame(path, len(transform.mean)), *frame_size(height, width, side, patch)
        )
        pixels = torch.from_numpy(image)[None].to(device)
        with autocast(device, precision):
            found = backbone.tokens(transform.normalise(pixels))[1][0].float()
        if not found.isfinite().all():
            raise RunFailed(f"a patch token of {path} is not finite")
        return found

    yield mask
    first = tokens(video.frames[0])
    h, w = first.shape[:2]
    given = first.flatten(0, 1), one_hot(mask, (h, w)).flatten(0, 1).to(device)
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=min(how.context, len(video.frames)))
    for path in video.frames[1:]:
        target = tokens(path).flatten(0, 1)
        sources, labels = zip(given, *before, strict=True)
        soft = propagate(target, torch.stack(sources), torch.stack(labels), (h, w), how)
        before.append((target, soft))
        large = Image.fromarray(decide(soft.unflatten(0, (h, w)), patch))
        yield np.array(large.resize((width, height), Image.Resampling.NEAREST))


def transform_of(backbone: Backbone) -> EvalTransform:
    """How a frame is normalised; with the published slip where the backbone asks for ImageNet's."""
    std = PUBLISHED_STD if tuple(backbone.std) == IMAGENET_STD else tuple(backbone.std)
    return EvalTransform.of(backbone, std=std)


# --- the evaluation ---------------------------------------------------------------------------


def evaluate(
    backbone: Backbone,
    folder: Path,
    videos: list[Video],
    out: Path,
    how: Propagation | None = None,
    side: int = 480,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Row:
    """Write the masks of `videos` to OUT/VIDEO/FRAME.png, and score them: a row, unsigned.

    J and F are measured where every frame has its annotation; the row's metrics are empty where no
    video has.

    Args:
        folder: the data set's, for the row. out: folder for the masks.

    Raises:
        UsageError: the backbone has no patch tokens, or `out` would write over the data set.
        RunFailed: a file is damaged, or a mask cannot be written.
    """
    how = how or Propagation()
    patch = backbone.require_patches()  # before anything is read
    _check(out, videos, side, patch)
    start = time.monotonic()
    scores: list[ObjectScore] = []
    notes = _told(videos, side, patch)
    total, done = sum(len(video.frames) for video in videos), 0
    with evaluating(backbone), torch.inference_mode():
        for video in videos:
            found, palette = [], palette_of(video.masks[0])
            for path, labels in zip(
                video.frames, segment(backbone, video, how, side, precision), strict=True
            ):
                write_mask(out / video.name / f"{path.stem}.png", labels, palette)
                found.append(labels)
                done += 1
                if progress:
                    progress(done, total)
            if video.scored:
                truth = np.stack([read_mask(path, video.labels) for path in video.masks])
                scores += score_video(truth, np.stack(found))
                late = set(np.unique(truth)) - {*range(highest(truth[0]) + 1), VOID}
                if late:
                    notes.append(
                        f"{printable(video.name)} shows objects after its first frame that are "
                        "neither followed nor scored"
                    )
    unscored = [video.name for video in videos if not video.scored]
    transform = transform_of(backbone)
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (transform.mean, transform.std))
    if unscored:
        named = printable(", ".join(unscored))
        notes.append(f"not scored (fewer than three frames, or not all annotated): {named}")
    side = whole(side, patch)
    return Row(
        protocol="video segmentation",
        settings={**vars(how), "size": side, "objects": len(scores)},
        top1=None,
        top5=None,
        data=printable(folder),
        transform=f"shorter side {side}, longer a multiple of {MULTIPLE} (bilinear), "
        f"mean ({mean}), std ({std}), {precision}",
        train_size=0,
        val_size=total,
        seconds=time.monotonic() - start,
        notes=notes,
        metrics=summary(scores) if scores else {},
    )


def highest(mask: np.ndarray) -> int:
    """The highest label of an object in uint8 [H, W]; 0 without any."""
    return int(np.where(mask == VOID, 0, mask).max())


def _told(videos: list[Video], side: int, patch: int) -> list[str]:
    """What a reader of the numbers should know before they are believed."""
    notes = []
    if whole(side, patch) != side:
        notes.append(
            f"frames were shown with a shorter side of {whole(side, patch)} pixels instead of "
            f"{side}: a multiple of the patch of {patch}"
        )
    drawn = [video.name for video in videos if video.labels.numbers is not None]
    if drawn:
        notes.append(
            "masks that are drawn, not labelled (grey levels or colours stand for objects): "
            + printable(", ".join(drawn))
        )
    empty = [v.name for v in videos if not highest(read_mask(v.masks[0], v.labels))]
    if empty:
        notes.append("no object in the first mask of: " + printable(", ".join(empty)))
    return notes


def _check(out: Path, videos: list[Video], side: int, patch: int) -> None:
    """Refuse frames that are larger than memory holds, and to write over the data set."""
    for video in videos:
        size = image_files.shown_size(video.frames[0])
        height, width = frame_size(size[1], size[0], side, patch)
        if height * width > LARGEST:
            raise UsageError(
                f"the frames of {video.name} with a shorter side of {side} pixels come to more than "
                f"the limit of {LARGEST / 1e6:,.0f} million pixels: lower --size"
            )
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out needs a folder, and {out} is a file")
    for video in videos:
        place = os.path.realpath(out / video.name)
        for path in (video.frames[0], video.masks[0]):
            if os.path.realpath(path.parent) == place:
                raise UsageError(f"the masks would be written over {path.parent}: another --out")
