"""The two kinds of failure that a person is told about in one sentence.

`UsageError` is a `ValueError`: what was asked for cannot be done as asked (exit code 2).
`RunFailed` is the world's doing: a disk, a file, a loss that is no longer finite (exit code 1).
Anything else that is raised is a defect, and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """What was asked for cannot be done; the message names the mend. Exit code 2."""


class RunFailed(RuntimeError):
    """The world stopped a run that was asked for correctly. Exit code 1."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A half-sentence that names the choice closest to `name`, else all of them.

    >>> nearest("archh", ["arch", "depth"])
    'did you mean "arch"?'
    """
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return "choose one of " + ", ".join(choices) if choices else "there is none to choose from"


class Stopped(Exception):
    """A signal ended a run after its state was saved. Exit code 75."""
