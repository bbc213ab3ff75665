"""Keys of the configuration as options: `--section.key VALUE`, in the help, and at the Tab key."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from xdino.errors import UsageError

if TYPE_CHECKING:
    from xdino.config import RunConfig

KEYED = {"ignore_unknown_options": True, "allow_extra_args": True}  # a command's context settings


def schema_of(kind: str) -> "type[RunConfig]":
    """What recipes of a kind are read by."""
    if kind == "finetune":
        from xdino_transfer.finetuning.recipe import FineTuning

        return FineTuning
    if kind == "segment":
        from xdino_transfer.dense_training.segmenting.recipe import Segmentation

        return Segmentation
    if kind == "detect":
        from xdino_transfer.dense_training.detecting.recipe import Detection

        return Detection
    from xdino.config import Config

    return Config


def parse_overrides(arguments: Sequence[str], kind: str = "pretrain") -> dict[str, str]:
    """["--optim.lr", "1e-3", "--train.epochs=10"] -> {"optim.lr": "1e-3", "train.epochs": "10"}."""
    from xdino import config
    from xdino.values import shown

    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or "." not in key:
            keys = config.dotted_keys(schema_of(kind))
            leaves = {known.split(".")[1]: known for known in keys}
            name = leaves.get(key.replace("-", "_"))
            hint = "name the recipe first; overrides are --section.key value"
            if name:
                hint = f'did you mean "--{name}"?'
            raise UsageError(f'"{option}" is not an option of {kind}: {hint}')
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        key = config.spelt(key)
        if key in overrides:
            raise UsageError(
                f"--{key} is given twice, with {shown(overrides[key])} and {shown(value)}"
            )
        overrides[key] = value
    return overrides


def complete_recipe(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Recipes, each with its first words; then files."""
    from xdino import config

    kind = ctx.command.kind if isinstance(ctx.command, Keyed) else None
    found = [
        CompletionItem(name, help=config.head(name)["about"])
        for name in config.recipes(kind)
        if name.startswith(incomplete)
    ]
    return [*found, CompletionItem(incomplete, type="file")]


class Keyed(click.Command):
    """A command that takes every key of the configuration as an option, and lists them."""

    kind = "pretrain"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        from xdino import config

        formatter.write_paragraph()
        formatter.write_text(
            "Every key of the configuration is an option, or a line below its section in a YAML "
            "file:"
        )
        schema = schema_of(self.kind)
        for section, keys in config.settings(schema).items():
            with formatter.section(section):
                formatter.write_text(config.about(section, schema))
                formatter.write_dl(
                    [
                        (f"--{key.name} {key.metavar}", f"{key.meaning}  [default: {default}]")
                        for key in keys
                        for default in [key.default_text or "none"]
                    ]
                )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from xdino import config

        parts = config.settings(schema_of(self.kind)).values()
        keys = {f"--{key.name}": key for part in parts for key in part}
        before = ctx.args[-1] if ctx.args else str(ctx.params.get("config") or "")
        if before in keys and not incomplete.startswith("--"):
            choices = keys[before].choices
            if not choices:
                return [CompletionItem(incomplete, type="file")]
            return [CompletionItem(word) for word in choices if word.startswith(incomplete)]
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            found += [
                CompletionItem(name, help=key.meaning)
                for name, key in keys.items()
                if name.startswith(incomplete)
            ]
        return found


class KeyedToFineTuning(Keyed):
    """The same for recipes of `xdino finetune`."""

    kind = "finetune"


class KeyedToSegmentation(Keyed):
    """The same for recipes of `xdino segment`."""

    kind = "segment"


class KeyedToDetection(Keyed):
    """The same for recipes of `xdino detect`."""

    kind = "detect"
