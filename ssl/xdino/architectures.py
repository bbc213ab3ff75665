"""Which network a file's tensors belong to: parameter names between families, shapes read back.

Three namings are in use. Published XCiT names (facebookresearch/xcit) are ours. timm's XCiT has the
query, key and value of class attention apart and calls the positional encoding `pos_embed`. DINO's
ViTs and timm's share theirs. Around them lie prefixes of wrappers (`module.`, `backbone.`) and heads.

What shapes cannot tell: `tokens_norm` of an XCiT (the published sizes fix it) and the number of a
ViT's heads, and whether a ViT's positions are resampled as DINO's or as timm's (see `vit`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xdino import vit, xcit
from xdino.errors import RunFailed

# MultiCropWrapper, DistributedDataParallel and torch.compile put these before every name.
_WRAPPERS = ("module.", "backbone.", "_orig_mod.")
# Projection heads, and the class heads of XCiT, ViT ("head") and ResNet ("fc").
_HEADS = ("head.", "head_dist.", "fc.")


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wrappers' prefixes off (as prefixes only), heads out, timm's XCiT names made published ones.

    Raises:
        RunFailed: two tensors of one name once the prefixes are off; timm's names, but incomplete.
    """
    names: dict[str, Tensor] = {}
    for name, value in tensors.items():
        while prefix := next((p for p in _WRAPPERS if name.startswith(p)), ""):
            name = name.removeprefix(prefix)
        if name.startswith(_HEADS):
            continue
        if name in names:
            raise RunFailed(f"the file mixes several networks: it has {name} twice")
        names[name] = value
    return _from_timm(names) if "pos_embed.token_projection.weight" in names else names


def _from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        name.replace("pos_embed.token_projection", "pos_embeder.token_projection"): value
        for name, value in tensors.items()
    }
    for name in [n for n in names if re.fullmatch(r"cls_attn_blocks\.\d+\.attn\.q\.\w+", n)]:
        stem, leaf = name.rsplit(".q.", 1)
        try:
            parts = [names.pop(f"{stem}.{letter}.{leaf}") for letter in "qkv"]
            names[f"{stem}.qkv.{leaf}"] = torch.cat(parts)
        except (KeyError, RuntimeError):
            raise RunFailed(f"the file's {stem}.q, .k and .v do not belong together") from None
    return names


def to_timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published XCiT names -> timm's, with the fused query, key and value of class attention apart."""
    names: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", name):
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                names[name.replace(".qkv.", f".{letter}.")] = piece
        else:
            names[name.replace("pos_embeder.", "pos_embed.")] = value
    return names


# --- what shapes say --------------------------------------------------------------------------


def xcit_shape(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Constructor arguments of the XCiT that has these tensors, but for eta and tokens_norm.

    None where they are no XCiT's. eta is only an initial value, and does not matter once trained.
    """
    stem = _count(tensors, r"patch_embed\.proj\.(\d+)\.0\.weight")
    try:
        embed_dim = tensors["cls_token"].shape[-1]
        return {
            "embed_dim": embed_dim,
            "depth": _count(tensors, r"blocks\.(\d+)\.attn\.temperature"),
            "num_heads": tensors["blocks.0.attn.temperature"].shape[0],
            "patch_size": 2**stem,
            "in_chans": tensors["patch_embed.proj.0.0.weight"].shape[1],
            "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
            "class_attention_layers": _count(tensors, r"cls_attn_blocks\.(\d+)\.norm1\.weight"),
        }
    except (KeyError, IndexError, ZeroDivisionError):
        return None


def _count(tensors: Iterable[str], pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.fullmatch(pattern, name))})


def xcit_name(shape: Mapping[str, Any]) -> str | None:
    """The published name of an XCiT of this shape, if it has one."""
    if (shape["mlp_ratio"], shape["class_attention_layers"]) != (4.0, 2):
        return None
    wanted = (shape["embed_dim"], shape["depth"], shape["num_heads"])
    for size, variant in xcit.VARIANTS.items():
        if (variant.embed_dim, variant.depth, variant.num_heads) == wanted:
            name = f"xcit_{size}_p{shape['patch_size']}"
            return name if name in xcit.NAMES else None
    return None


def nearest_xcit(shape: Mapping[str, Any]) -> str:
    """The named XCiT whose width, depth, heads and patch are closest, each by its factor."""

    def distance(name: str) -> float:
        theirs = xcit.arguments(name)
        keys = ("embed_dim", "depth", "num_heads", "patch_size")
        return sum(abs(math.log2(max(shape[key], 0.5) / theirs[key])) for key in keys)

    return min(xcit.NAMES, key=distance)


def vit_shape(tensors: Mapping[str, Tensor]) -> tuple[str, int, int] | None:
    """Size, patch and side of the position table in pixels of the DINO ViT that has these shapes.

    The arguments of `vit.name`: ("small", 16, 224). None where they are another network's.
    """
    try:
        width, _, _, patch = tensors["patch_embed.proj.weight"].shape
        patches = tensors["pos_embed"].shape[1] - 1
        depth = _count(tensors, r"blocks\.(\d+)\.attn\.qkv\.weight")
    except (KeyError, IndexError, ValueError):
        return None
    side = math.isqrt(max(patches, 0))
    for size, (embed_dim, _) in vit.SIZES.items():
        if (embed_dim, 12, patches) == (width, depth, side * side):
            return size, patch, side * patch
    return None


def published_name(arch: str, tensors: Mapping[str, Tensor], patch_size: Any = None) -> str:
    """A published `--arch` or torch.hub name as ours; any other name as it is.

    "vit_small", "deit_small" (as DINO first called it) and "dino_vits16" are DINO's ViTs, whose
    patch and table size the tensors tell; "dino_xcit_small_12_p16", "dino_resnet50" lose the prefix.
    """
    arch = arch.removeprefix("dino_")
    match = re.fullmatch(r"(?:vit|deit)_?(tiny|small|base|[tsb])_?(\d+)?", arch)
    if match is None:
        return arch
    size = {"t": "tiny", "s": "small", "b": "base"}.get(match[1], match[1])
    _, patch, side = vit_shape(tensors) or (size, int(patch_size or 16), 224)
    return vit.name(size, int(match[2] or patch), side)


def advice(tensors: Mapping[str, Tensor]) -> str:
    """A half-sentence on what the tensors look like and which --arch to give."""
    shape = xcit_shape(tensors)
    if shape is not None:
        name = xcit_name(shape)
        if name is not None:
            return f"its shapes are those of {name}: --arch {name}"
        return (
            f"its shapes are those of an XCiT without a published name ({described(shape)}); "
            f"the nearest is {nearest_xcit(shape)}"
        )
    vit_like = vit_shape(tensors)
    if vit_like is not None:
        name = vit.name(*vit_like)
        timms = name.removesuffix(".dino")
        return (
            f"its shapes are those of {timms}: --arch {name} for a published DINO file, "
            f"--arch {timms} for timm's"
        )
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return "its names are those of a ResNet: --arch resnet50"
    return "name it with --arch, for example --arch xcit_small_12_p16"


def described(shape: Mapping[str, Any]) -> str:
    """ "embed_dim 96, depth 4, ..." """
    return ", ".join(f"{key} {value:g}" for key, value in shape.items())


def differences(tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    """How the tensors differ from a network's own, in half a sentence; empty where they do not."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own)
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (extra, "unknown"), (shapes, "of another shape"))
        if names
    )


def fitting(tensors: Mapping[str, Tensor]) -> str | None:
    """The named network that has exactly these tensors, None where none has."""
    shape, vit_like = xcit_shape(tensors), vit_shape(tensors)
    name: str | None = None
    with torch.device("meta"):
        if shape is not None and (name := xcit_name(shape)) is not None:
            model: nn.Module = xcit.build(name, in_chans=shape["in_chans"])
        elif vit_like is not None:
            name = vit.name(*vit_like)
            model = vit.build(name, tensors["patch_embed.proj.weight"].shape[1])
        else:
            return None
    return None if differences(tensors, model) else name
