"""The published XCiTs by their names."""

from dataclasses import dataclass
from typing import Any

from xdino.errors import UsageError, nearest
from xdino.xcit.model import XCiT


@dataclass(frozen=True)
class Variant:
    """One row of the paper's table of models (table 1; eta and tokens_norm from the released code)."""

    embed_dim: int
    depth: int
    num_heads: int
    eta: float
    tokens_norm: bool


VARIANTS = {
    "nano_12": Variant(128, 12, 4, 1.0, False),
    "tiny_12": Variant(192, 12, 4, 1.0, True),
    "small_12": Variant(384, 12, 8, 1.0, True),
    "tiny_24": Variant(192, 24, 4, 1e-5, True),
    "small_24": Variant(384, 24, 8, 1e-5, True),
    "medium_24": Variant(512, 24, 8, 1e-5, True),
    "large_24": Variant(768, 24, 16, 1e-5, True),
}
NAMES = tuple(f"xcit_{size}_p{patch}" for size in VARIANTS for patch in (16, 8, 4))


def arguments(name: str) -> dict[str, Any]:
    """The constructor arguments behind a name such as "xcit_small_12_p16"."""
    if name not in NAMES:
        raise UsageError(f'no XCiT is called "{name}": {nearest(name, NAMES)}')
    size, patch = name.removeprefix("xcit_").rsplit("_p", 1)
    return {"patch_size": int(patch), **vars(VARIANTS[size])}


def build(name: str, **overrides: Any) -> XCiT:
    """An XCiT by its published name, "xcit_small_12_p16"; any constructor argument overrides.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    return XCiT(**{**arguments(name), **overrides})
