"""Backbones by name: XCiT by default, DINO's ViTs, anything that timm can build besides.

timm is imported where it is needed (`_timm`): it takes seconds, and an XCiT needs none of it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdino import dino_vit, xcit
from xdino.backbone import Backbone, Spec
from xdino.backbone import statistics as statistics
from xdino.errors import UsageError, nearest, reason


@dataclass(frozen=True)
class BackboneSpec(Spec):
    """A `Spec` that builds its network."""

    def build(self, drop_path: float = 0.0) -> Backbone:
        """The network with its ordinary initialisation."""
        backbone: Backbone
        if self.arch.startswith("xcit_"):
            backbone = xcit.build(
                self.arch, in_chans=self.in_chans, drop_path_rate=drop_path, **self.shape
            )
        elif not is_known(self.arch):
            hint = nearest(self.arch, known_names())
            raise UsageError(f'no backbone is called "{self.arch}": {hint}')
        elif self.shape:
            raise UsageError(
                f"model.{next(iter(self.shape))} reshapes an XCiT only, and {self.arch} is none"
            )
        else:
            backbone = _build_timm(self.arch, self.in_chans, self.input_size, drop_path)
        backbone.spec = self
        return backbone


def is_known(arch: str) -> bool:
    """Whether timm has a network of this name, or it is one of DINO's ViTs."""
    return dino_vit.is_name(arch) or bool(_timm().is_model(arch))


def known_names() -> list[str]:
    """Of XCiTs and of timm's networks."""
    return [*xcit.NAMES, *_timm().list_models()]


def _timm() -> Any:
    """timm, imported as on the CPU even where a network is being built without memory."""
    with torch.device("cpu"):
        import timm

        from xdino import timm_backbone  # noqa: F401
        from xdino.dino_vit import network  # noqa: F401
    return timm


def compile_backbone(backbone: Backbone) -> None:
    """torch.compile in place: parameters keep their names, and work begins with the first batch."""
    for part in backbone.parts_to_compile():
        part.compile(dynamic=False)


def of_timm(arch: str) -> BackboneSpec:
    """The spec of a timm network, or of a DINO ViT, as it is evaluated.

    A name with one of timm's tags ("vit_base_patch16_224.augreg_in21k") brings the tag's image size,
    crop and statistics; one without keeps ImageNet's, and the size that the network is made for.
    """
    if dino_vit.is_name(arch):
        side = dino_vit.side(arch)
        return BackboneSpec(arch, input_size=side, resize=round(side * 256 / 224))
    if arch in xcit.NAMES:  # none of which is timm's
        return BackboneSpec(arch)
    timm = _timm()
    if not timm.is_model(arch):
        return BackboneSpec(arch)  # `build` names the nearest
    try:
        config = timm.models.get_pretrained_cfg(arch)
    except RuntimeError:
        base = arch.split(".")[0]
        tags = timm.list_models(f"{base}.*", pretrained=True)
        raise UsageError(f'timm has no weights called "{arch}": {nearest(arch, tags)}') from None
    if config is None:  # a network that timm has no weights for
        return BackboneSpec(arch)
    side = config.input_size[-1] if "." in arch or config.fixed_input_size else 224
    spec = BackboneSpec(arch, input_size=side, resize=round(side * 256 / 224))
    if "." not in arch:
        return spec
    resize = round(side / config.crop_pct)
    return dataclasses.replace(spec, resize=resize, mean=config.mean, std=config.std)


def _build_timm(arch: str, in_chans: int, input_size: int, drop_path: float) -> Backbone:
    _timm()
    from xdino.dino_vit import network
    from xdino.timm_backbone import TimmBackbone

    if dino_vit.is_name(arch):
        return TimmBackbone(network.build(arch, in_chans, drop_path))
    return TimmBackbone(_timm_network(arch, in_chans, input_size, drop_path))


def _timm_network(arch: str, in_chans: int, input_size: int, drop_path: float) -> nn.Module:
    timm = _timm()
    common = {"pretrained": False, "num_classes": 0, "in_chans": in_chans}
    # Vision transformers take crops of several sizes only when told so, and other networks refuse
    # to be told; timm raises TypeError for an argument that a network does not have.
    attempts: tuple[dict[str, Any], ...] = (
        {"img_size": input_size, "dynamic_img_size": True, "drop_path_rate": drop_path},
        {"img_size": input_size, "drop_path_rate": drop_path},
        {"drop_path_rate": drop_path},
        {},
    )
    for extra in attempts:
        try:
            built: nn.Module = timm.create_model(arch, **common, **extra)
            return built
        except TypeError:
            continue
        except (RuntimeError, ValueError, AssertionError, LookupError, ArithmeticError) as error:
            raise UsageError(
                f"timm cannot build {arch} with {in_chans} channels for {input_size} pixels: "
                f"{reason(error)}"
            ) from error
    raise UsageError(f"timm cannot build {arch} with {in_chans} channels")
