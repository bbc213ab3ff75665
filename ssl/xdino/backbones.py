"""Backbones by name: XCiT by default, anything that timm can build besides.

A backbone maps images `[B, C, H, W]` to one vector `[B, D]` and says `embed_dim`. `BackboneSpec` is
all that is needed to build it again, and travels with its weights.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from xdino import dino_vit, xcit
from xdino.errors import UsageError, nearest, reason

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# One channel: the luma-weighted sum of ImageNet's means, the average of its standard deviations.
LUMA_MEAN, LUMA_STD = (0.459,), (0.226,)


def statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation for a number of channels (values in 0..1)."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return LUMA_MEAN * channels, LUMA_STD * channels


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is and how its images are prepared for evaluation.

    Args:
        arch: "xcit_small_12_p16" and the like, "vit_small_patch16_224.dino" and the like (DINO's
            ViTs, see `dino_vit`), or a timm name.
        shape: arguments of XCiT that differ from what the name says.
        input_size, resize: evaluation crop and the shorter side before it, in pixels.
        mean, std: one entry a channel, for images in 0..1.
    """

    arch: str
    in_chans: int = 3
    shape: dict[str, Any] = field(default_factory=dict)
    input_size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.in_chans:
                raise UsageError(
                    f"{name} needs one value a channel: {self.in_chans}, got {getattr(self, name)}"
                )

    def build(self, drop_path: float = 0.0) -> nn.Module:
        """The network with its ordinary initialisation, carrying `input_size`, `mean` and the rest."""
        if self.arch.startswith("xcit_"):
            model: nn.Module = xcit.build(
                self.arch, in_chans=self.in_chans, drop_path_rate=drop_path, **self.shape
            )
        elif not (dino_vit.is_name(self.arch) or timm.is_model(self.arch)):
            choices = [*xcit.NAMES, *timm.list_models()]
            raise UsageError(f'no backbone is called "{self.arch}": {nearest(self.arch, choices)}')
        elif self.shape:
            raise UsageError(
                f"model.{next(iter(self.shape))} reshapes an XCiT only, and {self.arch} is none"
            )
        elif dino_vit.is_name(self.arch):
            model = dino_vit.build(self.arch, self.in_chans, drop_path)
        else:
            model = _build_timm(self.arch, self.in_chans, self.input_size, drop_path)
        for name in ("in_chans", "input_size", "resize", "mean", "std"):
            setattr(model, name, getattr(self, name))
        return model

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "BackboneSpec":
        return cls(**{**tree, "mean": tuple(tree["mean"]), "std": tuple(tree["std"])})


def compile_backbone(backbone: nn.Module) -> None:
    """torch.compile in place: parameters keep their names, and work begins with the first batch.

    An XCiT is compiled part by part, so that its blocks share one compilation a crop size.
    """
    parts: list[nn.Module] = [backbone]
    if isinstance(backbone, xcit.XCiT):
        parts = [backbone.patch_embed, *backbone.blocks, *backbone.cls_attn_blocks]
    for part in parts:
        part.compile(dynamic=False)


def of_timm(arch: str) -> BackboneSpec:
    """The spec of a timm network, or of a DINO ViT, as it is evaluated.

    A name with one of timm's tags ("vit_base_patch16_224.augreg_in21k") brings the tag's image size,
    crop and statistics; one without keeps ImageNet's, and the size that the network is made for.
    """
    if dino_vit.is_name(arch):
        side = dino_vit.side(arch)
        return BackboneSpec(arch, input_size=side, resize=round(side * 256 / 224))
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


def _build_timm(arch: str, in_chans: int, input_size: int, drop_path: float) -> nn.Module:
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
            model = timm.create_model(arch, **common, **extra)
        except TypeError:
            continue
        except (RuntimeError, ValueError, AssertionError, LookupError, ArithmeticError) as error:
            raise UsageError(
                f"timm cannot build {arch} with {in_chans} channels for {input_size} pixels: "
                f"{reason(error)}"
            ) from error
        # Some networks widen their features on the way to the head that is left out here.
        model.embed_dim = getattr(model, "head_hidden_size", None) or model.num_features
        return model
    raise UsageError(f"timm cannot build {arch} with {in_chans} channels")
