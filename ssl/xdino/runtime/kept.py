"""Tables that take long to make, kept in a file and read back by mapping it: one copy a machine.

The file is safetensors', so that nothing in it is ever executed; what it tells besides arrays is JSON
in its header. It lies where its maker says, or in the user's cache folder where that place cannot be
written. A file that is damaged, cut short, or of another version is as good as none: each array comes
with its checksum. It is written beside and renamed, so that a process that has the old one mapped
keeps it, and two that write at once do not meet.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xdino.errors import RunFailed
from xdino.runtime.atomic import written_beside

_VERSION = 1
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
_LONGEST_HEADER = 1 << 26  # bytes


@dataclass(frozen=True)
class Kept:
    """arrays: read-only, uint8, int32 or int64; told: plain JSON."""

    told: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def kept(place: Path, fresh: Callable[[Kept], bool], make: Callable[[], Kept | None]) -> bool:
    """Whether `place` has what is fresh; where it has not, it is made and kept.

    Of several processes of a machine one makes it, and the others wait for it. fresh: is asked about
    what was found, and may take from it what it needs. make: None where nothing is to be kept.
    """
    if _found(place, fresh):
        return True
    with _alone(place) as waited:
        if waited and _found(place, fresh):
            return True
        made = make()
        if made is not None:
            _write(place, made)
    return False


def in_cache(place: Path) -> Path:
    """Where in the user's cache folder lies what belongs to `place`."""
    whole = os.fsencode(os.path.abspath(place))
    name = f"{hashlib.blake2b(whole, digest_size=8).hexdigest()}-{place.name.lstrip('.')[-100:]}"
    return cache_folder() / "indexes" / name


def cache_folder() -> Path:
    """`XDG_CACHE_HOME/xdino`, by default ~/.cache/xdino."""
    given = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home
        return Path(given or Path.home() / ".cache") / "xdino"
    return Path(tempfile.gettempdir()) / f"xdino-{os.getuid()}"


def _found(place: Path, fresh: Callable[[Kept], bool]) -> bool:
    for path in (place, in_cache(place)):
        found = _read(path)
        if found is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError, IndexError, AttributeError):
                if fresh(found):
                    return True
    return False


# The file


def _write(place: Path, made: Kept) -> None:
    from safetensors.numpy import save_file

    # A table that cannot be kept costs the time to make it again, nothing else.
    for path in (place, in_cache(place)):
        with contextlib.suppress(RunFailed), written_beside(path) as beside:
            arrays = {name: np.ascontiguousarray(array) for name, array in made.arrays.items()}
            sums = {name: zlib.crc32(array.data) for name, array in arrays.items()}
            told = json.dumps({"version": _VERSION, "sums": sums, "told": dict(made.told)})
            save_file(arrays, beside, {"told": told, "sum": str(zlib.crc32(told.encode()))})
            return


def _read(path: Path) -> Kept | None:
    """What a file holds; None where it is absent or not whole."""
    try:
        with open(path, "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start = 8 + int.from_bytes(mapped[:8], "little")
        if not 8 < start <= min(len(mapped), _LONGEST_HEADER):
            return None
        header = json.loads(bytes(mapped[8:start]))
        text = header.pop("__metadata__")
        told = json.loads(text["told"])
        if zlib.crc32(text["told"].encode()) != int(text["sum"]) or told["version"] != _VERSION:
            return None
        arrays = {}
        for name, facts in header.items():
            first, last = facts["data_offsets"]
            piece = mapped[start + first : start + last]
            if zlib.crc32(piece) != told["sums"].pop(name):
                return None
            arrays[name] = np.frombuffer(piece, _DTYPES[facts["dtype"]]).reshape(facts["shape"])
        return None if told["sums"] else Kept(told["told"], arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Until the first of this user's processes on this machine that came in for `place` is out again.

    Yields whether that was another. All who waited then go in at once: if they find nothing that was
    kept, one after the other would not, either. The lock is the kernel's, in the machine's own folder
    for what is temporary, and ends with its holder.
    """
    descriptor, waited = None, False
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"xdino-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and not folder.is_symlink():
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(folder / f"{in_cache(place).name[:16]}.lock", flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    try:
        yield waited
    finally:
        if descriptor is not None:
            os.close(descriptor)
