"""Copies of shards on this machine, as many as fit: whole files, under a limit that holds for all.

Every image is read once an epoch, in an order that goes through all shards at once, so that nothing
would be won by giving up one shard for another: what is there stays, and the rest is read in pieces.
Only copies of other data make room, the longest unused first. Several processes share the folder: its
lock is held while space is counted, and a copy's own while it is made.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xdino.errors import RunFailed, UsageError
from xdino.runtime.kept import cache_folder

_GIGABYTES = 20.0
_PIECE = 8 << 20  # bytes that are asked for at once
_PART = ".part"


@dataclass(frozen=True)
class Wanted:
    """A shard of this size, in bytes, and of this content (`Transport.facts`)."""

    address: str
    size: int
    stamp: int

    @property
    def name(self) -> str:
        """Of its copy: another content has another."""
        told = f"{self.address}\0{self.size}\0{self.stamp}".encode()
        return f"{hashlib.blake2b(told, digest_size=12).hexdigest()}.tar"


class ShardCache:
    """The folder of copies. wanted: the shards that are in use, which never make room."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        given = os.environ.get("XDINO_CACHE")
        self.folder = (Path(given).expanduser() if given else cache_folder()) / "shards"
        self.most = _limit()
        self._keep = {shard.name for shard in wanted}

    def copy_of(self, shard: Wanted) -> Path | None:
        """The copy, if there is one."""
        path = self.folder / shard.name
        try:
            if path.stat().st_size != shard.size:
                return None
            os.utime(path)
        except OSError:
            return None
        return path

    def make(self, shard: Wanted, read: Callable[[str, int, int], bytes]) -> Path | None:
        """The copy, made now; None where there is no room for it or another process is at it.

        read: as `Transport.read`, whose errors pass through.
        """
        path, part = self.folder / shard.name, self.folder / f"{shard.name}{_PART}"
        descriptor = self._reserve(part, shard.size)
        if descriptor is None:
            return self.copy_of(shard)
        try:
            for offset in range(0, shard.size, _PIECE):
                data = read(shard.address, min(_PIECE, shard.size - offset), offset)
                if len(data) < min(_PIECE, shard.size - offset):
                    return None  # it is another one by now
                os.pwrite(descriptor, data, offset)
            os.replace(part, path)
            return path
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
            os.close(descriptor)

    def _reserve(self, part: Path, size: int) -> int | None:
        """A file of this size, locked; None where it does not fit or somebody else has it."""
        with contextlib.suppress(OSError), self._counting():
            if (part.parent / part.name.removesuffix(_PART)).exists():
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(part)) and self._room(part, size):
                    os.posix_fallocate(descriptor, 0, max(size, 1))
                    os.ftruncate(descriptor, size)
                    return descriptor
                part.unlink()
            except BlockingIOError:
                pass
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink()
            os.close(descriptor)
        return None

    def _room(self, part: Path, size: int) -> bool:
        """Whether `size` bytes fit beside `part`'s neighbours; copies of other data may go for it."""
        held = {path: path.stat() for path in self.folder.iterdir() if path != part}
        held = {path: status for path, status in held.items() if path.suffix in (".tar", _PART)}
        total = sum(status.st_size for status in held.values())
        for path, status in sorted(held.items(), key=lambda item: item[1].st_mtime):
            if total + size <= self.most:
                break
            if path.name not in self._keep and not _is_being_made(path):
                path.unlink(missing_ok=True)
                total -= status.st_size
        return total + size <= self.most

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_being_made(path: Path) -> bool:
    if path.suffix != _PART:
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False  # who made it was killed


def _limit() -> int:
    """Bytes of copies: XDINO_CACHE_GB, by default 20; 0 keeps none."""
    text = os.environ.get("XDINO_CACHE_GB", "")
    try:
        return int(max(0.0, float(text) if text else _GIGABYTES) * 1e9)
    except (ValueError, OverflowError):
        raise UsageError(f"XDINO_CACHE_GB must be a number of gigabytes, got {text}") from None


#: What ends the making of a copy without an end to the reading of its shard.
UNREACHED = (RunFailed, UsageError)
