"""Class attention: maps, figures of them, and how well they cut out objects."""

from xdino_eval.attention.maps import (
    MASS,
    Maps,
    class_attention_maps,
    mask,
    mass_threshold,
    network_input,
    patch_of_pixel,
)

__all__ = [
    "MASS",
    "Maps",
    "class_attention_maps",
    "mask",
    "mass_threshold",
    "network_input",
    "patch_of_pixel",
]
