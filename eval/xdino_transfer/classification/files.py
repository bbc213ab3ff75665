"""Classifiers on disk: ours, published XCiT classification files, timm's; written, read, gone on from.

Files carry the published names: the backbone's own, and `head.weight`, `head.bias` beside them (of
timm networks what timm calls their classifier). Ours say in their header which network it is, for
which images, and what the classes are called. A folder of timm's layout says so in its config.json.
Nothing of a file runs (`checkpoint.reading`).

Letters: D width, K classes.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from xdino import checkpoint, weight_names
from xdino.backbone import Origin
from xdino.backbones import BackboneSpec
from xdino.checkpoint import WeightsFile
from xdino.errors import RunFailed, UsageError, asked, world
from xdino_transfer.classification.classifier import Classifier, head_name

MODEL_FILE = checkpoint.EXPORTED_FILE  # of a run directory: the classifier
CONFIG_FILE = "config.json"  # of a folder of timm's layout, beside the same
TASK = "classification"  # among the facts of our own files
CROP_FACT = "crop_ratio"  # another: what an exported classifier of timm's was evaluated with
# Arguments in config.json that make no other network, or are looked at here.
SHAPELESS = {"img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate"}


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier from a file, and what the file says of it.

    classifier: in evaluation mode on the CPU, without gradients. classes: their names in order, None
    where the file does not say them. mean, std: a number a channel, for pixels in 0..1. size: pixels
    of the square it is shown. facts: iteration, init, protocol and so on, of our own files.
    crop_ratio: that square as a share of the resized shorter side, where timm says how the network
    is evaluated; None = not said. origin: the file, its SHA-256, its facts. remarks: what else a
    reader of its scores should know.
    """

    classifier: Classifier
    classes: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    facts: dict[str, Any]
    crop_ratio: float | None
    origin: Origin
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """ "classifier, iteration 1234"; of files without it their name."""
        said = self.facts.get("iteration")
        return self.origin.path.name if said is None else f"classifier, iteration {said}"


def write_classifier(path: Path, classifier: Classifier, facts: Mapping[str, Any]) -> None:
    """Write a classifier to safetensors: published names; spec, class names and facts in the header.

    facts: what can be JSON. Equal weights and facts give equal bytes.
    """
    names = None if classifier.classes is None else list(classifier.classes)
    told = {**facts, "task": TASK, "classes": names}
    checkpoint.save_tensors(path, classifier.published_state(), classifier.spec, told)


def read_classifier(source: str | Path, arch: str | None = None) -> LoadedClassifier:
    """The classifier in a run directory, a file of ours, a published XCiT file, or timm's.

    Args:
        source: a folder with model.safetensors (a run's, or one of timm's layout with config.json
            beside it), or a weights file.
        arch: for files that do not say; overrides what a file says.

    Raises:
        UsageError: nothing there, no known architecture, no head or not one linear head.
        RunFailed: a damaged file, one that tries to run code, values that are not finite.
    """
    file, config = _read(source)
    spec = _spec_of(file, arch, config)
    bare, head = _apart(file, spec)
    if head is None:
        raise UsageError(
            f"{file.path} holds a backbone without a head, which knows no classes: fine-tune it first"
        )
    backbone = checkpoint.build_for(bare, spec)
    checkpoint.load_into(backbone, bare, spec.arch)
    _refuse_leftovers(bare, backbone, spec)
    _refuse_other_pooling(config, backbone, spec)
    classifier = Classifier(backbone, spec, _class_names(file, len(head[0]), config))
    _set_head(classifier, head, file)
    ratio, remarks = _as_timm_shows(file, spec, config)
    return LoadedClassifier(
        classifier.eval().requires_grad_(False),
        classifier.classes,
        spec.mean,
        spec.std,
        spec.input_size,
        dict(file.facts),
        ratio,
        Origin(file.path, checkpoint.sha256(file.path), dict(file.facts)),
        remarks,
    )


def holds_classifier(path: str | Path) -> bool:
    """Whether a run directory or a file of ours says that it has a head; no tensor is read."""
    with contextlib.suppress(
        OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError
    ):
        place = Path(path).expanduser()
        file = place / MODEL_FILE if place.is_dir() else place
        with safe_open(file, framework="pt") as opened:
            told = json.loads((opened.metadata() or {})[checkpoint.HEADER_KEY])
        return told["facts"].get("task") == TASK
    return False


def spec_in(path: str | Path, arch: str | None = None) -> BackboneSpec:
    """What `start_from` builds for a file, without building it.

    Raises:
        UsageError, RunFailed: as `start_from`, but for tensors that do not fit.
    """
    file, config = _read(path)
    return _spec_of(file, arch, config)


def start_from(
    path: str | Path,
    classes: Sequence[str],
    arch: str | None = None,
    drop_path: float = 0.0,
    head_scale: float = 1.0,
) -> tuple[Classifier, list[str]]:
    """A classifier to be fine-tuned from any weights that `load_backbone` or `read_classifier` reads.

    A head for as many classes is kept (224 -> 384 pixels goes on so); any other is dropped.

    Returns:
        The classifier in training mode, and sentences on what was dropped.

    Raises:
        UsageError, RunFailed: as `read_classifier`, but for files without a head.
    """
    file, config = _read(path)
    spec = _spec_of(file, arch, config)
    bare, head = _apart(file, spec)
    checkpoint.build_for(bare, spec)  # which says in a sentence what does not fit
    backbone = spec.build(drop_path=drop_path)
    checkpoint.load_into(backbone, bare, spec.arch)
    classifier = Classifier(backbone, spec, classes, head_scale)
    notices = []
    if head is not None:
        theirs = _class_names(file, len(head[0]), config)
        if len(head[0]) != len(classes):
            notices.append(
                f"the head of {file.path} knows {len(head[0]):,} classes and the data has "
                f"{len(classes):,}: a new one is trained"
            )
        elif not isinstance(theirs, int) and theirs != tuple(classes):
            notices.append(f"the head of {file.path} is for other classes: a new one is trained")
        else:
            _set_head(classifier, head, file)
    return classifier.train(), notices


def _read(path: str | Path) -> tuple[WeightsFile, dict[str, Any]]:
    """The weights behind a path, and timm's config.json beside those of a folder ({} without)."""
    with asked(f"cannot read {path}"):
        folder = Path(path).expanduser()
        model, beside = folder / MODEL_FILE, folder / CONFIG_FILE
        there, told = model.is_file(), beside.is_file()
    file = checkpoint.read_weights(model if there else path)
    task = file.facts.get("task", TASK)
    if task != TASK:
        raise UsageError(f"{file.path} is a network for {task}, not a classifier")
    return file, _configuration(beside) if there and told and file.spec is None else {}


def _configuration(path: Path) -> dict[str, Any]:
    """timm's config.json, with its `pretrained_cfg` a dictionary whatever the file has.

    Raises:
        RunFailed: it cannot be read, or is none.
    """
    with world(f"read {path}"):
        content = path.read_bytes()
    try:
        told = json.loads(content)
        pretrained = told.get("pretrained_cfg") or told  # older ones are of one piece
        if not isinstance(told.get("architecture"), str) or not isinstance(pretrained, dict):
            raise ValueError("it names no architecture")
    except (ValueError, AttributeError, RecursionError) as error:
        raise RunFailed(f"{path} is damaged or not timm's ({error})") from None
    return {**told, "pretrained_cfg": pretrained}


def _spec_of(file: WeightsFile, arch: str | None, config: dict[str, Any]) -> BackboneSpec:
    """`checkpoint.spec_of`, with timm's config.json for what it says."""
    spec = checkpoint.spec_of(file, arch or config.get("architecture"))
    if not config:
        return spec
    said, arguments = config["pretrained_cfg"], config.get("model_args") or {}
    try:
        channels, side, _ = said.get("input_size", (spec.in_chans, spec.input_size, 0))
        told = arguments.get("img_size", side)
        side = int(told[0] if isinstance(told, list) else told)
        spec = dataclasses.replace(
            spec,
            in_chans=int(channels),
            input_size=side,
            resize=math.floor(side / float(said.get("crop_pct", spec.input_size / spec.resize))),
            mean=tuple(map(float, said.get("mean", spec.mean))),
            std=tuple(map(float, said.get("std", spec.std))),
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise RunFailed(f"the {CONFIG_FILE} beside {file.path} is damaged ({error})") from None
    others = arguments.keys() - SHAPELESS
    if others and spec.arch.startswith("xcit_"):
        shape = weight_names.xcit_shape(file.tensors) or {}
        shape.pop("in_chans", None)
        if "tokens_norm" in arguments:
            shape["tokens_norm"] = bool(arguments["tokens_norm"])
        spec = dataclasses.replace(spec, shape=shape)
    elif others:
        raise UsageError(
            f"the {CONFIG_FILE} beside {file.path} reshapes {spec.arch} by {', '.join(sorted(others))}, "
            "which is read of XCiT only"
        )
    return spec


def _apart(
    file: WeightsFile, spec: BackboneSpec
) -> tuple[WeightsFile, tuple[Tensor, Tensor | None] | None]:
    """The file without its head, and the head's weight [K, D] and bias [K], None where it has none."""
    name = head_name(spec.arch)
    names = (f"{name}.weight", f"{name}.bias")
    tensors = {key: value for key, value in file.tensors.items() if key not in names}
    weight, bias = (file.tensors.get(key) for key in names)
    if weight is None or weight.ndim < 2 or weight.shape[2:].numel() != 1:
        return dataclasses.replace(file, tensors=tensors), None
    return dataclasses.replace(file, tensors=tensors), (weight.flatten(1), bias)


def _refuse_leftovers(bare: WeightsFile, backbone: nn.Module, spec: BackboneSpec) -> None:
    """Raises UsageError where a head has more than one linear layer: logits would come out others."""
    unused = sorted(name for name in bare.tensors.keys() - backbone.state_dict() if "." in name)
    if unused:
        raise UsageError(
            f"the head of {bare.path} is more than one linear layer ({', '.join(unused[:3])}): a "
            f"{spec.arch} like this cannot be scored here"
        )


def _refuse_other_pooling(config: dict[str, Any], backbone: nn.Module, spec: BackboneSpec) -> None:
    """Raises UsageError where config.json pools features otherwise than timm does by default."""
    asked_for = (config.get("model_args") or {}).get("global_pool")
    network = getattr(backbone, "network", backbone)
    places = (network, getattr(network, "head", None))
    pools = [getattr(place, "global_pool", None) for place in places]
    own = next((getattr(pool, "pool_type", pool) for pool in pools if pool is not None), None)
    if asked_for is not None and asked_for != own and not spec.arch.startswith("xcit_"):
        raise UsageError(
            f"{CONFIG_FILE} pools the features of {spec.arch} by {asked_for!r:.40}, and here it is {own}"
        )


def _class_names(file: WeightsFile, count: int, config: Mapping[str, Any]) -> tuple[str, ...] | int:
    """The names of a file's classes, their number where neither it nor config.json says them."""
    if file.spec is not None:
        names = file.facts.get("classes")
    else:
        pretrained = config.get("pretrained_cfg", {})
        names = config.get("label_names") or pretrained.get("label_names")
        if isinstance(names, dict):  # number -> name
            names = [names.get(str(number)) for number in range(count)]
    if names is None:
        return count
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunFailed(f"{file.path} is damaged: its classes are no names")
    if len(names) != count:
        raise RunFailed(
            f"{file.path} is damaged: it names {len(names):,} classes and has a head for {count:,}"
        )
    return tuple(names)


def _as_timm_shows(
    file: WeightsFile, spec: BackboneSpec, config: Mapping[str, Any]
) -> tuple[float | None, tuple[str, ...]]:
    """timm's `crop_pct` of a network, by config.json or by the tag of its name; how it differs."""
    if config:
        said = config["pretrained_cfg"]
        ratio, resampling = said.get("crop_pct"), said.get("interpolation", "bicubic")
    elif file.spec is None and "." in spec.arch and timm.is_model(spec.arch):
        known = timm.models.get_pretrained_cfg(spec.arch)
        ratio, resampling = known.crop_pct, known.interpolation
    else:
        ratio = file.facts.get(CROP_FACT) if file.spec is not None else None
        return (float(ratio) if isinstance(ratio, int | float) and 0 < ratio <= 1 else None), ()
    remarks: tuple[str, ...] = ()
    if resampling != "bicubic":
        remarks = (f"timm resamples images for {spec.arch} {resampling}, and here it is bicubic",)
    return None if ratio is None else float(ratio), remarks


def _set_head(
    classifier: Classifier, head: tuple[Tensor, Tensor | None], file: WeightsFile
) -> None:
    weight, bias = head
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    own = classifier.head
    if weight.shape != own.weight.shape or bias.shape != own.bias.shape:
        raise UsageError(
            f"the head of {file.path} takes features of {weight.shape[1]:,} numbers and "
            f"{classifier.spec.arch} gives {own.in_features:,}: it cannot be scored here"
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise RunFailed(f"{file.path} holds values that are not finite, in its head")
    own.load_state_dict({"weight": weight, "bias": bias})
