"""Weights files: the tensors of a backbone, its spec and facts, out and in.

Ours are safetensors under the published XCiT names (or timm's, for timm networks), with a
`BackboneSpec`, facts and a checksum in the header. Read besides: runs' states, published DINO
checkpoints (student and teacher; XCiT, DINO's ViTs, ResNet-50), published backbone-only and XCiT
classification files, timm weights. `weight_names` knows the names.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from xdino import weight_names
from xdino.backbone import Spec
from xdino.backbones import BackboneSpec
from xdino.checkpoint.plain import load_plain, reading
from xdino.checkpoint.states import STATE_FILE, check_state
from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.atomic import written_beside
from xdino.runtime.places import missing_weights

BACKBONE_FILE = "backbone.safetensors"
BEST_FILE = "best.safetensors"  # beside it: the teacher whose k-NN was best while training
EXPORTED_FILE = "model.safetensors"  # of a folder that was exported for timm and transformers
LABELLED = ("finetune", "segment", "detect")  # kinds of runs, as their states say
HEADER_KEY = "xdino"  # of the safetensors metadata
CHECKSUM = "sha256"  # of tensors, spec and facts, in the header of our own files


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a backbone under the names of its own network, and what the file says of them."""

    path: Path
    tensors: dict[str, Tensor]
    spec: BackboneSpec | None  # of our own files, which are loaded as they are
    facts: dict[str, Any]  # iteration, role and so on, where known


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if role not in weight_names.ROLES:
        raise UsageError(f'role must be "teacher" or "student", got "{role}"')
    with asked(f"cannot read {path}"):
        path = Path(path).expanduser()
        if path.is_dir():
            file = path / (BACKBONE_FILE if role == "teacher" else STATE_FILE)
            if not file.is_file() and (path / EXPORTED_FILE).is_file():
                file = path / EXPORTED_FILE
            if not file.is_file():
                why = "" if role == "teacher" else " (which has the student)"
                raise UsageError(
                    f"{path} holds no {file.relative_to(path)}{why}: not a run directory, or no "
                    "step yet"
                )
            path = file
        if not path.is_file():
            raise UsageError(missing_weights(path))
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
    run = path.parent if path.name in (BACKBONE_FILE, BEST_FILE) else path.parent.parent
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
    if not isinstance(iteration, int) or role not in weight_names.ROLES:
        raise RunFailed(f"it is damaged: no iteration {iteration!r:.40} of a {role!r:.40}")
    return dict(tree)


def _read_pickle(path: Path, role: str) -> WeightsFile:
    tree = load_plain(path)
    size = path.stat().st_size
    if isinstance(tree, dict) and isinstance(tree.get("learner"), dict):  # a run's own state
        refuse_labelled(path, tree)
        check_state(path)
        facts = _facts({"role": role, "iteration": tree.get("iteration")})
        network = tree["learner"].get(role)
        if not is_network(network, size):
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
        if not isinstance(tree, dict) or is_network(tree, size):
            break
        key = _inner(tree, role)
        whose = key if key in weight_names.ROLES else whose
        tree = tree[key] if key is not None else None
    if not is_network(tree, size):
        raise RunFailed(
            f"{path} holds no weights of a {role}, a model or a state_dict{_described(top)}"
        )
    found = weight_names.groups(tree, f"{whose}." if whose else "", whose)
    group = weight_names.of_role(found, role)
    if group.role:
        facts["role"] = group.role
    return WeightsFile(path, weight_names.own_names(group.tensors), None, facts)


def refuse_labelled(path: Path, tree: Any) -> None:
    """Raises UsageError for the state of a run that learns with labels, whose weights lie beside it."""
    if isinstance(tree, dict) and tree.get("kind") in LABELLED:
        raise UsageError(
            f"{path} is what a run of xdino {tree['kind']} goes on with, and is not read for weights: "
            f"name the run, or its {EXPORTED_FILE}"
        )


def _inner(tree: dict[Any, Any], role: str) -> str | None:
    """Under which key of a published checkpoint the weights lie.

    Raises:
        UsageError: it holds the other role alone.
    """
    names = (role, "model", "state_dict", "model_state_dict", "network", "net", "backbone",
             "encoder", "student", "teacher")  # fmt: skip
    key = next((name for name in names if isinstance(tree.get(name), dict)), None)
    if key in weight_names.ROLES and key != role:
        raise UsageError(f"it holds the {key} alone: --role {key}")
    return key


def is_network(tree: Any, size: int) -> bool:
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
