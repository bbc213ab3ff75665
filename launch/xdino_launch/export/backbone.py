"""A backbone for others: published names, timm's names, ONNX, or a folder of Hugging Face's layout.

Every file says what it holds, in strings that any reader of the format shows (`card`): architecture,
patch size, statistics of the images, training data, commit, iteration. A safetensors file also
carries the `BackboneSpec`, so that xdino reads it back without being told anything.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdino import checkpoint
from xdino.backbone import Backbone
from xdino.errors import RunFailed, UsageError
from xdino.run_directory import commit
from xdino_launch.export import to_folder, to_onnx
from xdino_launch.export.to_timm import timm_weights

SUFFIXES = {"published": ".safetensors", "timm": ".safetensors", "onnx": ".onnx"}
FOLDER = "hf"
UNKNOWN = "not recorded"
OF_HEADS = ("task", "classes", "crop_ratio")  # facts that a backbone alone has no more


def format_of(path: Path, format: str | None) -> str:
    """The format that is asked for, or what the name of the file asks for.

    Raises:
        UsageError: the two contradict each other, or neither says.
    """
    suffix = path.suffix.lower()
    if format is None:
        if suffix not in SUFFIXES.values():
            known = "published names in .safetensors, ONNX in .onnx"
            raise UsageError(
                f"{path} does not say its format ({known}): name it with --format, for a folder "
                f"--format {FOLDER}"
            )
        return next(name for name, known in SUFFIXES.items() if known == suffix)
    if format == FOLDER:
        if suffix in (*SUFFIXES.values(), ".pt", ".pth", ".bin"):
            raise UsageError(f"--format {FOLDER} writes a folder, got --out {path}")
    elif path.suffix != SUFFIXES[format]:
        raise UsageError(f"--format {format} writes {SUFFIXES[format]} files, got --out {path}")
    return format


def refuse_folder(path: Path, format: str) -> None:
    """Raises UsageError where a file of `format` would be written over a folder."""
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder, and --format {format} writes a file")


def destination(path: Path, format: str | None) -> str:
    """The format that `path` is written in, once nothing stands in its way.

    Raises:
        UsageError: a suffix of another format; the onnx packages are not there; a folder that holds
            something else.
    """
    format = format_of(path, format)
    if format == "onnx":
        to_onnx.require()
    if format == FOLDER:
        to_folder.require_free(path)
    else:
        refuse_folder(path, format)
    return format


def export_backbone(
    weights: str,
    path: Path,
    format: str | None = None,
    arch: str | None = None,
    role: str = "teacher",
    say: Callable[[str], None] = lambda sentence: None,
) -> Path:
    """Write one backbone to `path`, checked before it gets its name.

    Args:
        weights: whatever `load_backbone` reads.
        format: "published" or "timm" (safetensors), "onnx", or "hf" (a folder); None = what `path`
            ends in.
        say: told what was checked, a sentence at a time.

    Raises:
        UsageError: as `load_backbone`; a suffix of another format; what timm cannot build; the onnx
            packages are not there; a folder that holds something else.
        RunFailed: the file cannot be written, or computes something else than the backbone.
    """
    format = destination(path, format)
    backbone = checkpoint.load_backbone(weights, arch, role)
    spec, origin = backbone.spec, backbone.origin
    facts = {key: value for key, value in origin.facts.items() if key not in OF_HEADS}
    facts["exported_from"] = origin.sha256
    about = card(backbone, facts, origin.path)
    try:
        if format == "onnx":
            to_onnx.write(backbone, spec, path, about, say)
        elif format == FOLDER:
            to_folder.write(backbone, path, facts, about, say)
        else:
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
