"""A backbone as a file for others: published names, timm's names, or ONNX.

Every file says what it holds, in strings that any reader of the format shows (`card`): architecture,
patch size, statistics of the images, training data, commit, iteration. A safetensors file also
carries the `BackboneSpec`, so that xdino reads it back without being told anything.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from xdino import checkpoint, weight_names, xcit
from xdino.backbone import Backbone, Spec
from xdino.errors import RunFailed, UsageError
from xdino.run_directory import commit
from xdino_launch.export import to_onnx

SUFFIXES = {"published": ".safetensors", "timm": ".safetensors", "onnx": ".onnx"}
UNKNOWN = "not recorded"
TIMM_TOLERANCE = 1e-5  # relative; timm may fuse what the published code spells out


def export_backbone(
    weights: str,
    path: Path,
    format: str,
    arch: str | None = None,
    role: str = "teacher",
    say: Callable[[str], None] = lambda sentence: None,
) -> Path:
    """Write one backbone to `path`, checked before it gets its name.

    Args:
        weights: whatever `load_backbone` reads.
        format: "published" or "timm" (safetensors), or "onnx".
        say: told what was checked, a sentence at a time.

    Raises:
        UsageError: as `load_backbone`; a suffix of another format; what timm cannot build; the onnx
            packages are not there.
        RunFailed: the file cannot be written, or computes something else than the backbone.
    """
    if path.suffix != SUFFIXES[format]:
        raise UsageError(f"--format {format} writes {SUFFIXES[format]} files, got --out {path}")
    if format == "onnx":
        to_onnx.require()
    backbone = checkpoint.load_backbone(weights, arch, role)
    spec, origin = backbone.spec, backbone.origin
    facts = {**origin.facts, "exported_from": origin.sha256}
    about = card(backbone, facts, origin.path)
    try:
        if format == "onnx":
            to_onnx.write(backbone, spec, path, about, say)
            return path
        tensors = backbone.state_dict()
        if format == "timm":
            tensors, recipe = timm_weights(backbone, spec, say)
            about |= recipe
        checkpoint.save_tensors(path, tensors, spec, facts, about)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error}") from None
    return path


def card(backbone: Backbone, facts: dict[str, Any], source: Path) -> dict[str, str]:
    """What a file says of itself, each a string.

    `commit` is of the code that trained, from the run directory that `source` lies in;
    `exported_by_commit` of this code.
    """
    spec = backbone.spec
    iteration = facts.get("iteration")
    epoch = facts.get("epoch")
    said = {
        "architecture": spec.arch,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "in_chans": spec.in_chans,
        "shape": json.dumps(spec.shape, sort_keys=True),
        "input_size": spec.input_size,
        "resize": spec.resize,
        "mean": ", ".join(f"{value:g}" for value in spec.mean),
        "std": ", ".join(f"{value:g}" for value in spec.std),
        "role": facts.get("role", UNKNOWN),
        "training_data": facts.get("data", UNKNOWN),
        "iteration": f"epoch {epoch}" if iteration is None and epoch is not None else iteration,
        "commit": training_commit(source, iteration),
        "exported_by_commit": commit(),
        "exported_from_sha256": facts["exported_from"],
    }
    told = {key: UNKNOWN if value is None else str(value) for key, value in said.items()}
    # Paths of other encodings: what cannot be UTF-8 is spelled out.
    return {key: text.encode("utf-8", "backslashreplace").decode() for key, text in told.items()}


def training_commit(source: Path, iteration: int | None) -> str | None:
    """The commit in the environment.json of a run whose weights these are, at their iteration."""
    for folder in (source.parent, source.parent.parent):
        try:
            starts = json.loads((folder / "environment.json").read_text())["starts"]
            found = [s for s in starts if iteration is None or s["iteration"] <= iteration]
            return str(found[-1]["commit"]) if found else None
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
    return None


def timm_weights(
    backbone: Backbone, spec: Spec, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under timm's names, and how `timm.create_model` builds the network they load into.

    It is built here, loaded strictly and compared on one batch.

    Raises:
        UsageError: an XCiT of a patch that timm's has not.
        RunFailed: timm's network gives other features.
    """
    name, options = timm_recipe(spec)
    theirs = timm.create_model(name, **options).eval()
    state: dict[str, Tensor] = backbone.state_dict()
    tensors = weight_names.to_timm_names(state) if isinstance(backbone, xcit.XCiT) else state
    theirs.load_state_dict(tensors, strict=True)
    size = spec.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, spec.in_chans, size, size, generator=generator)
    with torch.no_grad():
        ours = backbone(images)
        error = ((theirs(images) - ours).abs().max() / ours.abs().max()).item()
    if not error <= TIMM_TOLERANCE:
        raise RunFailed(f"timm {timm.__version__}'s {name} gives other features ({error:.1e})")
    arguments = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in options.items())])
    say(f"timm.create_model({arguments}) gives the same features, to {error:.1e} of the largest")
    return tensors, {"timm": f"timm.create_model({arguments})", "timm_version": timm.__version__}


def timm_recipe(spec: Spec) -> tuple[str, dict[str, Any]]:
    """Name and options for `timm.create_model` of the network behind a spec, without a class head."""
    options: dict[str, Any] = {"num_classes": 0}
    if spec.in_chans != 3:
        options["in_chans"] = spec.in_chans
    if not spec.arch.startswith("xcit_"):
        name = spec.arch.removesuffix(".dino")
        if not timm.is_model(name):
            raise UsageError(f"timm has no {name}: export it as published or onnx")
        if name != spec.arch or timm.models.get_pretrained_cfg(name).fixed_input_size:
            options["img_size"] = spec.input_size
        return name, options
    shape = dict(spec.shape)
    patch = shape.pop("patch_size", xcit.arguments(spec.arch)["patch_size"])
    name = re.sub(r"_p\d+$", f"_p{patch}_224", spec.arch)
    if not timm.is_model(name):
        raise UsageError(
            f"timm's XCiT has patch sizes 8 and 16, not {patch}: export it as published or onnx"
        )
    if "class_attention_layers" in shape:
        shape["cls_attn_layers"] = shape.pop("class_attention_layers")
    return name, {**options, **shape}
