"""A run folder belongs to one process at a time.

The kernel's lock on a file (flock) decides between processes of one machine, and lets go when its
holder dies. Where the folder is shared between machines that lock may not reach the others, so the
file also says who holds it, and its time is refreshed as a sign of life.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from xdino.errors import UsageError, world

LOCK_FILE = ".lock"
HEARTBEAT = 20.0  # seconds between signs of life
WRITTEN = 2.0  # seconds within which a holder has written who it is
SILENCE = 300.0  # seconds without one, after which another machine's holder counts as dead


def start_time(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's clock ticks; None if it is not there.

    "unknown" where the kernel does not tell. A number that was given to another process since has
    another start.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


class Lock:
    """Holds the folder's lock from `__enter__` to `__exit__`.

    `notice`: a sentence where the lock of a dead process was taken over, else None.

    Raises:
        UsageError: another process holds it; the message says which.
        RunFailed: the lock cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.notice: str | None = None
        self._descriptor: int | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "Lock":
        with world(f"lock {self.path.parent}"):
            self._descriptor = self._locked()
            try:
                self._take_over()
                mine = {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "start": start_time(os.getpid()),
                    "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "job": os.environ.get("SLURM_JOB_ID"),
                    "job_start": _job_start(),
                }
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, json.dumps(mine).encode() + b"\n", 0)
            except BaseException:
                os.close(self._descriptor)
                self._descriptor = None
                raise
        threading.Thread(target=self._beat, name="xdino-lock", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _locked(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    return descriptor
            except FileNotFoundError:
                pass  # its holder ended between the two lines: another file has the name now
            except BlockingIOError:
                held = _read_soon(descriptor)
                os.close(descriptor)
                raise UsageError(self._refusal(held)) from None
            except OSError:  # a file system without locks: the file's content decides
                return descriptor
            os.close(descriptor)

    def _take_over(self) -> None:
        """Look at who left the file behind: dead, or alive where the kernel's lock does not reach."""
        assert self._descriptor is not None
        held = _read(self._descriptor)
        if not held:
            return
        if held.get("host") == socket.gethostname():
            started = start_time(held["pid"]) if isinstance(held.get("pid"), int) else None
            if started is not None and started == held.get("start") and held["pid"] != os.getpid():
                raise UsageError(self._refusal(held))
            why = "which is not running any more"
        elif self._same_job_before(held):  # SLURM starts a job again when its node is lost
            why = "an earlier start of the same job"
        else:
            silent = self._silence()
            if silent < SILENCE:
                raise UsageError(
                    f"{self._refusal(held)}; its last sign of life is {max(silent, 0):.0f} s old, "
                    f"and it counts as dead after {SILENCE:.0f} s"
                )
            why = f"which has given no sign of life for {silent:.0f} s"
        self.notice = f"took over {self.path.parent} from {_holder(held)}, {why}"

    @staticmethod
    def _same_job_before(held: dict[str, Any]) -> bool:
        job, start = held.get("job"), held.get("job_start")
        return (
            job is not None
            and job == os.environ.get("SLURM_JOB_ID")
            and isinstance(start, int)
            and start < _job_start()
        )

    def _silence(self) -> float:
        """Seconds since the last sign of life, by the clock of whoever keeps the files."""
        assert self._descriptor is not None
        probe = self.path.with_name(f"{LOCK_FILE}.{os.getpid()}.tmp")
        try:
            probe.touch()
            return probe.stat().st_mtime - os.fstat(self._descriptor).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, held: dict[str, Any]) -> str:
        return (
            f"{self.path.parent} is in use by {_holder(held)}: wait for it or stop it, "
            "or choose another folder"
        )

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def holder_of(folder: Path) -> str | None:
    """Who holds the folder, in words; None where nobody does. Looks only, and takes no lock.

    Of another machine's holder its last sign of life decides, by the clock of this machine.
    """
    file = folder / LOCK_FILE
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        held = _read(descriptor)
        silent = time.time() - os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
    if held.get("host") == socket.gethostname():
        started = start_time(held["pid"]) if isinstance(held.get("pid"), int) else None
        alive = started is not None and started == held.get("start")
    else:
        alive = bool(held) and silent < SILENCE
    return _holder(held) if alive else None


def _read(descriptor: int) -> dict[str, Any]:
    try:
        held = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}  # somebody is about to write it, or was killed before
    return held if isinstance(held, dict) else {}


def _read_soon(descriptor: int) -> dict[str, Any]:
    """What the file says, once its holder, who has just taken it, has written it."""
    end = time.monotonic() + WRITTEN
    while not (held := _read(descriptor)) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def _job_start() -> int:
    """How often SLURM has started this job again."""
    text = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def _holder(held: dict[str, Any]) -> str:
    if not held:
        return "another process"
    return f"process {held.get('pid')} on {held.get('host')} (since {held.get('since')})"
