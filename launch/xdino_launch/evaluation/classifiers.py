"""A classifier as a command judges it: read, checked against what it is shown, and where it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from xdino.backbone import Backbone
from xdino.data import Source
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device
from xdino_eval.extraction import Options
from xdino_eval.results import Row
from xdino_launch.evaluation.subject import check_views, options_for
from xdino_transfer import judging
from xdino_transfer.classification import files, scoring
from xdino_transfer.classification.files import LoadedClassifier
from xdino_transfer.classification.predicting import Prediction
from xdino_transfer.judging.inputs import gather


@dataclass(frozen=True)
class Judged:
    """A classifier, and how images are shown to it."""

    loaded: LoadedClassifier
    options: Options
    max_bad_share: float
    max_pixels: int | None

    @classmethod
    def open(
        cls,
        weights: str,
        arch: str | None = None,
        size: int | None = None,
        crop_ratio: float | None = None,
        batch_size: int = 128,
        workers: int = 2,
        device: str = "auto",
        precision: str = "fp32",
        max_bad_share: float = scoring.ALLOWED,
        max_pixels: int | None = None,
    ) -> "Judged":
        """Read everything, or say in a sentence what is wrong.

        Args:
            size, crop_ratio: as of `xdino_transfer.score`.

        Raises:
            UsageError, RunFailed: as `read_classifier`; a size that the network does not take.
        """
        loaded = files.read_classifier(weights, arch)
        transform = judging.transform_of(loaded, size, crop_ratio)
        where = resolve_device(device)
        backbone = cast(Backbone, loaded.classifier.backbone)
        check_views(backbone, transform, where, batch_size, size is not None)
        options = options_for(where, batch_size, workers, precision)
        return cls(loaded, replace(options, transform=transform), max_bad_share, max_pixels)

    def on_all(self) -> "Judged":
        """The same, each of several processes with its share of the images."""
        return replace(self, options=replace(self.options, shared=distributed.world_size() > 1))

    @property
    def channels(self) -> int:
        return cast(Backbone, self.loaded.classifier.backbone).in_chans

    def score(self, source: Source, train_size: int = 0) -> list[Row]:
        """The signed row of `source`."""
        return judging.score_source(
            self.loaded, source, self.options, train_size, self.max_bad_share
        )

    def predict(self, names: Sequence[str], top: int) -> list[Prediction]:
        """The `top` likeliest classes of every image and frame, in order."""
        found = gather(names, self.channels, self.max_pixels)
        return judging.predict_all(self.loaded, found, self.options, top, self.max_bad_share)
