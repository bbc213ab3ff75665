"""From a backbone and images to a file of features, whole or not at all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xdino.backbone import Backbone
from xdino.plan import feasibility
from xdino.runtime.atomic import written_beside
from xdino_eval.extraction import Options
from xdino_eval.feature_files.formats import WRITERS, Writer, suffix_of
from xdino_eval.feature_files.parts import open_parts
from xdino_eval.feature_files.rows import Part, rows_of

AS_IT_GOES = (".parquet", ".csv")  # written row by row, of any number of images


@dataclass(frozen=True)
class FeatureFile:
    """Where features go. patches: those of the patches, too."""

    path: Path
    patches: bool = False

    @property
    def format(self) -> str:
        """Its suffix. Raises UsageError where there is no such format, or not as asked."""
        return suffix_of(self.path, self.patches)

    def check(self, backbone: Backbone, parts: Sequence[Part], options: Options) -> str:
        """The format, by the suffix.

        Raises:
            UsageError: there is none of this suffix, or it cannot be done as asked.
        """
        suffix = self.format
        if self.patches:
            backbone.require_patches()
            if suffix not in AS_IT_GOES:
                size, patch = options.transform_for(backbone).size, backbone.require_patches()
                each = backbone.embed_dim * (1 + max(1, size // patch) ** 2)
                needed = 4 * each * sum(len(part.source) for part in parts)
                mend = f"write {self.path.stem}.parquet, which is written as it goes"
                cpu = torch.device("cpu")
                feasibility.check_memory("the patch features of all images", needed, cpu, mend)
        return suffix


def save_parts(
    backbone: Backbone, parts: Sequence[Part], file: FeatureFile, options: Options
) -> Path:
    """Write the features of all parts to one file.

    Raises:
        UsageError: as `FeatureFile.check`.
        RunFailed: as `rows_of`; the file cannot be written.
    """
    suffix = file.check(backbone, parts, options)
    origin = backbone.origin
    about = {
        "checkpoint": origin.sha256,
        "features": origin.name,
        "transform": options.transform_for(backbone).describe(),
        "data": parts[0].source.name,
    }
    about = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in about.items()}
    with written_beside(file.path) as beside:
        capacity = {part.split: len(part.source) for part in parts}
        writer: Writer = WRITERS[suffix](beside, about, capacity)
        for part in parts:
            for rows in rows_of(backbone, part, options, file.patches):
                writer.add(rows)
        for sentence in writer.close():
            options.notice(sentence)
    return file.path


def save_features(
    backbone: Backbone,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | None = None,
    patches: bool = False,
    options: Options | None = None,
) -> Path:
    """Write the features of the images of `data` to `out`, as `xdino features` does.

    Args:
        data: a folder, flat, of classes, or with train/ and val/; a list of paths; tars; a name.
        out: FILE.parquet, FILE.npz, FILE.csv or FILE.safetensors.
        split: "train", "val" or "both"; None = all that there is.
        patches: those of the patches, too.
        options: how images are shown; where unreadable ones are named.

    Raises:
        ValueError: nothing there, no such format, patches of a backbone without any.
        xdino.errors.RunFailed: no image could be read, a disk, features that are not finite.
    """
    options = options or Options()
    parts = open_parts(os.fspath(data), backbone.in_chans, split)
    for sentence in {s: None for part in parts for s in part.source.notices()}:
        options.notice(sentence)
    return save_parts(backbone, parts, FeatureFile(Path(out), patches), options)
