"""The timm network that a backbone is: its name, its arguments, its tensors by timm's names.

Built here, loaded strictly and compared on one batch before anything is written.
"""

import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from xdino import dino_vit, weight_names, xcit
from xdino.backbone import Backbone, Spec
from xdino.errors import RunFailed, UsageError

TIMM_TOLERANCE = 1e-5  # relative; timm may fuse what the published code spells out


def timm_weights(
    backbone: Backbone, spec: Spec, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under timm's names, and how `timm.create_model` builds the network they load into.

    It is built here, loaded strictly and compared on one batch.

    Raises:
        UsageError: an XCiT of a patch that timm's has not.
        RunFailed: timm's network gives other features.
    """
    name, options = timm_recipe(spec)
    theirs = timm.create_model(name, **options).eval()
    tensors = timm_tensors(backbone)
    theirs.load_state_dict(tensors, strict=True)
    error = difference(backbone, spec, theirs, f"timm {timm.__version__}'s {name}")
    call = called(name, options)
    say(f"{call} gives the same features, to {error:.1e} of the largest")
    return tensors, {"timm": call, "timm_version": timm.__version__}


def called(name: str, options: dict[str, Any]) -> str:
    """The call that builds a network of timm's."""
    arguments = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in options.items())])
    return f"timm.create_model({arguments})"


def timm_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The state of a backbone under timm's names."""
    state: dict[str, Tensor] = backbone.state_dict()
    return weight_names.to_timm_names(state) if isinstance(backbone, xcit.XCiT) else state


def difference(
    ours: Callable[[Tensor], Tensor],
    spec: Spec,
    theirs: Callable[[Tensor], Tensor],
    who: str,
    what: str = "features",
) -> float:
    """The largest difference of the features of two images, a share of the largest feature.

    Args:
        ours, theirs: two networks, [B, C, H, W] -> [B, D]. spec: of the images that ours is for.
        who, what: what a sentence calls theirs, and what they give.

    Raises:
        RunFailed: above `TIMM_TOLERANCE`.
    """
    size = spec.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, spec.in_chans, size, size, generator=generator)
    with torch.no_grad():
        own = ours(images)
        error = ((theirs(images) - own).abs().max() / own.abs().max()).item()
    if not error <= TIMM_TOLERANCE:
        raise RunFailed(f"{who} gives other {what} ({error:.1e})")
    return error


def timm_recipe(spec: Spec) -> tuple[str, dict[str, Any]]:
    """Name and options for `timm.create_model` of the network behind a spec, without a class head."""
    options: dict[str, Any] = {"num_classes": 0}
    if spec.in_chans != 3:
        options["in_chans"] = spec.in_chans
    if not spec.arch.startswith("xcit_"):
        name = spec.arch.removesuffix(".dino")
        if not timm.is_model(name):
            raise UsageError(f"timm has no {name}: export it as published or onnx")
        if dino_vit.is_name(spec.arch) and dino_vit.side(spec.arch) != spec.input_size:
            raise UsageError(
                f"{spec.arch} is shown {spec.input_size} pixels here, and timm stretches positions "
                "otherwise than DINO does: export it as published or onnx"
            )
        if name != spec.arch or timm.models.get_pretrained_cfg(name).fixed_input_size:
            options["img_size"] = spec.input_size
        return name, options
    shape = dict(spec.shape)
    patch = shape.pop("patch_size", xcit.arguments(spec.arch)["patch_size"])
    name = re.sub(r"_p\d+$", f"_p{patch}_224", spec.arch)
    if not timm.is_model(name):
        raise UsageError(
            f"timm's XCiT has patch sizes 8 and 16, not {patch}: export it as published or onnx"
        )
    if "class_attention_layers" in shape:
        shape["cls_attn_layers"] = shape.pop("class_attention_layers")
    return name, {**options, **shape}
