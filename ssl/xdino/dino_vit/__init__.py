"""DINO's own vision transformers (Caron et al., 2021, arXiv 2104.14294): their names.

They are timm's with its tag for these weights: "vit_small_patch16_224.dino". The networks lie apart
(`network`), because timm, which those are made of, takes seconds to import.
"""

import re

# embed_dim and num_heads of the published vision_transformer.py; depth is 12 throughout.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_NAME = re.compile(r"vit_(tiny|small|base)_patch([1-9]\d*)_([1-9]\d*)\.dino")


def is_name(arch: str) -> bool:
    """Whether `arch` names one of these networks: "vit_small_patch16_224.dino"."""
    return _NAME.fullmatch(arch) is not None


def name(size: str, patch_size: int, side: int = 224) -> str:
    """The name of a published size ("tiny", "small", "base") whose table is for `side` pixels."""
    return f"vit_{size}_patch{patch_size}_{side}.dino"


def parts(arch: str) -> tuple[str, int, int]:
    """What `name` was given: ("small", 16, 224)."""
    match = _NAME.fullmatch(arch)
    assert match, arch
    return match[1], int(match[2]), int(match[3])


def side(arch: str) -> int:
    """Pixels that the position table of a name is for: 224."""
    return parts(arch)[2]
