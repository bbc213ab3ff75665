"""From a frozen network and a source of images to features [N, D].

Threads read and resize ahead of the network (PIL and the decoders let go of the interpreter
lock), a bounded number of images at a time. No random number is drawn and the network comes back
in the mode it was in, so a training run may call this between two iterations.

Letters: N images, B images of a batch, D width of a feature, s side of a crop, C channels.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from xdino.backbone import evaluating
from xdino.data.decode import UnreadableImage
from xdino.data.sources import Source
from xdino.errors import RunFailed, UsageError, nearest, reason
from xdino.runtime import transfer, turns
from xdino.runtime.device import device_of
from xdino_eval.transform import EvalTransform

__all__ = [
    "Batch", "Features", "Progress", "autocast", "device_of", "each_batch", "evaluating", "extract",
    "in_turn", "labels_of", "none_read", "pixels", "read_batches", "refuse_broken",
]  # fmt: skip

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Features:
    """Features as the network gave them, not normalised, and where they came from.

    features: float32 [N, D] on the CPU. labels: int64 [N], or None. indices: int64 [N], the
    places in the source that could be read. skipped: (description, reason) of the others.
    data: the source's name. transform: one line, precision included.
    """

    features: Tensor
    labels: Tensor | None
    indices: Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)
    data: str = ""
    transform: str = ""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that computes in `precision`, "fp32" or "bf16", on `device`."""
    if precision not in PRECISIONS:
        raise UsageError(f'no precision "{precision}"; {nearest(precision, PRECISIONS)}')
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


@dataclass(frozen=True)
class Batch:
    """images: uint8 [B, s, s, C]. indices: int64 [B]. skipped: (index, reason)."""

    images: Tensor
    indices: np.ndarray
    skipped: list[tuple[int, str]]


def read_batches(
    source: Source,
    crop: Callable[[np.ndarray, int], np.ndarray],
    order: np.ndarray,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Read `order` (indices, int64 [N]) by `batch_size`, two batches ahead of the consumer.

    Images are on the CPU, pinned where `device` is CUDA, for `transfer.to_device`.

    `crop(image, index)` turns uint8 [H, W, C] into uint8 [s, s, C]. An image that cannot be read
    is left out of its batch, which may so become empty.
    """

    def load(indices: list[int]) -> list[tuple[int, np.ndarray | str]]:
        loaded: list[tuple[int, np.ndarray | str]] = []
        for index in indices:
            try:
                loaded.append((index, crop(source.read(index), index)))
            except (UnreadableImage, OSError) as error:
                loaded.append((index, reason(error)))
        return loaded

    Task = Future[list[tuple[int, np.ndarray | str]]]
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="read")
    waiting: deque[list[Task]] = deque()
    try:
        for start in range(-2 * batch_size, len(order), batch_size):
            coming = order[start + 2 * batch_size :][:batch_size].tolist()
            step = source.batch_reads
            waiting.append(
                [pool.submit(load, coming[i : i + step]) for i in range(0, len(coming), step)]
            )
            if start < 0:
                continue
            pairs = [pair for task in waiting.popleft() for pair in task.result()]
            good = [(i, item) for i, item in pairs if not isinstance(item, str)]
            yield Batch(
                _stacked([image for _, image in good], device) if good else NOTHING,
                np.array([i for i, _ in good], dtype=np.int64),
                [(i, item) for i, item in pairs if isinstance(item, str)],
            )
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(images: list[np.ndarray], device: torch.device) -> Tensor:
    """Images of one shape in a row, where copies to `device` begin."""
    shape = len(images), *images[0].shape
    out = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack(images, out=out.numpy())
    return out


def in_turn(
    batches: Iterable[Batch], compute: Callable[[Batch], Tensor]
) -> Generator[tuple[Batch, Tensor], None, None]:
    """(batch, compute(batch) as float32 on the CPU), while the device works on the next batch.

    Where a batch is empty, so is what comes with it, and nothing is computed.
    """
    before: tuple[Batch, transfer.Arriving] | None = None
    for batch in batches:
        out = compute(batch).float() if len(batch.indices) else torch.empty(0, 0)
        now = batch, transfer.Arriving(out)
        if before is not None:
            yield before[0], before[1].wait()
        before = now
    if before is not None:
        yield before[0], before[1].wait()


def each_batch(
    network: nn.Module,
    source: Source,
    transform: EvalTransform,
    order: np.ndarray,
    batch_size: int = 128,
    device: torch.device | None = None,
    workers: int = 2,
    precision: str = "fp32",
    shared: bool = False,
) -> Generator[tuple[Batch, Tensor], None, None]:
    """What `network` makes of the images `order` of a source, a batch after the other: float32 [B, D].

    In evaluation mode, from one centre crop an image. device: None = where the network is. shared:
    the processes of a group take the batches in turn, and each hears of all; batches come without
    their images then.
    """
    count, whole = -(-len(order) // batch_size), order
    order = turns.mine(whole, batch_size) if shared else whole
    device = device_of(network) if device is None else device
    batches = read_batches(
        source, lambda image, _: transform.array(image), order, batch_size, workers, device
    )

    def look(batch: Batch) -> Tensor:
        # Not around all batches: what happens between two of them is the caller's.
        with torch.inference_mode(), autocast(device, precision):
            return network(transform.normalise(transfer.to_device(batch.images, device))).float()

    with evaluating(network):
        network.to(device)
        looked_at = in_turn(batches, look)
        if not shared:
            yield from looked_at
            return
        with contextlib.closing(looked_at):
            bare = ((replace(batch, images=NOTHING), out) for batch, out in looked_at)
            yield from turns.of_all(bare, count)


def extract(
    backbone: nn.Module,
    source: Source,
    transform: EvalTransform,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    workers: int = 2,
    precision: str = "fp32",
    indices: Sequence[int] | np.ndarray | None = None,
    progress: Progress | None = None,
    may_be_empty: bool = False,
    shared: bool = False,
) -> Features:
    """The features of `source`, in its order, one centre crop an image.

    Args:
        backbone: float32 [B, C, s, s] -> [B, D].
        device: the network is moved there; None = where it is.
        workers: threads that read and resize.
        precision: "fp32", or "bf16" by autocast; features are float32 in either case.
        indices: the places in the source to read; None = all.
        may_be_empty: where no image can be read, features are [0, 0] instead of a failure.
        shared: every process of a group calls this, computes its part, and gets all of it.

    Raises:
        RunFailed: no image could be read, or a feature is not finite.
    """
    order = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    features = torch.empty(0, 0)
    kept: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    filled = 0
    where = None if device is None else torch.device(device)
    looked_at = each_batch(
        backbone, source, transform, order, batch_size, where, workers, precision, shared
    )
    with contextlib.closing(looked_at):
        for batch, out in looked_at:
            skipped += [(source.describe(i), reason) for i, reason in batch.skipped]
            if len(out):
                if not filled:
                    features = torch.empty(len(order), out.shape[1])
                features[filled : filled + len(out)] = out
                filled += len(out)
                kept.append(batch.indices)
            if progress:
                progress(filled + len(skipped), len(order))
    if not filled and not may_be_empty:
        raise none_read(source, skipped)
    read = np.concatenate([np.empty(0, np.int64), *kept])
    features = features[:filled]
    refuse_broken(features, source, read)
    told = f"{transform.describe()}, {precision}"
    labels = _labels_at(source, read)
    return Features(features, labels, torch.from_numpy(read), skipped, source.name, told)


def _labels_at(source: Source, places: np.ndarray) -> Tensor | None:
    """int64 [N], None where the source has none."""
    return None if source.labels is None else torch.from_numpy(np.asarray(source.labels)[places])


def none_read(source: Source, skipped: Sequence[tuple[str, str]]) -> RunFailed:
    """The error of a source that no image could be read of. skipped: (description, reason)."""
    reason = f"; the first: {': '.join(skipped[0])}" if skipped else " (it is empty)"
    return RunFailed(f"no image of {source.name} could be read{reason}")


def refuse_broken(features: Tensor, source: Source, read: np.ndarray) -> None:
    """Raises RunFailed where one of `features` [n, D], of the images `read` [n], is not finite."""
    broken = (~features.isfinite().all(1)).nonzero()[:, 0]
    if len(broken):
        raise RunFailed(
            f"{len(broken)} of {len(features)} features of {source.name} are not finite, "
            f"the first of {source.describe(int(read[broken[0]]))}"
        )


def pixels(
    source: Source,
    size: int,
    batch_size: int = 128,
    workers: int = 2,
    indices: Sequence[int] | np.ndarray | None = None,
) -> Features:
    """The baseline without a network: the pixels of the central square, 0..1, D = s * s * C.

    Images whose shorter side is `size` already are not resampled.
    """
    raw = EvalTransform(size, size, (0.0,) * source.channels, (1.0,) * source.channels)
    return extract(nn.Flatten(), source, raw, batch_size, workers=workers, indices=indices)


def labels_of(features: Features) -> Tensor:
    """The labels, int64 [N]. Raises UsageError where there are none."""
    if features.labels is None:
        raise UsageError(f"{features.data} has no labels to score against")
    return features.labels
