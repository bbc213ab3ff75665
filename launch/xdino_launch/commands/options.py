"""Options that several commands take, and what they do with rows of results."""

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from xdino import values
from xdino.errors import UsageError, asked, nearest


class Whole(click.IntRange):
    """A plain decimal integer within bounds; the upper one keeps out what nobody means."""

    def __init__(self, least: int = 1, most: int = 2**31) -> None:
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return super().convert(_plain(self, values.whole, value, param, ctx), param, ctx)


class Number(click.FloatRange):
    """A plain decimal number, finite and within bounds."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        return super().convert(_plain(self, values.number, value, param, ctx), param, ctx)


def _plain(
    kind: click.ParamType,
    read: Callable[[str], Any],
    value: Any,
    param: click.Parameter | None,
    ctx: click.Context | None,
) -> Any:
    try:
        return read(value) if isinstance(value, str) else value
    except ValueError as error:
        kind.fail(str(error), param, ctx)


class Place(click.ParamType):
    """A path, there or not, that the system can look at: no self-link, no name that is too long.

    `file`: no folder either.
    """

    name = "path"

    def __init__(self, kind: type[str] | type[Path] = str, file: bool = False) -> None:
        self.kind, self.file = kind, file

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | Path:
        text = str(value)
        if not text:
            self.fail("is empty", param, ctx)
        with asked(values.shown(text)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            Path(text).expanduser().stat()
            if self.file and Path(text).is_dir():
                self.fail(f"{values.shown(text)} is a folder, and this needs a file", param, ctx)
        return self.kind(value)


ABOVE_0 = Number(0, 1e30, min_open=True)
BATCH = Whole(1, 2**20)
PIXELS = Whole(1, 2**13)
SEED = Whole(0, 2**32 - 1)  # what scikit-learn and faiss take, too
WORKERS = Whole(1, 1024)


def _known_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refused before anything is read; auto and cpu are there without asking torch."""
    if value not in ("auto", "cpu"):
        from xdino.runtime.device import resolve_device

        resolve_device(value)
    return value


def device_option(default: str = "auto") -> Callable[..., Any]:
    return click.option(
        "--device",
        default=default,
        show_default=True,
        callback=_known_device,
        help="auto, cpu, cuda or cuda:N.",
    )


def workers_option() -> Callable[..., Any]:
    return click.option("--workers", default=min(8, os.cpu_count() or 1), type=WORKERS)


class Commands(click.Group):
    """A group that names the nearest command when there is no such one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = nearest(args[0], self.list_commands(ctx))
            raise UsageError(f'there is no command "{args[0]}": {hint}')
        return super().resolve_command(ctx, args)


def evaluation_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every evaluation of a backbone on labelled data takes."""
    options = [
        click.argument("weights", type=Place()),
        click.option(
            "--data",
            required=True,
            type=Place(),
            help="Folder or tars with train/ and val/, or a named source.",
        ),
        click.option("--arch", help="Architecture, where the file does not say."),
        click.option("--role", default="teacher", type=click.Choice(["teacher", "student"])),
        click.option("--out", type=Place(file=True), help="Append to this results.json."),
        click.option("--json", "as_json", is_flag=True, help="JSON on standard output."),
        click.option("--size", type=PIXELS, help="Centre crop in pixels."),
        click.option("--resize", type=PIXELS, help="Shorter side before it, in pixels."),
        click.option("--mean", help="Per channel, comma-separated, 0..1."),
        click.option("--std", help="Per channel, comma-separated, 0..1."),
        click.option("--batch-size", default=128, type=BATCH, show_default=True),
        click.option(
            "--max-pixels",
            type=Whole(1, 2**40),
            help="Of an image; a larger one is skipped and named. Default: as in pretraining.",
        ),
        workers_option(),
        device_option(),
        click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"])),
        click.option(
            "--cache",
            type=Place(),
            help="Keep features in this folder for the next command; files count by name, size and time.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def on_one_process(command: Callable[..., None]) -> Callable[..., None]:
    """Under a launcher the first process alone does it; the others wait, and fail as it does."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            command(*arguments, **options)
            return
        from datetime import timedelta

        import torch

        from xdino.runtime import distributed

        joined = distributed.start(torch.device("cpu"))
        try:
            distributed.from_first(lambda: command(*arguments, **options), timedelta(days=365))
        finally:
            if joined:
                distributed.stop()

    return wrapped


def numbers(
    text: str | None,
    name: str,
    kind: Callable[[str], Any] = values.number,
    least: float = -math.inf,
    above: float = -math.inf,
    what: str = "numbers",
) -> tuple[Any, ...] | None:
    """ "10,20" -> (10, 20), each finite and within the bounds."""
    if text is None:
        return None
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--{name} takes numbers with commas between them, got {values.shown(text)}"
        ) from None
    for value in found if kind is not str else ():
        if value < least:
            raise UsageError(f"--{name} takes {what} from {least:g} up, got {value:g}")
        if value <= above:
            raise UsageError(f"--{name} must be above {above:g}, got {value:g}")
    return found


def results_file(weights: str, out: str | None) -> Path | None:
    """Where rows are kept: --out, else results.json of a run's folder, else nowhere."""
    if out:
        return Path(out)
    return Path(weights) / "results.json" if Path(weights).is_dir() else None


def finish(rows: Sequence[Any], weights: str, out: str | None, as_json: bool) -> None:
    """Where rows go: standard output, then results.json of the run or --out.

    In this order, so that a disk that refuses them loses none.
    """
    from xdino_eval import results
    from xdino_launch.console import stdout_console

    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        stdout_console().print(results.table(rows))
    sys.stdout.flush()
    target = results_file(weights, out)
    if target is not None:
        results.append(target, rows)


def subject_options(options: dict[str, Any]) -> dict[str, Any]:
    """The evaluation options that say what is judged and on what, parsed."""
    names = (
        *("weights", "arch", "role", "data", "max_pixels", "size", "resize"),
        *("batch_size", "workers", "device", "precision", "cache"),
    )
    subject = {name: options[name] for name in names}
    return subject | {
        "mean": numbers(options["mean"], "mean"),
        "std": numbers(options["std"], "std", above=0),
    }
