"""What `xdino bench scaling` times: a forward pass as images grow, beside a transformer's."""

import math
from collections.abc import Callable

import numpy as np
import timm
import torch
from torch import nn

from xdino import xcit
from xdino.errors import UsageError
from xdino.stepping import AUTOCAST
from xdino_launch.bench.timing import Arm, Protocol, Ratio, Report, again, divided, timed


def scaling(
    arch: str,
    against: str,
    sizes: tuple[int, ...],
    batch: int,
    precision: str,
    device: str,
    protocol: Protocol,
) -> Report:
    """Seconds of a forward pass at each of `sizes` (pixels): an XCiT against a timm transformer.

    The exponent is the slope of log time over log tokens, fitted in every round.
    """
    if min(sizes) < 16 or len(set(sizes)) < 2:
        raise UsageError("--sizes takes two or more different sizes of at least 16 pixels")
    if precision not in AUTOCAST:
        raise UsageError(f"--precision takes {', '.join(AUTOCAST)}, got {precision}")
    ours = xcit.build(arch).eval().to(device)
    theirs = _transformer(against).eval().to(device)
    autocast = AUTOCAST[precision]

    def forward(network: nn.Module, size: int) -> Callable[[int], float]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, size, size, generator=generator).to(device)

        @torch.inference_mode()
        def work(number: int) -> None:
            with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
                network(images)

        return timed(work, device=torch.device(device))

    arms = [
        Arm(f"{name}, {size} px", forward(network, size))
        for size in sizes
        for name, network in ((arch, ours), (against, theirs))
    ]
    arms.append(again(arms[0]))
    values = protocol.measure(arms)
    tokens = [math.prod(ours.grid(size, size)) for size in sizes]
    figures = {
        f"exponent in tokens, {sizes[0]} to {sizes[-1]} px: {name}": [
            float(np.polyfit(np.log(tokens), np.log(times), 1)[0])
            for times in zip(*(values[f"{name}, {size} px"] for size in sizes), strict=True)
        ]
        for name in (arch, against)
    }
    ratios = [
        Ratio(f"{against} / {arch}, {s} px", f"{against}, {s} px", f"{arch}, {s} px") for s in sizes
    ]
    settings = {"arch": arch, "against": against, "sizes": sizes, "batch": batch}
    settings |= {"precision": precision, "device": device, "threads": protocol.used_threads}
    unit = "s a forward pass"
    return Report("scaling", settings, unit, values, divided(values, ratios), figures)


def _transformer(name: str) -> nn.Module:
    """A network of timm's that takes images of any size."""
    if not timm.is_model(name):
        raise UsageError(f'timm has no network called "{name}"')
    try:
        network: nn.Module = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise UsageError(f"{name} does not take images of any size") from None
    return network
