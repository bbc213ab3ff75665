"""The command line: the commands put together, and what becomes of their errors.

Standard output carries results (a table, or JSON with --json); everything else goes to standard
error. Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and resumable.
"""

import contextlib
import itertools
import os
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from xdino.errors import RunFailed, Stopped, UsageError, reason
from xdino.runtime import rendezvous
from xdino_launch.commands import (
    benchmarks,
    classifying,
    features,
    forecasting,
    knn,
    learning,
    linear,
    listing,
    neighbours,
    pictures,
    pretraining,
    showing,
    suite,
    weights,
)
from xdino_launch.commands.options import Commands

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75


CHAPTERS = {  # of the help; what is in none comes last
    "Pretrain": ("demo", "look", "plan", "recipes", "pretrain", "submit", "runs", "report", "replay"),
    "Learn on": ("finetune", "segment", "detect", "score", "predict", "transfer"),
    "Judge the features": (
        "knn", "linear", "quality", "retrieval", "copydetection", "davis", "segment-score",
        "patch-probe",
    ),
    "Look": ("attention", "neighbours"),
    "Use elsewhere": ("features", "export", "pack", "bench"),
}  # fmt: skip


@click.group(
    cls=Commands, chapters=CHAPTERS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="xdino")
def xdino() -> None:
    """Pretrain XCiT without labels (DINO), judge the features, look at the attention."""


for command in (
    listing.recipes,
    listing.runs,
    pretraining.pretrain,
    pretraining.submit,
    learning.finetune,
    learning.segment,
    learning.detect,
    forecasting.look,
    forecasting.plan,
    showing.replay,
    knn.knn,
    knn.patch_probe,
    neighbours.neighbours,
    linear.linear,
    features.features,
    features.quality,
    suite.retrieval,
    suite.copydetection,
    suite.davis,
    pictures.attention,
    pictures.segment_score,
    classifying.score,
    classifying.predict,
    classifying.transfer,
    weights.export,
    weights.pack,
    showing.report,
    showing.demo,
    benchmarks.bench,
):
    xdino.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: one sentence for a person, never a traceback for a mistake."""
    given = list(arguments) if arguments is not None else sys.argv[1:]
    try:
        os.environ.update(rendezvous.from_slurm(os.environ))
        with warnings.catch_warnings():
            warnings.showwarning = _told  # type: ignore[assignment]  # the rest is not told
            # Commands learn whether they are all that this process is for.
            xdino.main(given, "xdino", standalone_mode=False, obj=arguments is None)
    except click.ClickException as error:
        fail(error.format_message(), EXIT_USAGE)
    except UsageError as error:
        fail(str(error), EXIT_USAGE)
    except RunFailed as error:
        fail(str(error), EXIT_FAILED)
    except Stopped as error:
        fail(str(error), EXIT_STOPPED)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except Exception as error:  # noqa: BLE001 - the last resort
        fail(_unforeseen(error, given), EXIT_FAILED)


def _told(message: Warning | str, *_where: object) -> None:
    """What Python calls a warning, without the line of code that it prints beside it."""
    click.echo(f"xdino: {' '.join(str(message).split())}", err=True)


def fail(sentence: str, code: int) -> None:
    """End with a sentence. What several processes agree on is said by the first of them."""
    number = os.environ.get("RANK", "0")
    if number == "0" or code == EXIT_FAILED:
        who = f"xdino (process {number})" if number != "0" else "xdino"
        click.echo(f"{who}: {' '.join(sentence.split())}", err=True)
    sys.exit(code)


def _unforeseen(error: Exception, given: Sequence[str]) -> str:
    """A sentence about what nobody has put into words where it arose; its traceback goes to a file."""
    if isinstance(error, OSError):
        named = (
            f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
        )
        told = f"the disk or the network failed: {reason(error)}{named}"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        told = "the memory does not suffice"
    else:
        told = f"an error that xdino does not know: {type(error).__name__}: {reason(error)}"
    trace = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} xdino {shlex.join(given)}\n"
    trace += "".join(traceback.format_exception(error))
    for path in _log_files(given):
        with contextlib.suppress(OSError, ValueError):
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(trace)
            return f"{told}. The traceback is in {path}"
    return told


def _log_files(given: Sequence[str]) -> Iterator[Path]:
    """Where a traceback may go: the run that the command line names, else a temporary folder."""
    for option, value in itertools.pairwise([*given, ""]):
        name, _, attached = option.partition("=")
        folder = Path(attached or value) if name in ("--run", "--run-dir") else Path(option)
        if (folder / "config.yaml").is_file():
            yield folder / "error.log"
    yield Path(tempfile.gettempdir()) / f"xdino-error-{os.getpid()}.log"
