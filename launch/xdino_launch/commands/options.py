"""Options that several commands take, and what they do with rows of results."""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from xdino.errors import UsageError, nearest


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
        click.argument("weights"),
        click.option(
            "--data", required=True, help="Folder or tars with train/ and val/, or a named source."
        ),
        click.option("--arch", help="Architecture, where the file does not say."),
        click.option("--role", default="teacher", type=click.Choice(["teacher", "student"])),
        click.option("--out", type=click.Path(), help="Append to this results.json."),
        click.option("--json", "as_json", is_flag=True, help="JSON on standard output."),
        click.option("--size", type=click.IntRange(1), help="Centre crop in pixels."),
        click.option("--resize", type=click.IntRange(1), help="Shorter side before it, in pixels."),
        click.option("--mean", help="Per channel, comma-separated, 0..1."),
        click.option("--std", help="Per channel, comma-separated, 0..1."),
        click.option("--batch-size", default=128, type=click.IntRange(1), show_default=True),
        click.option(
            "--max-pixels",
            type=click.IntRange(1),
            help="Of an image; a larger one is skipped and named. Default: as in pretraining.",
        ),
        click.option("--workers", default=min(8, os.cpu_count() or 1), type=click.IntRange(1)),
        click.option("--device", default="auto", show_default=True),
        click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"])),
        click.option(
            "--cache",
            type=click.Path(),
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

        from xdino import distributed

        joined = distributed.start(torch.device("cpu"))
        try:
            distributed.from_first(lambda: command(*arguments, **options), timedelta(days=365))
        finally:
            if joined:
                distributed.stop()

    return wrapped


def numbers(
    text: str | None, name: str, kind: Callable[[str], Any] = float
) -> tuple[Any, ...] | None:
    """ "10,20" -> (10, 20)."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f'--{name} takes numbers with commas between them, got "{text}"') from None


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
    return subject | {name: numbers(options[name], name) for name in ("mean", "std")}
