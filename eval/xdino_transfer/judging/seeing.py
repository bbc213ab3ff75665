"""What a segmenter or a detector sees in one picture of any size, whole or in tiles.

    seeing = Seeing(read_dense("runs/trees"))
    found = seeing.objects(picture)  # uint8 [H, W, C]

Pictures are shown as they are, and larger where they are smaller than in a test. Whole pictures get
what `xdino score` gets of them at the same size; of tiles see `windows`.

Letters: K classes, N objects, H x W pixels, (h, w) of a window as the network sees it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xdino.errors import RunFailed
from xdino.plan.feasibility import free_memory
from xdino.runtime.device import device_of
from xdino_transfer.dense_files import LoadedDense
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.objects import Detections, Shown
from xdino_transfer.detection.views import MULTIPLE
from xdino_transfer.judging.dense import views_at
from xdino_transfer.judging.memory import STRIP, Estimate
from xdino_transfer.judging.windows import Cut, Window, cut, shown_size
from xdino_transfer.resizing import bilinear, padded, resized_image
from xdino_transfer.segmentation.segmenter import Segmenter
from xdino_transfer.segmentation.views import TestViews, normalised

SHARE = 0.5  # of the free memory that one picture may take
UNKNOWN = 4 << 30  # bytes, where nobody tells what is free
_COVERED = 0.7  # share of a cut object's box inside another's of its class: the same object


@dataclass(frozen=True)
class Instance:
    """One object: box (left, top, right, bottom) in the picture's pixels, the mask inside of it.

    mask: bool [., .], whose upper left pixel is (top, left) of the picture. cut: it ends at the edge of
    a tile.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    top: int
    left: int
    mask: np.ndarray
    cut: bool = False

    def whole_mask(self, size: tuple[int, int]) -> np.ndarray:
        """bool [H, W]."""
        found = np.zeros(size, bool)
        height, width = self.mask.shape
        found[self.top : self.top + height, self.left : self.left + width] = self.mask
        return found


class Seeing:
    """A network that looks at pictures one after the other.

    Args:
        bound: bytes that one picture may take; None = half of what is free.
        shorter: pixels of the shorter side as the network sees it; None = the picture's own.
        tile: pixels a side of tiles; None = whole, or the largest that fit.
        threshold: the least score of objects.
        notice: is told how a picture of a new size is cut into tiles; of whole pictures, about the
            first, and about those that take twice the memory of any before.
    """

    def __init__(
        self,
        loaded: LoadedDense,
        bound: int | None = None,
        shorter: int | None = None,
        tile: int | None = None,
        threshold: float = 0.5,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.loaded, self.shorter, self.tile = loaded, shorter, tile
        self.threshold = threshold
        self._bound = bound or _may_take(device_of(loaded.network))
        self._estimate = Estimate(loaded.network)
        self._notice, self._told, self._most = notice, set[tuple[int, ...]](), 0

    def cut(self, image: np.ndarray) -> Cut:
        """How a picture uint8 [H, W, C] is looked at."""
        views, size = views_at(self.loaded, self.shorter), image.shape[:2]
        shorter = views.shorter if isinstance(views, TestViews) else views.test_side
        exactly = self.shorter is not None
        shown = shown_size((size[0], size[1]), views.longer, shorter, exactly)
        found = cut((size[0], size[1]), shown, self._estimate, self._bound, self.tile)
        if self._notice is not None and size not in self._told:
            self._told.add(size)
            if len(found.windows) > 1 or found.estimate >= 2 * self._most:
                self._notice(found.told)
                self._most = max(self._most, found.estimate)
        return found

    def _shown(self, image: np.ndarray, plan: Cut, window: Window) -> Tensor:
        """A window, normalised, float32 [C, h, w]."""
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        pixels = torch.from_numpy(np.ascontiguousarray(image[rows, columns])).permute(2, 0, 1)
        seen = resized_image(pixels, plan.seen(window))
        return normalised(seen, self.loaded.mean, self.loaded.std)

    # --- segmentation ---------------------------------------------------------------------------

    @torch.inference_mode()
    def classes(self, image: np.ndarray) -> np.ndarray:
        """The class of each pixel, uint8 [H, W].

        Raises:
            UsageError: not even a tile fits into memory. RunFailed: numbers that are not finite.
        """
        model = self.loaded.network
        assert isinstance(model, Segmenter)
        plan, found = self.cut(image), np.empty(image.shape[:2], np.uint8)
        for window in plan.windows:
            pixels = self._shown(image, plan, window)[None].to(device_of(model))
            logits = model(pixels).float()
            if not logits.isfinite().all():
                raise RunFailed("the logits are not finite: the weights are damaged")
            seen = (pixels.shape[2], pixels.shape[3])
            own = likeliest(logits, seen, (window.height, window.width))
            top, left, bottom, right = window.inner
            found[top:bottom, left:right] = own[
                top - window.top : bottom - window.top, left - window.left : right - window.left
            ]
        return found

    # --- detection ------------------------------------------------------------------------------

    @torch.inference_mode()
    def objects(self, image: np.ndarray) -> list[Instance]:
        """What is found, best first; at most as many as in a test, of tiles as many of each.

        Raises:
            UsageError: not even a tile fits into memory. RunFailed: numbers that are not finite.
        """
        model = self.loaded.network
        assert isinstance(model, Detector)
        plan, found = self.cut(image), list[Instance]()
        with _from(model, self.threshold):
            for window in plan.windows:
                found += self._objects_in(model, image, plan, window)
        if len(plan.windows) > 1:
            found = merged(found, model.roi.settings.overlap)
        return sorted(found, key=lambda one: -one.score)

    def _objects_in(
        self, model: Detector, image: np.ndarray, plan: Cut, window: Window
    ) -> list[Instance]:
        pixels = self._shown(image, plan, window)
        batch = padded([pixels], MULTIPLE).to(device_of(model))
        shown = Shown(
            (pixels.shape[1], pixels.shape[2]),
            (batch.shape[2], batch.shape[3]),
            (window.height, window.width),
        )
        (own,) = model(batch, [shown])
        if not (own.boxes.isfinite().all() and own.scores.isfinite().all()):
            raise RunFailed("the detections are not finite: the weights are damaged")
        return _instances(own, window)


@contextlib.contextmanager
def _from(model: Detector, threshold: float) -> Iterator[None]:
    """Inside, what scores less goes before masks are made of it; which others stay is the same."""
    before = model.roi.settings
    model.roi.settings = dataclasses.replace(before, score=max(threshold, before.score))
    try:
        yield
    finally:
        model.roi.settings = before


def _may_take(device: torch.device) -> int:
    free = free_memory(device)
    return UNKNOWN if free is None else int(SHARE * free)


def likeliest(logits: Tensor, seen: tuple[int, int], original: tuple[int, int]) -> np.ndarray:
    """Logits [1, K, ., .] of a picture seen at one size -> classes uint8 [H, W] of the original's.

    Resized twice, as in a test, a strip of rows at a time: votes of all pixels would take K times four
    bytes each.
    """
    H, W = original
    strip = max(1, STRIP // (logits.shape[1] * max(W, seen[1])))
    out = np.empty(original, np.uint8)
    for top in range(0, H, strip):
        rows = torch.arange(top, min(top + strip, H), device=logits.device)
        votes = _rows(logits, seen, original, rows)
        out[top : top + len(rows)] = votes[0].argmax(0).cpu().numpy()
    return out


def _rows(logits: Tensor, seen: tuple[int, int], original: tuple[int, int], rows: Tensor) -> Tensor:
    """Rows of what `bilinear(bilinear(logits, seen), original)` gives, [1, K, rows, W]."""
    if seen == original:
        return _resized_rows(logits, seen, rows)
    low, high, _ = _between(rows, original[0], seen[0])
    first, last = int(low.min()), int(high.max())
    own = torch.arange(first, last + 1, device=rows.device)
    return _mixed(_resized_rows(logits, seen, own), original, rows, seen[0], first)


def _resized_rows(x: Tensor, size: tuple[int, int], rows: Tensor) -> Tensor:
    return _mixed(x, size, rows, x.shape[2], 0)


def _mixed(x: Tensor, size: tuple[int, int], rows: Tensor, height: int, first: int) -> Tensor:
    """Rows of `x` resized to `size`; `x` holds those from `first` on of `height` rows."""
    low, high, share = _between(rows, size[0], height)
    mixed = torch.lerp(x[:, :, low - first], x[:, :, high - first], share[:, None])
    return bilinear(mixed, (len(rows), size[1]))


def _between(rows: Tensor, new: int, old: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two of `old` rows that each of the rows out of `new` lies between, and how far."""
    place = ((rows.double() + 0.5) * (old / new) - 0.5).clamp(min=0)
    low = place.long().clamp(max=old - 1)
    return low, (low + 1).clamp(max=old - 1), (place - low).float()


def _instances(found: Detections, window: Window) -> list[Instance]:
    """Objects of a window in the picture's pixels, their masks cut out."""
    boxes, masks = found.boxes.double().cpu().numpy(), found.masks.cpu().numpy()
    out = []
    for box, score, label, mask in zip(
        boxes, found.scores.tolist(), found.labels.tolist(), masks, strict=True
    ):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, bottom = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        left, right = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        moved = box + np.array([window.left, window.top] * 2)
        out.append(
            Instance(
                int(label),
                float(score),
                (float(moved[0]), float(moved[1]), float(moved[2]), float(moved[3])),
                top + window.top,
                left + window.left,
                mask[top:bottom, left:right].copy(),
                _at_an_edge(box, window),
            )
        )
    return out


def _at_an_edge(box: np.ndarray, window: Window) -> bool:
    """Whether a box ends where the window was cut out of the picture."""
    near = np.array([box[1] < 2, box[0] < 2, box[3] > window.height - 2, box[2] > window.width - 2])
    return bool((near & np.array(window.edges)).any())


def merged(found: list[Instance], overlap: float) -> list[Instance]:
    """Objects of tiles without those that were found twice; whole ones go before those that were cut.

    A second one of the same class overlaps the first by more than `overlap` (intersection over union),
    or was cut at a tile's edge and lies in it for the most part.
    """
    order = sorted(found, key=lambda one: (one.cut, -one.score))
    kept: list[Instance] = []
    for one in order:
        same = np.array([other.box for other in kept if other.label == one.label]).reshape(-1, 4)
        shared, union, own = _shared(np.array(one.box), same)
        twice = shared > overlap * union
        if one.cut:
            twice |= shared > _COVERED * own
        if not twice.any():
            kept.append(one)
    return kept


def _shared(box: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Areas: of what a box [4] shares with others [N, 4], of both together, of itself."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.prod(sides.clip(min=0), axis=1)
    own = float(np.prod(box[2:] - box[:2]))
    return shared, own + np.prod(others[:, 2:] - others[:, :2], axis=1) - shared, own
