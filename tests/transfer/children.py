"""Commands in processes of their own, forked from one that has imported everything and trained nothing.

A fork of the tests' own process would do until some test has computed gradients on several threads
or devices: after that torch refuses to in a fork.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from xdino import config

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


def done(*arguments: object) -> None:
    """The same, awaited; it must end with 0."""
    awaited(child(*arguments))


def awaited(*processes: BaseProcess, code: int = 0) -> None:
    for process in processes:
        process.join()
        assert process.exitcode == code


def pair(*arguments: object) -> list[BaseProcess]:
    """The same command as the two processes of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [child(*arguments, RANK=str(r), LOCAL_RANK=str(r), **world) for r in (0, 1)]


def ended_by(sent: signal.Signals, processes: list[BaseProcess], run: Path, steps: int) -> None:
    """A signal to all once the run has told of so many steps; with the exit code that belongs to it."""
    deadline = time.monotonic() + 100
    while len(losses(run)) < steps:
        assert all(process.is_alive() for process in processes), (
            "it ended before it could be stopped"
        )
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, sent)
    awaited(*processes, code=-sent if sent == signal.SIGKILL else 75)


def typed(
    kind: str, tiny: Mapping[str, object], run: Path, data: Path, recipe: str | None, keys: Any
) -> list[object]:
    """What starts a run: `tiny` and `keys` (a__b for a.b) over those of the recipe."""
    given = {**tiny, "data.path": data, **{k.replace("__", "."): v for k, v in keys.items()}}
    options = [word for key, value in given.items() for word in (f"--{key}", value)]
    return [kind, *([] if recipe is None else [recipe]), "--run-dir", run, *options]


def told(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, which is being written perhaps."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in told(run) if "loss" in row]


def check_printed(xdino: Callable[..., Any], schema: Any, folder: Path) -> None:
    """What --print-config prints of each recipe of a kind is that recipe."""
    for name in config.recipes(schema.kind):
        code, out, error = xdino(schema.kind, name, "--print-config")
        assert (code, error) == (0, "")
        assert out.startswith(f"kind: {schema.kind}\nmodel:\n")
        assert max(map(len, out.splitlines())) <= 80
        (folder / "again.yaml").write_text(out)
        again = config.load(str(folder / "again.yaml"), None, schema)
        assert again == config.load(name, None, schema)
        assert xdino("recipes", name)[0] == 0
