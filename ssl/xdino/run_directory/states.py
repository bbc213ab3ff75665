"""The states of a run in its checkpoints/: the last, the one before it, newest ones, milestones.

last.pt, previous.pt         the two newest
iteration_00001200.pt        one of the newest, where `runtime.keep_last` asks for more than two
epoch_0020.pt                a milestone (`runtime.keep_every`), which is never removed
left_epoch_0040.pt           from a part of the run that was left by --from-iteration

Another name of a state is a hard link where the disk knows such a thing, else a copy that shares its
blocks, else a copy: mostly it takes no room.
"""

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path

from xdino import checkpoint
from xdino.errors import RunFailed, UsageError, world
from xdino.runtime.atomic import written_beside

PREVIOUS = "previous.pt"
LEFT = "left_"
_NEWEST = "iteration_[0-9]*.pt"
_CLONE = 0x40049409  # FICLONE of linux/fs.h: a copy that shares its blocks


def kept(folder: Path) -> list[Path]:
    """The states besides last.pt, the newest first."""
    newest = sorted(folder.glob(_NEWEST), reverse=True)
    epochs = sorted(folder.glob("epoch_[0-9]*.pt"), reverse=True)
    return [path for path in (folder / PREVIOUS, *newest, *epochs) if path.is_file()]


def keep_newest(last: Path, iteration: int, count: int) -> None:
    """Keep last.pt, of this iteration, under its number too, and so `count` of the newest."""
    folder = last.parent
    if count > 2:
        linked(last, folder / f"iteration_{iteration:08}.pt")
    for path in sorted(folder.glob(_NEWEST), reverse=True)[count if count > 2 else 0 :]:
        path.unlink(missing_ok=True)


def iteration_of(path: Path) -> int | None:
    """The iteration of a state, without its tensors; None where it is damaged."""
    if named := re.fullmatch(r"iteration_(\d+)\.pt", path.name):
        return int(named[1])
    try:
        return checkpoint.iteration_of(path)
    except RunFailed:
        return None


def find(last: Path, iteration: int) -> Path:
    """The state of an iteration.

    Raises:
        UsageError: none is kept; with the nearest that are.
    """
    found = {iteration_of(path): path for path in (*kept(last.parent), last) if path.is_file()}
    if iteration in found:
        return found[iteration]
    known = sorted(number for number in found if number is not None)
    near = sorted(known, key=lambda number: abs(number - iteration))[:6]
    there = ", ".join(f"{number:,}" for number in sorted(near))
    raise UsageError(
        f"{last.parent.parent} keeps no state of iteration {iteration:,}: "
        + (f"those of {there} are there" if there else "there is none at all")
        + " (runtime.keep_last and runtime.keep_every say which are kept)"
    )


def go_back(last: Path, iteration: int) -> None:
    """The state of this iteration becomes last.pt; later ones are called otherwise from here on.

    Raises:
        UsageError: as `find`.
    """
    wanted = find(last, iteration)
    later = [
        path
        for path in (*kept(last.parent), last)
        if path.is_file() and (iteration_of(path) or 0) > iteration
    ]
    with world(f"go back to {wanted}"):
        for path in later:
            if path.name == PREVIOUS or re.fullmatch(r"iteration_\d+\.pt", path.name):
                path.unlink()
            else:
                linked(path, path.with_name(LEFT + path.name))
                if path != last:
                    path.unlink()
        if wanted != last:
            linked(wanted, last)


def linked(path: Path, name: Path) -> None:
    """`name` becomes another name of the file `path`, or a copy where the disk knows no such thing.

    Never half of it, and `name` is never absent.
    """
    with written_beside(name) as beside:
        beside.unlink()
        try:
            os.link(path, beside)
        except OSError:
            if not _cloned(path, beside):
                shutil.copyfile(path, beside)


def _cloned(path: Path, copy: Path) -> bool:
    """Whether `copy` is one of `path` that shares its blocks."""
    with contextlib.suppress(OSError), open(path, "rb") as source, open(copy, "wb") as target:
        fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
        return True
    return False
