"""States that a thread writes while training goes on, one at a time, on the run's first process.

Training goes on while a state is copied and written. It waits before the first thing that would move
what is being copied (`copied`), and before the next state for the one before. What the disk refuses is
raised where somebody waits, and the loop looks for it after every step.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xdino import checkpoint
from xdino.run_directory.directory import RunDirectory
from xdino.runtime.device import free_memory

Export = Callable[[Path], None]


class StateWriter:
    """Writes a run's states, and the weights that follow from each.

    Args:
        newest: how many states are kept (`runtime.keep_last`).
        milestone: the name that a state of an iteration is kept by besides; None for none.
    """

    def __init__(
        self, run: RunDirectory, newest: int, milestone: Callable[[int], str | None]
    ) -> None:
        self.run, self.newest, self.milestone = run, newest, milestone
        self.good_at: int | None = None  # the last iteration whose state is on the disk
        self._snapshot = checkpoint.Snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()

    def begin(
        self, iteration: int, state: dict[str, Any], export: Export, later: Export | None
    ) -> None:
        """Write a state and its weights; what was begun before has been waited for.

        In this order: the weights follow from the state, and a run that was killed between the two
        writes them at its next start.

        Args:
            export: writes the weights as they are now. later: the same at any later time; None where
                that cannot be. Without it, or without memory for a copy, this waits for the disk.
        """
        assert self._thread is None, "wait for the one before it"
        free, needed = free_memory(torch.device("cpu")), self._snapshot.missing(state)
        if later is None or (free is not None and 2 * needed > free):
            self._write(iteration, state, export)
            return
        kept, fill = self._snapshot.begin(state)
        self._copied.clear()

        def work() -> None:
            try:
                try:
                    fill()
                finally:
                    self._copied.set()
                self._snapshot.wait()
                self._write(iteration, kept, later)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                self._error = error

        # None that the interpreter leaves behind: a process ends when its state is written.
        self._thread = threading.Thread(target=work, name="xdino-save")
        self._thread.start()

    def _write(self, iteration: int, state: dict[str, Any], export: Export) -> None:
        self.run.save(state, self.newest)
        self.good_at = iteration
        export(self.run.path / checkpoint.BACKBONE_FILE)
        name = self.milestone(iteration)
        if name is not None:
            self.run.keep(name)

    def copied(self) -> None:
        """Wait until what was begun has its copy: from here on anything may move."""
        self._copied.wait()

    @property
    def failed(self) -> bool:
        """Whether what was begun has ended in an error, which `wait` raises."""
        return self._error is not None

    def join(self) -> None:
        """Wait, and leave an error where it is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """What was begun is on the disk; raises what the write raised."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def last_good(self) -> str:
        """A sentence that names what can be continued from."""
        if self.good_at is None:
            return "No checkpoint was written yet"
        return f"The last good checkpoint is {self.run.state_file}, iteration {self.good_at}"
