"""A classifier for others, with its head: published names, timm's names, ONNX, or a folder of timm's.

    timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers.TimmWrapperForImageClassification.from_pretrained("FOLDER")

Logits are compared before a file gets its name. A folder's config.json names the classes, too.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
from torch import Tensor

from xdino import checkpoint
from xdino.backbone import Backbone
from xdino.checkpoint import EXPORTED_FILE
from xdino.errors import RunFailed
from xdino.runtime.atomic import folder_beside, write_text
from xdino_launch.export import to_folder, to_onnx
from xdino_launch.export.backbone import FOLDER, card, destination
from xdino_launch.export.to_folder import CARD, CONFIG, cell
from xdino_launch.export.to_timm import called, difference, timm_recipe, timm_tensors
from xdino_transfer.classification import files, scoring
from xdino_transfer.classification.classifier import Classifier, head_name
from xdino_transfer.classification.files import CROP_FACT, TASK, LoadedClassifier

Say = Callable[[str], None]


def export_classifier(
    weights: str,
    path: Path,
    format: str | None = None,
    arch: str | None = None,
    say: Say = lambda sentence: None,
) -> Path:
    """Write one classifier to `path`, checked before it gets its name.

    Args:
        weights: whatever `read_classifier` reads.
        format: "published" or "timm" (safetensors), "onnx", or "hf" (a folder); None = what `path`
            ends in.
        say: told what was checked, a sentence at a time.

    Raises:
        UsageError: as `read_classifier`; a suffix of another format; what timm cannot build; the onnx
            packages are not there; a folder that holds something else.
        RunFailed: the file cannot be written, or computes something else than the classifier.
    """
    format = destination(path, format)
    loaded = files.read_classifier(weights, arch)
    classifier = _as_it_is_shown(loaded)
    backbone, origin = cast(Backbone, classifier.backbone), loaded.origin
    names = None if loaded.classes is None else list(loaded.classes)
    facts = {**origin.facts, "exported_from": origin.sha256, "task": TASK, "classes": names}
    if loaded.crop_ratio is not None:
        facts[CROP_FACT] = loaded.crop_ratio
    about = card(backbone, facts, origin.path) | _classes_told(classifier)
    try:
        if format == "onnx":
            to_onnx.write(classifier, classifier.spec, path, about, say, "logits")
        elif format == FOLDER:
            _write_folder(loaded, classifier, path, facts, about, say)
        else:
            tensors = classifier.published_state()
            if format == "timm":
                name, options = _recipe(classifier)
                theirs = timm.create_model(name, **options).eval()
                tensors = _tensors_for(classifier, theirs.state_dict())
                theirs.load_state_dict(tensors, strict=True)
                who, call = f"timm {timm.__version__}'s {name}", called(name, options)
                error = difference(classifier, classifier.spec, theirs, who, "logits")
                say(f"{call} gives the same logits, to {error:.1e} of the largest")
                about |= {"timm": call, "timm_version": timm.__version__}
            checkpoint.save_tensors(path, tensors, classifier.spec, facts, about)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error}") from None
    return path


def _as_it_is_shown(loaded: LoadedClassifier) -> Classifier:
    """The classifier, its spec with the resize that its evaluation has by default."""
    classifier = loaded.classifier
    ratio = loaded.crop_ratio or scoring.FULL_CROP
    resize = scoring.cropped(classifier.spec, ratio).resize
    spec = dataclasses.replace(classifier.spec, resize=resize)
    classifier.spec = cast(Backbone, classifier.backbone).spec = spec
    return classifier


def _classes_told(classifier: Classifier) -> dict[str, str]:
    names = classifier.classes
    told = {"class_names": json.dumps(list(names), ensure_ascii=False)} if names else {}
    text = {"classes": str(classifier.num_classes), **told}
    return {key: s.encode("utf-8", "backslashreplace").decode() for key, s in text.items()}


def _recipe(classifier: Classifier) -> tuple[str, dict[str, Any]]:
    """Name and options for `timm.create_model`, with the head."""
    name, options = timm_recipe(classifier.spec)
    return name, {**options, "num_classes": classifier.num_classes}


def _tensors_for(classifier: Classifier, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under timm's names; a head that is a convolution there has its shape."""
    head = head_name(classifier.spec.arch)
    tensors = timm_tensors(cast(Backbone, classifier.backbone))
    for name, value in classifier.head.state_dict().items():
        own = f"{head}.{name}"
        tensors[own] = value.reshape(theirs[own].shape) if own in theirs else value
    return tensors


def _write_folder(
    loaded: LoadedClassifier,
    classifier: Classifier,
    folder: Path,
    facts: Mapping[str, Any],
    about: Mapping[str, str],
    say: Say,
) -> None:
    """config.json, model.safetensors and README.md, loaded again from beside and compared."""
    name, options = _recipe(classifier)
    config = configuration(classifier, name, options)
    state = timm.create_model(name, **options).state_dict()
    with folder_beside(folder) as beside:
        tensors, header = _tensors_for(classifier, state), {**about, "format": "pt"}
        checkpoint.save_tensors(beside / EXPORTED_FILE, tensors, classifier.spec, facts, header)
        write_text(beside / CONFIG, json.dumps(config, indent=2) + "\n")
        write_text(beside / CARD, model_card(loaded, classifier, about, folder.name))
        for sentence in _compared(classifier, beside, config):
            say(sentence)


def configuration(classifier: Classifier, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as timm writes it, with the classes."""
    count = classifier.num_classes
    config = to_folder.configuration(cast(Backbone, classifier.backbone), name, options)
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = count
    if classifier.classes is not None:
        config["label_names"] = list(classifier.classes)
    return config


def _compared(classifier: Classifier, folder: Path, config: Mapping[str, Any]) -> list[str]:
    spec = classifier.spec
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    who = f"timm {timm.__version__} from the folder"
    error = difference(classifier, spec, theirs, who, "logits")
    told = [f"timm's local-dir: gives the same logits, to {error:.1e} of the largest"]
    to_folder.compare_pixels(cast(Backbone, classifier.backbone), config["pretrained_cfg"])
    if importlib.util.find_spec("transformers") is None:
        return [*told, "transformers is not installed here: not tried with it"]
    import transformers
    from transformers import TimmWrapperForImageClassification

    network = TimmWrapperForImageClassification.from_pretrained(
        folder, local_files_only=True
    ).eval()

    def logits(images: Tensor) -> Tensor:
        return network(images).logits

    who = f"transformers {transformers.__version__}"
    error = difference(classifier, spec, logits, who, "logits")
    return [*told, f"transformers' TimmWrapperForImageClassification does, to {error:.1e}"]


def model_card(
    loaded: LoadedClassifier, classifier: Classifier, about: Mapping[str, str], name: str
) -> str:
    """README.md: what it is, how it is loaded, what was measured of it."""
    facts = "\n".join(f"| {cell(key)} | {cell(value)} |" for key, value in about.items())
    side = classifier.spec.input_size
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- xdino
---

# {cell(name)}

A {classifier.spec.arch} that tells {classifier.num_classes:,} classes apart, written by xdino. Images of
{side} x {side} pixels become logits.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
probabilities = model(transform(image)[None]).softmax(1)
```

```bash
xdino score FOLDER --data DATA
xdino predict FOLDER photo.jpg
```

## What it is

| | |
|---|---|
{facts}

## What was measured

{to_folder.measured(loaded.origin)}
"""
