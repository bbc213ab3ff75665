"""Started by test_knn_cli: several commands of xdino, one after the other, in each of two processes."""

import json
import sys
from pathlib import Path

import torch
from click.testing import CliRunner

from xdino.errors import RunFailed, UsageError
from xdino.runtime import distributed
from xdino_launch.cli import xdino

commands, out = json.loads(sys.argv[1]), Path(sys.argv[2])
distributed.start(torch.device("cpu"))
printed = []
for command in commands:
    result = CliRunner().invoke(xdino, command)
    if result.exception is not None and not isinstance(result.exception, UsageError | RunFailed):
        raise result.exception
    printed.append(str(result.exception) if result.exception else result.stdout)


def fails_on_the_last() -> int:
    if distributed.rank() == distributed.world_size() - 1:
        raise RunFailed("the last one fails")
    return 1


try:
    distributed.together(fails_on_the_last)
except RunFailed as error:
    printed.append(str(error))
(out / f"rank{distributed.rank()}.json").write_text(json.dumps(printed))
distributed.stop()
