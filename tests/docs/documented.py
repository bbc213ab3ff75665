"""The commands of a page: fenced shell blocks and indented lines, and how far each can be tried here.

A comment above a block says so in the page's source: `<!-- parsed: WHY -->` for what needs a cluster, a
GPU or data that is not here, `<!-- not run: WHY -->` for what is none of ours to start. Without a comment
the block is run.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "xdino", "torchrun", "make", "pip", "python", "uv", "conda", "sbatch", "srun", "eval", "tensorboard",
)  # fmt: skip
_MARKER = re.compile(r"<!-- (parsed|not run): (\S.*?) -->")


@dataclass(frozen=True)
class Block:
    """`how`: "run", "parsed" or "not run". `lines`: whole commands."""

    how: str
    why: str
    lines: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """In the order of the page."""
    found: list[Block] = []
    how, why = "run", ""
    fence: str | None = None
    lines: list[str] = []

    def close() -> None:
        nonlocal how, why
        if lines:
            found.append(Block(how, why, tuple(_joined(lines))))
            how, why = "run", ""
        lines.clear()

    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("```"):
            close() if fence is not None else None
            fence = None if fence is not None else line[3:].strip()
        elif fence is not None:
            if fence in ("bash", "sh", "console"):
                lines.append(line)
        elif marker := _MARKER.fullmatch(line.strip()):
            how, why = marker[1], marker[2]
        elif line.startswith("    ") and (lines or line.split()[0] in PROGRAMS):
            lines.append(line.strip())
        else:
            close()
    return found


def _joined(lines: list[str]) -> list[str]:
    """Without comments and empty lines; what a backslash continues is one line."""
    text = "\n".join(lines).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def commands(line: str) -> list[tuple[list[str], str | None]]:
    """`a && b > file` -> the words of each, and the file that its output goes to."""
    found = []
    for part in line.split("&&"):
        words = shlex.split(part)
        target = None
        if ">" in words:
            target = words[words.index(">") + 1]
            words = words[: words.index(">")]
        found.append((words, target))
    return found
