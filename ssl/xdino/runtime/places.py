"""Places that a person names, looked for before anything large is imported: a mistyped path is
answered at once.

What is there may still be of the wrong kind; whoever opens it says so.
"""

import os
from pathlib import Path

from xdino.errors import UsageError, nearest

#: Data sets that have a name instead of a place.
DATA_SETS = ("fashion_mnist", "fashion_mnist_sample", "fashion_mnist_scattered")


def check_data(*named: str | None) -> None:
    """Look for each `data`, but for those that are None or empty.

    Raises:
        UsageError: it is neither a data set's name, a folder nor a file; the message names the nearest.
    """
    for data in named:
        if data and data.partition(":")[0] not in DATA_SETS and _is_missing(data):
            raise UsageError(missing_data(data, Path(data).expanduser()))


def check_weights(weights: str | Path) -> None:
    """
    Raises:
        UsageError: there is no such file or folder.
    """
    if _is_missing(weights):
        raise UsageError(missing_weights(Path(weights).expanduser()))


def check_files(what: str, *named: str | Path | None) -> None:
    """
    Raises:
        UsageError: one is not there; `what`: what it should be, "folder".
    """
    for place in named:
        if place is not None and _is_missing(place):
            raise UsageError(f"there is no {what} {place}")


def missing_weights(path: Path) -> str:
    return f"there is no weights file or run directory {path}"


def missing_data(data: str, path: Path) -> str:
    """One sentence about a `data` that is neither a name, a folder nor a file."""
    if path.is_symlink():
        return f"{data} is a link to {os.readlink(path)}, which does not exist"
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    siblings = [entry.name for entry in os.scandir(parent)]
    if parent.is_dir() and path.is_file():
        return f"{data} does not exist: {path} is a file, not a folder"
    if len(Path(data).parts) == 1 and not data.startswith("~"):
        return (
            f'there is no data set or folder called "{data}"; '
            + nearest(data, [*DATA_SETS, *siblings])
            + f" (data sets: {', '.join(DATA_SETS)}; else a folder or a list of paths)"
        )
    hint = nearest(path.name, siblings)
    where = f"{data} does not exist: {parent} has no {path.name}"
    return where + (f"; {hint}" if hint.startswith("did you") else "")


def _is_missing(place: str | Path) -> bool:
    """Whether nothing is there; False where the system does not tell, for whoever opens it will."""
    try:
        os.stat(Path(place).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError, RuntimeError):  # permissions, loops, a zero byte, an unknown ~user
        return False
    return False
