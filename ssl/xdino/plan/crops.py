"""The crops of a configuration, as `augment` takes them."""

import dataclasses
from typing import Any

from xdino import augment
from xdino.backbones import BackboneSpec
from xdino.config import Config, Crops


def photometric_of(crops: Crops) -> dict[str, Any]:
    """The part of the crops' configuration that `augment.MultiCrop` takes by the same names."""
    known = {field.name for field in dataclasses.fields(augment.MultiCrop)} - {"mean", "std"}
    return {name: value for name, value in vars(crops).items() if name in known}


def crops_of(config: Config, spec: BackboneSpec) -> augment.MultiCrop:
    """The table of crops that `crops` describes."""
    c = config.crops
    return augment.multi_crop(
        c.global_size,
        c.global_scale,
        c.local_count,
        c.local_size,
        c.local_scale,
        c.global_blur,
        c.global_solarize,
        c.local_blur,
        **photometric_of(c),
        mean=spec.mean,
        std=spec.std,
        rgb=None if spec.bands is None else spec.bands.rgb,
    )
