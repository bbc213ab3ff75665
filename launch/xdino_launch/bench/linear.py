"""What `xdino bench linear` times: a grid of linear probes against one probe.

Over images, where the backbone is what costs, and over features extracted once, where there is
nothing but heads. Both arms train on the same batches, one epoch a round: `linear.train_head`, which
is the published probe by autograd and torch's optimiser, against `stacked_heads.train_heads`. Reading,
augmenting and the backbone count in both; extracting the scored split does not.

Letters: N images, B images of a batch, D width, K classes, G heads.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xdino import data
from xdino.backbones import BackboneSpec
from xdino.data.sources import Source
from xdino.errors import UsageError
from xdino_eval.features import evaluating
from xdino_eval.linear.grid import Grid, new_stacks
from xdino_eval.linear.sgd import (
    OverImages,
    Sgd,
    new_head,
    shuffled,
    small_products_alone,
    train_head,
)
from xdino_eval.linear.stacked_heads import Batches, threads_for, train_heads
from xdino_eval.transform import EvalTransform
from xdino_launch.bench.timing import Arm, Protocol, Ratio, Report, again, divided, timed


@dataclass(frozen=True)
class LinearShape:
    """One epoch of a probe. size: pixels; dim: width of features that no backbone makes."""

    arch: str = "xcit_nano_12_p16"
    images: int = 256
    size: int = 224
    features: int = 10_000
    dim: int = 384
    classes: int = 1_000
    batch: int = 128
    lrs: int = 13
    device: str = "cpu"

    def grid(self) -> Grid:
        """As many learning rates as asked for, over the default grid's range."""
        return Grid(lrs=tuple(np.geomspace(1e-5, 1e-1, self.lrs).tolist()))


def linear(shape: LinearShape, folder: str | None, protocol: Protocol) -> Report:
    """Seconds an epoch of one probe and of a grid, over images and over cached features.

    Args:
        folder: labelled images; None for noise, written as JPEG to a temporary folder. `--images`
            are taken of it, and their classes count as they are.
    """
    if shape.lrs < 2:
        raise UsageError(f"--lrs must be at least 2, got {shape.lrs}")
    device = torch.device(shape.device)
    facts: dict[str, object] = {}
    with ExitStack() as stack:
        arms: list[Arm] = []
        if shape.features:
            arms += _over_features(shape, device, protocol, facts)
        if shape.images:
            source = _source(shape, folder, stack)
            arms += _over_images(shape, source, device, protocol, stack)
        if not arms:
            raise UsageError("nothing to time: --images and --features are both 0")
        values = protocol.measure([*arms, *(again(arm) for arm in arms[::2])])
    ratios = divided(
        values,
        [
            Ratio(f"grid / one, {what}", f"grid of {shape.lrs}, {what}", f"one probe, {what}")
            for what in ("cached features", "images")
        ],
    )
    if shape.features:
        forward = 2 * shape.batch * shape.dim * shape.classes * 2
        facts["arithmetic of a batch, cached features, GFLOP"] = {
            "one probe": forward / 1e9,
            "grid": forward * shape.lrs / 1e9,
        }
    settings = {**asdict(shape), "data": folder or "noise", "threads": protocol.used_threads}
    return Report("linear", settings, "s an epoch", values, ratios, facts=facts)


def _pair(
    what: str,
    shape: LinearShape,
    width: int,
    classes: int,
    batches: Batches,
    device: torch.device,
    threads: int,
) -> list[Arm]:
    """One probe and the grid on the same batches. Heads are trained on from round to round."""
    grid, how = shape.grid(), Sgd(epochs=1, batch_size=shape.batch)
    head = new_head(width, classes, 0, device)
    columns = grid.columns(width)
    stacks = new_stacks(grid, columns, classes, 0, device)

    def alone(work: Callable[[], object], heads: int) -> Callable[[int], float]:
        def run(number: int) -> None:
            with small_products_alone(shape.batch * head.weight.numel() * heads):
                work()

        return timed(run, device=device)

    one = partial(train_head, head, batches, how)
    many = partial(train_heads, stacks, batches, columns, grid.head_lrs, how, None, None, threads)
    return [
        Arm(f"one probe, {what}", alone(one, 1)),
        Arm(f"grid of {shape.lrs}, {what}", alone(many, shape.lrs)),
    ]


def _over_features(
    shape: LinearShape, device: torch.device, protocol: Protocol, facts: dict[str, object]
) -> list[Arm]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(shape.features, shape.dim, generator=generator).to(device)
    target = torch.randint(shape.classes, (shape.features,), generator=generator).to(device)
    how = Sgd(epochs=1, batch_size=shape.batch)
    stacks = new_stacks(shape.grid(), shape.grid().columns(shape.dim), shape.classes, 0, device)
    threads = threads_for(stacks, shape.batch, protocol.used_threads)
    facts["threads that share the grid's heads out"] = threads
    batches = partial(shuffled, table, target, how)
    what = "cached features"
    return _pair(what, shape, shape.dim, shape.classes, batches, device, threads)


def _over_images(
    shape: LinearShape,
    source: Source,
    device: torch.device,
    protocol: Protocol,
    stack: ExitStack,
) -> list[Arm]:
    torch.manual_seed(0)
    spec = BackboneSpec(shape.arch, input_size=shape.size)
    backbone = spec.build().eval().to(device)
    transform = EvalTransform(shape.size, round(shape.size * 256 / 224), spec.mean, spec.std)
    images = OverImages(backbone, source, source, transform, device, workers=protocol.used_threads)
    classes, train_class = np.unique(images.labels(), return_inverse=True)
    indices = np.random.default_rng(0).permutation(len(source))[: shape.images]
    how = Sgd(epochs=1, batch_size=shape.batch)
    views = images.augmented(backbone, train_class, indices, how)
    stack.enter_context(evaluating(backbone))
    width = backbone.embed_dim
    K = max(len(classes), shape.classes)
    return _pair("images", shape, width, K, views.batches, device, threads=1)


def _source(shape: LinearShape, folder: str | None, stack: ExitStack) -> Source:
    """`folder`, or JPEG files of noise in two classes."""
    if folder is not None:
        return data.open_source(folder, "train", 3, labelled=True)
    where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    generator = np.random.default_rng(0)
    for i in range(shape.images):
        path = where / "ab"[i % 2] / f"{i:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(path)
    return data.open_source(str(where), "train", 3, labelled=True)
