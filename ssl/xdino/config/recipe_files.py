"""Recipes: where they lie, how their YAML is read, and what the command line puts on top.

YAML guesses types: there `on` is true, `010` is eight, `1:30` is ninety, `1e-3` is text, and a folder
called `photos #1` loses its number. Here a scalar is the text that it is, and its key decides (see
`values`). Of YAML a recipe keeps what it is read for: sections, keys, lists, quotes and comments.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import yaml

from xdino.config.parsing import C, parse, spelt, to_tree
from xdino.config.schema import Config, RunConfig
from xdino.errors import UsageError, asked, nearest
from xdino.values import Quoted, shown

LARGEST_FILE = 100_000  # bytes of a recipe; the shipped ones have 1,500
DEEPEST = 3  # the file, its sections, a list: nothing in a recipe lies deeper
KINDS = (
    "pretrain",
    "finetune",
    "segment",
    "detect",
)  # what `kind:` may say, each the name of a command


def recipes_dir() -> Path:
    """Where recipes live: inside the installed wheel, or the checkout's `configs/`."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def recipes(kind: str | None = Config.kind) -> list[str]:
    """Those of a kind; None for all."""
    found = sorted(path.stem for path in recipes_dir().glob("*.yaml"))
    return [name for name in found if kind in (None, kind_of(recipes_dir() / f"{name}.yaml"))]


def kind_of(path: Path) -> str | None:
    """What a recipe or a run's config.yaml is for; None where it cannot be read or says nonsense."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return None
    said = re.search(r"^kind:\s*([^\s#]*)", text, re.MULTILINE)
    return Config.kind if said is None else said[1] if said[1] in KINDS else None


@overload
def load(name: str | Config, overrides: Mapping[str, Any] | None = None) -> Config: ...
@overload
def load(name: str | C, overrides: Mapping[str, Any] | None, schema: type[C]) -> C: ...
def load(
    name: str | Any, overrides: Mapping[str, Any] | None = None, schema: type[Any] = Config
) -> Any:
    """A recipe's name or a YAML path, with dotted overrides ("optim.lr" -> "1e-3") on top.

    From Python a whole configuration will do, and so will values that are no texts (1e-3).

    Raises:
        UsageError: no such recipe or file, not YAML, one of another kind, or anything `parse`
            objects to.
    """
    given = isinstance(name, RunConfig)
    tree: dict[str, Any] = to_tree(name) if isinstance(name, RunConfig) else _recipe(name, schema)
    for dotted, value in (overrides or {}).items():
        key, _, leaf = spelt(dotted).partition(".")
        section = next((known for known in tree if spelt(known) == key), key)
        below = tree.get(section) or {}
        if not isinstance(below, dict):
            continue  # a text where keys belong: `parse` says so
        kept = {old: text for old, text in below.items() if spelt(old) != leaf}
        tree[section] = kept | {leaf: value} if leaf else value
    return parse(tree, "the configuration" if given else str(name), schema)


HEAD = ("command", "hardware", "hours", "expected")


def head(name: str) -> dict[str, str]:
    """What the head of a shipped recipe says: "about", then what `HEAD` names."""
    told, key = {"about": ""}, "about"
    for line in (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or (key == HEAD[-1] and not text):
            break
        word, colon, value = text.partition(":")
        if colon and word in HEAD:
            key, text = word, value.strip()
        told[key] = f"{told.get(key, '')} {text}".strip()
    return told


def comments(name: str) -> dict[str, str]:
    """What a recipe or file says above and behind its keys, by dotted key.

    Raises:
        UsageError: as `load`.
    """
    path = file_of(name)
    _read(path)  # no anchors, no tags, not deep: nothing in it can make composing it long
    text = _text_of(path)
    root, lines = yaml.compose(text, Loader=yaml.SafeLoader), text.splitlines()
    found = {}
    for section, below in root.value if isinstance(root, yaml.MappingNode) else ():
        for key, value in below.value if isinstance(below, yaml.MappingNode) else ():
            number = key.start_mark.line
            told: list[str] = []
            while number and lines[number - 1].strip().startswith("#"):
                number -= 1
                told.insert(0, lines[number])
            if value.end_mark.line == key.start_mark.line:
                behind = lines[key.start_mark.line][value.end_mark.column :]
                told += [behind] if behind.strip().startswith("#") else []
            if words := " ".join(line.strip().lstrip("# ") for line in told):
                found[spelt(f"{section.value}.{key.value}")] = words
    return found


def _recipe(name: str, schema: type[RunConfig]) -> dict[str, Any]:
    """The sections of a recipe or a file, as texts."""
    tree = _read(file_of(name, schema.kind))
    kind = tree.pop("kind", None) or Config.kind
    if kind not in KINDS:
        raise UsageError(
            f"{name}: no kind of recipe is called {shown(kind)}: {nearest(kind, KINDS)}"
        )
    if kind != schema.kind:
        raise UsageError(
            f"{name} is for another command than xdino {schema.kind}: xdino {kind} {name} --run DIR"
        )
    return tree


def file_of(name: str, kind: str | None = None) -> Path:
    """The file that a recipe's name or a path means; a path need not be there.

    kind: of which recipes the nearest is named; None for all.

    Raises:
        UsageError: no recipe is called so.
    """
    path = Path(name)
    with asked(f"cannot read {shown(name)}"):
        is_file = path.suffix in (".yaml", ".yml") or path.is_file()
        held = path / "config.yaml"
        is_run = not is_file and held.is_file()
    if is_file:
        return path
    if name in recipes(None):
        return recipes_dir() / f"{name}.yaml"
    if name.startswith("--"):
        raise UsageError(f"name a recipe before the options, got {name}")
    if is_run:
        raise UsageError(f"{name} is a folder; the run in it has {held}")
    raise UsageError(f"no recipe is called {shown(name)}: {nearest(name, recipes(kind))}")


# YAML


def sections(path: Path) -> dict[str, Any]:
    """A YAML file that is no recipe but has the shape of one: sections with keys below them, as texts.

    Raises:
        UsageError: it cannot be read, or has another shape.
    """
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    """A YAML file of sections with keys below them; every scalar is text, an absent one None.

    Raises:
        UsageError: it cannot be read, is no YAML or not of this shape, says something twice, or
            holds anchors or tags, for which a recipe has no use. The message names the line.
    """
    tree = _Reader(path).document()
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold sections with keys below them")
    kind = tree.get("kind")
    if isinstance(kind, dict | list):
        raise UsageError(f"{path}: kind is one word: {' or '.join(KINDS)}")
    bare = [
        key
        for key, below in tree.items()
        if below is not None and not isinstance(below, dict) and key != "kind"
    ]
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
