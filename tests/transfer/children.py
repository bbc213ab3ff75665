"""Commands in processes of their own, forked from one that has imported everything and trained nothing.

A fork of the tests' own process would do until some test has computed gradients on several threads
or devices: after that torch refuses to in a fork.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["xdino_launch.cli", "xdino_launch.local"])


def child(*arguments: object, **environment: str) -> BaseProcess:
    """`xdino` with these arguments, begun; `environment`: variables besides those of the tests."""
    told = [str(argument) for argument in arguments], {**os.environ, **environment}
    process = _SERVER.Process(target=_run, args=told)
    process.start()
    return process


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    import torch

    from xdino_launch import cli

    os.environ.update(environment)
    torch.set_num_threads(1)
    cli.main(arguments)
