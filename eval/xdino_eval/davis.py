"""Video object segmentation on DAVIS-2017 by propagating the first frame's mask.

Nothing is trained: the label of a patch is the mean of those of the patches that look most alike in
the first frame and in the frames just before, within a neighbourhood (Jabri et al. 2020,
https://arxiv.org/abs/2006.14613; DINO, https://arxiv.org/abs/2104.14294, section 4.2.2 and the
published `eval_video_segmentation.py`).

The folder, as DAVIS-2017 (480p, semi-supervised) is distributed:

    FOLDER/ImageSets/2017/val.txt                    names of videos, one a line
    FOLDER/JPEGImages/480p/VIDEO/00000.jpg ...       frames, all of one size
    FOLDER/Annotations/480p/VIDEO/00000.png ...      palette masks of the frames' size; the first is
                                                     needed, the others are scored against

Letters: M context frames, N patches of a frame, D width, K labels with the background, (h, w) patch
grid, H x W pixels, C channels.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from xdino.backbones import IMAGENET_STD
from xdino.errors import RunFailed, UsageError
from xdino.files import written_beside
from xdino.images import UnreadableImage, decode
from xdino_eval.davis_scores import VOID, ObjectScore, score_video, summary
from xdino_eval.features import Progress, autocast, device_of, evaluating
from xdino_eval.results import Row
from xdino_eval.tokens import class_and_patches, patch_side
from xdino_eval.transform import EvalTransform, Judged

# The published evaluation divides red by 0.228, where every other one of DINO has 0.229.
PUBLISHED_STD = (0.228, 0.224, 0.225)
MULTIPLE = 64  # the longer side of a frame is rounded down to
LARGEST = 2**26  # affinities that are held at a time


@dataclass(frozen=True)
class Propagation:
    """context: frames before the one in hand, besides the first. radius: of the neighbourhood, in
    patches; 0 = the whole frame. topk: patches that vote. temperature: of the affinities."""

    context: int = 7
    radius: int = 12
    topk: int = 5
    temperature: float = 0.1


@dataclass(frozen=True)
class Video:
    """frames: the files in order. masks: one for each frame, or the first frame's alone."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]

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
    names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    if not names:
        raise UsageError(f"{listed} names no video")
    return [_open_video(folder, name, listed) for name in names]


def _open_video(folder: Path, name: str, listed: Path) -> Video:
    if Path(name).name != name or name == "..":
        raise UsageError(f'{listed} names "{name}", which is no name of a video')
    frames = _files(folder / "JPEGImages" / "480p" / name, ".jpg")
    if not frames:
        raise UsageError(f"{folder / 'JPEGImages' / '480p' / name} holds no frame (*.jpg)")
    places = [folder / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
    if not places[0].is_file():
        raise UsageError(f"{places[0]}, the mask of the first frame of {name}, is missing")
    whole = all(place.is_file() for place in places)
    video = Video(name, tuple(frames), tuple(places if whole else places[:1]))
    size = _size(frames[0])
    for path in (*video.frames, *video.masks):
        if _size(path) != size:
            what = "mask" if path.suffix == ".png" else "frame"
            raise UsageError(
                f"the {what} {path} has {' x '.join(map(str, _size(path)))} pixels, and the first "
                f"frame of {name} {size[0]} x {size[1]}"
            )
    return video


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    return sorted(Path(e.path) for e in os.scandir(folder) if e.name.endswith(suffix))


def _size(path: Path) -> tuple[int, int]:
    """(width, height) from a file's header."""
    try:
        with Image.open(path) as image:
            if path.suffix == ".png" and image.mode not in ("P", "L", "1"):
                raise UsageError(f"{path} is no mask of labels: its pixels are {image.mode}")
            return image.size
    except (OSError, SyntaxError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def read_mask(path: Path) -> np.ndarray:
    """Labels, uint8 [H, W].

    Raises:
        RunFailed: the file is damaged.
    """
    try:
        with Image.open(path) as image:
            return np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError) as error:
        raise RunFailed(f"{path} cannot be read: {error}") from None


def read_frame(path: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, C].

    Raises:
        RunFailed: the file is damaged.
    """
    try:
        return decode(path.read_bytes(), channels)
    except (UnreadableImage, OSError) as error:
        raise RunFailed(f"{path} cannot be read: {error}") from None


def palette_of(path: Path) -> list[int]:
    """The colours of a mask's labels, for masks that are written beside it; PASCAL's if it has none."""
    with Image.open(path) as image:
        colours = image.getpalette()
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


def frame_size(height: int, width: int, side: int = 480) -> tuple[int, int]:
    """(height, width) that a frame is shown at: the shorter side at `side`, the longer rounded
    down to a multiple of 64; a square loses in width."""
    if height > width:
        return side * height // width // MULTIPLE * MULTIPLE, side
    return side, side * width // height // MULTIPLE * MULTIPLE


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
            affinity *= neighbours(rows, grid, how.radius).repeat(1, M)
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
    backbone: nn.Module,
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
    device, patch = device_of(backbone), patch_side(backbone)
    transform = transform_of(backbone)
    mask = read_mask(video.masks[0])
    height, width = mask.shape

    def tokens(path: Path) -> Tensor:  # [h, w, D]
        image = resize_linear(
            read_frame(path, len(transform.mean)), *frame_size(height, width, side)
        )
        pixels = torch.from_numpy(image)[None].to(device)
        with autocast(device, precision):
            found = class_and_patches(backbone, transform.normalise(pixels))[1][0].float()
        if not found.isfinite().all():
            raise RunFailed(f"a patch token of {path} is not finite")
        return found

    yield mask
    first = tokens(video.frames[0])
    h, w = first.shape[:2]
    given = first.flatten(0, 1), one_hot(mask, (h, w)).flatten(0, 1).to(device)
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=how.context)
    for path in video.frames[1:]:
        target = tokens(path).flatten(0, 1)
        sources, labels = zip(given, *before, strict=True)
        soft = propagate(target, torch.stack(sources), torch.stack(labels), (h, w), how)
        before.append((target, soft))
        large = Image.fromarray(decide(soft.unflatten(0, (h, w)), patch))
        yield np.array(large.resize((width, height), Image.Resampling.NEAREST))


def transform_of(backbone: nn.Module) -> EvalTransform:
    """How a frame is normalised; with the published slip where the backbone asks for ImageNet's."""
    judged = cast(Judged, backbone)
    std = PUBLISHED_STD if tuple(judged.std) == IMAGENET_STD else tuple(judged.std)
    return EvalTransform.of(judged, std=std)


# --- the evaluation ---------------------------------------------------------------------------


def evaluate(
    backbone: nn.Module,
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
        UsageError: the backbone has no patch tokens.
        RunFailed: a file is damaged, or a mask cannot be written.
    """
    how = how or Propagation()
    patch_side(backbone)  # before anything is read
    start = time.monotonic()
    scores: list[ObjectScore] = []
    total, done = sum(len(video.frames) for video in videos), 0
    with evaluating(backbone), torch.inference_mode():
        for video in videos:
            found, palette = [], palette_of(video.masks[0])
            for path, labels in zip(
                video.frames, segment(backbone, video, how, side, precision), strict=True
            ):
                try:
                    write_mask(out / video.name / f"{path.stem}.png", labels, palette)
                except OSError as error:
                    raise RunFailed(f"cannot write the masks of {video.name}: {error}") from None
                found.append(labels)
                done += 1
                if progress:
                    progress(done, total)
            if video.scored:
                truth = np.stack([read_mask(path) for path in video.masks])
                scores += score_video(truth, np.stack(found))
    unscored = [video.name for video in videos if not video.scored]
    transform = transform_of(backbone)
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (transform.mean, transform.std))
    notes = [
        "not scored (fewer than three frames, or not all annotated): " + ", ".join(unscored)
    ] if unscored else []  # fmt: skip
    return Row(
        protocol="video segmentation",
        settings={**vars(how), "size": side, "objects": len(scores)},
        top1=None,
        top5=None,
        data=str(folder),
        transform=f"shorter side {side}, longer a multiple of {MULTIPLE} (bilinear), "
        f"mean ({mean}), std ({std}), {precision}",
        train_size=0,
        val_size=total,
        seconds=time.monotonic() - start,
        notes=notes,
        metrics=summary(scores) if scores else {},
    )
