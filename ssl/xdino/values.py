"""Values as people write them, on the command line and in recipes: text, read by the key's type.

YAML guesses types: there `on` is true, `010` is eight, `1:30` is ninety, `1e-3` is text, and a folder
called `photos #1` loses its number. Here the key decides. A text is the text as it stands, a number
is a plain decimal, and the same word means the same in a recipe and on the command line. Of YAML a
recipe keeps what it is read for: sections, keys, lists, quotes and comments.
"""

import math
import os
import re
import reprlib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from xdino.errors import UsageError, asked, nearest

LARGEST_FILE = 100_000  # bytes of a recipe; the shipped ones have 1,500
DEEPEST = 3  # the file, its sections, a list: nothing in a recipe lies deeper

_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SWITCH = {"true": True, "yes": True, "on": True, "1": True,
           "false": False, "no": False, "off": False, "0": False}  # fmt: skip
_NOTHING = ("null", "Null", "NULL", "~")

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 60


class Quoted(str):
    """Text between quotes in a recipe: "null" is a word there, not the absence of one."""


def shown(value: object) -> str:
    """A value in a sentence, however long it is."""
    try:
        return _shortened.repr(str(value) if isinstance(value, str) else value)
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def whole(text: str) -> int:
    """A decimal integer.

    >>> whole("010")
    10
    """
    if not _WHOLE.fullmatch(text.strip()):
        raise ValueError(f"takes a whole number such as 10, got {shown(text)}")
    return int(text)


def number(text: str) -> float:
    """A finite decimal number.

    >>> number("1e-3")
    0.001
    """
    text = text.strip()
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError(f"takes a finite number such as 0.001 or 1e-3, got {shown(text)}")
    return float(text)


def switch(text: str) -> bool:
    if text.strip().lower() not in _SWITCH:
        raise ValueError(f"takes true or false, got {shown(text)}")
    return _SWITCH[text.strip().lower()]


def name(text: str) -> str:
    """The text as it is, if a path could be called so."""
    if "\0" in text:
        raise ValueError("holds a zero byte, which no name can")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"holds half a character, got {shown(text)}") from None
    return str(text)


def read(kind: Any, value: object) -> Any:
    """`value`, a text or several, as what a key of the type `kind` holds.

    What is no text passes as it is (a configuration built in Python), but true is no number.

    Raises:
        ValueError: half a sentence that goes on after the key.
    """
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return _one_of(get_args(kind), value)
    if get_origin(kind) is tuple:
        return _several(get_args(kind), value)
    if value is None or isinstance(value, Mapping | list | tuple):
        raise ValueError("takes a value" + ("" if value is None else f", got {shown(value)}"))
    if get_origin(kind) is Literal:
        return _choice(get_args(kind), value)
    if not isinstance(value, str):
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"takes a {'text' if kind is str else 'number'}, got {value}")
        return value
    readers: dict[Any, Any] = {str: name, bool: switch, int: whole, float: number}
    return readers[kind](value)


def _one_of(kinds: tuple[Any, ...], value: object) -> Any:
    """A value that may be absent, or a number that may be a share of the run ("10%")."""
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) < len(kinds):
        words = _NOTHING if str in others else (*_NOTHING, "none", "None")
        if value is None or (value in words and not isinstance(value, Quoted)):
            return None
        if value == "" and str in others:
            raise ValueError("is empty; null stands for none")
    if len(others) == 1:
        return read(others[0], value)
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return number(value)
    return read(str, value) if isinstance(value, str) else read(float, value)


def _several(kinds: tuple[Any, ...], value: object) -> Any:
    """ "0.3, 1.0", "[0.3, 1.0]" or a list; each by its own type."""
    if isinstance(value, str):
        inner = value.strip()
        if inner.startswith("[") and inner.endswith("]"):
            inner = inner[1:-1]
        value = [part.strip() for part in inner.split(",")]
    if not isinstance(value, list | tuple):
        raise ValueError(f"takes numbers such as 0.3,1.0, got {shown(value)}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"takes {len(kinds)} numbers, got {len(value)}")
    return [read(kind, part) for kind, part in zip(kinds, value, strict=True)]


def _choice(choices: tuple[Any, ...], value: object) -> Any:
    words = {str(choice): choice for choice in choices}
    if isinstance(value, bool) or str(value) not in words:
        raise ValueError(f"cannot be {shown(value)}: {nearest(str(value)[:60], words)}")
    return words[str(value)]


# Recipes


def read_recipe(path: Path) -> dict[str, Any]:
    """A YAML file of sections with keys below them; every scalar is text, an absent one None.

    Raises:
        UsageError: it cannot be read, is no YAML or not of this shape, says something twice, or
            holds anchors or tags, for which a recipe has no use. The message names the line.
    """
    tree = _Reader(path).document()
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold sections with keys below them")
    bare = [key for key, below in tree.items() if below is not None and not isinstance(below, dict)]
    if bare:
        section, dot, leaf = bare[0].partition(".")
        hint = f": write {leaf} below {section}:" if dot else ""
        raise UsageError(f"{path} must hold sections with keys below them{hint}")
    return tree


class _Reader:
    """Events of the parser, one after the other, into a tree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: Iterator[yaml.Event] = yaml.parse(_text_of(path), Loader=yaml.SafeLoader)

    def next(self) -> yaml.Event:
        try:
            event = next(self.events)
        except (yaml.YAMLError, RecursionError) as error:
            raise UsageError(f"{self.path} is not YAML: {' '.join(str(error).split())}") from None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self.wrong(event, "anchors and aliases (& and *) are not for recipes")
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise self.wrong(event, f"tags ({shown(tag)}) are not for recipes")
        return event

    def wrong(self, event: yaml.Event, what: str) -> UsageError:
        return UsageError(f"{self.path}, line {_line(event)}: {what}")

    def document(self) -> Any:
        tree: Any = {}
        while not isinstance(event := self.next(), yaml.StreamEndEvent):
            if isinstance(event, yaml.DocumentStartEvent):
                if tree:
                    raise self.wrong(event, "a second document begins; a recipe is one")
                tree = self.node(self.next(), 1) or {}
        return tree

    def node(self, event: yaml.Event, depth: int) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            if event.style is not None:
                return Quoted(event.value)
            return event.value or None
        if depth > DEEPEST:
            raise self.wrong(event, "too deep; a recipe has sections and keys below them")
        if isinstance(event, yaml.SequenceStartEvent):
            values = []
            while not isinstance(event := self.next(), yaml.SequenceEndEvent):
                values.append(self.node(event, depth + 1))
            return values
        return self.mapping(depth)

    def mapping(self, depth: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self.wrong(event, "a key must be a word")
            key, line = event.value, _line(event)
            if key in lines:
                raise self.wrong(event, f"{key} is there already, in line {lines[key]}")
            tree[key], lines[key] = self.node(self.next(), depth + 1), line
        return tree


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _text_of(path: Path) -> str:
    with asked(f"cannot read {path}"):
        if path.is_dir():
            raise UsageError(f"cannot read {path}: it is a folder")
        if path.exists() and not path.is_file():
            raise UsageError(f"cannot read {path}: it is no ordinary file")
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise UsageError(f"{path} is larger than {LARGEST_FILE:,} bytes: that is no recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8: that is no recipe") from None
