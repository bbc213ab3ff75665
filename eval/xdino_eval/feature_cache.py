"""Features kept in a folder for the next command: under what key, whole or not at all.

A file carries the checksum of what it holds. One that is damaged is computed again and said so.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xdino.backbone import Backbone
from xdino.config.bands import Bands
from xdino.data.sources import Source, fingerprint
from xdino.errors import RunFailed
from xdino.runtime.atomic import written_beside
from xdino_eval.features import Features
from xdino_eval.transform import EvalTransform

VERSION = "features 3"  # of what decides on features, and of the file


def content_of(source: Source) -> str:
    """What tells a source from every other, and from itself after a file of it was changed.

    Its name, the images' names, labels and classes, and the sizes and times of the files: two folders
    with the same names in them are two sources.
    """
    stamps = hashlib.sha256(source.stamps()).hexdigest()
    channels = source.channels
    how = channels.key() if isinstance(channels, Bands) else channels
    told = [source.name, fingerprint(source), stamps, how, source.max_pixels]
    return json.dumps(told)


def cache_key(
    backbone: Backbone,
    source: Source,
    transform: EvalTransform,
    precision: str,
    tokens: Sequence[str] = ("class",),
    part: str = "",
) -> str:
    """32 hexadecimal digits that change with everything that changes the features.

    Args:
        tokens: what is read off the backbone, see `PooledTokens`. part: which images of the source.
    """
    origin = backbone.origin
    network = [origin.sha256, origin.role, origin.name, repr(backbone.spec), list(tokens)]
    told = [VERSION, *network, repr(transform), content_of(source), part, precision]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def cached(folder: Path | str, key: str, compute: Callable[[], Features]) -> Features:
    """The features kept under `key` in `folder`, else those of `compute()`, kept for next time.

    A file that cannot be read is reported by a warning and written again; a folder that cannot be
    written costs no more than a warning.
    """
    path = Path(folder) / f"{key}.safetensors"
    if path.exists():
        try:
            return _load(path, key)
        except (
            SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError,
        ) as error:  # fmt: skip
            warnings.warn(f"{path} is damaged ({error}); computing it again", stacklevel=2)
    features = compute()
    try:
        _save(path, key, features)
    except RunFailed as error:
        warnings.warn(f"the features are not kept: {error}", stacklevel=2)
    return features


def mapped(folder: Path, key: str, compute: Callable[[], Features]) -> Features:
    """As `cached`, but from the file in any case, which is mapped and not read into memory.

    Its pages come as they are touched, and leave when others are wanted.
    """
    found = cached(folder, key, compute)
    written = (folder / f"{key}.safetensors").exists()
    return cached(folder, key, compute) if written else found


def _save(path: Path, key: str, features: Features) -> None:
    tensors = {"features": features.features.contiguous(), "indices": features.indices}
    if features.labels is not None:
        tensors["labels"] = features.labels
    told = json.dumps(
        {"skipped": features.skipped, "data": features.data, "transform": features.transform}
    )
    facts = {"key": key, "told": told, "sha256": _checksum(key, told, tensors)}
    with written_beside(path) as beside:
        save_file(tensors, beside, facts)


def _load(path: Path, key: str) -> Features:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("key") != key:
        raise ValueError("it holds another key")
    if metadata["sha256"] != _checksum(key, metadata["told"], tensors):
        raise ValueError("its checksum is another than when it was written")
    told = json.loads(metadata["told"])
    return Features(
        features=tensors["features"],
        labels=tensors.get("labels"),
        indices=tensors["indices"],
        skipped=[(description, reason) for description, reason in told["skipped"]],
        data=told["data"],
        transform=told["transform"],
    )


def _checksum(key: str, told: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([key, told]).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
