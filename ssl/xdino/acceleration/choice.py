"""The choice between the plain path and the fused kernels: what was asked, what works, what is faster."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from xdino import augment, kernels
from xdino.acceleration.equality import check_network, check_views
from xdino.acceleration.speed import compare_network, compare_views
from xdino.errors import UsageError, nearest
from xdino.runtime import distributed
from xdino.xcit import XCiT

MODES = ("auto", "plain", "fused")


@dataclass(frozen=True)
class Choice:
    """What really runs: which kernels, whether torch.compile's code; and why not all that was asked
    for does (None: it does, or nobody would expect it to)."""

    network: bool = False
    views: bool = False
    why: str | None = None
    compiled: bool = False
    activation_checkpointing: bool = False

    def facts(self) -> dict[str, Any]:
        """As environment.json tells it."""
        return {
            "fused_kernels": {"network": self.network, "views": self.views},
            "compiled": self.compiled,
            "activation_checkpointing": self.activation_checkpointing,
        }


def choose(
    mode: str,
    model: nn.Module,
    crops: augment.MultiCrop,
    device: torch.device,
    autocast: torch.dtype | None = None,
    compile: bool = False,
) -> Choice:
    """The kernels for training `model` (a backbone) on `device`.

    "plain" takes none. "auto" takes, on CUDA, those that agree with the plain path and are faster;
    every process makes the same choice. "fused" takes all, without asking further than whether they
    can run. `compile`: whether torch.compile is asked for; it has nothing to do where the kernels
    run the network. A network that computes its activations again takes the plain path.

    Raises:
        UsageError: an unknown mode, or "fused" where no kernel can run, the model is no XCiT,
            computes its activations again or is to be compiled.
    """
    if mode not in MODES:
        raise UsageError(f'runtime.kernels cannot be "{mode}": {nearest(mode, MODES)}')
    if mode == "fused":
        found = _all(model, device, compile)
    elif mode == "auto" and device.type == "cuda":
        found = _faster(model, crops, device, autocast)
    else:
        found = Choice()
    found = replace(found, activation_checkpointing=_recomputes(model))
    if not compile:
        return found
    if not found.network:
        return replace(found, compiled=True)
    left = "runtime.compile is left out: the fused kernels run what it would compile"
    return replace(found, why=f"{found.why}; {left}" if found.why else left)


def _recomputes(model: nn.Module) -> bool:
    # timm's name for it, and ours; some of timm's networks have it on their stages alone.
    return any(getattr(module, "grad_checkpointing", False) for module in model.modules())


_AGAIN = "runtime.activation_checkpointing computes the network again on the plain path"


def _all(model: nn.Module, device: torch.device, compile: bool) -> Choice:
    why = kernels.reason(device)
    if why is None and not isinstance(model, XCiT):
        why = f"they are for XCiT, and this network is {type(model).__name__}"
    if why is None and _recomputes(model):
        why = _AGAIN
    if why is None and compile:
        why = "runtime.compile compiles the plain path"
    if why is not None:
        raise UsageError(
            f"runtime.kernels is fused, but the kernels cannot run: {why}; use auto or plain"
        )
    return Choice(True, True)


def _faster(
    model: nn.Module, crops: augment.MultiCrop, device: torch.device, autocast: torch.dtype | None
) -> Choice:
    """The kernels that agree with the plain path and are faster than it, and why not the others."""
    reason = kernels.reason(device)
    found = [reason or check_views(crops, device) or compare_views(crops, device)]
    if isinstance(model, XCiT):
        reason = reason or (_AGAIN if _recomputes(model) else None)
        reason = reason or check_network(model, device, autocast)
        found.append(reason or compare_network(model, crops, device, autocast))
    # Collectives differ between the paths: one process must not go another way than the rest.
    agreed = [not distributed.any_true(why is not None) for why in found]
    whys = dict.fromkeys(
        why or "another process found that they do not work or are no faster"
        for why, good in zip(found, agreed, strict=True)
        if not good
    )
    sentence = f"the plain path is used: the fused kernels are not, since {'; '.join(whys)}"
    return Choice(agreed[-1] and isinstance(model, XCiT), agreed[0], sentence if whys else None)


def use_kernels(models: Iterable[nn.Module], fused: bool) -> None:
    """Let every XCiT inside `models` train with the fused kernels, or without."""
    for model in models:
        for module in model.modules():
            if isinstance(module, XCiT):
                module.fused = fused
