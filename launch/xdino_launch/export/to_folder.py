"""A backbone as a folder of Hugging Face's layout, which timm, transformers and xdino load offline.

    timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers.TimmWrapperModel.from_pretrained("FOLDER")
    xdino.load("FOLDER")

`config.json` says which of timm's networks it is, with which arguments and for which images;
`model.safetensors` holds the tensors by timm's names, and what xdino wants to know in its header;
`README.md` is the model card. All three are written into a folder beside, loaded from there and
compared, features and pixels, before the folder gets its name.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor

from xdino import checkpoint
from xdino.backbone import Backbone, Origin, Preprocessing
from xdino.checkpoint import EXPORTED_FILE
from xdino.config.bands import Bands
from xdino.errors import RunFailed, UsageError, asked
from xdino.runtime.atomic import folder_beside, write_text
from xdino_eval import results
from xdino_eval.transform import EvalTransform
from xdino_launch.export.to_timm import difference, timm_recipe, timm_tensors

CONFIG, CARD = "config.json", "README.md"
FILES = (CONFIG, EXPORTED_FILE, CARD)


def require_free(folder: Path) -> None:
    """Raises UsageError where `folder` is a file, or holds anything but an earlier export."""
    with asked(f"cannot write {folder}"):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--format hf writes a folder, and {folder} is a file")
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if names and not ({CONFIG, EXPORTED_FILE} <= set(names) <= set(FILES)):
            other = next((name for name in names if name not in FILES), names[0])
            raise UsageError(
                f"{folder} holds something else than an earlier export ({other}): choose a new folder"
            )


def write(
    backbone: Backbone,
    folder: Path,
    facts: Mapping[str, Any],
    about: Mapping[str, str],
    say: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Write the folder.

    Args:
        facts: what xdino records of weights. about: what the files say of themselves.
        say: told what was compared, a sentence at a time.

    Raises:
        UsageError: timm has no such network.
        RunFailed: what comes back from the folder gives other features, or sees other pixels.
    """
    name, arguments = timm_recipe(backbone.spec)
    config = configuration(backbone, name, arguments)
    with folder_beside(folder) as beside:
        # What transformers asks of a file's header, besides ours.
        header = {**about, "format": "pt"}
        checkpoint.save_tensors(
            beside / EXPORTED_FILE, timm_tensors(backbone), backbone.spec, facts, header
        )
        write_text(beside / CONFIG, json.dumps(config, indent=2) + "\n")
        write_text(beside / CARD, model_card(backbone, about, folder.name))
        for sentence in _compared(backbone, beside, config):
            say(sentence)


def configuration(backbone: Backbone, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as timm writes it.

    Args:
        name, arguments: of `timm.create_model`, the number of classes among them.
    """
    view = backbone.preprocessing
    architecture = name.split(".")[0]
    known = timm.models.get_pretrained_cfg(architecture)
    kept = {key: value for key, value in arguments.items() if key != "num_classes"}
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "pretrained_cfg": {
            "input_size": [view.channels, view.input_size, view.input_size],
            "fixed_input_size": bool(known and known.fixed_input_size),
            "interpolation": "bicubic",
            "crop_pct": crop_share(view),
            "crop_mode": "center",
            "mean": list(view.mean),
            "std": list(view.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": known.first_conv if known else None,
            "classifier": known.classifier if known else None,
        },
    }
    return {**config, "model_args": kept} if kept else config


def crop_share(view: Preprocessing) -> float:
    """The `crop_pct` from which timm, which rounds down, gets back the side that images are resized
    to."""
    shares = (view.input_size / (view.resize + more) for more in (0.0, 1e-9, 0.25))
    return next(share for share in shares if math.floor(view.input_size / share) == view.resize)


# What comes back


def _compared(backbone: Backbone, folder: Path, config: Mapping[str, Any]) -> list[str]:
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    error = difference(backbone, backbone.spec, theirs, f"timm {timm.__version__} from the folder")
    told = [f"timm's local-dir: gives the same features, to {error:.1e} of the largest"]
    if isinstance(backbone.in_chans, Bands):
        told.append(
            f"timm has no transform of images of {backbone.in_chans} bands: pixels not tried"
        )
    else:
        compare_pixels(backbone, config["pretrained_cfg"])
    if importlib.util.find_spec("transformers") is None:
        return [*told, "transformers is not installed here: not tried with it"]
    import transformers
    from transformers import TimmWrapperModel

    network = TimmWrapperModel.from_pretrained(folder, local_files_only=True).eval()

    def pooled(images: Tensor) -> Tensor:
        return network(images).pooler_output

    error = difference(backbone, backbone.spec, pooled, f"transformers {transformers.__version__}")
    return [*told, f"transformers' TimmWrapperModel does, to {error:.1e}"]


def compare_pixels(backbone: Backbone, pretrained: Mapping[str, Any]) -> None:
    """Raises RunFailed where timm would show the network another view of an image."""
    chosen = timm.data.resolve_data_config({}, pretrained_cfg=dict(pretrained))
    transform: Any = timm.data.create_transform(**chosen, is_training=False)
    side, channels = 2 * backbone.resize, backbone.in_chans
    shape = side, side + side // 3, channels
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    theirs = transform(Image.fromarray(image if channels == 3 else image[..., 0]))
    own = EvalTransform.of(backbone)
    ours = own.normalise(torch.from_numpy(own.array(image).copy())[None])[0]
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-4):
        raise RunFailed(f"timm {timm.__version__} shows the network another view of an image")


# The card


def model_card(backbone: Backbone, about: Mapping[str, str], name: str) -> str:
    """README.md: what it is, how it is loaded, what was measured of it."""
    facts = "\n".join(f"| {cell(key)} | {cell(value)} |" for key, value in about.items())
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- self-supervised
- dino
- timm
- xdino
---

# {cell(name)}

A {backbone.spec.arch} pretrained without labels by DINO (arXiv 2104.14294), written by xdino. Images of
{backbone.input_size} x {backbone.input_size} pixels become features of {backbone.embed_dim} numbers.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
features = model(transform(image)[None])  # [1, {backbone.embed_dim}]
```

```python
from transformers import AutoImageProcessor, TimmWrapperModel

model = TimmWrapperModel.from_pretrained("FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("FOLDER")
features = model(**processor(image)).pooler_output
```

```python
import xdino

features = xdino.load("FOLDER").embed("photo.jpg")
```

## What it is

| | |
|---|---|
{facts}

## What was measured

{measured(backbone.origin)}
"""


def measured(origin: Origin) -> str:
    """The rows of the run's results.json that speak of these weights."""
    try:
        rows = results.load(origin.path.parent / "results.json")
    except RunFailed:
        rows = []
    own = [row for row in rows if row.checkpoint == origin.sha256 and row.top1 is not None]
    if not own:
        return "Nothing that is recorded beside the weights."
    lines = ["| protocol | settings | data | top-1, per cent |", "|---|---|---|---|"]
    for row in own:
        settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
        cells = (row.protocol, settings, row.data, f"{row.top1:.2f}")
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """One line of plain text, with nothing in it that a table or HTML would take for its own."""
    plain = " ".join(text.split()).replace("|", "\\|")
    plain = plain.replace("<", "&lt;").encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= 300 else plain[:297] + "..."
