"""Whether the fused kernels compute what the plain path does, on the device that they would run on.

A small network and a few crops go through both paths, forward and backward.
"""

import copy
import subprocess

import numpy as np
import torch
from torch import Tensor

from xdino import augment
from xdino.augment import photometric
from xdino.xcit import XCiT
from xdino.xcit.layers import XCABlock

#: Largest relative difference (of norms) of any output, gradient or statistic from the plain
#: path's: float32 against float32, and mixed precision against mixed precision.
FLOAT32_BOUND, MIXED_BOUND = 1e-3, 0.1
LEVEL_BOUND = 0.05  # mean difference of the views, in levels of 0..255


def twins(
    model: XCiT, depth: int, drop_path_rate: float, device: torch.device
) -> tuple[XCiT, XCiT]:
    """A network of `depth` blocks like those of `model`, in training: on the plain path, and fused."""
    block = _block(model)
    plain = XCiT(
        model.patch_size,
        model.embed_dim,
        depth,
        block.attn.num_heads,
        in_chans=model.in_chans,
        drop_path_rate=drop_path_rate,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
    )
    plain.to(device).train()
    fused = copy.deepcopy(plain)
    fused.fused = True
    return plain, fused


def _block(model: XCiT) -> XCABlock:
    block = model.blocks[0]
    assert isinstance(block, XCABlock)
    return block


def head_dim(model: XCiT) -> int:
    """Channels a head."""
    return model.embed_dim // _block(model).attn.num_heads


def drop_path_rate(model: XCiT) -> float:
    return _block(model).drop_path_rate


def check_network(
    model: XCiT, device: torch.device, autocast: torch.dtype | None = None
) -> str | None:
    """Why the kernels should not train a network of this width on `device`; None where they may.

    Two blocks of it, forward and backward, in float32 and in the precision of the run.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _exact_products():
        torch.manual_seed(0)
        plain, fused = twins(model, 2, 0.2, device)
        size = 3 * model.patch_size, 5 * model.patch_size
        images = torch.randn(4, model.in_chans, *size, device=device)
        bounds = {torch.float32: FLOAT32_BOUND}
        if autocast is not None:
            bounds[autocast] = MIXED_BOUND
        for dtype, bound in bounds.items():
            try:
                ours, theirs = (_trained(one, images, dtype) for one in (fused, plain))
            except failures() as error:
                return f"they do not run here ({first_line(error)})"
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
    except failures() as error:
        return f"the photometric ones do not run here ({first_line(error)})"
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


def failures() -> tuple[type[Exception], ...]:
    """What Triton, its compiler and the driver raise where a kernel cannot be built or launched."""
    from triton.errors import TritonError

    return (
        TritonError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError,
        ImportError, AssertionError, subprocess.SubprocessError,
    )  # fmt: skip


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
