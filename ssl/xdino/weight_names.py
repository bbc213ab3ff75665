"""Which network a file's tensors belong to: parameter names between families, shapes read back.

Three namings are in use. Published XCiT names (facebookresearch/xcit) are ours. timm's XCiT has the
query, key and value of class attention apart and calls the positional encoding `pos_embed`. DINO's
ViTs and timm's share theirs. Around them lie prefixes of trainers (`module.`, `teacher.backbone.`,
`momentum_backbone.`), which tell several networks of one file apart, and beside them heads.

What shapes cannot tell: `tokens_norm` of an XCiT (the published sizes fix it) and the number of a
ViT's heads, and whether a ViT's positions are resampled as DINO's or as timm's (see `dino_vit`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdino import dino_vit, xcit
from xdino.errors import RunFailed, UsageError

ROLES = ("teacher", "student")  # of the two networks of self-distillation
# DistributedDataParallel and torch.compile put these before every name.
_TRANSPARENT = ("module.", "_orig_mod.")
# What trainers call the part of themselves that is a network: DINO and DINOv2 (teacher, backbone),
# solo-learn (backbone, momentum_backbone), MoCo and its kin (encoder_q, momentum_encoder), lightly.
# A teacher is the one that follows as a moving average, whatever it is called.
_NETWORKS: dict[str, str | None] = {
    "backbone": None,
    "teacher": "teacher",
    "student": "student",
} | {
    name: role
    for role, names in {
        "teacher": "momentum_backbone backbone_momentum teacher_backbone backbone_teacher "
        "momentum_encoder target_encoder encoder_k teacher_encoder teacher_model ema_model "
        "model_ema teacher_embedding_model",
        "student": "student_backbone backbone_student base_encoder online_encoder encoder_q "
        "student_encoder student_model student_embedding_model",
    }.items()
    for name in names.split()
}
# Modules that hold a network and nothing else; taken off where every name lies below one of them.
_HOLDERS = (
    *("model", "_model", "wrapped_model", "embedding_model"),
    *("net", "network", "encoder", "trunk", "method"),
)
# What lies beside a network: projection heads, class heads, losses.
_BESIDE = re.compile(
    r"(\w*_)?(heads?|head_dist|fc|classifiers?|projectors?|projection|predictors?|prototypes?"
    r"|loss|criterion|queue|centers?|centres?|metrics?)(_\w*)?"
)
# Class heads of published files: XCiT, ViT ("head", and "head_dist" of DeiT), ResNet ("fc"), ...
_CLASS_HEADS = ("head.", "head_dist.", "heads.", "fc.", "classifier.")
_UNUSED = ("mask_token",)  # of masked training: DINOv2, BEiT


@dataclass(frozen=True)
class Group:
    """The tensors of one network in a file. prefix: of their names. role: as the prefix says it."""

    prefix: str
    role: str | None
    tensors: dict[str, Tensor]

    def __str__(self) -> str:
        return (
            f"{len(self.tensors)} tensors {f'below {self.prefix}' if self.prefix else 'unprefixed'}"
        )


def plain_names(tensors: Mapping[str, Tensor], role: str = "teacher") -> dict[str, Tensor]:
    """The names of one network: those of the `role` where there are several.

    Prefixes are off (as prefixes only), and timm's XCiT names made published ones. Class heads stay,
    for what is one depends on the network: see `without_heads`.

    Raises:
        RunFailed: two tensors of one name once the prefixes are off; timm's names, but incomplete.
        UsageError: there is no network of this role, or more than one.
    """
    return own_names(of_role(groups(tensors), role).tensors)


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's XCiT names made published ones; any other as they are."""
    timms = "pos_embed.token_projection.weight" in tensors
    return _from_timm(tensors) if timms else dict(tensors)


def groups(tensors: Mapping[str, Tensor], prefix: str = "", role: str | None = None) -> list[Group]:
    """The networks among tensors, by the prefixes of their names; heads and losses are left out."""
    names: dict[str, Tensor] = {}
    for name, value in tensors.items():
        while wrapper := next((p for p in _TRANSPARENT if name.startswith(p)), ""):
            name = name.removeprefix(wrapper)
        if name in names:
            raise RunFailed(f"the file mixes several networks: it has {prefix}{name} twice")
        names[name] = value
    first = {name: name.partition(".")[0] if "." in name else "" for name in names}

    def below(word: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{word}."): v for n, v in names.items() if first[n] == word}

    found = []
    for word in dict.fromkeys(w for w in first.values() if w in _NETWORKS):
        found += groups(below(word), f"{prefix}{word}.", role or _NETWORKS[word])
    if found:
        rest = {n: v for n, v in names.items() if first[n] not in _NETWORKS}
        rest = {n: v for n, v in rest.items() if not _BESIDE.fullmatch(n.partition(".")[0])}
        # A few more tensors are a trainer's own; as many as a network has, or the same, are one.
        rival = any(len(rest) > len(g.tensors) / 10 or rest.keys() & g.tensors for g in found)
        return [*found, Group(prefix, role, rest)] if rest and rival else found
    holders = {w for n, w in first.items() if not _BESIDE.fullmatch(n.partition(".")[0])}
    if len(holders) == 1 and (word := holders.pop()) in _HOLDERS:
        return groups(below(word), f"{prefix}{word}.", role)
    return [Group(prefix, role, names)]


def of_role(found: list[Group], role: str) -> Group:
    """The network of this role; the only one, for a teacher, where nothing says whose it is.

    Raises:
        UsageError: none, or more than one; the message names what there is.
    """
    roles = {group.role for group in found}
    if None in roles and roles - {None} == {"teacher"}:  # solo-learn: backbone, momentum_backbone
        found = [Group(g.prefix, g.role or "student", g.tensors) for g in found]
    matching = [group for group in found if group.role == role]
    if not matching and roles == {None}:
        if len(found) == 1 and role != "teacher":
            raise UsageError(
                f"it holds one network and does not say whose: leave out --role {role}"
            )
        matching = found
    listed = "; ".join(str(group) for group in found[:6])
    if not matching:
        other = "student" if role == "teacher" else "teacher"
        raise UsageError(f"it holds no {role} but a {other} ({listed}): --role {other}")
    if len(matching) > 1:
        raise UsageError(
            f"it holds several networks and does not say which is the {role} ({listed}): "
            "save the one you mean alone"
        )
    return matching[0]


def without_heads(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without class heads, and what masked training adds, as far as the network has none of them."""
    own = model.state_dict().keys()
    said = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()  # timm's own word
    heads = [f"{name}." for name in ((said,) if isinstance(said, str) else said)]
    unused = (*_CLASS_HEADS, *heads)
    return {
        name: value
        for name, value in tensors.items()
        if name in own or not (name.startswith(unused) or name in _UNUSED)
    }


def _from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        shape = {
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
    return shape if min(shape.values()) > 0 else None


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

    The arguments of `dino_vit.name`: ("small", 16, 224). None where they are another network's.
    """
    try:
        width, _, _, patch = tensors["patch_embed.proj.weight"].shape
        patches = tensors["pos_embed"].shape[1] - 1
        depth = _count(tensors, r"blocks\.(\d+)\.attn\.qkv\.weight")
    except (KeyError, IndexError, ValueError):
        return None
    side = math.isqrt(max(patches, 0))
    if not (side and patch):
        return None
    for size, (embed_dim, _) in dino_vit.SIZES.items():
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
    told = patch_size if isinstance(patch_size, int) and 0 < patch_size < 1000 else 16
    _, patch, side = vit_shape(tensors) or (size, told, 224)
    return dino_vit.name(size, int(match[2] or patch), side)


# Blocks of each stage of the published ResNets; timm's names, plain blocks and bottlenecks.
_RESNETS: dict[tuple[bool, tuple[int, ...]], tuple[str, ...]] = {
    (False, (2, 2, 2, 2)): ("resnet18",),
    (False, (3, 4, 6, 3)): ("resnet34",),
    (True, (2, 2, 2, 2)): ("resnet26",),
    (True, (3, 4, 6, 3)): ("resnet50", "wide_resnet50_2", "resnext50_32x4d"),
    (True, (3, 4, 23, 3)): (
        "resnet101", "wide_resnet101_2", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    ),
    (True, (3, 8, 36, 3)): ("resnet152",),
}  # fmt: skip


def resnets(tensors: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """timm's names of ResNets with these blocks, () where none has; None for other networks."""
    if not {"conv1.weight", "layer1.0.conv1.weight"} <= tensors.keys():
        return None
    blocks = tuple(_count(tensors, rf"layer{n}\.(\d+)\.conv1\.weight") for n in (1, 2, 3, 4))
    return _RESNETS.get(("layer1.0.conv3.weight" in tensors, blocks), ())


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
        name = dino_vit.name(*vit_like)
        timms = name.removesuffix(".dino")
        return (
            f"its shapes are those of {timms}: --arch {name} for a published DINO file, "
            f"--arch {timms} for timm's"
        )
    names = resnets(tensors)
    if names is not None:
        fits = fitting(tensors) or next(iter(names), None)
        if fits is not None:
            return f"its shapes are those of a ResNet: --arch {fits}"
        return "its names are those of a ResNet without a published name: name it with --arch"
    return "name it with --arch, for example --arch xcit_small_12_p16"


def described(shape: Mapping[str, Any]) -> str:
    """ "embed_dim 96, depth 4, ..." """
    return ", ".join(f"{key} {value:g}" for key, value in shape.items())


def differences(tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    """How the tensors differ from a network's own, in half a sentence; empty where they do not."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own)
    shared = [name for name in own if name in tensors]
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in shared
        if tensors[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} {tensors[name].dtype}".replace("torch.", "")
        for name in shared
        if own[name].is_floating_point() and not tensors[name].is_floating_point()
    ]
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in (
            (missing, "missing"),
            (extra, "unknown"),
            (shapes, "of another shape"),
            (kinds, "of another type"),
        )
        if names
    )


def fitting(tensors: Mapping[str, Tensor]) -> str | None:
    """The named network that has exactly these tensors, None where none has."""
    shape, vit_like = xcit_shape(tensors), vit_shape(tensors)
    models: dict[str, nn.Module] = {}
    of_resnets = resnets(tensors) or ()
    if vit_like is not None or of_resnets:  # they take seconds, and are imported with real tensors
        import timm

        from xdino.dino_vit import network
    with torch.device("meta"):
        if shape is not None:
            name = xcit_name(shape)
            if name is not None:
                models[name] = xcit.build(name, in_chans=shape["in_chans"])
        elif vit_like is not None:
            name = dino_vit.name(*vit_like)
            models[name] = network.build(name, max(1, tensors["patch_embed.proj.weight"].shape[1]))
        for name in of_resnets:
            stem = tensors["conv1.weight"]
            channels = stem.shape[1] if stem.ndim == 4 and stem.shape[1] else 3
            models[name] = timm.create_model(name, num_classes=0, in_chans=channels)
    fits = (n for n, m in models.items() if not differences(without_heads(tensors, m), m))
    return next(fits, None)
