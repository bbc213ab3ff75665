"""Weights and whole states on disk, in and out. No code from a file ever runs.

Files appear whole or not at all: written beside their name, flushed to the disk, renamed. A run's
state is `torch.save` of plain types and tensors; a backbone is safetensors under the published XCiT
names (or timm's, for timm networks) with a `BackboneSpec` in its header.

Reads besides: published DINO checkpoints (student and teacher), published backbone-only and XCiT
classification files, timm weights.
"""

import argparse
import hashlib
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from xdino import xcit
from xdino.backbones import BackboneSpec, statistics
from xdino.errors import RunFailed, UsageError
from xdino.files import written_beside

BACKBONE_FILE = "backbone.safetensors"
STATE_FILE = Path("checkpoints") / "last.pt"
HEADER_KEY = "xdino"  # of the safetensors metadata


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the state of a run -----------------------------------------------------------------------


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's whole state: tensors and plain types only."""
    with written_beside(path) as beside:
        torch.save(state, beside)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        RunFailed: the file is damaged or is something else.
    """
    state = _load_pickle(path)
    if not isinstance(state, dict) or "learner" not in state:
        raise RunFailed(f"{path} is not the state of a run")
    return state


def _load_pickle(path: Path) -> Any:
    # Published files hold an argparse.Namespace and numpy scalars; nothing else is let through.
    plain = [argparse.Namespace, np.dtype, *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8"))]
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    # Files written with numpy 1 name the module without the underscore.
    allowed: list[Any] = [*plain, scalar, (scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise RunFailed(
                f"{path} asks for {unsafe[1]}, which weights have no need of: refused, nothing of it ran"
            ) from None
        raise RunFailed(f"{path} is damaged or not a checkpoint") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise RunFailed(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None


# --- backbones --------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a backbone under the names of its own network, and what the file says of them."""

    path: Path
    tensors: dict[str, Tensor]
    spec: BackboneSpec | None
    facts: dict[str, Any]  # iteration, role and so on, where known


def save_backbone(path: Path, model: nn.Module, spec: BackboneSpec, **facts: Any) -> None:
    """Write a backbone to safetensors. Equal weights and facts give equal bytes."""
    header = json.dumps({"spec": spec.to_dict(), "facts": facts}, sort_keys=True)
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    with written_beside(path) as beside:
        safetensors.torch.save_file(tensors, beside, metadata={HEADER_KEY: header})


def weights_path(path: str | Path) -> Path:
    """The file behind WEIGHTS: itself, or a run directory's backbone.

    Raises:
        UsageError: nothing there.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / BACKBONE_FILE).is_file():
            raise UsageError(
                f"{path} holds no {BACKBONE_FILE}: not a run directory, or no step yet"
            )
        return path / BACKBONE_FILE
    if not path.is_file():
        raise UsageError(f"there is no weights file or run directory {path}")
    return path


def read_weights(path: str | Path, role: str = "teacher") -> WeightsFile:
    """Read any weights file this project knows.

    Args:
        role: "teacher" or "student", where a file holds both.

    Raises:
        UsageError, RunFailed: nothing there; damaged; no weights inside.
    """
    path = weights_path(path)
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise RunFailed(f"{path} is damaged or not a safetensors file ({error})") from None
        spec = BackboneSpec.from_dict(header["spec"]) if header else None
        return WeightsFile(path, _plain_names(tensors), spec, header.get("facts", {}))
    tree = _load_pickle(path)
    facts: dict[str, Any] = {}
    spec = None
    if isinstance(tree, dict) and "learner" in tree:  # a run's own state
        spec = BackboneSpec.from_dict(tree["spec"])
        facts = {"role": role, "iteration": tree["iteration"]}
        tree = tree["learner"]
    if isinstance(tree, dict):
        args = tree.get("args")
        arch = getattr(args, "arch", None)
        if arch is not None:
            facts["arch"], facts["patch_size"] = arch, getattr(args, "patch_size", None)
        for key in (role, "model", "state_dict"):
            if isinstance(tree.get(key), dict):
                facts.setdefault("role", key)
                tree = tree[key]
                break
    if not (isinstance(tree, dict) and tree and all(isinstance(v, Tensor) for v in tree.values())):
        raise RunFailed(f"{path} holds no weights of a {role}, a model or a state_dict")
    return WeightsFile(path, _plain_names(tree), spec, facts)


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wrappers' prefixes off (as prefixes only), heads out, timm's XCiT names made published ones."""
    names: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for prefix in ("module.", "backbone."):
            name = name.removeprefix(prefix)
        # Projection heads, and the class heads of XCiT, ViT ("head") and ResNet ("fc").
        if not name.startswith(("head.", "head_dist.", "fc.")):
            names[name] = value
    if "pos_embed.token_projection.weight" in names:
        names = {_from_timm(name): value for name, value in names.items()}
        for name in [n for n in names if re.fullmatch(r"cls_attn_blocks\.\d+\.attn\.q\.\w+", n)]:
            stem, leaf = name.rsplit(".q.", 1)
            parts = [names.pop(f"{stem}.{letter}.{leaf}") for letter in "qkv"]
            names[f"{stem}.qkv.{leaf}"] = torch.cat(parts)
    return names


def _from_timm(name: str) -> str:
    return name.replace("pos_embed.token_projection", "pos_embeder.token_projection")


def to_timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published XCiT names -> timm's, with the fused query, key and value of class attention apart."""
    names: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", name):
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                names[name.replace(".qkv.", f".{letter}.")] = piece
        else:
            names[name.replace("pos_embeder.", "pos_embed.")] = value
    return names


def _spec_of(file: WeightsFile, arch: str | None) -> BackboneSpec:
    """What to build for a file: what it says, what the caller says, or what the shapes say."""
    if arch is None and file.spec is not None:
        return file.spec
    name = arch or _published_arch(file.facts) or _xcit_of(file.tensors)
    if name is None:
        raise UsageError(
            f"{file.path} does not say its architecture: name it with --arch, "
            "for example --arch xcit_small_12_p16"
        )
    # timm's XCiT names go on behind ours with the image size and the training's tag.
    match = re.match(r"(xcit_\w+?_p\d+)(_\d+)?(_dist)?(\..*)?$", name)
    spec = BackboneSpec(match[1] if match else name)
    stem = file.tensors.get("patch_embed.proj.0.0.weight")
    if stem is not None and stem.shape[1] != 3:
        mean, std = statistics(stem.shape[1])
        spec = BackboneSpec(spec.arch, in_chans=stem.shape[1], mean=mean, std=std)
    return spec


def _published_arch(facts: dict[str, Any]) -> str | None:
    """The published trainer's `arch` and `patch_size` arguments as a name of ours or timm's."""
    arch, patch = facts.get("arch"), facts.get("patch_size")
    if not isinstance(arch, str):
        return None
    match = re.fullmatch(r"(?:vit|deit)_(tiny|small|base)", arch)
    return f"vit_{match[1]}_patch{patch}_224" if match else arch


def _xcit_of(tensors: dict[str, Tensor]) -> str | None:
    """The published XCiT whose shapes these are, if any. eta does not matter once trained."""
    token, temperature = tensors.get("cls_token"), tensors.get("blocks.0.attn.temperature")
    if token is None or temperature is None:
        return None
    stem = len([n for n in tensors if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", n)])
    depth = len([n for n in tensors if re.fullmatch(r"blocks\.\d+\.attn\.temperature", n)])
    for size, variant in xcit.VARIANTS.items():
        if (variant.embed_dim, variant.depth, variant.num_heads) == (
            token.shape[-1],
            depth,
            temperature.shape[0],
        ):
            return f"xcit_{size}_p{2**stem}"
    return None


def load_into(model: nn.Module, file: WeightsFile, arch: str) -> None:
    """Load strictly, with a sentence about the first differences where the file is of another network."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - file.tensors.keys()), sorted(file.tensors.keys() - own)
    shapes = [
        f"{name} {list(file.tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in file.tensors and file.tensors[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (extra, "unknown"), (shapes, "of another shape"))
        if names
    ]
    if problems:
        raise UsageError(f"{file.path} does not fit {arch}: tensors {'; '.join(problems)}")
    model.load_state_dict(file.tensors, strict=True)


def load_backbone(path: str | Path, arch: str | None = None, role: str = "teacher") -> nn.Module:
    """The frozen backbone of a run directory, a file of ours, or a published or timm file.

    Args:
        path: a run directory or a weights file.
        arch: for files that do not say; overrides what a file says.
        role: "teacher" or "student", where a file holds both.

    Returns:
        The network in eval mode on the CPU, images `[B, in_chans, H, W]` -> `[B, embed_dim]`, with
        `input_size`, `resize`, `mean`, `std`, `in_chans`, and `weights` (path, sha256, facts).

    Raises:
        ValueError: nothing there, no known architecture, tensors that do not fit.
        RunFailed: a damaged file, or one that tries to run code.
    """
    file = read_weights(path, role)
    spec = _spec_of(file, arch)
    model = spec.build()
    load_into(model, file, spec.arch)
    model.spec = spec  # type: ignore[assignment]
    model.weights = {  # type: ignore[assignment]
        "path": str(file.path),
        "sha256": sha256(file.path),
        **file.facts,
    }
    return model.eval().requires_grad_(False)
