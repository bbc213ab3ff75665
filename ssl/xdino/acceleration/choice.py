"""The choice itself: what was asked for, what can run, what agrees, what is faster."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xdino import kernels
from xdino.acceleration import equality, speed
from xdino.augment import MultiCrop
from xdino.errors import UsageError, nearest
from xdino.runtime import distributed
from xdino.xcit import XCiT

MODES = ("auto", "plain", "fused")


@dataclass(frozen=True)
class Choice:
    """What really runs.

    Args:
        network, views: whether the fused kernels do.
        xca: whether they do inside cross-covariance attention too, which leaves some precisions and
            head widths to the plain path.
        why: why not all that was asked for; None: it does, or nobody would expect it to.
        compiled: whether torch.compile's code runs.
        activation_checkpointing: whether the student computes its activations again.
        graphs: whether passes run as CUDA graphs.
        speedup: of each part whose two paths were timed, the plain path's time over the kernels'.
    """

    network: bool = False
    views: bool = False
    why: str | None = None
    compiled: bool = False
    activation_checkpointing: bool = False
    xca: bool = False
    graphs: bool = False
    speedup: Mapping[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For environment.json."""
        fused = {"network": self.network, "xca": self.xca, "views": self.views}
        facts: dict[str, Any] = {
            "fused_kernels": fused,
            "compiled": self.compiled,
            "activation_checkpointing": self.activation_checkpointing,
            "cuda_graphs": self.graphs,
        }
        if self.speedup:
            facts["fused_speedup"] = {part: round(x, 3) for part, x in self.speedup.items()}
        return facts


def choose(
    mode: str,
    model: nn.Module,
    crops: MultiCrop,
    device: torch.device,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    images: int = 32,
    graphs: bool = False,
) -> Choice:
    """The kernels for training `model` (a backbone) on `device`.

    "plain" takes none. "auto" takes, on CUDA, those that pass the checks of equality and speed; every
    process makes the same choice. "fused" takes all, without asking further than whether they can
    run. torch.compile and activation checkpointing need the plain path through the network, and get
    it: both are asked for by name.

    Args:
        compile: whether torch.compile is asked for.
        images: of a micro-batch, for the comparison of speed.
        graphs: whether passes are to run as CUDA graphs, which are compared then.

    Raises:
        UsageError: an unknown mode, or "fused" where no kernel can run, the model is no XCiT, is to
            be compiled, or computes its activations again.
    """
    if mode not in MODES:
        raise UsageError(f'runtime.kernels cannot be "{mode}": {nearest(mode, MODES)}')
    recomputes = any(getattr(part, "grad_checkpointing", False) for part in model.modules())
    asked = {"compile": compile, "activation_checkpointing": recomputes}
    rivals = [f"runtime.{name}" for name, on in asked.items() if on]
    network, views, why = False, False, None
    speedup: dict[str, float] = {}
    if mode == "fused":
        _check_fused(model, device, rivals)
        network = views = True
    elif mode == "auto" and device.type == "cuda":
        found, speedup = _tried(model, crops, device, autocast, images, rivals, graphs)
        network, views = found.get("network", "none") is None, found["views"] is None
        why = _sentence(found)
    xca = network and isinstance(model, XCiT) and _fuses_xca(model, autocast)
    return Choice(network, views, why, compile and not network, recomputes, xca, graphs, speedup)


def _check_fused(model: nn.Module, device: torch.device, rivals: list[str]) -> None:
    reason = kernels.reason(device)
    if reason is None and not isinstance(model, XCiT):
        reason = f"they are for XCiT, and this network is {type(model).__name__}"
    if reason is None and rivals:
        reason = _needs_plain(rivals)
    if reason is not None:
        raise UsageError(
            f"runtime.kernels is fused, but the kernels cannot run: {reason}; use auto or plain"
        )


def _needs_plain(rivals: list[str]) -> str:
    return f"{' and '.join(rivals)} {'needs' if len(rivals) == 1 else 'need'} the plain path"


def _fuses_xca(model: XCiT, autocast: torch.dtype | None) -> bool:
    from xdino.kernels import xca  # imports triton, which not every machine has

    return xca.supports(equality.head_dim(model), autocast or torch.float32)


def _tried(
    model: nn.Module,
    crops: MultiCrop,
    device: torch.device,
    autocast: torch.dtype | None,
    images: int,
    rivals: list[str],
    graphs: bool,
) -> tuple[dict[str, str | None], dict[str, float]]:
    """Of each part that has kernels, why they are not taken (None: they are), and their speed."""
    cannot = kernels.reason(device)
    found: dict[str, str | None] = {}
    speedup: dict[str, float] = {}

    def judge(
        part: str, check: Callable[[], str | None], compare: Callable[[], speed.Comparison]
    ) -> None:
        # Collectives differ between the paths: one process must not go another way than the rest.
        found[part] = _agreed(cannot or check(), "another process found that they do not work")
        if found[part] is None:
            compared, why = speed.tried(compare)
            found[part] = _agreed(why, "another process found them no faster")
            if compared is not None:
                speedup[part] = compared.speedup

    judge(
        "views",
        lambda: equality.check_views(crops, device),
        lambda: speed.compare_views(crops, images, device),
    )
    if isinstance(model, XCiT) and rivals:
        found["network"] = _needs_plain(rivals)
    elif isinstance(model, XCiT):
        judge(
            "network",
            lambda: equality.check_network(model, device, autocast),
            lambda: speed.compare_networks(model, crops, images, device, autocast, graphs),
        )
    return found, speedup


def _agreed(why: str | None, elsewhere: str) -> str | None:
    """None where no process says why not; else this one's reason, or that of others."""
    return (why or elsewhere) if distributed.any_true(why is not None) else None


def _sentence(found: Mapping[str, str | None]) -> str | None:
    whys: dict[str, list[str]] = {}
    for part, why in found.items():
        if why is not None:
            whys.setdefault(why, []).append(part)
    told = [f"for the {' and the '.join(parts)}, since {why}" for why, parts in whys.items()]
    return f"the plain path is used, not the fused kernels, {'; '.join(told)}" if told else None


def use_kernels(models: Iterable[nn.Module], fused: bool) -> None:
    """Let every XCiT inside `models` train with the fused kernels, or without."""
    for model in models:
        for module in model.modules():
            if isinstance(module, XCiT):
                module.fused = fused
