"""From a weights file to a network: which one it is, whether the tensors fit, the frozen backbone."""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from xdino import dino_vit, weight_names
from xdino.backbone import Backbone, Origin
from xdino.backbones import BackboneSpec, is_known, known_names, of_timm, statistics
from xdino.checkpoint.weights import WeightsFile, read_weights, sha256
from xdino.errors import RunFailed, UsageError, nearest, reason

_STEMS = ("patch_embed.proj.0.0.weight", "patch_embed.proj.weight", "conv1.weight")


def spec_of(file: WeightsFile, arch: str | None) -> BackboneSpec:
    """What to build for a file: what it says, what the caller says, or what the shapes say.

    A file of ours keeps its image size and statistics under any name for its own network.

    Raises:
        UsageError: none of them does; the message says what the tensors look like.
    """
    if arch is None and file.spec is not None:
        return file.spec
    tensors = file.tensors
    said, patch_size = file.facts.get("arch"), file.facts.get("patch_size")
    said = said if isinstance(said, str) and len(said) < 200 else None
    own = weight_names.published_name(said, tensors, patch_size) if said else None
    name = weight_names.published_name(arch, tensors) if arch else own
    if name is None:
        shape = weight_names.xcit_shape(tensors)
        name = weight_names.xcit_name(shape) if shape is not None else None
    if name is None:
        raise UsageError(
            f"{file.path} does not say its architecture, and {weight_names.advice(tensors)}"
        )
    if own == f"{name}.dino":  # the plain timm name for a file that says it is DINO's
        name = own
    if file.spec is not None:
        return _renamed(file.spec, name)
    spec = _named(name)
    stem = next((tensors[n] for n in _STEMS if n in tensors), None)
    if stem is not None and stem.ndim == 4 and stem.shape[1] not in (0, 3):
        mean, std = statistics(stem.shape[1])
        spec = dataclasses.replace(spec, in_chans=stem.shape[1], mean=mean, std=std)
    return spec


def _named(name: str) -> BackboneSpec:
    """The spec of a name; timm's XCiT names go on behind ours with image size and training's tag.

    As for all of timm's names, a tag brings the image size, crop and statistics of its training.
    """
    match = re.match(r"(xcit_\w+?_p\d+)(_(\d+))?(_dist)?(\..*)?$", name)
    if match is None:
        if not is_known(name):
            hint = nearest(name[:100], known_names())
            hint = (
                hint if hint.startswith("did you") else "XCiT's, DINO's and timm's names are known"
            )
            raise UsageError(f'no backbone is called "{name[:100]}": {hint}')
        return of_timm(name)
    side = int(match[3] or 224)
    spec = BackboneSpec(match[1], input_size=side, resize=round(side * 256 / 224))
    return dataclasses.replace(of_timm(name), arch=match[1]) if match[5] else spec


def _renamed(spec: BackboneSpec, name: str) -> BackboneSpec:
    """A file's spec under another name; its shape stays only where it is the same network's."""
    named = _named(name)
    arch = named.arch
    if dino_vit.is_name(arch) != dino_vit.is_name(spec.arch):  # other position tables and sizes
        return dataclasses.replace(named, in_chans=spec.in_chans, mean=spec.mean, std=spec.std)
    same = arch.split(".")[0] == spec.arch.split(".")[0]  # but for timm's tags, and DINO's
    return dataclasses.replace(spec, arch=arch, shape=spec.shape if same else {})


def load_into(model: nn.Module, file: WeightsFile, arch: str) -> None:
    """Load strictly; only class heads of foreign files, and of our classifiers, are left out.

    Raises:
        UsageError: the file is of another network; the message gives the first differences and
            what its shapes say it is.
        RunFailed: values that are not finite.
    """
    tensors = _fitted(model, file, arch)
    spoilt = [name for name, value in tensors.items() if not _finite(value)]
    if spoilt:
        raise RunFailed(
            f"{file.path} holds values that are not finite, in {len(spoilt)} of "
            f"{len(tensors)} tensors (first {spoilt[0]}): use an earlier checkpoint"
        )
    model.load_state_dict(tensors, strict=True)


def _fitted(model: nn.Module, file: WeightsFile, arch: str) -> dict[str, Tensor]:
    """The tensors of a file that are a network's. Raises UsageError where they do not fit it."""
    tensors = file.tensors
    if (
        file.spec is None or "task" in file.facts
    ):  # a foreign file, or ours of a network with a head
        tensors = weight_names.without_heads(tensors, model)
    problems = weight_names.differences(tensors, model)
    if not problems:
        return tensors
    if (task := file.facts.get("task")) and any(name.startswith("backbone.") for name in tensors):
        raise UsageError(
            f"{file.path} is a network for {task}, which gives pixels or boxes and no vector of an "
            "image: name the weights that it began from"
        )
    if part := file.facts.get("part"):
        raise UsageError(
            f"{file.path} holds the {part} of a network for pixels or boxes; they give no vector of "
            "an image: name the weights that it began from"
        )
    fits = weight_names.fitting(file.tensors)
    if fits is not None and fits != arch:
        advice = f"it fits {fits}: --arch {fits}"
    else:
        advice = "no published XCiT or DINO ViT has just these: incomplete, mixed or reshaped"
    raise UsageError(f"{file.path} does not fit {arch}: tensors {problems}; {advice}")


def _finite(value: Tensor) -> bool:
    small = value.is_floating_point() and value.element_size() == 1  # torch asks no float8
    return bool((value.float() if small else value).isfinite().all())


def build_for(file: WeightsFile, spec: BackboneSpec) -> Backbone:
    """A network for the tensors of a file, made without memory first to see that they fit.

    Raises:
        UsageError: no such network, or one of other tensors.
        RunFailed: what the file says of its network makes none.
    """
    counts = [spec.shape.get(key, 0) for key in ("depth", "class_attention_layers")]
    try:
        if max(counts) > len(file.tensors):
            raise ValueError("more layers than tensors")
        with torch.device("meta"):
            blueprint = spec.build()
    except UsageError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        if spec is not file.spec:  # not the file's doing
            raise UsageError(f"no network can be built as {spec.arch} ({reason(error)})") from None
        raise RunFailed(
            f"{file.path} is damaged: no {spec.arch} is as it says ({reason(error)})"
        ) from None
    _fitted(blueprint, file, spec.arch)
    return spec.build()


def load_backbone(
    path: str | Path, arch: str | BackboneSpec | None = None, role: str = "teacher"
) -> Backbone:
    """The frozen backbone of a run directory, a file of ours, or a published or timm file.

    Args:
        path: a run directory or a weights file.
        arch: for files that do not say; overrides what a file says. A published name
            ("xcit_small_12_p16", "vit_small" and "dino_vits16" for DINO's ViTs) or a timm name; a
            `BackboneSpec` for an XCiT of a shape without a name. A published DINO ViT is resampled
            to other image sizes as published, under a plain timm name as timm does it (see `dino_vit`).
        role: "teacher" or "student". Of a run directory the student is in its last checkpoint; a
            file that holds one of them refuses the other.

    Returns:
        The network in eval mode on the CPU, images `[B, in_chans, H, W]` -> `[B, embed_dim]`, with
        its `preprocessing` and its `origin`.

    Raises:
        ValueError: nothing there, no known architecture, tensors that do not fit.
        RunFailed: a damaged file, one that tries to run code, values that are not finite.
    """
    file = read_weights(path, role)
    spec = arch if isinstance(arch, BackboneSpec) else spec_of(file, arch)
    model = build_for(file, spec)
    load_into(model, file, spec.arch)
    model.origin = Origin(file.path, sha256(file.path), file.facts)
    return model.eval().requires_grad_(False)
