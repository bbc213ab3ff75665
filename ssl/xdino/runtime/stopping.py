"""Signals that ask a run to stop, and what they may interrupt.

A step is finished before a run stops, so that the state that is saved is whole. Planning and
evaluations leave nothing behind when they are abandoned, so they end at once.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from xdino.errors import Stopped

# SIGUSR1 and SIGUSR2 are what schedulers send before the time is up (Slurm's --signal, submitit).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Remembers the first stop signal. A worker of torchrun also stops when torchrun is gone.

    Only the main thread of a process can listen; elsewhere nothing is ever heard.

    Args:
        last: nothing follows in this process but its end, which signals do not disturb any more: what
            it ends with is decided.
    """

    def __init__(self, last: bool = False) -> None:
        self._last = last
        self._name: str | None = None
        self._abandons = False
        self._before: dict[int, Any] = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def name(self) -> str | None:
        """What asked for the stop, "SIGTERM" and the like; None while nothing did."""
        if self._name is None and self._launcher not in (None, os.getppid()):
            self._name = "the end of its launcher"
        return self._name

    def _catch(self, number: int, frame: FrameType | None) -> None:
        # Asked twice: now. A launcher passes on what the terminal has sent to all by itself.
        if self._name is not None and number == signal.SIGINT and self._launcher is None:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        if self._abandons:
            self._abandons = False  # once: cleaning up is not to be interrupted again
            raise Stopped(f"stopped by {self._name}; the same command continues it")

    def __enter__(self) -> "StopSignal":
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._last else handler)
        self._before.clear()

    @contextlib.contextmanager
    def abandoning(self, what: str) -> Iterator[None]:
        """Inside, a stop signal ends the work at once.

        Raises:
            Stopped: with a sentence that says `what` was abandoned.
        """
        try:
            self._abandons = True
            if self.name is not None:  # it came before
                raise Stopped
            yield
        except Stopped:
            raise Stopped(f"stopped by {self.name} {what}; the same command continues it") from None
        finally:
            self._abandons = False


# An evaluation on all processes must not be left by one of them between two exchanges, in which the
# others would wait for it: it asks, and lets itself be interrupted only where nobody waits.
_heeded: StopSignal | None = None


@contextlib.contextmanager
def heeding(stop: StopSignal) -> Iterator[None]:
    """Inside, `asked` and `abandonable` are about this signal."""
    global _heeded
    before, _heeded = _heeded, stop
    try:
        yield
    finally:
        _heeded = before


def asked() -> None:
    """Raises Stopped where the signal that is heeded has come."""
    if _heeded is not None and _heeded.name is not None:
        raise Stopped(f"stopped by {_heeded.name}")


def abandonable(what: str) -> contextlib.AbstractContextManager[None]:
    """Inside, the signal that is heeded ends the work at once, see `StopSignal.abandoning`."""
    return contextlib.nullcontext() if _heeded is None else _heeded.abandoning(what)
