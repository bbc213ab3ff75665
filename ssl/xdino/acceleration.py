"""Which parts of a run take the fused kernels, decided once at its start.

Kernels are compiled on the machine that they run on, by the Triton that is found there. So before
they are trusted, a small network and a few crops go through both paths on the device, forward and
backward; where the two disagree, or the kernels do not run, the plain path stays and a sentence
says why. Nothing that is learned depends on the choice but through rounding.
"""

import copy
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from xdino import augment, kernels
from xdino.augment import photometric
from xdino.errors import UsageError, nearest
from xdino.runtime import distributed
from xdino.xcit import XCiT

MODES = ("auto", "plain", "fused")
#: Largest relative difference (of norms) of any output, gradient or statistic from the plain
#: path's: float32 against float32, and mixed precision against mixed precision.
FLOAT32_BOUND, MIXED_BOUND = 1e-3, 0.1
LEVEL_BOUND = 0.05  # mean difference of the views, in levels of 0..255


@dataclass(frozen=True)
class Choice:
    """What really runs: which kernels, whether torch.compile's code; and why not all that was asked
    for does (None: it does, or nobody would expect it to)."""

    network: bool = False
    views: bool = False
    why: str | None = None
    compiled: bool = False


def choose(
    mode: str,
    model: nn.Module,
    crops: augment.MultiCrop,
    device: torch.device,
    autocast: torch.dtype | None = None,
    compile: bool = False,
) -> Choice:
    """The kernels for training `model` (a backbone) on `device`.

    "plain" takes none. "auto" takes, on CUDA, those that pass the check; every process makes the
    same choice. "fused" takes all, without asking further than whether they can run. A network that
    computes its activations again takes the plain path. `compile`: whether torch.compile is asked
    for; it has nothing to do where the kernels run the network.

    Raises:
        UsageError: an unknown mode, or "fused" where no kernel can run, the model is no XCiT or
            computes its activations again.
    """
    found = _kernels(mode, model, crops, device, autocast)
    if not compile:
        return found
    if not found.network:
        return replace(found, compiled=True)
    left = "runtime.compile is left out: the fused kernels run what it would compile"
    return replace(found, why=f"{found.why}; {left}" if found.why else left)


def _kernels(
    mode: str,
    model: nn.Module,
    crops: augment.MultiCrop,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Choice:
    if mode not in MODES:
        raise UsageError(f'runtime.kernels cannot be "{mode}": {nearest(mode, MODES)}')
    if mode == "plain":
        return Choice()
    reason = kernels.reason(device)
    again = "runtime.activation_checkpointing computes the network again on the plain path"
    thrifty = isinstance(model, XCiT) and model.grad_checkpointing
    if mode == "fused":
        if reason is None and not isinstance(model, XCiT):
            reason = f"they are for XCiT, and this network is {type(model).__name__}"
        if reason is None and thrifty:
            reason = again
        if reason is not None:
            raise UsageError(
                f"runtime.kernels is fused, but the kernels cannot run: {reason}; use auto or plain"
            )
        return Choice(True, True)
    if device.type != "cuda":
        return Choice()
    found = [reason or check_views(crops, device)]
    if isinstance(model, XCiT):
        found.append(reason or (again if thrifty else check_network(model, device, autocast)))
    # Collectives differ between the paths: one process must not go another way than the rest.
    agreed = [not distributed.any_true(why is not None) for why in found]
    whys = dict.fromkeys(
        why or "another process found that they do not work"
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


def check_network(
    model: XCiT, device: torch.device, autocast: torch.dtype | None = None
) -> str | None:
    """Why the kernels should not train a network of this width on `device`; None where they may.

    Two blocks of it, forward and backward, in float32 and in the precision of the run.
    """
    attn: nn.Module = model.blocks[0].attn  # type: ignore[assignment]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _exact_products():
        torch.manual_seed(0)
        plain = XCiT(
            model.patch_size, model.embed_dim, 2, attn.num_heads,  # type: ignore[arg-type]
            in_chans=model.in_chans, drop_path_rate=0.2,
        ).to(device).train()  # fmt: skip
        fused = copy.deepcopy(plain)
        fused.fused = True
        size = 3 * model.patch_size, 5 * model.patch_size
        images = torch.randn(4, model.in_chans, *size, device=device)
        bounds = {torch.float32: FLOAT32_BOUND}
        if autocast is not None:
            bounds[autocast] = MIXED_BOUND
        for dtype, bound in bounds.items():
            try:
                ours, theirs = (_trained(one, images, dtype) for one in (fused, plain))
            except _failures() as error:
                return f"they do not run here ({_first_line(error)})"
            for name, expected in theirs.items():
                apart = _relative(ours[name], expected)
                if not apart <= bound:
                    return (
                        f"{name} is {apart:.1e} away from the plain path's in {dtype}, more than "
                        f"{bound:.0e}"
                    )
    return None


def check_views(crops: augment.MultiCrop, device: torch.device) -> str | None:
    """Why the photometric kernels should not run on `device`; None where they may."""
    spec = crops
    table = augment.draw_batch(spec, 0, 0, np.arange(4))[:2].reshape(-1)
    generator = torch.Generator().manual_seed(0)
    # Noise on a slope: plain noise has almost the same mean level whatever is done to it.
    noise = torch.rand(len(table), 72, 40, spec.channels, generator=generator)
    tilt = torch.rand(len(table), 1, 1, 1, generator=generator)
    slope = torch.linspace(0, 160, 72).view(1, 72, 1, 1) * tilt
    pixels = (slope + 90 * noise).to(torch.uint8)
    expected = photometric.photometric(pixels, table, spec)
    try:
        found = photometric.photometric(pixels.to(device), table, spec, fused=True).cpu()
    except _failures() as error:
        return f"the photometric ones do not run here ({_first_line(error)})"
    std = torch.tensor(spec.std).view(-1, 1, 1)
    apart = ((found - expected) * std * 255).abs().mean().item()
    if not apart <= LEVEL_BOUND:
        return f"the views are {apart:.2f} levels away from the plain path's on average"
    return None


def _trained(model: XCiT, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and BatchNorm statistics of one pass, float32."""
    torch.manual_seed(1)  # the same paths are dropped
    model.zero_grad()
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        tokens = model.patch_tokens(images)[0]
    weight = torch.linspace(-1, 1, tokens.numel(), device=tokens.device).view_as(tokens)
    (tokens.float() * weight.sin()).sum().backward()
    found = {"the output": tokens.detach().float()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"the gradient of {name}"] = parameter.grad.float()
    for name, buffer in model.named_buffers():
        found[name] = buffer.detach().clone().float()
    return found


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-20)).item()


class _exact_products:  # noqa: N801, reads as a context manager
    """Float32 means float32 for matrix products and convolutions while the paths are compared."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *exception: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


def _failures() -> tuple[type[Exception], ...]:
    """What Triton, its compiler and the driver raise where a kernel cannot be built or launched."""
    from triton.errors import TritonError

    return (
        TritonError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError,
        ImportError, AssertionError, subprocess.SubprocessError,
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
