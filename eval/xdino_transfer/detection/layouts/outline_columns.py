"""Outlines of many objects as columns: 860,000 of COCO's size are some 200 MB, also of a mapped file.

Coordinates that are whole hundredths of a pixel to the last bit, as COCO writes them, are kept as
those; others as they are.

Letters: M objects, P polygons of all of them, R of the objects whose outline is runs of pixels.
"""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from xdino.data.listing import ByteStrings
from xdino_transfer.detection.boxes import Size
from xdino_transfer.detection.outlines import Outline

_LIST = b" "  # begins a list of runs; COCO's strings have no such character


@dataclass(frozen=True)
class Outlines:
    """`Outlines.of` makes them, `at` gives one back.

    first: int64 [M + 1], polygons of an object. starts: int64 [P + 1], numbers of a polygon in
    `coordinates` (int32 hundredths, or float64). objects: int64 [R], rising; runs: of each its text.
    """

    first: np.ndarray
    starts: np.ndarray
    coordinates: np.ndarray
    objects: np.ndarray
    runs: ByteStrings

    @classmethod
    def of(cls, outlines: Iterable[Outline | None]) -> "Outlines":
        first, starts, coordinates = array("q", [0]), array("q", [0]), array("d")
        objects, runs = array("q"), list[bytes]()
        for number, outline in enumerate(outlines):
            if isinstance(outline, Mapping):
                counts = outline["counts"]
                objects.append(number)
                if isinstance(counts, list):
                    counts = _LIST + " ".join(map(str, counts)).encode()
                runs.append(counts.encode() if isinstance(counts, str) else counts)
            for polygon in () if outline is None or isinstance(outline, Mapping) else outline:
                coordinates.frombytes(np.asarray(polygon, np.float64).tobytes())
                starts.append(len(coordinates))
            first.append(len(starts) - 1)
        return cls(
            np.frombuffer(first, np.int64),
            np.frombuffer(starts, np.int64),
            _in_hundredths(np.frombuffer(coordinates, np.float64)),
            np.array(objects, np.int64),
            ByteStrings.of(runs),
        )

    def __len__(self) -> int:
        return len(self.first) - 1

    def any(self) -> bool:
        """Whether one of the objects has one."""
        return len(self.starts) > 1 or len(self.objects) > 0

    def at(self, row: int, size: Size) -> Outline | None:
        """The outline of an object in a picture of this size; None for none."""
        place = int(np.searchsorted(self.objects, row))
        if place < len(self.objects) and self.objects[place] == row:
            text = self.runs[place]
            is_list = text.startswith(_LIST)
            return {"size": [*size], "counts": [*map(int, text.split())] if is_list else text}
        starts = self.starts[self.first[row] : self.first[row + 1] + 1].tolist()
        divisor = 100 if self.coordinates.dtype == np.int32 else 1
        return [self.coordinates[begin:end] / divisor for begin, end in pairwise(starts)] or None

    def are_whole(self, count: int) -> bool:
        """Whether all fits together, of `count` objects whose columns were read from a file."""
        first, starts, objects = self.first, self.starts, self.objects
        if any(column.dtype != np.int64 or column.ndim != 1 for column in (first, starts, objects)):
            return False
        lengths = np.diff(starts)
        ends = (
            len(first) == count + 1
            and len(starts) > 0
            and (first[0], first[-1], starts[0], starts[-1])
            == (0, len(starts) - 1, 0, len(self.coordinates))
        )
        return bool(
            ends
            and (np.diff(first) >= 0).all()
            and ((lengths >= 6) & (lengths % 2 == 0)).all()
            and np.isfinite(self.coordinates).all()
            and self.runs.are_whole()
            and len(self.runs) == len(objects)
            and (np.diff(objects) > 0).all()
            and (not len(objects) or 0 <= objects[0] <= objects[-1] < count)
        )


def _in_hundredths(coordinates: np.ndarray) -> np.ndarray:
    """float64 -> int32 where nothing is lost, the same number where something is."""
    if not len(coordinates) or np.abs(coordinates).max() >= 2**31 / 100 - 1:
        return coordinates
    hundredths = np.rint(coordinates * 100).astype(np.int32)
    return hundredths if np.array_equal(hundredths / 100, coordinates) else coordinates
