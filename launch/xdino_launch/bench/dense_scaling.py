"""What `xdino bench scaling --task` times: whole detectors and segmenters as pictures grow.

An XCiT and a transformer of timm's of the same width and patch, each behind the same pyramid, neck and
heads, look at one picture of 800 : 1,344 (COCO's common size). Weights are new ones, by which nothing
is found: a detector classifies its 1,000 regions and makes no masks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from xdino import xcit
from xdino.errors import UsageError
from xdino.stepping import AUTOCAST
from xdino_launch.bench.memory import in_a_process, status
from xdino_launch.bench.timing import Arm, Protocol, Ratio, Report, again, divided, on_cores, timed
from xdino_transfer.detection import detector
from xdino_transfer.detection.objects import Shown
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation import segmenter

SIZES = (400, 800, 1600)  # shorter sides: 1,050, 4,200 and 16,800 tokens of 16 pixels
MULTIPLE, SMALLEST = 16, 32
CLASSES = {"detect": 80, "segment": 150}  # COCO's and ADE20K's
TASKS = tuple(CLASSES)


class TransformerPyramid(nn.Module):
    """A transformer's tokens after four blocks, brought to four strides as an XCiT's are."""

    def __init__(self, network: nn.Module, levels: Pyramid) -> None:
        super().__init__()
        self.network, self.after = network, levels.after
        self.embed_dim = levels.embed_dim
        self.levels = nn.ModuleList((levels.fpn1, levels.fpn2, levels.fpn3, levels.fpn4))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.network.forward_intermediates(  # type: ignore[operator]
            images, indices=list(self.after), norm=False, intermediates_only=True
        )
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def network_of(task: str, arch: str, against: str | None = None) -> nn.Module:
    """A detector or segmenter on an XCiT, or on a transformer in its place.

    Raises:
        UsageError: an unknown name, a transformer of another width, patch or depth.
    """
    pyramid = Pyramid(xcit.build(arch))
    model: Any
    if task == "detect":
        model = detector.build(pyramid, CLASSES[task])
    else:
        model = segmenter.build(pyramid, "semantic_fpn", CLASSES[task])
    if against is not None:
        theirs = _transformer(against, pyramid)
        model.backbone = TransformerPyramid(theirs, pyramid)
    return model.eval()


def _transformer(name: str, pyramid: Pyramid) -> nn.Module:
    if not timm.is_model(name):
        raise UsageError(f'timm has no network called "{name}"')
    try:
        network = timm.create_model(name, num_classes=0, dynamic_img_size=True)
        width, patch = network.embed_dim, network.patch_embed.patch_size[0]
        depth = len(network.blocks)
    except (TypeError, AttributeError):
        raise UsageError(f"{name} is no transformer that takes images of any size") from None
    own = (pyramid.embed_dim, pyramid.patch_size, len(pyramid.blocks))
    if (width, patch, depth) != own:
        raise UsageError(
            f"--against takes a transformer like --arch, {own[0]} wide with patches of {own[1]} pixels "
            f"and {own[2]} blocks, and {name} has {width}, {patch} and {depth}"
        )
    return network


def dense_scaling(
    task: str,
    arch: str,
    against: str,
    sizes: tuple[int, ...],
    precision: str,
    device: str,
    memory: bool,
    protocol: Protocol,
) -> Report:
    """Seconds of a forward pass, or MB at its peak, at each of `sizes` (shorter sides).

    The exponent is the slope of log time over log tokens, fitted in every round.
    """
    if min(sizes) < SMALLEST or len(set(sizes)) < 2:
        raise UsageError(f"--sizes takes two or more different sizes of at least {SMALLEST} pixels")
    if precision not in AUTOCAST:
        raise UsageError(f"--precision takes {', '.join(AUTOCAST)}, got {precision}")
    shapes = {size: shape_of(size) for size in sizes}
    names: dict[str, str | None] = {arch: None, against: against}
    networks = {name: network_of(task, arch, other) for name, other in names.items()}
    threads = protocol.used_threads

    def measured(name: str, shape: tuple[int, int]) -> Callable[[int], float]:
        if memory:
            wanted = (task, arch, names[name], shape, precision, threads)
            return lambda number: in_a_process(peak, *wanted, lower="--sizes")
        return _measure(networks[name], shape, precision, device)

    arms = [
        Arm(_name(name, shape), measured(name, shape))
        for shape in shapes.values()
        for name in names
    ]
    arms.append(again(arms[0]))
    values = protocol.measure(arms, warm_up=not memory)
    patch = xcit.arguments(arch)["patch_size"]
    tokens = [-(-h // patch) * -(-w // patch) for h, w in shapes.values()]
    settings: dict[str, Any] = {"task": task, "arch": arch, "against": against}
    settings |= {"sizes": [*shapes.values()], "tokens": tokens, "precision": precision}
    settings |= {"device": device, "threads": threads}
    ratios = [
        Ratio(f"{against} / {arch}, {_pixels(s)}", _name(against, s), _name(arch, s))
        for s in shapes.values()
    ]
    figures = {}
    for name in names:
        rounds = zip(*(values[_name(name, shape)] for shape in shapes.values()), strict=True)
        figures[f"exponent in tokens, {tokens[0]:,} to {tokens[-1]:,}: {name}"] = [
            float(np.polyfit(np.log(tokens), np.log(found), 1)[0]) for found in rounds
        ]
    unit = "MB above the process's own" if memory else "s a forward pass"
    title = f"scaling, {task}{' memory' if memory else ''}"
    return Report(title, settings, unit, values, divided(values, ratios), figures)


def shape_of(size: int) -> tuple[int, int]:
    """Height and width of 800 : 1,344, multiples of 16 pixels."""
    height, width = (max(round(side / MULTIPLE), 1) * MULTIPLE for side in (size, size * 1.68))
    return height, width


def _pixels(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _name(name: str, shape: tuple[int, int]) -> str:
    return f"{name}, {_pixels(shape)}"


def forward(
    network: nn.Module, shape: tuple[int, int], precision: str, device: str
) -> Callable[[], object]:
    """One forward pass in inference."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *shape, generator=generator).to(device)
    autocast = AUTOCAST[precision]

    @torch.inference_mode()
    def work() -> object:
        with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
            if isinstance(network, detector.Detector):
                return network(images, [Shown(shape, shape)])
            return network(images)

    return work


def _measure(
    network: nn.Module, shape: tuple[int, int], precision: str, device: str
) -> Callable[[int], float]:
    work = forward(network.to(device), shape, precision, device)
    return timed(lambda number: work(), device=torch.device(device))


def peak(
    task: str,
    arch: str,
    against: str | None,
    shape: tuple[int, int],
    precision: str,
    threads: int,
) -> float:
    """MB that a forward pass takes here at its peak, beside the network."""
    with on_cores(threads):
        network = network_of(task, arch, against)
        forward(network, (64, 64), precision, "cpu")()  # what libraries keep from the first call on
        work = forward(network, shape, precision, "cpu")
        before = status("VmRSS")
        work()
        return status("VmHWM") - before
