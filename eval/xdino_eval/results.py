"""One schema for every number: a row says what was measured, on what, and how.

`results.json` is a list of flat objects that a person can read and `jq` can filter. A file is
written beside the old one and renamed, so a reader sees all the old rows or all the new ones.
Processes append one after the other.
"""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdino.errors import RunFailed, world
from xdino.runtime.atomic import write_text

if TYPE_CHECKING:  # torch takes seconds, and rows are read and written without it
    from xdino_eval.features import Features

CLASSES_FILE = "per_class.csv"  # beside results.json
LARGEST = 1e15  # of any number in a row: JSON has integers that no float holds
PATIENCE = 60.0  # seconds that one process waits for the others' rows


@dataclass(frozen=True)
class Row:
    """One measurement and its protocol.

    `top1` and `top5` are in per cent, None for what is no classification; such a row has named
    `metrics` instead ("mAP medium", "J mean"), in per cent too, but for measures of quality, which
    have no unit. `seconds` is the wall clock of the evaluation (for cached features without their
    extraction), sizes count the images that could be read. `checkpoint` is a SHA-256 or a name,
    `features` says which: "teacher, iteration 1234" or "raw pixels".
    """

    protocol: str
    settings: dict[str, Any]
    top1: float | None
    top5: float | None
    data: str
    transform: str
    train_size: int
    val_size: int
    checkpoint: str = ""
    features: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def signed(rows: Iterable[Row], checkpoint: str, features: str) -> list[Row]:
    """The rows with their origin filled in: which weights, and which features of them."""
    return [replace(row, checkpoint=checkpoint, features=features) for row in rows]


def load(path: Path | str) -> list[Row]:
    """The rows of `path`; none if there is no such file. Rows from before a field was added lack it.

    Raises:
        RunFailed: the file is damaged, cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        return [_row(entry) for entry in entries(path)]
    except (ValueError, TypeError) as error:
        raise RunFailed(
            f"{path} does not hold result rows ({error}); nothing was written. "
            "Move it away, or mend it by hand"
        ) from error


def entries(path: Path) -> list[Any]:
    """The JSON list in a file; an empty one if there is no such file.

    Raises:
        RunFailed: it cannot be read. ValueError: it holds something else.
    """
    try:
        with world(f"read {path}"):
            content = path.read_bytes()
    except RunFailed as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    try:
        found = json.loads(content.decode(), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("lists within lists without end") from None
    if not isinstance(found, list):
        raise ValueError("not a list")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    "protocol": str, "settings": dict, "top1": (*_NUMBER, type(None)), "top5": (*_NUMBER, type(None)),
    "data": str, "transform": str, "train_size": int, "val_size": int, "checkpoint": str,
    "features": str, "seconds": _NUMBER, "notes": list, "metrics": dict,
}  # fmt: skip


def _row(entry: Any) -> Row:
    """The row that a JSON object is. Raises ValueError or TypeError where it is none."""
    if not isinstance(entry, dict) or entry.keys() | {"metrics"} != {f.name for f in fields(Row)}:
        raise ValueError(f"a row with the fields {sorted(entry)}")  # of before metrics have none
    for name, value in entry.items():
        if not isinstance(value, _KINDS[name]) or isinstance(value, bool):
            raise ValueError(f"a row whose {name} is {json.dumps(value):.40}")
    if not all(isinstance(note, str) for note in entry["notes"]):
        raise ValueError("a row with notes that are no text")
    if not all(isinstance(value, _NUMBER) for value in entry.get("metrics", {}).values()):
        raise ValueError("a row with metrics that are no numbers")
    numbers = [entry[name] for name in ("top1", "top5", "seconds", "train_size", "val_size")]
    if any(
        abs(n) > LARGEST for n in (*numbers, *entry.get("metrics", {}).values()) if n is not None
    ):
        raise ValueError("a row with a number that nothing measures")
    return Row(**entry)


def append(
    path: Path | str, rows: Sequence[Row], instead_of: Callable[[Row], bool] = lambda row: False
) -> None:
    """Add `rows` to the file at `path`, making it if need be; `instead_of`: rows that go for them.

    Raises:
        ValueError: a row without its origin (see `signed`), or with a number that is not finite.
        RunFailed: the existing file is damaged and left as it is, or it cannot be written.
    """
    for row in rows:
        if not row.checkpoint or not row.features:
            raise ValueError(f"a {row.protocol} row names no checkpoint or no features: sign it")
    path = Path(path)
    as_json([asdict(row) for row in rows])  # before anything is touched
    with locked(path):
        kept = [row for row in load(path) if not instead_of(row)]
        write_text(path, as_json([asdict(row) for row in [*kept, *rows]]))


def as_json(value: Any) -> str:
    """JSON for people. Names that are no UTF-8 come out as escapes, which JSON reads back.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Alone with the file at `path` among processes that ask, on one machine or on several.

    The lock is a hidden file beside it, removed again at the end. One that a killed process left is
    nobody's: the lock is the system's, not the name's.

    Raises:
        RunFailed: another process keeps it for more than `patience` seconds, or it cannot be made.
    """
    hidden = path.with_name(f".{path.name}.lock")
    until = time.monotonic() + (PATIENCE if patience is None else patience)
    with world(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if _held(lock, hidden):
                break
            os.close(lock)
            if time.monotonic() > until:
                raise RunFailed(
                    f"cannot write {path}: another process holds {hidden}. Is it stuck?"
                )
            time.sleep(0.05)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()
        os.close(lock)


def _held(descriptor: int, hidden: Path) -> bool:
    """Whether this process has the lock now, and the name is still that of the file it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), hidden.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return True  # a file system without locks: as good as alone
        raise


def row_of(
    protocol: str,
    settings: dict[str, object],
    score: tuple[float, float],
    train: "Features",
    val: "Features",
    seconds: float,
    notes: Sequence[str] = (),
) -> Row:
    """A result row, not signed yet, of an evaluation on features; skipped images are noted."""
    skipped = [
        f"{len(split.skipped)} images of {split.data} could not be read"
        for split in (train, val)
        if split.skipped
    ]
    return Row(
        protocol=protocol,
        settings=dict(settings),
        top1=score[0],
        top5=score[1],
        data=train.data if train.data == val.data else f"{train.data} -> {val.data}",
        transform=val.transform,
        train_size=len(train.features),
        val_size=len(val.features),
        seconds=round(seconds, 3),
        notes=[*skipped, *notes],
    )


def write_classes(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A line a class under the names of its numbers: whole ones, per cent, None where there is none.

    Raises:
        RunFailed: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(lines[0] if lines else ())
    for line in lines:
        writer.writerow(f"{v:.4f}" if isinstance(v, float) else v for v in line.values())
    write_text(path, text.getvalue())
