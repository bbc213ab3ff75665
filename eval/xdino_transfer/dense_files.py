"""Segmenters and detectors on disk: ours, and the published ones; written, and rebuilt from the file.

Ours are safetensors under the names of `Segmenter` and `Detector`. The header says which network it is
(the backbone's spec, the head and its settings), what the classes are called, how pictures are shown in
a test, and facts (iteration, init, protocol). Published files (`meta`, `state_dict`, an optimiser) say
the classes at most; their shapes say the rest. Nothing of a file runs.

Letters: K classes.
"""

import dataclasses
import json
import mmap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from xdino import checkpoint, weight_names
from xdino.backbone import Backbone, Origin
from xdino.backbones import BackboneSpec
from xdino.checkpoint.weights import WeightsFile
from xdino.config.bands import channels_of
from xdino.errors import RunFailed, UsageError, asked, reason
from xdino.xcit import XCiT
from xdino_transfer import published_files
from xdino_transfer.detection import detector
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.published import detector_in
from xdino_transfer.detection.roi import RegionSettings
from xdino_transfer.detection.rpn import RPNSettings
from xdino_transfer.detection.views import Views
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation import segmenter
from xdino_transfer.segmentation.heads import LinearMap, SemanticFPN, UperNet
from xdino_transfer.segmentation.published import segmenter_in
from xdino_transfer.segmentation.segmenter import LastTokens, Segmenter
from xdino_transfer.segmentation.views import TestViews

MODEL_FILE = checkpoint.EXPORTED_FILE  # of a run directory
SEGMENTATION, DETECTION = "segmentation", "detection"
TASKS = (SEGMENTATION, DETECTION)
Task = Literal["segmentation", "detection"]
# Facts of the header that are not a caller's: what rebuilds the network and how it is shown pictures.
RESERVED = ("task", "classes", "network", "views")
_HEADS: dict[type, str] = {SemanticFPN: "semantic_fpn", UperNet: "upernet", LinearMap: "linear_map"}
# Names in published files that tell them apart; a published classifier has none of them.
_MARKS: dict[bytes, Task] = {
    b"decode_head.conv_seg.": "segmentation",
    b"roi_head.bbox_head.": "detection",
}


@dataclass(frozen=True)
class LoadedDense:
    """A segmenter or a detector from a file, and what the file says of it.

    network: in evaluation mode on the CPU, without gradients. classes: their names in order; their
    numbers where the file does not name them, and then `named` is false. mean, std: a number a
    channel, for pixels in 0..1. views: how a picture is shown in a test. facts: iteration, init,
    protocol and so on, of our own files. origin: the file, its SHA-256, its facts.
    """

    network: Segmenter | Detector
    task: Task
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    spec: BackboneSpec
    facts: dict[str, Any]
    views: TestViews | Views
    origin: Origin
    named: bool = True

    @property
    def channels(self) -> int:
        """Of the pictures that it is shown, as sources take them: `Bands` of a sensor's."""
        return channels_of(self.spec.in_chans, self.spec.bands)

    @property
    def name(self) -> str:
        """ "segmenter, iteration 1234"; of files without it their name."""
        said = self.facts.get("iteration")
        kind = "segmenter" if self.task == SEGMENTATION else "detector"
        return self.origin.path.name if said is None else f"{kind}, iteration {said}"


def write_dense(
    path: Path,
    network: Segmenter | Detector,
    facts: Mapping[str, Any],
    *,
    spec: BackboneSpec,
    classes: Sequence[str],
    views: TestViews | Views | None = None,
) -> None:
    """Write a segmenter or a detector to safetensors. Equal weights and facts give equal bytes.

    Args:
        facts: what can be JSON; none of `RESERVED`.
        spec: of the network that the pyramid (or the linear map's backbone) was made of. Its mean and
            std are those that pictures are shown with.
        classes: their names in order, as many as the network tells apart.
        views: how a picture is shown in a test; None = as published.

    Raises:
        ValueError: another number of classes; a fact that is reserved.
        RunFailed: it cannot be written.
    """
    if len(classes) != classes_of(network):
        raise ValueError(f"{len(classes)} names for the {classes_of(network)} classes of a network")
    if taken := facts.keys() & set(RESERVED):
        raise ValueError(f"facts may not be called {', '.join(sorted(taken))}")
    shown = views or _views(task_of(network), spec, {})
    told = {
        **facts,
        "task": task_of(network),
        "classes": list(classes),
        "network": _described(network),
        "views": {name: getattr(shown, name) for name in _shown_by(type(shown))},
    }
    checkpoint.save_tensors(path, network.state_dict(), spec, told)


def read_dense(source: str | Path, arch: str | None = None) -> LoadedDense:
    """The segmenter or detector in a run directory, a file of ours or a published file.

    Args:
        source: a folder with model.safetensors, or a file.
        arch: for published files: the XCiT that the file must hold.

    Raises:
        UsageError: nothing there, or the file of something else.
        RunFailed: a damaged file, one that tries to run code, values that are not finite.
    """
    path = _file_of(source)
    if task := _marked(path):
        return _published(path, task, arch)
    file = checkpoint.read_weights(path)
    told = file.facts.get("task")
    if told not in TASKS:
        what = "a backbone alone" if told is None else f"a network for {told}"
        raise UsageError(f"{path} holds {what}, which can neither segment nor detect")
    if file.spec is None:
        raise RunFailed(f"{path} is damaged: it does not say its network")
    if arch is not None and arch != file.spec.arch:
        raise UsageError(f"{path} is on {file.spec.arch}: leave out --arch {arch}")
    network, views = _rebuilt(file, file.spec, told)
    names = file.facts.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunFailed(f"{path} is damaged: its classes are no names")
    if len(names) != classes_of(network):
        raise RunFailed(
            f"{path} is damaged: it names {len(names):,} classes and has a head for "
            f"{classes_of(network):,}"
        )
    return _loaded(network, file.spec, tuple(names), views, path, file.facts)


def dense_task(source: str | Path) -> Task | None:
    """What a run directory or a file is for, by its header or names; None for anything else."""
    try:
        path = _file_of(source)
        with safe_open(path, framework="pt") as opened:
            told = json.loads((opened.metadata() or {})[checkpoint.HEADER_KEY])
        task = told["facts"].get("task")
        return task if task in TASKS else None
    except SafetensorError:
        return _marked(path)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError):
        return None


def task_of(network: Segmenter | Detector) -> Task:
    return "segmentation" if isinstance(network, Segmenter) else "detection"


def classes_of(network: Segmenter | Detector) -> int:
    """K, without a detector's background."""
    if isinstance(network, Detector):
        return network.roi.classes
    return network.decode_head.conv_seg.out_channels


def _file_of(source: str | Path) -> Path:
    with asked(f"cannot read {source}"):
        path = Path(source).expanduser()
        if path.is_dir():
            if not (path / MODEL_FILE).is_file():
                raise UsageError(
                    f"{path} holds no {MODEL_FILE}: not a run that learns with labels, or no step yet"
                )
            path = path / MODEL_FILE
        if not path.is_file():
            raise UsageError(f"there is no run or file {path}")
        open(path, "rb").close()
    return path


def _marked(path: Path) -> Task | None:
    """What a published file is for, by the names in it; nothing of it is loaded."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            # A safetensors header's length may begin with a pickle's first byte.
            if start[8:] == b"{" or not start.startswith((b"PK", b"\x80")):
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return next(
                    (task for mark, task in _MARKS.items() if content.find(mark) >= 0), None
                )
    except (OSError, ValueError):
        return None


# What a header says of a network, and back


def _described(network: Segmenter | Detector) -> dict[str, Any]:
    """Everything that `_built` needs besides the backbone's spec and the number of classes."""
    if isinstance(network, Detector):
        shape = detector.Shape(
            network.neck.width,
            network.roi.box_head.fc6.out_features,
            network.roi.mask_predictor.conv5_mask.in_channels,
        )
        return {
            "head": "mask_rcnn",
            "after": _after(network.backbone),
            "shape": dataclasses.asdict(shape),
            "proposals": dataclasses.asdict(network.rpn.settings),
            "regions": dataclasses.asdict(network.roi.settings),
        }
    head = _HEADS[type(network.decode_head)]
    if isinstance(network.backbone, LastTokens):
        return {"head": head}
    return {
        "head": head,
        "after": _after(network.backbone),
        "channels": network.decode_head.conv_seg.in_channels,
    }


def _after(backbone: nn.Module) -> list[int]:
    assert isinstance(backbone, Pyramid)
    return list(backbone.after)


def _built(
    told: Mapping[str, Any], task: Task, spec: BackboneSpec, classes: int, build: Any
) -> Segmenter | Detector:
    """A new network as a header describes it; `build()` gives its backbone."""
    backbone: Backbone = build()
    if told["head"] == "linear_map":
        return segmenter.build(backbone, "linear_map", classes)
    if not isinstance(backbone, XCiT):
        raise TypeError(f"a pyramid on {spec.arch}")
    depth, after = len(backbone.blocks), [int(i) for i in told["after"]]
    if not all(0 <= i < depth for i in after):
        raise ValueError(f"blocks {after} of {depth}")
    levels = Pyramid(backbone, after)
    if task == SEGMENTATION:
        return segmenter.build(levels, told["head"], classes, int(told["channels"]))
    return detector.build(
        levels,
        classes,
        detector.Shape(**{name: int(value) for name, value in told["shape"].items()}),
        _dataclass(RPNSettings, told["proposals"]),
        _dataclass(RegionSettings, told["regions"]),
    )


def _dataclass(kind: type, tree: Mapping[str, Any]) -> Any:
    """What `dataclasses.asdict` and JSON made of a dataclass of numbers, tuples and dataclasses."""
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    if strange := tree.keys() - known:
        raise TypeError(f"{kind.__name__} has no {sorted(strange)[0]}")
    return kind(**{name: _value(hints[name], value) for name, value in tree.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _dataclass(hint, value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = (*allowed, int) if float in allowed else allowed
    if not isinstance(value, allowed):
        raise TypeError(f"{value!r:.40} for a {hint}")
    return value


def _rebuilt(
    file: WeightsFile, spec: BackboneSpec, task: Task
) -> tuple[Segmenter | Detector, TestViews | Views]:
    """The network of a file of ours with its weights; made without memory first, to see that it fits."""
    told, names = file.facts.get("network"), file.facts.get("classes")
    try:
        if not isinstance(told, dict) or not isinstance(names, list):
            raise ValueError("it does not say its head or classes")
        if spec.shape.get("depth", 0) > len(file.tensors):
            raise ValueError("more layers than tensors")
        with torch.device("meta"):
            blueprint = _built(told, task, spec, len(names), spec.build)
        views = _views(task, spec, file.facts.get("views") or {})
    except (
        LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError,
    ) as error:  # fmt: skip
        raise RunFailed(
            f"{file.path} is damaged: no network is as it says ({reason(error)})"
        ) from None
    if problems := weight_names.differences(file.tensors, blueprint):
        raise RunFailed(f"{file.path} is damaged: tensors {problems}")
    spoilt = [name for name, value in file.tensors.items() if not value.isfinite().all()]
    if spoilt:
        raise RunFailed(
            f"{file.path} holds values that are not finite (first {spoilt[0]}): use an earlier one"
        )
    network = _built(told, task, spec, len(names), spec.build)
    network.load_state_dict(file.tensors, strict=True)
    return network, views


def _shown_by(kind: type) -> tuple[str, ...]:
    """The settings of a test's views that a header keeps."""
    return ("longer", "shorter") if kind is TestViews else ("longer", "test_side")


def _views(task: Task, spec: BackboneSpec, told: Mapping[str, Any]) -> TestViews | Views:
    """How pictures are shown in a test, as a header says or as published."""
    kind: type[TestViews] | type[Views] = TestViews if task == SEGMENTATION else Views
    sides = {name: told[name] for name in _shown_by(kind) if name in told}
    if not all(isinstance(side, int | float) and 1 <= side < 1e6 for side in sides.values()):
        raise ValueError(f"no pictures are shown in {sides}")
    return kind(mean=spec.mean, std=spec.std, **sides)


def _loaded(
    network: Segmenter | Detector,
    spec: BackboneSpec,
    classes: tuple[str, ...] | None,
    views: TestViews | Views,
    path: Path,
    facts: Mapping[str, Any],
) -> LoadedDense:
    network.eval().requires_grad_(False)
    if isinstance(network.backbone, LastTokens):
        network.backbone.network.spec = spec
    return LoadedDense(
        network,
        task_of(network),
        classes or tuple(map(str, range(classes_of(network)))),
        spec.mean,
        spec.std,
        spec,
        dict(facts),
        views,
        Origin(path, checkpoint.sha256(path), dict(facts)),
        classes is not None,
    )


def _published(path: Path, task: Task, arch: str | None) -> LoadedDense:
    """A published file: its shapes say the network, ImageNet's statistics are the published ones."""
    file = published_files.read(path)
    network: nn.Module
    network, classes = (segmenter_in if task == SEGMENTATION else detector_in)(file)
    count = classes_of(network)
    if classes is not None and len(classes) != count:
        raise RunFailed(
            f"{path} is damaged: it names {len(classes):,} classes and has a head for {count:,}"
        )
    spec = published_files.spec_of(file, arch)
    return _loaded(network, spec, classes, _views(task, spec, {}), path, {})
