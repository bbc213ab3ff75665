"""Places that a person names, looked for before anything large is imported: a mistyped path is
answered at once.

What is there may still be of the wrong kind; whoever opens it says so.
"""

import glob
import itertools
import os
import re
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
        if not data or data.partition(":")[0] in DATA_SETS or is_address(data):
            continue
        if _is_missing(data) and not matching(data):
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


# Many at once

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST = 1_000_000  # names that braces may stand for


def is_address(data: str) -> bool:
    """Whether it lies in a store over a network: https://..., s3://..."""
    return _ADDRESS.match(data) is not None


def without_braces(pattern: str) -> list[str]:
    """What {000..099} and {a,b} stand for, in their order, as in a shell.

    Raises:
        UsageError: more than a million names.

    >>> without_braces("{train,val}-{08..10}.tar")[1:4]
    ['train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    parts: list[list[str]] = []
    end = 0
    for found in _BRACES.finditer(pattern):
        low, high, words = found.groups()
        if words is None:
            width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
            step = 1 if int(low) <= int(high) else -1
            numbers = range(int(low), int(high) + step, step)
            if len(numbers) > _MOST:
                raise UsageError(f"{pattern} stands for more than {_MOST:,} names")
            words_of = [f"{number:0{width}}" for number in numbers]
        else:
            words_of = words.split(",")
        parts += [[pattern[end : found.start()]], words_of]
        end = found.end()
    parts.append([pattern[end:]])
    count = 1
    for part in parts:
        count *= len(part)
    if count > _MOST:
        raise UsageError(f"{pattern} stands for more than {_MOST:,} names")
    return ["".join(each) for each in itertools.product(*parts)]


def matching(data: str) -> list[str]:
    """The paths that a pattern stands for; of braces alone, whether they are there or not.

    Empty where it is no pattern, and where nothing matches.
    """
    names = without_braces(os.path.expanduser(data))
    if len(names) == 1 and names[0] == os.path.expanduser(data) and not glob.has_magic(data):
        return []
    found = [sorted(glob.glob(name)) if glob.has_magic(name) else [name] for name in names]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))
