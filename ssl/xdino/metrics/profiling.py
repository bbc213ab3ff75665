"""What some steps of a run spend their time on, as torch's profiler sees them."""

import contextlib
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from xdino.runtime.atomic import written_beside

WARM = 3  # steps that pass before: they build what later ones find


class Profile:
    """A trace of `count` steps, after some that warm up; nothing where `count` is 0.

    RUN/profile.json.gz is opened by ui.perfetto.dev or chrome://tracing. The numbers that training
    comes to are the same; the steps that are looked at are slower.
    """

    def __init__(self, count: int) -> None:
        self.left, self._passed = count, 0
        self._running: profile | None = None

    def before_step(self) -> None:
        if self.left and self._running is None and self._passed >= WARM:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=kinds, acc_events=True)
            self._running.start()

    def after_step(self, run_dir: Path) -> str | None:
        """A sentence when the trace is written, else None.

        Raises:
            RunFailed: it cannot be written.
        """
        self._passed += 1
        if self._running is None:
            return None
        self.left -= 1
        if self.left:
            return None
        self._running.stop()
        path = run_dir / "profile.json.gz"
        with written_beside(path) as beside:
            self._running.export_chrome_trace(str(beside))
        self._running = None
        return f"a trace of the steps is in {path}: ui.perfetto.dev opens it"

    def close(self) -> None:
        """Give up a trace that has not come to its end."""
        if self._running is not None:
            with contextlib.suppress(RuntimeError):
                self._running.stop()
            self._running, self.left = None, 0
