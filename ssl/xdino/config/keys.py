"""The keys of the configuration as people read them: meaning, unit, default, what they may be.

All of it comes from `schema`: the text below a key, its type and its default. `xdino pretrain --help`
lists it, `--print-config` writes it above each key, and docs/settings.md is `page`.
"""

import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from xdino.config.parsing import head_of, to_tree
from xdino.config.schema import Config, RunConfig

WIDTH = 80  # columns of a commented configuration
LARGEST_TOLD = 10**4  # larger bounds only keep out what nobody means


@dataclass(frozen=True)
class Setting:
    """One key. `kind`: its type; `meaning`: with the unit."""

    section: str
    key: str
    kind: Any
    default: Any
    meaning: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    @property
    def default_text(self) -> str:
        """The default as one writes it on the command line."""
        return written(self.default)

    @property
    def metavar(self) -> str:
        """ "NUMBER", "auto|plain|fused", "NUMBER,NUMBER"."""
        return _metavar(self.kind)

    @property
    def choices(self) -> list[str]:
        """The words it may be; none where there is no such list."""
        base = _parts(self.kind)[0]
        if get_origin(base) is tuple:
            base = _parts(get_args(base)[0])[0]
        words = get_args(base) if get_origin(base) is Literal else ()
        return [str(word) for word in words] or (["true", "false"] if base is bool else [])

    @property
    def values(self) -> str:
        """ "whole number from 1", "true or false", "number from 0 to 1, or null"."""
        return _values(self.kind)


def settings(schema: type[RunConfig] = Config) -> dict[str, list[Setting]]:
    """Every key, by section, in the order of the schema."""
    return {
        section: [
            Setting(section, key.name, key.type, key.default, _text(type(part), key.name))
            for key in dataclasses.fields(part)
        ]
        for section, part in _sections(schema).items()
    }


def about(section: str, schema: type[RunConfig] = Config) -> str:
    """The first paragraph of what a section says of itself, in one line."""
    told = inspect.getdoc(type(_sections(schema)[section])) or ""
    return " ".join(told.split("\n\n")[0].split())


def _sections(schema: type[RunConfig]) -> dict[str, Any]:
    config: Any = schema()
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _text(section: type, key: str) -> str:
    """The text below a key of a section, or of one that it is made from."""
    for owner in section.__mro__:
        text = _texts(owner.__module__).get((owner.__name__, key))
        if text is not None:
            return text
    return ""


@functools.cache
def _texts(module: str) -> dict[tuple[str, str], str]:
    """The text below each key, by class and key; none where the source is not installed."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # TypeError: a module that Python itself brings
        return {}
    found = {}
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            for key, text in zip(owner.body, owner.body[1:], strict=False):
                if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name):
                    value = text.value if isinstance(text, ast.Expr) else None
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        found[owner.name, key.target.id] = " ".join(value.value.split())
    return found


# Types in words


def written(value: Any) -> str:
    """A value as one writes it on the command line.

    >>> written((0.3, 1.0)), written(None), written(False), written(1e-06)
    ('0.3,1.0', 'null', 'false', '1e-06')
    """
    if isinstance(value, list | tuple):
        return ",".join(map(written, value)) or "[]"
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value)


def _parts(kind: Any) -> tuple[Any, list[Any], bool]:
    """A type without its wrappings: what it is of, its bounds, whether null is allowed."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        base, bounds, null = _parts(inner)
        return base, [*bounds, *(b for mark in marks for b in getattr(mark, "metadata", ()))], null
    if get_origin(kind) in (Union, types.UnionType):
        others = [part for part in get_args(kind) if part is not type(None)]
        if len(others) == 1:
            return (*_parts(others[0])[:2], True)
        return kind, [], False
    return kind, [], False


def _metavar(kind: Any) -> str:
    base, _, _ = _parts(kind)
    if get_origin(base) is Literal:
        return "|".join(map(str, get_args(base)))
    if get_origin(base) is tuple:
        inner = [_metavar(part) for part in get_args(base) if part is not Ellipsis]
        return ",".join(inner) + (",..." if Ellipsis in get_args(base) else "")
    known = {bool: "true|false", int: "N", float: "NUMBER", str: "TEXT"}
    return known.get(base, "NUMBER|SHARE%")


def _values(kind: Any) -> str:
    base, bounds, null = _parts(kind)
    also = ", or null" if null else ""
    if get_origin(base) is Literal:
        *most, last = map(str, get_args(base))
        return (f"{', '.join(most)} or {last}" if most else last) + also
    if get_origin(base) is tuple:
        first, *rest = get_args(base)
        many = "values" if Ellipsis in rest else f"{1 + len(rest)} values"
        return f"{many} with a comma between them, each {_values(first)}" + also
    known = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    words = known.get(base, "number from 0, or a share of the run such as 10%")
    return " ".join([words, *_limits(bounds)]) + also


def _limits(bounds: list[Any]) -> list[str]:
    """Bounds in words: from 0, to 1; or above 0, and at most 1."""
    found = {
        name: f"{limit:g}"
        for name in ("ge", "gt", "le", "lt")
        for limit in [getattr(bound, name, None) for bound in bounds]
        if limit is not None and abs(limit) <= LARGEST_TOLD
    }
    words = {"ge": "from", "gt": "above", "le": "to" if "ge" in found else "at most", "lt": "below"}
    joined = "" if {"ge", "le"} >= set(found) else "and "
    return [
        f"{joined if i else ''}{words[name]} {limit}"
        for i, (name, limit) in enumerate(found.items())
    ]


# What people read


def commented(config: RunConfig, remarks: Mapping[str, str] | None = None) -> str:
    """The whole configuration as YAML that can be a recipe, with what each key means above it.

    remarks: more to say of some keys, by dotted name.
    """
    tree, remarks = to_tree(config), remarks or {}
    schema = type(config)
    lines = head_of(config).splitlines()
    for section, keys in settings(schema).items():
        lines += [f"{section}:", *_comment(about(section, schema)), ""]
        for key in keys:
            lines += _comment(key.meaning) + _comment(remarks.get(key.name, ""))
            dumped = yaml.safe_dump({key.key: tree[section][key.key]}, sort_keys=False)
            lines += textwrap.indent(dumped, "  ").splitlines()
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False
    )


def page(*others: tuple[type[RunConfig], str]) -> str:
    """docs/settings.md; `others`: further kinds of runs, each with the file that its keys stand in."""
    lines = [
        "# Settings",
        "",
        "Every key of a recipe, from `ssl/xdino/config/schema.py`. On the command line a key is",
        "`--section.key VALUE`; in a YAML file it stands below `section:`. Defaults are the published",
        "trainer's unless the text says otherwise. `xdino pretrain --help` lists the same, and",
        "`xdino pretrain RECIPE --print-config` shows what a recipe and the options come to.",
    ]
    if others:
        told = " and ".join(
            f"[xdino {schema.kind}](#keys-of-{schema.kind})" for schema, _ in others
        )
        lines += ["", f"First the keys of `xdino pretrain`; those of {told} stand behind them."]
    lines += _sections_told(Config, "##")
    for schema, file in others:
        lines += ["", f"## Keys of {schema.kind}", "", f"Of `xdino {schema.kind}`, from `{file}`."]
        lines += _sections_told(schema, "###")
    return "\n".join(lines).replace("``", "") + "\n"


def _sections_told(schema: type[RunConfig], heading: str) -> list[str]:
    """A table a section, and what may change when a run is continued."""
    lines = []
    for section, keys in settings(schema).items():
        lines += ["", f"{heading} {section}", "", about(section, schema), ""]
        lines += ["| key | default | values | meaning |", "|---|---|---|---|"]
        for key in keys:
            cells = (f"`{key.key}`", f"`{key.default_text}`", key.values, key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    free = ", ".join(f"`{name}`" for name in sorted(schema.free))
    lines += ["", f"{heading} When a run is continued", ""]
    lines += [f"`runtime.*` may have other values then, and so may {free}. No other key may."]
    return lines
