"""The files of a run, read for its report: what is damaged is said, and the rest is used.

Values stay as they are written in their file, so that every number of a report can be found again.
"""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from xdino.checkpoint import BACKBONE_FILE, HEADER_KEY
from xdino.errors import RunFailed, UsageError, asked, reason
from xdino.metrics import METRICS_FILE, collapse_warning, read_rows
from xdino.run_directory import CONFIG_FILE
from xdino_eval.results import Row
from xdino_launch.report.curves import KEYS, Level, Levels, is_number
from xdino_launch.report.next_commands import next_commands, next_of_labelled
from xdino_launch.report.verdict import MEASURES, Scores, Verdict, judge, scores_of

ABSENT = "–"  # noqa: RUF001
VERDICT_FILE = "verdict.json"
#: Kinds of runs that learn with labels, and what they are trained for.
LEARNED = {
    "finetune": "trained to tell classes apart",
    "segment": "trained to tell the class of every pixel",
    "detect": "trained to find objects",
}
SCORED = tuple(key for key, _, _ in MEASURES)  # of an evaluation while training
T = TypeVar("T")


#: `loss.objective` -> what a report says of it.
LEARNED_BY = {
    "dino": "self-distillation (DINO)",
    "simdino": "self-distillation with a coding rate (SimDINO)",
    "sigreg": "agreement of views and SIGReg (LeJEPA)",
}


@dataclass(frozen=True)
class Run:
    """`config`: dotted keys to values as they are written. `damage`: what could not be read, a
    sentence each."""

    path: Path
    name: str
    config: dict[str, str]
    facts: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    rows: list[Row]
    damage: list[str]

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Read everything but the pictures.

        Raises:
            UsageError: no folder, or one that is no run.
        """
        with asked(f"{path} cannot be read"):
            if not path.is_dir():
                raise UsageError(f"there is no run folder {path}")
            if not (path / CONFIG_FILE).exists():
                raise UsageError(f"{path} is not a run: it has no {CONFIG_FILE}")
        damage: list[str] = []
        return cls(
            path=path,
            name=path.resolve().name,
            config=_config(path / CONFIG_FILE, damage),
            facts=_facts(path / BACKBONE_FILE, damage),
            starts=_starts(path / "environment.json", damage),
            metrics=_metrics(path / METRICS_FILE, damage),
            rows=_rows(path / "results.json", damage),
            damage=damage,
        )

    def value(self, key: str) -> str:
        return self.config.get(key, ABSENT)

    @property
    def fine_tuned(self) -> bool:
        """Whether it is one of `xdino finetune`."""
        return self.value("kind") == "finetune"

    @property
    def labelled(self) -> bool:
        """Whether it learned with labels."""
        return self.value("kind") in LEARNED

    @property
    def learner(self) -> str:
        """The command that made it."""
        return self.value("kind") if self.labelled else "pretrain"

    @property
    def task(self) -> str:
        """What it was trained for, where it learned with labels."""
        return LEARNED.get(self.value("kind"), ABSENT)

    @property
    def judged(self) -> str:
        """Of what its scores while training are."""
        network = {"segment": "segmenter", "detect": "detector"}.get(
            self.value("kind"), "classifier"
        )
        whose = f"Of the {network} on the val images; in per cent."
        return (
            whose if self.labelled else "Of the teacher's frozen features; accuracies in per cent."
        )

    @property
    def finished(self) -> bool:
        """Whether its weights are those of its last iteration."""
        return (
            "iterations" in self.facts and self.facts.get("iteration") == self.facts["iterations"]
        )

    @property
    def learned_by(self) -> str:
        """The objective, in words."""
        return LEARNED_BY.get(self.value("loss.objective"), LEARNED_BY["dino"])

    @property
    def prototypes(self) -> int | None:
        """K, where the loss has prototypes and so begins at ln K."""
        told = self.value("head.prototypes")
        known = re.fullmatch(r"[1-9]\d{0,9}", told) and int(told) > 1
        with_them = self.value("loss.objective") in (ABSENT, "dino")
        return int(told) if known and with_them else None

    @property
    def start(self) -> str:
        """What the network was before its first step."""
        given = {self.value("train.init"), self.value("train.continue_from")}
        return "untrained" if given <= {ABSENT, "null", "~", ""} else "at the start"

    @property
    def verdict(self) -> Verdict:
        return judge(self.metrics, self.prototypes, self.finished, self.start)

    @property
    def levels(self) -> Levels:
        """What its curves are compared with: ln K, the network before its first step, chance."""
        found: dict[str, list[Level]] = {}
        if self.prototypes is not None:
            found["loss"] = [Level("ln K", math.log(self.prototypes))]
        for key, _, guess in MEASURES:
            rows = [row for row in self.metrics if is_number(row.get(key))]
            own = found.setdefault(key, [])
            own += [Level(self.start, row[key]) for row in rows[:1] if row["iteration"] == 0]
            own += [Level("chance", row[guess]) for row in rows[-1:] if is_number(row.get(guess))]
        return found

    @property
    def scores(self) -> list[dict[str, Any]]:
        """The rows of evaluations while it trained."""
        return [row for row in self.metrics if any(key in row for key in SCORED)]

    @property
    def measure(self) -> Scores | None:
        """What the verdict goes by, where it was ever scored."""
        return scores_of(self.metrics)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best of `scores` by that measure."""
        found = self.measure
        return None if found is None or found.best is None else dict(found.best)

    @property
    def going_on(self) -> str | None:
        """The command that continues it, where it is unfinished and its start is recorded."""
        told = self.starts[-1].get("command") if self.starts and not self.finished else None
        if not isinstance(told, list) or not all(isinstance(word, str) for word in told):
            return None
        return shlex.join(["xdino", *told])

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What to type next: (what for, command)."""
        keys = "evaluate.data", "data.path", "data.val_json", "data.val_images"
        none = ABSENT, "null", "~", ""
        *data, images = (None if (path := self.value(key)) in none else path for key in keys)
        known = next((path for path in data if path is not None), "DATA")
        if self.labelled:
            return next_of_labelled(self.value("kind"), self.path, known, images)
        return next_commands(self.path, known)

    @property
    def reached(self) -> str:
        """How far it is, in words."""
        if "iterations" in self.facts:
            here, end = self.facts.get("iteration"), self.facts["iterations"]
            return f"iteration {here} of {end}, {'finished' if here == end else 'unfinished'}"
        if self.metrics:
            return f"iteration {self.metrics[-1]['iteration']}, no backbone yet"
        return "not begun"

    @property
    def network(self) -> str:
        """Its name; of a fine-tuned run that names none, that of the weights it began with."""
        named = self.value("model.arch")
        spec = self.starts[-1].get("spec") if self.starts else None
        if named in ("null", "~") and isinstance(spec, dict):
            return str(spec.get("arch", named))
        return named

    @property
    def summary(self) -> dict[str, Any]:
        """What it is, in the words of its configuration and its first start."""
        first = self.starts[0] if self.starts else {}
        device = f"{first['device']}, {first.get('precision', '')}" if "device" in first else ABSENT
        return {
            "network": self.network,
            "trained on" if self.labelled else "pretrained on": self.value("data.path"),
            **({"from": self.value("train.init")} if self.labelled else {}),
            **self._length,
            "images a micro-batch": self.value("train.batch_size"),
            "seed": self.value("train.seed"),
            "reached": self.reached,
            "on": device.removesuffix(", "),
            "code": short(str(first.get("commit", ABSENT))),
        }

    @property
    def _length(self) -> dict[str, str]:
        iterations = self.value("train.iterations")
        if iterations in (ABSENT, "null", "~", ""):
            return {"epochs": self.value("train.epochs")}
        return {"iterations": iterations}

    @property
    def last(self) -> dict[str, Any]:
        """The last value of everything that was logged."""
        return {key: value for row in self.metrics for key, value in row.items()}

    @property
    def has_quality(self) -> bool:
        """Whether the label-free measures are among its rows."""
        return any(name.lower() == "rankme" for row in self.rows for name in row.metrics)

    @property
    def collapse(self) -> str | None:
        """The trainer's own alarm, where the last logged values call for it."""
        loss, entropy, kl = (self.last.get(key) for key in ("loss", "teacher_entropy", "kl"))
        prototypes = self.prototypes
        if not (is_number(loss) and is_number(entropy) and is_number(kl)):
            return None
        if prototypes is None:
            return None
        seen = {"teacher_entropy": entropy, "kl": kl}
        if is_number(koleo := self.last.get("koleo")):
            seen["koleo"] = koleo
        alarm = collapse_warning(loss, seen, prototypes)
        # ln K, worked out, stands in no file.
        return None if alarm is None else re.sub(r" = [\d.]+", "", alarm)


def short(digest: str) -> str:
    """The beginning of a hash; anything else as it is."""
    head, plus, changes = digest.partition("+")
    is_hash = len(head) >= 32 and set(head) <= set("0123456789abcdef")
    return (head[:12] if is_hash else head) + plus + changes


def plain(value: Any) -> str:
    """A value as its file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- file by file -----------------------------------------------------------------------------


def _json(path: Path, kind: type[T], damage: list[str]) -> T | None:
    """What a JSON file holds, where it is a `kind`; None without the file, or with a damaged one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} is damaged and left out: {reason(error)}")
        return None
    if isinstance(value, kind):
        return value
    named = "list" if kind is list else "object"
    damage.append(f"{path.name} is damaged and left out: it is no {named}")
    return None


def _config(path: Path, damage: list[str]) -> dict[str, str]:
    """Dotted keys -> values, both as they are written: 1.0e-06 stays 1.0e-06."""
    try:
        told = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(told)):
            raise ValueError("it refers to itself (an alias), which no run writes")
        tree = yaml.load(told, Loader=yaml.BaseLoader)
        if not isinstance(tree, dict):
            raise ValueError("it holds no sections")
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} is damaged and left out: {' '.join(str(error).split())}")
        return {}
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), below)
        else:
            flat[prefix] = ", ".join(map(plain, value)) if isinstance(value, list) else plain(value)

    walk("", tree)
    return flat


def _facts(path: Path, damage: list[str]) -> dict[str, Any]:
    """What the backbone's header says: iteration, iterations, data; nothing without a backbone."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
        facts = header.get("facts", {}) if isinstance(header, dict) else None
        if not isinstance(facts, dict):
            raise ValueError("its header says nothing of a run")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} is damaged: {reason(error)}")
        return {}
    return facts


def _starts(path: Path, damage: list[str]) -> list[dict[str, Any]]:
    starts = (_json(path, dict, damage) or {"starts": []}).get("starts")
    if not isinstance(starts, list):
        damage.append(f"{path.name} is damaged: it lists no starts")
        return []
    whole = [start for start in starts if isinstance(start, dict)]
    if len(whole) < len(starts):
        damage.append(f"{path.name} is damaged: a start in it is no object")
    return whole


def _metrics(path: Path, damage: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a line that was cut short when the run was killed is left out."""
    try:
        rows, bad = read_rows(path)
        ended = not path.exists() or path.read_bytes()[-1:] == b"\n"
    except (RunFailed, OSError) as error:
        damage.append(f"{path.name} is left out: {error}")
        return []
    if bad > (not ended):
        damage.append(f"{path.name} holds lines that are no rows: they are left out")
    wild = [key for key in KEYS if any(not is_number(row.get(key, 0)) for row in rows)]
    if wild:
        damage.append(
            f"{path.name} holds values that no curve can show (not finite, too large, or no "
            f"numbers): {', '.join(wild)}"
        )
    return rows


_ROW = TypeAdapter(Row)


def _rows(path: Path, damage: list[str]) -> list[Row]:
    """The rows of results.json that are whole."""
    rows = []
    entries = _json(path, list, damage) or []
    for entry in entries:
        try:
            _ROW.validate_json(json.dumps(entry), strict=True)
            rows.append(Row(**entry))
        except (ValidationError, TypeError):  # fields of other kinds; missing or unknown ones
            continue
    if len(rows) < len(entries):
        damage.append(f"{path.name} holds entries that are no whole rows: they are left out")
    return rows


def names_of(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their paths where the names are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]
