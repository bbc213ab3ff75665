"""The command line: the commands put together, and what becomes of their errors.

Standard output carries results (a table, or JSON with --json); everything else goes to standard
error. Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and resumable.
"""

import os
import sys
from collections.abc import Sequence

import click

from xdino.errors import RunFailed, Stopped, UsageError
from xdino_launch.commands import (
    benchmarks,
    features,
    knn,
    linear,
    neighbours,
    packing,
    pictures,
    pretraining,
    replaying,
    showing,
    suite,
    weights,
)
from xdino_launch.commands.options import Commands

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xdino")
def xdino() -> None:
    """Pretrain XCiT without labels (DINO), judge the features, look at the attention."""


for command in (
    pretraining.pretrain,
    pretraining.submit,
    replaying.replay,
    knn.knn,
    neighbours.neighbours,
    linear.linear,
    features.features,
    features.quality,
    suite.retrieval,
    suite.copydetection,
    suite.davis,
    pictures.attention,
    pictures.segment_score,
    weights.export,
    packing.pack,
    showing.report,
    showing.demo,
    benchmarks.bench,
):
    xdino.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: one sentence for a person, never a traceback for a mistake."""
    try:
        xdino.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
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


def fail(sentence: str, code: int) -> None:
    click.echo(f"xdino: {' '.join(sentence.split())}", err=True)
    sys.exit(code)
