"""What every data set must be, in one place: files that are there, labels that mean something."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from xdino.errors import UsageError, asked, nearest


def existing(folder: Path, name: str, what: str) -> Path:
    """FOLDER/NAME. Raises UsageError where it is not there, with the nearest name that is."""
    path = folder / name
    with asked(f"{path} cannot be read"):
        if path.exists():
            return path
        beside = (
            sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        )
    hint = nearest(path.name, beside)
    hint = f"; {hint}" if hint.startswith("did you") else ""
    raise UsageError(f"{what} is not whole: {path} does not exist{hint}")


def checked(
    labels: Iterable[int], classes: Sequence[str], where: str, empty: bool = False
) -> np.ndarray:
    """Labels as int64 [N], all of them numbers of `classes`.

    empty: classes without an image are allowed, as in a test split.

    Raises:
        UsageError: labels outside of the classes, fewer than two classes, no image, an empty class.
    """
    found = np.array([*labels], np.int64)
    if len(classes) < 2:
        raise UsageError(f"{where} has {len(classes)} class, and telling classes apart needs two")
    if not len(found):
        raise UsageError(f"{where} holds no image")
    outside = found[(found < 0) | (found >= len(classes))]
    if len(outside):
        raise UsageError(
            f"{where} has {len(outside):,} labels outside of 0 to {len(classes) - 1}, the first "
            f"{outside[0]}"
        )
    absent = np.flatnonzero(np.bincount(found, minlength=len(classes)) == 0)
    if len(absent) and not empty:
        names = ", ".join(classes[label] for label in absent[:5])
        more = f" and {len(absent) - 5:,} more" if len(absent) > 5 else ""
        raise UsageError(f"{where} has classes without an image: {names}{more}")
    return found


def all_there(root: Path, paths: Sequence[str], where: str) -> None:
    """Raises UsageError where files that an index names are missing."""
    missing = [path for path in paths if not _is_file(root / path)]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        names = names.encode("utf-8", "backslashreplace").decode()
        raise UsageError(
            f"{len(missing):,} of the {len(paths):,} images of {where} are not below {root}: {names}"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except ValueError:  # a name that no file can have
        return False
