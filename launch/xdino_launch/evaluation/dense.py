"""A segmenter or a detector as a command judges and uses it: one row; pictures, masks and a JSON file.

What `xdino predict` leaves in its folder: STEM-overlay.png of every picture (STEM-overlay.mp4 of a
video); of a segmenter masks/STEM.png, whose pixels are class numbers, and classes.txt, the layout that
`xdino segment` reads; predictions.json, which of a detector is a COCO file.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xdino.data.image_files import printable
from xdino.errors import UsageError
from xdino.runtime import distributed
from xdino.runtime.atomic import write_text
from xdino.runtime.device import resolve_device
from xdino_eval import sheets
from xdino_eval.results import CLASSES_FILE, as_json, write_classes
from xdino_launch.console import counter, stderr_console
from xdino_launch.evaluation.drawing import make_folder
from xdino_launch.evaluation.inputs import Film, Item, Skipped, Work, gather, say
from xdino_transfer.dense_files import SEGMENTATION, LoadedDense, read_dense
from xdino_transfer.detection.outlines import encoded, pycocotools_mask
from xdino_transfer.judging import dense, overlays, submission
from xdino_transfer.judging.dense import DenseScore, How
from xdino_transfer.judging.seeing import Instance, Seeing

JSON_FILE, NAMES_FILE, MASKS = "predictions.json", "classes.txt", "masks"
EVERY = 1 << 30  # images of a folder: all of them


def opened(weights: str, arch: str | None, device: str) -> LoadedDense:
    """
    Raises:
        UsageError, RunFailed: as `read_dense` and `resolve_device`.
    """
    loaded = read_dense(weights, arch)
    loaded.network.to(resolve_device(device))
    return loaded


def score(loaded: LoadedDense, data: str, submission: str | None = None, **how: Any) -> DenseScore:
    """As `dense.score`; how far it is, and what was left out, is said on standard error.

    Of several processes every one calls this, looks at its part, and the first one tells.
    """
    first, shared = distributed.rank() == 0, distributed.world_size() > 1
    if first:
        how |= {"progress": counter(stderr_console(), "pictures"), "notice": say}
    how["submission"] = None if submission is None else Path(submission)
    return dense.score(loaded, data, How(**how, shared=shared))


def keep_per_class(found: DenseScore, results: Path | None) -> None:
    """per_class.csv beside the file of results, if there is one; by the first process."""
    if results is not None and distributed.rank() == 0:
        path = results.parent / CLASSES_FILE
        write_classes(path, found.per_class)
        say(f"per class: {path}")


def check_submission(name: str | None, task: str) -> None:
    """Raises UsageError for a name that cannot be what is submitted."""
    if name is not None:
        submission.check(Path(name), task == SEGMENTATION)


def tell_submission(name: str | None) -> None:
    """Where it lies, on standard error; by the first process."""
    if name is not None and distributed.rank() == 0:
        say(f"to submit: {name}")


def refuse_annotated(weights: str, data: str) -> None:
    """Raises UsageError where a classifier is asked about pictures with masks, or with objects.

    Their folders would be taken for classes.
    """
    folder = Path(data).expanduser()
    ade = folder / "ADEChallengeData2016"
    pairs = [(folder / "masks", folder / "images"), (ade / "annotations", ade / "images")]
    masked = any(one.is_dir() and other.is_dir() for one, other in pairs)
    if masked or (folder / "SegmentationClass").is_dir():
        raise UsageError(f"{data} holds pictures with masks, and {weights} is a classifier")
    if any((folder / "annotations").glob("instances_*.json")) or (folder / "Annotations").is_dir():
        raise UsageError(f"{data} holds annotated objects, and {weights} is a classifier")


@dataclass(frozen=True)
class Looking:
    """What `xdino predict` was asked for.

    out: a folder, None for no files. memory: GB that a picture may take. tile: pixels a side.
    """

    out: Path | None
    threshold: float = 0.5
    shorter_side: int | None = None
    memory: float | None = None
    tile: int | None = None


@dataclass
class Found:
    """Everything that was found, as JSON has it, and the files that were written."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def predict(loaded: LoadedDense, names: Sequence[str], looking: Looking) -> tuple[Any, list[Path]]:
    """Look at every image and frame.

    Returns:
        What predictions.json holds, and the paths of all files but masks.

    Raises:
        UsageError: nothing there, a folder that is a file, no image that can be read.
        RunFailed: a file cannot be written, a video is damaged.
    """
    if loaded.task != SEGMENTATION:
        pycocotools_mask()
    out = looking.out or Path()
    work = gather(names, loaded.channels, out, limit=EVERY)
    if looking.out is not None:
        make_folder(looking.out)
    bound = None if looking.memory is None else round(looking.memory * 1e9)
    seeing = Seeing(
        loaded,
        bound,
        looking.shorter_side,
        looking.tile,
        looking.threshold,
        lambda sentence: say(f"looking at {sentence}"),
    )
    making = _Making(seeing, looking, Found(), work)
    making.all()
    found = making.found
    tree = making.tree()
    if looking.out is not None:
        if loaded.task == SEGMENTATION:
            lines = "".join(f"{printable(name)}\n" for name in loaded.classes)
            write_text(looking.out / NAMES_FILE, lines)
            found.paths.append(looking.out / NAMES_FILE)
        write_text(looking.out / JSON_FILE, as_json(tree))
        found.paths.append(looking.out / JSON_FILE)
    _summarise(found, loaded)
    return tree, found.paths


class _Making:
    """Pictures and entries, one image or frame after the other."""

    def __init__(self, seeing: Seeing, looking: Looking, found: Found, work: Work) -> None:
        self.seeing, self.looking, self.found, self.work = seeing, looking, found, work
        self.loaded = seeing.loaded
        self.segments = self.loaded.task == SEGMENTATION

    def all(self) -> None:
        skipped, tell = self.work.skipped(), counter(stderr_console(), "pictures")
        items = self.work.items
        for done, item in enumerate(items, 1):
            image = _read(item, skipped)
            if image is None:
                continue
            picture = self._seen(image, item.name, item.stem, legend=True)
            if self.looking.out is not None:
                path = self.looking.out / f"{item.stem}-overlay.png"
                sheets.save(picture, path)
                self.found.paths.append(path)
            tell(done, len(items))
        for film in self.work.videos:
            self._film(film)

    def _film(self, film: Film) -> None:
        out = self.looking.out
        with ExitStack() as stack:
            path = None if out is None else out / f"{film.stem}-overlay.mp4"
            writer = None if path is None else stack.enter_context(film.writer(path))
            for number, frame in film.counted():
                name, stem = f"{film.stem}, frame {number}", f"{film.stem}-{number:06d}"
                picture = self._seen(frame.pixels, name, stem, legend=False)
                if writer is not None:
                    writer.add(np.asarray(picture), frame.time, frame.duration)
        if path is not None:
            self.found.paths.append(path)

    def _seen(self, image: np.ndarray, name: str, stem: str, legend: bool) -> Image.Image:
        """Look at an image uint8 [H, W, C]; its entries are kept, its mask is written, its overlay
        comes back."""
        photograph = sheets.as_rgb(image, self.loaded.channels)
        if not self.segments:
            objects = self.seeing.objects(image)
            self._keep_objects(objects, image, name)
            return overlays.detected(photograph, objects, self.loaded.classes)
        classes = self.seeing.classes(image)
        self._keep_classes(classes, name, stem)
        return overlays.segmented(photograph, classes, self.loaded.classes, legend)

    def _keep_classes(self, classes: np.ndarray, name: str, stem: str) -> None:
        shares = overlays.shares(classes, self.loaded.classes)
        entry: dict[str, Any] = {
            "image": printable(name),
            "width": classes.shape[1],
            "height": classes.shape[0],
            "classes": [
                {"name": printable(own), "number": self.loaded.classes.index(own), "share": share}
                for own, share in shares.items()
            ],
        }
        if self.looking.out is not None:
            path = self.looking.out / MASKS / f"{stem}.png"
            sheets.save(overlays.palette_mask(classes), path)
            entry["mask"] = str(path.relative_to(self.looking.out))
        self.found.images.append(entry)
        for own, share in shares.items():
            self.found.counts[own] += round(share * classes.size)

    def _keep_objects(self, objects: Sequence[Instance], image: np.ndarray, name: str) -> None:
        height, width = image.shape[:2]
        number, ids = len(self.found.images) + 1, category_ids(self.loaded)
        self.found.images.append(
            {"id": number, "file_name": printable(name), "width": width, "height": height}
        )
        for one in objects:
            left, top, right, bottom = one.box
            self.found.annotations.append(
                {
                    "id": len(self.found.annotations) + 1,
                    "image_id": number,
                    "category_id": ids[one.label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(one.mask.sum()),
                    "iscrowd": 0,
                    "score": one.score,
                    "segmentation": encoded(one.whole_mask((height, width))),
                }
            )
            self.found.counts[self.loaded.classes[one.label]] += 1

    def tree(self) -> Any:
        """A list of images; of a detector a COCO tree."""
        if self.segments:
            return self.found.images
        pairs = zip(category_ids(self.loaded), self.loaded.classes, strict=True)
        return {
            "images": self.found.images,
            "annotations": self.found.annotations,
            "categories": [{"id": number, "name": printable(name)} for number, name in pairs],
        }


def _read(item: Item, skipped: Skipped) -> np.ndarray | None:
    try:
        return item.read()
    except UsageError as error:
        skipped.add(item, error)
        return None


def category_ids(loaded: LoadedDense) -> list[int]:
    """Numbers of the classes in COCO files: those of the data that was learned from, else 1 to K."""
    told, count = loaded.facts.get("category_ids"), len(loaded.classes)
    if isinstance(told, list) and len({n for n in told if type(n) is int}) == len(told) == count:
        return told
    return [*range(1, count + 1)]


def _summarise(found: Found, loaded: LoadedDense) -> None:
    """What came out, on standard error."""
    common, whole = found.counts.most_common(), sum(found.counts.values())
    if loaded.task == SEGMENTATION:
        parts = [f"{name} {100 * count / max(whole, 1):.1f} %" for name, count in common[:5]]
    else:
        parts = [f"{name} {count:,}" for name, count in common[:5]] or ["nothing was found"]
    more = f" and {len(common) - 5:,} other classes" if len(common) > 5 else ""
    count = len(found.images)
    pictures = "1 picture" if count == 1 else f"{count:,} pictures"
    say(f"{pictures}: {', '.join(map(printable, parts))}{more}")


def shown_paths(paths: Sequence[Path]) -> Iterator[str]:
    """A line a file; of many pictures the first and how many."""
    pictures = [path for path in paths if path.name.endswith("-overlay.png")]
    others = [path for path in paths if path not in set(pictures)]
    yield from map(printable, pictures[:3])
    if len(pictures) > 3:
        yield f"and {len(pictures) - 3:,} more pictures beside them"
    yield from map(printable, others)
