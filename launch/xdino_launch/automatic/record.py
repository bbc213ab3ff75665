"""The file of a run that keeps what was asked for and what was chosen; what is told of it."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

from rich.table import Table

from xdino import config as configuration
from xdino.config import Config
from xdino.errors import UsageError, asked
from xdino.forecast.choices import GIVEN, Choice, configured
from xdino.forecast.choosing import Asked, Recipe
from xdino.run_directory import CONFIG_FILE, RunDirectory
from xdino.runtime.atomic import write_text
from xdino.runtime.lock import Lock
from xdino_launch.console import stderr_console

RECORD_FILE = "auto.json"


# What is kept of it, in the run


def recorded(run: Path, wanted: Asked) -> Recipe | None:
    """What was chosen when the run in the folder began, with what may be changed; None for a new one.

    Raises:
        UsageError: the folder holds something else, or a run for other minutes or epochs.
    """
    with asked(f"--run {run}"):
        file, begun = run / RECORD_FILE, (run / CONFIG_FILE).exists()
        if not file.is_file():
            if begun:
                raise UsageError(
                    f"{run} holds a run that auto did not choose: continue it by xdino pretrain "
                    f"{run / CONFIG_FILE} --run {run}, or choose another folder"
                )
            RunDirectory(run).resolve(Config())
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            choices = [Choice(**choice) for choice in record["choices"]]
            minutes, epochs = record["minutes"], record["epochs"]
            seconds = float(record["seconds"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"{file} is damaged: continue the run by xdino pretrain {run / CONFIG_FILE} --run "
                f"{run}, or choose another folder"
            ) from None
    for what, then, now in (
        ("minutes", minutes, wanted.minutes),
        ("epochs", epochs, wanted.epochs),
    ):
        if now is not None and now != then:
            length = f"{minutes:g} minutes" if minutes is not None else f"{epochs} epochs"
            raise UsageError(
                f"{run} was begun for {length}, and its schedules end with them: leave --{what} "
                "out to continue it, or choose another folder"
            )
    kept = {choice.key: choice for choice in choices}
    kept |= {key: Choice(key, value, GIVEN) for key, value in wanted.given.items()}
    recipe = Recipe(list(kept.values()), seconds, {})
    if not begun:  # it was stopped before its first step
        write_text(run / CONFIG_FILE, configuration.to_yaml(configured(choices)))
    return recipe


def write(run: Path, wanted: Asked, recipe: Recipe) -> None:
    """The choices, then the recipe: the folder of a run from here on."""
    with asked(f"--run {run}"):
        run.mkdir(parents=True, exist_ok=True)
    with Lock(run):
        RunDirectory(run).resolve(recipe.config)  # another process may have begun one meanwhile
        record = {
            "minutes": wanted.minutes,
            "epochs": wanted.epochs,
            "given": dict(wanted.given),
            "seconds": round(recipe.seconds, 1),
            "choices": [dataclasses.asdict(choice) for choice in recipe.choices],
            **recipe.facts,
        }
        write_text(run / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        write_text(run / CONFIG_FILE, configuration.to_yaml(recipe.config))


def tell_end(run: Path, wanted: Asked, minutes: float) -> None:
    told = f"took {minutes:.1f} minutes"
    if wanted.minutes is not None:
        told += f" of the {wanted.minutes:g} asked for ({100 * minutes / wanted.minutes:.0f} %)"
    stderr_console().print(told)
    file = run / RECORD_FILE
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(file.read_text(encoding="utf-8"))
        write_text(file, json.dumps(record | {"minutes_taken": round(minutes, 2)}, indent=2) + "\n")


# What is told of it


def table(choices: list[Choice]) -> Table:
    """One line a choice."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("key", no_wrap=True)
    out.add_column("value", overflow="fold", max_width=22)
    out.add_column("reason", overflow="fold")
    for choice in choices:
        out.add_row(choice.key, choice.value, choice.reason)
    return out


def with_reasons(recipe: Recipe) -> str:
    """The whole configuration as YAML, a reason behind every key that was chosen."""
    reasons = {choice.key: choice.reason for choice in recipe.choices}
    lines, section = [], ""
    for line in configuration.to_yaml(recipe.config).splitlines():
        if match := re.match(r"(\w+):$", line):
            section = match[1]
        elif (match := re.match(r"  (\w+):", line)) and f"{section}.{match[1]}" in reasons:
            line += f"  # {reasons[f'{section}.{match[1]}']}"
        lines.append(line)
    return "\n".join(lines) + "\n"
