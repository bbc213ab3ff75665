"""The kinds of failure that a person is told about in one sentence, and the one door to them.

`UsageError` is a `ValueError`: what was asked for cannot be done as asked (exit code 2).
`RunFailed` is the world's doing: a disk, a file, a loss that is no longer finite (exit code 1).
Whatever libraries raise over files is translated where it arises: `asked` over what a person named,
`world` over what the program reads and writes by itself. Anything else that is raised is a defect.
"""

import contextlib
import difflib
import math
import os
from collections.abc import Iterable, Iterator


class UsageError(ValueError):
    """What was asked for cannot be done; the message names the mend. Exit code 2."""


class RunFailed(RuntimeError):
    """The world stopped a run that was asked for correctly. Exit code 1."""


class NonFinite(RunFailed):
    """A number of a step is none any more (infinite or NaN), and the step moved nothing.

    Args:
        sentence: which number it was.
        loss: the loss of that step.
        standing: how many steps, that one included, moved nothing until it was noticed.
        spoilt: the weights themselves are no longer finite, so that no step from here can be.
    """

    def __init__(
        self, sentence: str, loss: float = math.nan, standing: int = 1, spoilt: bool = False
    ) -> None:
        super().__init__(sentence)
        self.loss, self.standing, self.spoilt = loss, standing, spoilt
        # Filled in by the loop: the step's number as in metrics.jsonl, and what became of it.
        self.number: int | None = None
        self.action: str | None = None


class Stopped(Exception):
    """A signal ended a run after its state was saved. Exit code 75."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A half-sentence that names the choice closest to `name`, else all of them.

    >>> nearest("archh", ["arch", "depth"])
    'did you mean "arch"?'
    """
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    if not choices:
        return "there is none to choose from"
    more = f" and {len(choices) - 30:,} others" if len(choices) > 30 else ""
    return "choose one of " + ", ".join(choices[:30]) + more


def reason(error: BaseException) -> str:
    """What went wrong, in half a sentence without the library's own decoration.

    >>> reason(FileNotFoundError(2, "No such file or directory", "a.yaml"))
    'No such file or directory'
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, MemoryError):
        return "out of memory"
    first = str(error).strip().splitlines()
    return first[0] if first else type(error).__name__


@contextlib.contextmanager
def world(doing: str) -> Iterator[None]:
    """Inside, failures of disk, network and memory become `RunFailed("cannot DOING: reason")`.

    For reading and writing only: there safetensors raises an Exception of its own, and torch raises
    RuntimeError over a full disk, so that every exception but a defect's (TypeError and the like)
    is the world's.
    """
    try:
        yield
    except (UsageError, RunFailed):
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        raise RunFailed(f"cannot {doing}: {reason(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise RunFailed(f"cannot {doing}: {reason(error)}") from error


@contextlib.contextmanager
def asked(what: str) -> Iterator[None]:
    """Inside, an OSError over what a person named becomes `UsageError("WHAT: reason")`.

    Permissions, loops of links, names that are too long or hold a zero byte, unknown ~users.
    """
    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{what}: {reason(error)}") from error
    except ValueError as error:
        if "null byte" not in str(error) and "null character" not in str(error):
            raise
        raise UsageError(f"{what}: the name holds a zero byte") from error
    except RuntimeError as error:  # pathlib, of ~ without a home
        if "home directory" not in str(error):
            raise
        raise UsageError(f"{what}: {reason(error)}") from error
