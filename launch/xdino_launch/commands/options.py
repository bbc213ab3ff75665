"""Options that several commands take, and what they do with rows of results."""

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdino import values
from xdino.errors import UsageError, asked, nearest

if TYPE_CHECKING:
    from xdino.backbone import Backbone
    from xdino_eval.results import Row
    from xdino_launch.evaluation.subject import Subject


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


class Numbers(click.ParamType):
    """ "10,20" -> (10, 20), each finite and within the bounds; see `numbers`."""

    def __init__(self, kind: Callable[[str], Any] = values.number, **bounds: Any) -> None:
        self.kind, self.bounds = kind, bounds
        self.name = "names" if kind is str else "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        assert param is not None
        return numbers(value, param.opts[0].lstrip("-"), self.kind, **self.bounds)


ABOVE_0 = Number(0, 1e30, min_open=True)
BATCH = Whole(1, 2**20)
PIXELS = Whole(1, 2**13)
SEED = Whole(0, 2**32 - 1)  # what scikit-learn and faiss take, too
WORKERS = Whole(1, 1024)


class Renamed(click.Option):
    """An option whose names behind the first are older ones: understood, and not shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names

    def get_error_hint(self, ctx: click.Context | None) -> str:
        return f"'{self.opts[0]}'"


def shorter_side_option(**how: Any) -> Callable[..., Any]:
    """The size of a whole image in its own proportions; `--size` is a square's side everywhere."""
    how = {"type": PIXELS, "help": "Shorter side of the image, in pixels."} | how
    return click.option("--shorter-side", "--size", "size", cls=Renamed, **how)


def results_option() -> Callable[..., Any]:
    """Where rows of results go; `--out` is what a command makes, a file or a folder."""
    return click.option(
        "--results",
        "--out",
        "out",
        cls=Renamed,
        type=Place(file=True),
        help="Append to this results.json; default: the one of a run.",
    )


def known_device(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refused before anything is read; auto and cpu are there without asking torch."""
    try:
        value = None if value is None else values.device(value)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if value not in (None, "auto", "cpu"):
        from xdino.runtime.device import resolve_device

        resolve_device(value)
    return value


def device_option(default: str = "auto") -> Callable[..., Any]:
    return click.option(
        "--device",
        default=default,
        show_default=True,
        callback=known_device,
        help="auto, cpu, cuda or cuda:N.",
    )


def workers_option() -> Callable[..., Any]:
    return click.option("--workers", default=min(8, os.cpu_count() or 1), type=WORKERS)


def batch_option(default: int = 128) -> Callable[..., Any]:
    return click.option("--batch-size", default=default, type=BATCH, show_default=True)


def precision_option() -> Callable[..., Any]:
    return click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"]))


class Commands(click.Group):
    """A group that shows its help when it is called alone, and names the nearest command.

    chapters: names of commands by the heading that they stand under in the help.
    """

    def __init__(
        self, *arguments: Any, chapters: dict[str, tuple[str, ...]] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.chapters = chapters or {}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole sentences, in the order of the work."""
        told = {name for names in self.chapters.values() for name in names}
        others = tuple(name for name in self.list_commands(ctx) if name not in told)
        for chapter, names in {**self.chapters, "Commands": others}.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            rows = [(name, c.get_short_help_str(200)) for name, c in commands.items() if c]
            if rows:
                with formatter.section(chapter):
                    formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # the Tab key parses, too
            click.echo(ctx.get_help())
            ctx.exit(0)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = nearest(args[0], self.list_commands(ctx))
            raise UsageError(f'there is no command "{args[0]}": {hint}')
        return super().resolve_command(ctx, args)


def on_all_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Under a launcher every process does its part; a failure of one is one of all.

    Where features are kept in a folder (--cache), the first process alone does it.
    """
    alone = on_one_process(command)

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        judged = options["judged"]
        single = os.environ.get("WORLD_SIZE", "1") in ("", "1")
        if single or getattr(judged, "cache", None) is not None:
            alone(*arguments, **options)
            return
        from xdino.runtime import distributed
        from xdino.runtime.device import resolve_device

        joined = distributed.start(resolve_device(judged.device))
        try:
            distributed.together(lambda: command(*arguments, **options))
        finally:
            if joined:
                distributed.stop()

    return wrapped


def from_iteration_option() -> Callable[[Any], Any]:
    """--from-iteration, of commands that train."""
    return click.option(
        "--from-iteration",
        type=Whole(0),
        metavar="N",
        help="Go back to the kept state of iteration N and on from there; later ones are put aside.",
    )


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
    text: str,
    name: str,
    kind: Callable[[str], Any] = values.number,
    least: float = -math.inf,
    above: float = -math.inf,
    what: str = "numbers",
) -> tuple[Any, ...]:
    """ "10,20" -> (10, 20), each finite and within the bounds."""
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


# --- groups of options ------------------------------------------------------------------------


def given(option: Callable[..., Any]) -> Any:
    """A field of a group, filled by an option or an argument of click's."""
    return field(metadata={"click": option})


def option(*names: str, **how: Any) -> Any:
    """A field of a group, filled by an option of its own."""
    return given(click.option(*names, **how))


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command groups of options, each as the one value that a dataclass makes of them.

    >>> @takes(output=OutputOptions)
    ... def command(output: OutputOptions, **others): ...
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(*arguments: Any, **options: Any) -> None:
            made = {
                name: group(**{f.name: options.pop(f.name) for f in fields(group)})
                for name, group in groups.items()
            }
            command(*arguments, **made, **options)

        for each in reversed([f for group in groups.values() for f in fields(group)]):
            each.metadata["click"](wrapped)
        return wrapped

    return decorate


@dataclass(frozen=True)
class WeightsOptions:
    """Whose weights."""

    weights: str = given(click.argument("weights", type=Place()))
    arch: str | None = option("--arch", help="Architecture, where the file does not say.")
    role: str = option("--role", default="teacher", type=click.Choice(["teacher", "student"]))

    def there(self, *data: str, folders: "Sequence[str | Path | None]" = ()) -> None:
        """Look for the weights, data and folders before torch is imported: a slip is answered at once.

        Raises:
            UsageError: nothing is there.
        """
        from xdino.runtime import places

        places.check_weights(self.weights)
        places.check_data(*data)
        places.check_files("folder", *folders)


@dataclass(frozen=True)
class BackboneOptions(WeightsOptions):
    """A frozen backbone, and where it runs."""

    device: str = given(device_option())

    def backbone(self) -> "Backbone":
        """Raises UsageError and RunFailed as `load_backbone`."""
        from xdino.checkpoint import load_backbone
        from xdino.runtime.device import resolve_device

        where = resolve_device(self.device)
        return load_backbone(self.weights, self.arch, self.role).to(where)

    def signed(self, rows: "Sequence[Row]", backbone: "Backbone") -> "list[Row]":
        """The rows with the weights they speak of."""
        from xdino_eval.results import signed

        return signed(rows, backbone.origin.sha256, backbone.origin.name)


LABELLED = "Folder or tars with train/ and val/, or a named source."
CHANNELS = "Per channel, comma-separated, 0..1."
LIMIT = "Of an image; a larger one is skipped and named. Default: as in pretraining."
CACHE = "Keep features in this folder for the next command; files count by name, size and time."


@dataclass(frozen=True)
class SubjectOptions(BackboneOptions):
    """What is judged, on which images, and how they are shown to it."""

    data: str = option("--data", required=True, type=Place(), help=LABELLED)
    size: int | None = option(
        "--size", type=PIXELS, help="Side of the square that the network sees, in pixels."
    )
    resize: int | None = option(
        "--resize", type=PIXELS, help="Shorter side before the square is cut out, in pixels."
    )
    mean: tuple[float, ...] | None = option("--mean", type=Numbers(), help=CHANNELS)
    std: tuple[float, ...] | None = option("--std", type=Numbers(above=0), help=CHANNELS)
    batch_size: int = given(batch_option())
    max_pixels: int | None = option("--max-pixels", type=Whole(1, 2**40), help=LIMIT)
    workers: int = given(workers_option())
    precision: str = given(precision_option())
    cache: str | None = option("--cache", type=Place(), help=CACHE)

    def open(self, splits: Any = None) -> "Subject":
        """Raises UsageError and RunFailed as `Subject.open`."""
        from xdino_launch.evaluation.subject import Subject

        return Subject.open(**asdict(self), splits=splits)


@dataclass(frozen=True)
class OutputOptions:
    """Where rows of results go."""

    out: str | None = given(results_option())
    as_json: bool = option("--json", "as_json", is_flag=True, help="JSON on standard output.")

    def file(self, weights: str) -> Path | None:
        """--results, else results.json of a run's folder, else nowhere."""
        if self.out:
            return Path(self.out)
        return Path(weights) / "results.json" if Path(weights).is_dir() else None

    def tell(self, rows: "Sequence[Row]", weights: str) -> None:
        """Rows to standard output, then to the file: a disk that refuses them loses none.

        Of several processes the first one tells.
        """
        from xdino.runtime import distributed
        from xdino_eval import results
        from xdino_launch.console import print_results

        if distributed.rank() != 0:
            return
        if self.as_json:
            click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        else:
            print_results(rows)
        sys.stdout.flush()
        target = self.file(weights)
        if target is not None:
            results.append(target, rows)
