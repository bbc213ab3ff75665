"""What a dense run begins with: a pyramid or a whole backbone, from any weights or from scratch.

The published code loads without strictness, and so trained from scratch with a warning; here every
tensor must fit, and what is new is said in a sentence.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdino import checkpoint, weight_names
from xdino.backbone import Backbone
from xdino.backbones import BackboneSpec, of_timm, statistics
from xdino.checkpoint.weights import WeightsFile
from xdino.config.bands import Bands
from xdino.errors import UsageError, asked
from xdino.values import shown
from xdino.xcit import XCiT
from xdino_transfer import dense_files
from xdino_transfer.dense_files import LoadedDense
from xdino_transfer.dense_training.recipe import ARCH, DenseConfig, drop_path_of
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation.segmenter import LastTokens

RESHAPING = ("patch_size", "embed_dim", "depth", "num_heads", "eta", "tokens_norm")


@dataclass(frozen=True)
class Weights:
    """What `train.init` names, read: a dense network whole, or the tensors of a backbone.

    file: of the latter. spec: of the backbone, as the weights say.
    """

    spec: BackboneSpec
    dense: LoadedDense | None = None
    file: WeightsFile | None = None


def read(init: str, arch: str | None = None) -> Weights:
    """
    Raises:
        UsageError: nothing there, no known architecture, another one than `arch`.
        RunFailed: a damaged file, values that are not finite.
    """
    with asked(f"train.init {shown(init)}"):
        if dense_files.dense_task(init) is not None:
            loaded = dense_files.read_dense(init, arch)
            return Weights(loaded.spec, dense=loaded)
        file = checkpoint.read_weights(init)
        spec = checkpoint.spec_of(file, arch)
        checkpoint.build_for(file, spec)  # which says in a sentence what does not fit
        return Weights(spec, file=file)


def spec_of_weights(config: DenseConfig, weights: Weights) -> BackboneSpec:
    """
    Raises:
        UsageError: weights of a shape, and a recipe that gives another.
    """
    spec, m = weights.spec, config.model
    other = [name for name, value in _shape(config).items() if spec.shape.get(name) != value]
    if other:
        raise UsageError(
            f"model.{other[0]} reshapes a network from scratch, and train.init has its own: "
            "leave it out"
        )
    if m.in_chans not in (None, spec.in_chans):
        raise UsageError(
            f"model.in_chans is {m.in_chans}, and the weights of train.init take {spec.in_chans}"
        )
    return spec


def spec_from_scratch(config: DenseConfig, channels: int) -> BackboneSpec:
    """channels: of the images, as sources read them."""
    spec = dataclasses.replace(of_timm(config.model.arch or ARCH), shape=_shape(config))
    if channels == spec.in_chans and not isinstance(channels, Bands):
        return spec
    mean, std = (spec.mean, spec.std) if channels == 3 else statistics(channels)
    bands = channels if isinstance(channels, Bands) else None
    return dataclasses.replace(spec, in_chans=int(channels), mean=mean, std=std, bands=bands)


def _shape(config: DenseConfig) -> dict[str, Any]:
    m = config.model
    return {name: value for name in RESHAPING if (value := getattr(m, name)) is not None}


def drop_path(config: DenseConfig, spec: BackboneSpec) -> float:
    given = config.model.drop_path
    return drop_path_of(spec.arch) if given is None else float(given)


def whole_backbone(config: DenseConfig, spec: BackboneSpec, weights: Weights | None) -> Backbone:
    """A backbone with its class attention, frozen and in evaluation mode.

    Raises:
        UsageError: weights that have none.
    """
    backbone = spec.build()
    if weights is not None and weights.dense is not None:
        inner = weights.dense.network.backbone
        if not isinstance(inner, LastTokens):
            raise UsageError(
                f"{weights.dense.origin.path} holds a pyramid, and a linear map reads a whole backbone: "
                "start from the weights that it was made of"
            )
        backbone.load_state_dict(inner.network.state_dict())
    elif weights is not None:
        assert weights.file is not None
        checkpoint.load_into(backbone, weights.file, spec.arch)
    return backbone.eval().requires_grad_(False)


def pyramid(config: DenseConfig, spec: BackboneSpec, weights: Weights | None) -> Pyramid:
    """Four levels on the blocks of an XCiT, as `model.norm`, `model.frozen` and `runtime` say.

    Raises:
        UsageError: no XCiT of patch 16 or 8.
    """
    backbone = spec.build(drop_path(config, spec))
    if not isinstance(backbone, XCiT):
        raise UsageError(
            f"{spec.arch} is no XCiT, which the four levels of a pyramid are made of: take one, "
            "or a linear map (xdino segment with --model.frozen true)"
        )
    if weights is not None and weights.file is not None:
        checkpoint.load_into(backbone, weights.file, spec.arch)
    levels = Pyramid(backbone)
    if weights is not None and weights.dense is not None:
        inner = weights.dense.network.backbone
        if isinstance(inner, LastTokens):
            backbone.load_state_dict(inner.network.state_dict())
        else:
            assert isinstance(inner, Pyramid)
            levels = Pyramid(backbone, inner.after)
            levels.load_state_dict(inner.state_dict())
    if config.model.norm == "frozen":
        levels.rest_statistics()
    if config.model.frozen:
        levels.freeze_trunk()
    elif config.runtime.activation_checkpointing:
        levels.set_grad_checkpointing()
    return levels


def take_head(network: Any, weights: Weights | None, classes: Sequence[str]) -> list[str]:
    """All of a dense network's weights where it is for the same classes; sentences where it is not."""
    if weights is None or weights.dense is None:
        return []
    theirs = weights.dense
    path = theirs.origin.path
    if theirs.task != dense_files.task_of(network):
        return [f"{path} is for {theirs.task}: its levels are taken over, and the head is new"]
    tensors = theirs.network.state_dict()
    if weight_names.differences(tensors, network):
        return [f"the head of {path} is of another kind or size: a new one is trained"]
    if theirs.named and theirs.classes != tuple(classes):
        return [f"the head of {path} is for other classes: a new one is trained"]
    network.load_state_dict(tensors)
    return []


def facts(init: str | None) -> dict[str, Any]:
    """What the run started from, with its hash, for environment.json and results."""
    if init is None:
        return {"init": None, "init_sha256": None}
    path = Path(init).expanduser()
    model = path / dense_files.MODEL_FILE
    dense = dense_files.dense_task(init) is not None and model.is_file()
    file = model if dense else checkpoint.weights_path(path)
    return {"init": str(file), "init_sha256": checkpoint.sha256(file)}
