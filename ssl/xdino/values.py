"""Values as people write them, on the command line and in recipes: text, read by the key's type.

A text is the text as it stands, a number is a plain decimal, and the same word means the same in a
recipe and on the command line.
"""

import math
import os
import re
import reprlib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from xdino.errors import nearest

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


def span(seconds: float) -> str:
    """How long, in the two units that matter.

    >>> span(7800), span(95), span(8), span(300000)
    ('2 h 10 min', '1 min 35 s', '8 s', '3 d 11 h')
    """
    if seconds < 9.5:
        return f"{max(seconds, 0):.2g} s"
    left = round(seconds)
    if left >= 600:  # seconds matter no longer
        left = 60 * round(left / 60)
    parts: list[tuple[int, str]] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count)


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


def device(text: str) -> str:
    """A device by name; whether this machine has it, `runtime.device` says.

    >>> device("cuda:1")
    'cuda:1'
    """
    if re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?", text):
        return text
    why = f"there is no device {shown(text)} here"
    if re.fullmatch(r"mps(:\d+)?", text):
        why = (
            "Apple's GPUs (mps) are not supported: nothing was tested there, and they have no "
            "float64, in which k-NN compares"
        )
    raise ValueError(f"{why}: choose auto, cpu or cuda (cuda:N for one of many)")


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
        value = [part.strip() for part in inner.split(",")] if inner or value != "[]" else []
    if not isinstance(value, list | tuple):
        raise ValueError(f"takes numbers such as 0.3,1.0, got {shown(value)}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"takes {len(kinds)} numbers, got {len(value)}")
    return [read(kind, part) for kind, part in zip(kinds, value, strict=True)]


def _choice(choices: tuple[Any, ...], value: object) -> Any:
    """One of them. Where the first is off, YAML's words for yes and no do: yes is the second."""
    words = {str(choice): choice for choice in choices}
    switch_word = str(value).strip().lower()
    if choices[0] == "off" and str(value) not in words and switch_word in _SWITCH:
        return choices[int(_SWITCH[switch_word])]
    if isinstance(value, bool) or str(value) not in words:
        raise ValueError(f"cannot be {shown(value)}: {nearest(str(value)[:60], words)}")
    return words[str(value)]
