"""Weights and whole states on disk, in and out. No code from a file ever runs.

Files appear whole or not at all: written beside their name, flushed to the disk, renamed. A run's
state is `torch.save` of plain types and tensors; a backbone is safetensors under the published XCiT
names (or timm's, for timm networks) with a `BackboneSpec` in its header.

Reads besides: published DINO checkpoints (student and teacher; XCiT, DINO's ViTs, ResNet-50),
published backbone-only and XCiT classification files, timm weights. `weight_names` knows the names.
"""

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import mmap
import os
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from xdino import dino_vit, weight_names, xcit
from xdino.backbone import Backbone, Origin, Spec
from xdino.backbones import BackboneSpec, of_timm, statistics
from xdino.errors import RunFailed, UsageError, asked, nearest, reason, world
from xdino.runtime.atomic import written_beside
from xdino.weight_names import to_timm_names as to_timm_names

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
    with reading(path):
        state = load_plain(path)
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


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    """numpy's own `scalar`, but for numbers only: of other types it makes any size that is asked."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "fiub" or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is no number")
    return np.frombuffer(data, dtype, 1)[0]


def _plain_types() -> list[Any]:
    """What published files hold besides tensors and Python's own types; nothing else is let through.

    An argparse.Namespace of the trainer's arguments, numpy scalars in it and among the epochs, and
    the output folder, a path where the run was submitted by submitit. Such a path is read as a pure
    one, which cannot touch a file.
    """
    dtypes = [type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")]
    pure = pathlib.PurePosixPath
    return [
        argparse.Namespace,
        np.dtype,
        *dtypes,
        (_scalar, "numpy._core.multiarray.scalar"),
        (_scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 calls the module
        (pure, "pathlib.PosixPath"),
        (pure, "pathlib._local.PosixPath"),  # as Python 3.13 does
    ]


# --- backbones --------------------------------------------------------------------------------


CHECKSUM = "sha256"  # of tensors, spec and facts, in the header of our own files

# What decoders raise over bytes that are no checkpoint, or only the first half of one.
_NO_CHECKPOINT = (
    pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, AttributeError,
    TypeError, AssertionError, OverflowError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a backbone under the names of its own network, and what the file says of them."""

    path: Path
    tensors: dict[str, Tensor]
    spec: BackboneSpec | None  # of our own files, which are loaded as they are
    facts: dict[str, Any]  # iteration, role and so on, where known


def save_backbone(path: Path, model: nn.Module, spec: Spec, **facts: Any) -> None:
    """Write a backbone to safetensors. Equal weights and facts give equal bytes."""
    save_tensors(path, model.state_dict(), spec, facts)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    spec: Spec,
    facts: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to safetensors with what `read_weights` needs, and `metadata` for other readers."""
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    told: dict[str, Any] = {"spec": spec.to_dict(), "facts": dict(facts)}
    told = json.loads(json.dumps(told))  # as it will be read back
    header = json.dumps({**told, CHECKSUM: _checksum(own, told)}, sort_keys=True)
    with written_beside(path) as beside:
        safetensors.torch.save_file(own, beside, metadata={**(metadata or {}), HEADER_KEY: header})


def _checksum(tensors: Mapping[str, Tensor], told: dict[str, Any]) -> str:
    """64 hexadecimal digits that change with every tensor, its name and type, the spec, the facts."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_path(path: str | Path, role: str = "teacher") -> Path:
    """The file behind WEIGHTS: itself, or of a run directory the one that has this role.

    Raises:
        UsageError: nothing there.
    """
    if role not in ("teacher", "student"):
        raise UsageError(f'role must be "teacher" or "student", got "{role}"')
    with asked(f"cannot read {path}"):
        path = Path(path).expanduser()
        if path.is_dir():
            file = path / (BACKBONE_FILE if role == "teacher" else STATE_FILE)
            if not file.is_file():
                why = "" if role == "teacher" else " (which has the student)"
                raise UsageError(
                    f"{path} holds no {file.relative_to(path)}{why}: not a run directory, or no "
                    "step yet"
                )
            path = file
        if not path.is_file():
            raise UsageError(f"there is no weights file or run directory {path}")
        open(path, "rb").close()  # permissions, before anything is called damaged
    return path


def read_weights(path: str | Path, role: str = "teacher") -> WeightsFile:
    """Read any weights file this project knows.

    Args:
        role: "teacher" or "student": which network of a file with both; a file that says to hold
            the other alone is refused, and so is "student" where nothing says whose it is.

    Raises:
        UsageError: nothing there, or no network of this role.
        RunFailed: damaged; no weights inside.
    """
    path = weights_path(path, role)
    with reading(path):
        with open(path, "rb") as opened:
            start = opened.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise RunFailed(f"{path} is a Git LFS pointer and not the file: run git lfs pull")
        pickled = start.startswith((b"PK", b"\x80"))
        plain = start[8:9] == b"{" or (path.suffix == ".safetensors" and not pickled)
        return _read_safetensors(path, role) if plain else _read_pickle(path, role)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """One sentence, with the file's name in it, for each thing that can be wrong with weights.

    What a library raises over the bytes is damage; what the disk or the machine does is called so.
    """
    try:
        yield
    except (UsageError, RunFailed) as error:
        told = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise type(error)(told) from None
    except MemoryError:
        raise RunFailed(f"{path} needs more memory than there is, or is damaged") from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a decoder's, who seeks by numbers of the file
            raise RunFailed(f"{path} is damaged or not a checkpoint ({error})") from None
        raise RunFailed(f"cannot read {path}: {reason(error)}") from None
    except safetensors.SafetensorError as error:
        raise RunFailed(f"{path} is damaged or not a safetensors file ({error})") from None
    except _NO_CHECKPOINT as error:
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise RunFailed(
                f"{path} asks for {unsafe[1]}, which weights have no need of: refused, nothing of it "
                "ran"
            ) from None
        if "allocate memory" in str(error):
            raise RunFailed(f"{path} needs more memory than there is, or is damaged") from None
        kind = type(error).__name__
        raise RunFailed(f"{path} is damaged or not a checkpoint ({kind})") from None


def _read_safetensors(path: Path, role: str) -> WeightsFile:
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if not tensors:
        raise RunFailed(f"{path} holds no weights")
    if HEADER_KEY not in metadata:
        if any(f'"{CHECKSUM}"' in text and '"spec"' in text for text in metadata.values()):
            raise RunFailed(f"{path} is damaged: its header is not where it was written")
        group = weight_names.of_role(weight_names.groups(tensors), role)
        facts = {"role": group.role} if group.role else {}
        return WeightsFile(path, weight_names.own_names(group.tensors), None, facts)
    told = json.loads(metadata[HEADER_KEY])
    if not isinstance(told, dict) or not told.keys() <= {"spec", "facts", CHECKSUM}:
        raise RunFailed(f"{path} is damaged: its header is none of ours")
    before = told.pop(CHECKSUM, None)  # files of before had none
    if before is not None and before != _checksum(tensors, told):
        raise RunFailed(
            f"{path} is damaged: its checksum is another than when it was written. Use a copy, or an "
            "earlier checkpoint"
        )
    facts = _facts(told.get("facts", {}))
    if facts.get("role", "teacher") != role:
        raise UsageError(_of_one_role(path, facts.get("role", "teacher")))
    return WeightsFile(path, weight_names.own_names(tensors), _spec(told.get("spec")), facts)


def _of_one_role(path: Path, role: str) -> str:
    """A sentence on a file of ours that holds the other network than was asked for."""
    run = path.parent if path.name == BACKBONE_FILE else path.parent.parent
    if role == "teacher" and (run / STATE_FILE).is_file():
        return f"{path} holds the teacher alone: the student is in {run / STATE_FILE}"
    return f"{path} holds the {role} alone: --role {role}"


def _spec(tree: Any) -> BackboneSpec:
    """What a file says of its network.

    Raises:
        RunFailed: it says it wrongly.
    """
    try:
        spec = BackboneSpec.from_dict(tree)
        numbers = [spec.in_chans, spec.input_size, spec.resize, *spec.shape.values()]
        plausible = isinstance(spec.arch, str) and len(spec.arch) < 200
        plausible &= all(isinstance(n, int | float) and 0 <= n < 100_000 for n in numbers)
        plausible &= all(math.isfinite(value) for value in (*spec.mean, *spec.std))
        plausible &= all(value > 0 for value in spec.std) and spec.input_size > 0
        if plausible:
            return spec
    except (UsageError, LookupError, TypeError, ValueError, AttributeError):
        pass
    raise RunFailed("it is damaged: what it says of its network is none")


def _facts(tree: Any) -> dict[str, Any]:
    """The facts of a header or a state, if they can be ones."""
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise RunFailed("it is damaged: its facts are none")
    iteration, role = tree.get("iteration", 0), tree.get("role", "teacher")
    if not isinstance(iteration, int) or role not in ("teacher", "student"):
        raise RunFailed(f"it is damaged: no iteration {iteration!r:.40} of a {role!r:.40}")
    return dict(tree)


def load_plain(path: Path) -> Any:
    """What torch.save wrote of tensors and plain types; to be called inside `reading`.

    Refuses what would take more memory than the file has bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                if sum(info.file_size for info in archive.infolist()) > size:
                    raise RunFailed(
                        f"{path} is a compressed archive, which torch.save never writes"
                    )
        if size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(b"bytearray") >= 0:  # torch lets it through, of any size
                    raise RunFailed(
                        f"{path} asks for bytearray, which weights have no need of: refused, nothing "
                        "of it ran"
                    )
    with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_types()):
        warnings.simplefilter("ignore")
        with contextlib.ExitStack() as stack:
            # By its name torch would take a file for safetensors; other names it opens faster itself.
            misnamed = path.suffix == ".safetensors"
            source = stack.enter_context(open(path, "rb")) if misnamed else path
            return torch.load(source, map_location="cpu", weights_only=True)


def _read_pickle(path: Path, role: str) -> WeightsFile:
    tree = load_plain(path)
    size = path.stat().st_size
    if isinstance(tree, dict) and isinstance(tree.get("learner"), dict):  # a run's own state
        check_state(path)
        facts = _facts({"role": role, "iteration": tree.get("iteration")})
        network = tree["learner"].get(role)
        if not _is_network(network, size):
            raise RunFailed(f"{path} is damaged: a run's state without its {role}")
        own = {
            name.removeprefix("backbone."): value
            for name, value in network.items()
            if name.startswith("backbone.")
        }
        return WeightsFile(path, own, _spec(tree.get("spec")), facts)
    facts = _published_facts(tree) if isinstance(tree, dict) else {}
    top, whose = tree, None
    for _ in range(4):
        if not isinstance(tree, dict) or _is_network(tree, size):
            break
        key = _inner(tree, role)
        whose = key if key in ("teacher", "student") else whose
        tree = tree[key] if key is not None else None
    if not _is_network(tree, size):
        raise RunFailed(
            f"{path} holds no weights of a {role}, a model or a state_dict{_described(top)}"
        )
    found = weight_names.groups(tree, f"{whose}." if whose else "", whose)
    group = weight_names.of_role(found, role)
    if group.role:
        facts["role"] = group.role
    return WeightsFile(path, weight_names.own_names(group.tensors), None, facts)


def _inner(tree: dict[Any, Any], role: str) -> str | None:
    """Under which key of a published checkpoint the weights lie.

    Raises:
        UsageError: it holds the other role alone.
    """
    names = (role, "model", "state_dict", "model_state_dict", "network", "net", "backbone",
             "encoder", "student", "teacher")  # fmt: skip
    key = next((name for name in names if isinstance(tree.get(name), dict)), None)
    if key in ("teacher", "student") and key != role:
        raise UsageError(f"it holds the {key} alone: --role {key}")
    return key


def _is_network(tree: Any, size: int) -> bool:
    """Whether this is names and plain tensors that a file of `size` bytes can hold."""
    return (
        isinstance(tree, dict)
        and bool(tree)
        and all(isinstance(name, str) for name in tree)
        and all(isinstance(value, Tensor) and _is_plain(value, size) for value in tree.values())
    )


def _is_plain(value: Tensor, size: int) -> bool:
    """Numbers in memory, one for each place: no view that repeats one number a billion times."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    if value.is_nested or value.is_complex():
        return False
    held = min(value.untyped_storage().nbytes(), size)
    return value.numel() * value.element_size() <= held


def _described(tree: Any) -> str:
    if not isinstance(tree, dict) or not tree:
        return ""
    keys = ", ".join(f"{key!r:.40}" for key in list(tree)[:6])
    return f"; it has {keys}{', ...' if len(tree) > 6 else ''}"


def _published_facts(tree: dict[Any, Any]) -> dict[str, Any]:
    """What a published checkpoint says beside its weights: arch, patch_size, data, epoch."""
    args, facts = tree.get("args"), {}
    if isinstance(args, argparse.Namespace):
        said = vars(args)
        for name, key in (("arch", "arch"), ("patch_size", "patch_size"), ("data", "data_path")):
            value = said.get(key)
            if isinstance(value, int) or (isinstance(value, str) and len(value) < 1000):
                facts[name] = value
        if isinstance(tree.get("epoch"), int):
            facts["epoch"] = tree["epoch"]
    return facts


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


_STEMS = ("patch_embed.proj.0.0.weight", "patch_embed.proj.weight", "conv1.weight")


def _named(name: str) -> BackboneSpec:
    """The spec of a name; timm's XCiT names go on behind ours with image size and training's tag.

    As for all of timm's names, a tag brings the image size, crop and statistics of its training.
    """
    match = re.match(r"(xcit_\w+?_p\d+)(_(\d+))?(_dist)?(\..*)?$", name)
    if match is None:
        if not (dino_vit.is_name(name) or timm.is_model(name)):
            hint = nearest(name[:100], [*xcit.NAMES, *timm.list_models()])
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
    if dino_vit.is_name(arch) != dino_vit.is_name(
        spec.arch
    ):  # other position tables, of other sizes
        return dataclasses.replace(named, in_chans=spec.in_chans, mean=spec.mean, std=spec.std)
    same = arch.split(".")[0] == spec.arch.split(".")[0]  # but for timm's tags, and DINO's
    return dataclasses.replace(spec, arch=arch, shape=spec.shape if same else {})


def load_into(model: nn.Module, file: WeightsFile, arch: str) -> None:
    """Load strictly; only class heads of foreign files are left out.

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
    if file.spec is None:
        tensors = weight_names.without_heads(tensors, model)
    problems = weight_names.differences(tensors, model)
    if not problems:
        return tensors
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
