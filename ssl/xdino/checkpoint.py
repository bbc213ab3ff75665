"""Weights and whole states on disk, in and out. No code from a file ever runs.

Files appear whole or not at all: written beside their name, flushed to the disk, renamed. A run's
state is `torch.save` of plain types and tensors; a backbone is safetensors under the published XCiT
names (or timm's, for timm networks) with a `BackboneSpec` in its header.

Reads besides: published DINO checkpoints (student and teacher; XCiT, DINO's ViTs, ResNet-50),
published backbone-only and XCiT classification files, timm weights. `architectures` knows the names.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from xdino import architectures
from xdino.architectures import to_timm_names as to_timm_names  # part of this room's interface
from xdino.backbones import BackboneSpec, of_timm, statistics
from xdino.errors import RunFailed, UsageError, world
from xdino.files import written_beside

BACKBONE_FILE = "backbone.safetensors"
STATE_FILE = Path("checkpoints") / "last.pt"
HEADER_KEY = "xdino"  # of the safetensors metadata


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the state of a run -----------------------------------------------------------------------

# A state ends with its own checksum, as the comment of the zip file that torch writes: one file that
# is right or not, wherever it is moved, and that torch reads like any other.
_SEAL = b"sha256 "
_SEAL_SIZE = len(_SEAL) + 64
_ZIP_END = b"PK\x05\x06"  # of a zip's last record: 22 bytes where it has no comment


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's whole state: tensors and plain types only.

    Raises:
        RunFailed: it cannot be written; what `path` held is untouched.
    """
    with written_beside(path) as beside:
        torch.save(state, beside)
        _seal(beside)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        RunFailed: the file is damaged, be it by one byte, cannot be read, or is something else.
    """
    check_state(path)
    state = _load_pickle(path)
    wanted = {"iteration": int, "learner": dict, "rng": list, "sampler": dict, "spec": dict}
    if not isinstance(state, dict) or not isinstance(state.get("learner"), dict):
        raise RunFailed(f"{path} is not the state of a run")
    for key, kind in wanted.items():
        if not isinstance(state.get(key), kind):
            raise RunFailed(f"{path} is the state of a run, but lacks its {key}")
    return state


def _seal(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment
        file.write(struct.pack("<H", _SEAL_SIZE))
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_SEAL + digest.encode())


def check_state(path: Path) -> None:
    """Compare a state with its own checksum. States from before there were any have none.

    Raises:
        RunFailed: the file is damaged, or cannot be read.
    """
    with world(f"read {path}"), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _SEAL_SIZE, 0))
        tail = file.read()
        if tail[-22:-18] == _ZIP_END and tail[-2:] == b"\0\0":
            return
        digest = hashlib.sha256()
        file.seek(0)
        left = size - _SEAL_SIZE
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    if tail != _SEAL + digest.hexdigest().encode():
        raise RunFailed(f"{path} is damaged: its checksum is not that of its content")


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise RunFailed(
                f"{path} asks for {unsafe[1]}, which weights have no need of: refused, nothing of it ran"
            ) from None
        raise RunFailed(f"{path} is damaged or not a checkpoint") from None
    except _DAMAGE as error:
        raise RunFailed(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None


# What torch.load raises over bytes that are no checkpoint, or only the first half of one.
_DAMAGE = (
    RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError,
    OverflowError, MemoryError, struct.error, OSError,
)  # fmt: skip


def _plain_types() -> list[Any]:
    """What published files hold besides tensors and Python's own types; nothing else is let through.

    An argparse.Namespace of the trainer's arguments, numpy scalars in it and among the epochs, and
    the output folder, a path where the run was submitted by submitit. Such a path is read as a pure
    one, which cannot touch a file.
    """
    dtypes = [type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")]
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    pure = pathlib.PurePosixPath
    return [
        argparse.Namespace,
        np.dtype,
        *dtypes,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 calls the module
        (pure, "pathlib.PosixPath"),
        (pure, "pathlib._local.PosixPath"),  # as Python 3.13 does
    ]


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
    save_tensors(path, model.state_dict(), spec, facts)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    facts: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to safetensors with what `read_weights` needs, and `metadata` for other readers."""
    header = json.dumps({"spec": spec.to_dict(), "facts": dict(facts)}, sort_keys=True)
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with written_beside(path) as beside:
        safetensors.torch.save_file(own, beside, metadata={**(metadata or {}), HEADER_KEY: header})


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
    try:
        return (
            _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, role)
        )
    except RunFailed as error:
        raise RunFailed(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
        spec = BackboneSpec.from_dict(header["spec"]) if header else None
        facts = dict(header.get("facts", {}))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise RunFailed(f"{path} is damaged or not a safetensors file ({error})") from None
    if not tensors:
        raise RunFailed(f"{path} holds no weights")
    return WeightsFile(path, architectures.plain_names(tensors), spec, facts)


def _read_pickle(path: Path, role: str) -> WeightsFile:
    tree = _load_pickle(path)
    facts: dict[str, Any] = {}
    spec = None
    if isinstance(tree, dict) and "learner" in tree:  # a run's own state
        spec = BackboneSpec.from_dict(tree["spec"])
        facts = {"role": role, "iteration": tree["iteration"]}
        tree = tree["learner"]
    if isinstance(tree, dict):
        facts |= _published_facts(tree)
        for key in (role, "model", "state_dict"):
            if isinstance(tree.get(key), dict):
                facts.setdefault("role", key)
                tree = tree[key]
                break
    if not (isinstance(tree, dict) and tree and all(isinstance(v, Tensor) for v in tree.values())):
        raise RunFailed(f"{path} holds no weights of a {role}, a model or a state_dict")
    return WeightsFile(path, architectures.plain_names(tree), spec, facts)


def _published_facts(tree: dict[str, Any]) -> dict[str, Any]:
    """What a published checkpoint says beside its weights: arch, patch_size, data, epoch."""
    args, facts = tree.get("args"), {}
    for name, attribute in (("arch", "arch"), ("patch_size", "patch_size"), ("data", "data_path")):
        value = getattr(args, attribute, None)
        if isinstance(value, str | int):
            facts[name] = value
    if isinstance(args, argparse.Namespace) and isinstance(tree.get("epoch"), int):
        facts["epoch"] = tree["epoch"]
    return facts


def spec_of(file: WeightsFile, arch: str | None) -> BackboneSpec:
    """What to build for a file: what it says, what the caller says, or what the shapes say.

    Raises:
        UsageError: none of them does; the message says what the tensors look like.
    """
    if arch is None and file.spec is not None:
        return file.spec
    tensors = file.tensors
    said, patch_size = file.facts.get("arch"), file.facts.get("patch_size")
    own = architectures.published_name(said, tensors, patch_size) if said else None
    name = architectures.published_name(arch, tensors) if arch else own
    if name is None:
        shape = architectures.xcit_shape(tensors)
        name = architectures.xcit_name(shape) if shape is not None else None
    if name is None:
        raise UsageError(
            f"{file.path} does not say its architecture, and {architectures.advice(tensors)}"
        )
    if own == f"{name}.dino":  # the plain timm name for a file that says it is DINO's
        name = own
    # timm's XCiT names go on behind ours with the image size and the training's tag.
    match = re.match(r"(xcit_\w+?_p\d+)(_\d+)?(_dist)?(\..*)?$", name)
    spec = BackboneSpec(match[1]) if match else of_timm(name)
    stem = tensors.get("patch_embed.proj.0.0.weight", tensors.get("patch_embed.proj.weight"))
    if stem is not None and stem.ndim == 4 and stem.shape[1] != 3:
        mean, std = statistics(stem.shape[1])
        spec = dataclasses.replace(spec, in_chans=stem.shape[1], mean=mean, std=std)
    return spec


def load_into(model: nn.Module, file: WeightsFile, arch: str) -> None:
    """Load strictly.

    Raises:
        UsageError: the file is of another network; the message gives the first differences and
            what its shapes say it is.
        RunFailed: values that are not finite.
    """
    problems = architectures.differences(file.tensors, model)
    if problems:
        fits = architectures.fitting(file.tensors)
        if fits is not None:
            advice = f"it fits {fits}: --arch {fits}"
        else:
            advice = "no published XCiT or DINO ViT has just these: incomplete, mixed or reshaped"
        raise UsageError(f"{file.path} does not fit {arch}: tensors {problems}; {advice}")
    spoilt = [name for name, value in file.tensors.items() if not value.isfinite().all()]
    if spoilt:
        raise RunFailed(
            f"{file.path} holds values that are not finite, in {len(spoilt)} of "
            f"{len(file.tensors)} tensors (first {spoilt[0]}): use an earlier checkpoint"
        )
    model.load_state_dict(file.tensors, strict=True)


def load_backbone(
    path: str | Path, arch: str | BackboneSpec | None = None, role: str = "teacher"
) -> nn.Module:
    """The frozen backbone of a run directory, a file of ours, or a published or timm file.

    Args:
        path: a run directory or a weights file.
        arch: for files that do not say; overrides what a file says. A published name
            ("xcit_small_12_p16", "vit_small" and "dino_vits16" for DINO's ViTs) or a timm name; a
            `BackboneSpec` for an XCiT of a shape without a name. A published DINO ViT is resampled
            to other image sizes as published, under a plain timm name as timm does it (see `vit`).
        role: "teacher" or "student", where a file holds both.

    Returns:
        The network in eval mode on the CPU, images `[B, in_chans, H, W]` -> `[B, embed_dim]`, with
        `input_size`, `resize`, `mean`, `std`, `in_chans`, and `weights` (path, sha256, facts).

    Raises:
        ValueError: nothing there, no known architecture, tensors that do not fit.
        RunFailed: a damaged file, one that tries to run code, values that are not finite.
    """
    file = read_weights(path, role)
    spec = arch if isinstance(arch, BackboneSpec) else spec_of(file, arch)
    model = spec.build()
    load_into(model, file, spec.arch)
    model.spec = spec  # type: ignore[assignment]
    model.weights = {  # type: ignore[assignment]
        "path": str(file.path),
        "sha256": sha256(file.path),
        **file.facts,
    }
    return model.eval().requires_grad_(False)
