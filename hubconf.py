"""Entry points of torch.hub for a checkout: networks with the weights of a file.

    torch.hub.load(CHECKOUT, "xcit_small_12_p16", source="local", weights=FILE)
    torch.hub.load(CHECKOUT, "xdino", source="local", weights="runs/s12")

`xdino` takes whatever says its own architecture; the others are networks by their published names
(XCiT's, and those of DINO's hub), empty without weights. Nothing is downloaded, and nothing needs to
be installed but the dependencies.
"""

import importlib as _importlib
import sys as _sys
from functools import partial as _partial
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = ["torch", "timm", "numpy", "safetensors"]

# The folder `ssl/` itself, not the root: what must be found is `xdino` inside it. (The root, which
# torch.hub puts there, is harmless too: a folder without __init__.py gives way to the module ssl.)
_ROOM = str(_Path(__file__).resolve().parent / "ssl")
if _ROOM not in _sys.path:
    _sys.path.insert(0, _ROOM)
_xcit = _importlib.import_module("xdino.xcit")
_checkpoint = _importlib.import_module("xdino.checkpoint")
_backbones = _importlib.import_module("xdino.backbones")
_errors = _importlib.import_module("xdino.errors")

_DINO = {
    "dino_vitt16": "vit_tiny_patch16_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_resnet50": "resnet50",
    "dino_xcit_small_12_p16": "xcit_small_12_p16",
    "dino_xcit_small_12_p8": "xcit_small_12_p8",
    "dino_xcit_medium_24_p16": "xcit_medium_24_p16",
    "dino_xcit_medium_24_p8": "xcit_medium_24_p8",
}


def xdino(weights: str, arch: str | None = None, role: str = "teacher") -> _Any:
    """The frozen backbone of a run directory or a weights file, in eval mode.

    Args:
        weights: a run directory, a file of ours, or a published DINO, XCiT or timm file.
        arch: for files that do not say.
        role: "teacher" or "student", where a file holds both.
    """
    return _checkpoint.load_backbone(weights, arch, role)


def _named(
    arch: str,
    weights: str | None = None,
    role: str = "teacher",
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    in_chans: int = 3,
) -> _Any:
    """The network of this name: images `[B, in_chans, H, W]` -> `[B, embed_dim]`.

    Args:
        weights: a file or run directory of this architecture: the frozen backbone, in eval mode.
            None: a new network with its ordinary initialisation, to be trained.
        role: "teacher" or "student", where a file holds both.
        pretrained: refused, for nothing is downloaded: give `weights`.
        drop_path_rate, in_chans: of a new network.
    """
    if weights is not None:
        if drop_path_rate or in_chans != 3:
            raise _errors.UsageError(
                "drop_path_rate and in_chans are for a network without weights"
            )
        return _checkpoint.load_backbone(weights, arch, role)
    if pretrained:
        raise _errors.UsageError(f"nothing is downloaded: load {arch} with weights=FILE")
    mean, std = _backbones.statistics(in_chans)
    spec = _backbones.BackboneSpec(arch, in_chans=in_chans, mean=mean, std=std)
    return spec.build(drop_path_rate)


for _name, _arch in [*((name, name) for name in _xcit.NAMES), *_DINO.items()]:
    _entry = _partial(_named, _arch)
    _entry.__doc__ = f"{_arch}. {_named.__doc__}"
    globals()[_name] = _entry
