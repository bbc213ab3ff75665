"""A run directory: what it holds, whether it may be started, continued or left alone.

config.yaml               the resolved configuration
environment.json          every start: iteration, commit, versions, device, processes, seed
metrics.jsonl             see `metrics`
unreadable.jsonl          images that could not be read, if any: index, image, reason, iteration
nonfinite.json            steps whose numbers were not finite, if any (see `nonfinite`)
views.png                 the first batch as the networks saw it
checkpoints/last.pt       the whole state; previous.pt the one before it; the others see `states`
checkpoints/initial.safetensors   the teacher before the first step
backbone.safetensors      the teacher, refreshed with every checkpoint
best.safetensors          the teacher whose k-NN was best while training, where k-NN was asked for; of
                          a fine-tuned run the classifier that scored best
model.safetensors         the whole classifier of a fine-tuned run, whose backbone lies beside it
results.json, attention/  what the evaluations add
report.html, film/        the run as a page, redrawn while it goes; a small picture an evaluation
verdict.json              whether it learned anything, when it is finished
.lock                     which process holds the folder, while one does
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from xdino import checkpoint
from xdino import config as configuration
from xdino.config import RunConfig
from xdino.data.loader import BadImage
from xdino.errors import RunFailed, UsageError, asked, world
from xdino.metrics import check_writable, read_rows
from xdino.run_directory import batches, extension, states
from xdino.run_directory.states import PREVIOUS
from xdino.runtime.atomic import is_temporary, remove_left, write_text
from xdino.runtime.batch_layout import BatchLayout
from xdino.runtime.device import resolve_device
from xdino.runtime.lock import LOCK_FILE, Lock

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
UNREADABLE_FILE = "unreadable.jsonl"
INITIAL_FILE = Path("checkpoints") / "initial.safetensors"
_WEIGHTS = (checkpoint.BACKBONE_FILE, checkpoint.BEST_FILE)  # only a run that was trained has them
C = TypeVar("C", bound=RunConfig)
# What reading a damaged file of JSON raises.
_DAMAGES = (OSError, ValueError, KeyError, TypeError, RecursionError)


class RunDirectory:
    """The folder of a run. Only the run's first process looks at it and writes into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def state_file(self) -> Path:
        return self.path / checkpoint.STATE_FILE

    def resolve(self, config: C, extend: int | None = None) -> C:
        """The configuration to go on with; nothing is written.

        Of a run that was begun, what it started from stays what it was, and so do the epochs that it
        was extended by. `extend`: further epochs, which `settle` sees to.

        Raises:
            UsageError: the folder holds something else, or a run of another configuration (the
                message names the differing keys), or cannot be looked at.
        """
        with asked(f"--run {self.path}"):
            before = self._begun_with(type(config))
        if before is None:
            if extend is not None:
                raise UsageError(
                    f"--extend {extend} adds epochs to a finished run, and {self.path} holds none: "
                    "leave it out, and set train.epochs"
                )
            return config
        config = config.following(before)
        differing = configuration.differing_keys(before, config, batches.KEYS)
        if differing:
            if len(differing) == 1 and before.train.epochs != config.train.epochs:
                raise UsageError(extension.raised(self.path, before, config))
            raise UsageError(
                f"{self.path} holds a run of another configuration (there against here): "
                f"{', '.join(differing)}. Continue it with its own {CONFIG_FILE}, "
                "or choose another folder"
            )
        begun = {
            "init": before.train.init,
            "continue_from": before.train.continue_from,
            "extended": extension.extended(self.path, before, config, extend),
        }
        own = {key: value for key, value in begun.items() if key in vars(config.train)}
        return _with_train(config, **own)

    def share_out(self, config: C, processes: int) -> tuple[C, BatchLayout, str | None]:
        """`config`, which `resolve` gave, with the batches of so many processes.

        Returns:
            That, how the run's first start shared a step out, and a sentence where the last one did
            so otherwise than this one.

        Raises:
            UsageError: they cannot share the run's images a step.
        """
        before, start = self._begun_with(type(config)), self.last_start()
        first = None if before is None else batches.first_of(before, start)
        if before is None or first is None:
            return config, batches.of_config(config, processes), None
        on_cpu = resolve_device(config.runtime.device).type == "cpu"
        now = batches.of_start(self.path, before, config, first, processes, on_cpu)
        last = batches.of_config(before, start.get("processes", processes))
        config = _with_train(config, batch_size=now.batch_size, accumulate=now.accumulate)
        return config, first, batches.told(first, last, now, batches.mixes(config))

    def settle(self, config: C, iterations: int, steps_per_epoch: int, extend: int | None) -> C:
        """`config`, which `resolve` gave, if the epochs that it adds to the run may be added.

        An extension that was cut off and is asked for again by --extend goes on as it was begun.

        Args:
            iterations: what `config` comes to.

        Raises:
            UsageError: the run is not finished.
        """
        before = self._begun_with(type(config))
        had = before.train.extended if before is not None else config.train.extended
        added = config.train.extended[len(had) :]
        least = iterations - sum(added) * steps_per_epoch
        if not added or self.reached(least) is not None:
            return config
        if extend is not None and had[-1:] == (extend,):
            return _with_train(config, extended=had)
        raise UsageError(extension.unfinished(self.path, self.backbone_iteration(), least))

    def _begun_with(self, schema: type[C]) -> C | None:
        """The configuration in the folder, None for a folder that is empty or not there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(self.path)  # a name that is too long, a folder that may not be looked into
        there = next(p for p in [self.path, *self.path.parents] if os.path.lexists(p))
        if not there.is_dir():
            what = "is a file" if there.exists() else "is a link that leads nowhere"
            raise UsageError(f"{there} {what}; --run needs a folder")
        if there != self.path:
            return None
        file = self.path / CONFIG_FILE
        if not file.exists():
            names = (entry.name for entry in self.path.iterdir())
            # A run that begins now, or was killed when it began, has no more than these.
            if any(name != LOCK_FILE and not is_temporary(name) for name in names):
                raise UsageError(
                    f"{self.path} is not empty and not a run (it has no {CONFIG_FILE}): "
                    "choose another folder"
                )
            return None
        kind = configuration.kind_of(file) or schema.kind
        if kind != schema.kind:
            raise UsageError(
                f"{self.path} holds a run of xdino {kind}, which xdino {schema.kind} cannot go on "
                "with: choose another folder"
            )
        try:
            text = file.read_text(encoding="utf-8")
            if text.strip():
                return configuration.load(str(file), None, schema)
            why = "it is empty"
        except (UsageError, UnicodeDecodeError, OSError) as error:
            why = str(error)
        for kept in [self.state_file, *self.kept_states()]:  # each holds the configuration as well
            with contextlib.suppress(RunFailed, UsageError, KeyError):
                tree = checkpoint.load_state(kept)["config"]
                return configuration.parse(tree, "the configuration", schema)
        raise UsageError(
            f"{file} is damaged ({why}), and no state of the run tells its configuration: "
            "write the file again, or choose another folder"
        )

    def own(
        self, config: RunConfig, stack: contextlib.ExitStack, from_iteration: int | None = None
    ) -> str | None:
        """Take the folder until `stack` ends, making it if need be.

        `from_iteration`: the kept state of this iteration is then what is continued from.

        Returns:
            A notice where a dead process held it.

        Raises:
            UsageError: another process holds it, or has begun another run in it.
        """
        check_writable(self.path)
        lock = stack.enter_context(Lock(self.path))
        self.resolve(config)  # once more: another process may have begun a run since
        if from_iteration is not None:
            states.go_back(self.state_file, from_iteration)
        return lock.notice

    # --- states ---

    def kept_states(self) -> list[Path]:
        """The states besides last.pt, the newest first."""
        return states.kept(self.state_file.parent)

    def find(self, iteration: int) -> None:
        """Raises UsageError where no state of this iteration is kept."""
        with asked(f"--from-iteration {iteration}"):
            states.find(self.state_file, iteration)

    def has_state(self) -> bool:
        """Whether there is a state to continue from.

        Raises:
            UsageError: there was one, and it is gone.
        """
        if self.state_file.is_file():
            return True
        kept = [str(path) for path in self.kept_states()]
        if kept:
            advice = f"kept are {', '.join(kept)}: copy one to {self.state_file.name} there"
        elif weights := [name for name in _WEIGHTS if (self.path / name).exists()]:
            advice = f"its weights in {weights[0]} can start another run by --init"
        else:
            return False
        raise UsageError(
            f"{self.path} was trained, but its state {self.state_file} is missing: {advice}, "
            "or choose another folder"
        )

    def load(self) -> tuple[dict[str, Any] | None, str | None]:
        """The state to continue from, and a notice where it is not the newest.

        A damaged last.pt is put aside, and the newest good state takes its place.

        Raises:
            UsageError: the state is missing though the run was trained.
            RunFailed: no state there is good.
        """
        if not self.has_state():
            return None, None
        try:
            return checkpoint.load_state(self.state_file), None
        except RunFailed as error:
            damaged = error
        for path in self.kept_states():
            try:
                state = checkpoint.load_state(path)
            except RunFailed:
                continue
            aside = self.state_file.with_name("damaged.pt")
            states.linked(self.state_file, aside)  # last.pt is never absent
            states.linked(path, self.state_file)
            return state, (
                f"{damaged}; it lies in {aside.name} now. Continuing from {path}, "
                f"iteration {state['iteration']}"
            )
        raise RunFailed(f"{damaged}. There is no other good state in {self.state_file.parent}")

    def save(self, state: dict[str, Any], newest: int = 2) -> None:
        """The state becomes last.pt, and the one that was becomes previous.pt.

        `newest`: how many are kept in all, under their iterations where it is more than these two.
        """
        if self.state_file.is_file():
            states.linked(self.state_file, self.state_file.with_name(PREVIOUS))
        checkpoint.save_state(self.state_file, state)
        with world(f"keep {newest} states"):
            states.keep_newest(self.state_file, state["iteration"], newest)

    def keep(self, name: str) -> None:
        """The newest state under another name, which later ones do not overwrite."""
        states.linked(self.state_file, self.state_file.with_name(name))

    def backbone_iteration(self) -> int | None:
        """The iteration of the backbone in the folder, None where there is no good one."""
        try:
            iteration = checkpoint.read_weights(self.path / checkpoint.BACKBONE_FILE).facts
            return int(iteration["iteration"])
        except (RunFailed, UsageError, KeyError, TypeError, ValueError):
            return None

    def reached(self, least: int) -> int | None:
        """The iteration of a good state with its weights; None where there is none, or below `least`."""
        iteration = self.backbone_iteration()  # written after the state
        if not self.has_state() or iteration is None or iteration < least:
            return None
        try:
            checkpoint.check_state(self.state_file)
        except RunFailed:
            return None
        return iteration

    # --- the rest ---

    def create(self, config: RunConfig) -> None:
        """Make the folder and write its configuration, before anything else is put there."""
        check_writable(self.path)
        with world(f"clean up {self.path}"):
            remove_left(self.path)
        write_text(self.path / CONFIG_FILE, configuration.to_yaml(config))

    def last_start(self) -> dict[str, Any]:
        """The last start in environment.json; nothing where there is none, or the file is damaged."""
        with contextlib.suppress(*_DAMAGES, IndexError):
            return dict(_starts(self.path / ENVIRONMENT_FILE)[-1])
        return {}

    def record_start(self, facts: dict[str, Any]) -> str | None:
        """Add one start to environment.json; a notice where that was damaged and is put aside."""
        path = self.path / ENVIRONMENT_FILE
        starts, notice = [], None
        if path.exists():
            try:
                starts = _starts(path)
            except _DAMAGES:
                aside = path.with_suffix(".damaged")
                notice = f"{path} was damaged: it lies in {aside.name} now"
                with world(f"put {path} aside"):
                    os.replace(path, aside)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        starts.append({"time": started, **facts})
        write_text(path, json.dumps({"starts": starts}, indent=2) + "\n")
        return notice

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; lines that hold none are left out."""
        return read_rows(self.path / METRICS_FILE)[0]

    def evaluated(self, iteration: int) -> bool:
        """Whether metrics.jsonl holds scores of this iteration, but for the probe at the end."""
        return any(
            row.get("iteration") == iteration and "loss" not in row and "linear_top1" not in row
            for row in self.rows()
        )

    def owes_evaluation(self, iteration: int, every: int) -> bool:
        """Whether an evaluation, due every so many iterations (0: never), is missing at this one."""
        if not every or iteration % every:
            return False
        return not self.evaluated(iteration)

    def unreadable(self) -> list[BadImage]:
        """The images that earlier starts of this run could not read."""
        found = []
        for row in _json_lines(self.path / UNREADABLE_FILE):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found.append(BadImage(int(row["index"]), str(row["image"]), str(row["reason"])))
        return found

    def add_unreadable(self, images: Iterable[BadImage], iteration: int) -> str:
        """Add images to the list, by their index, none twice; a sentence that names them."""
        bad = sorted(set(images))
        known = {image.index for image in self.unreadable()}
        new = {image.index: image for image in bad if image.index not in known}
        rows = [
            {"index": i, "image": new[i].where, "reason": new[i].why, "iteration": iteration}
            for i in sorted(new)
        ]
        if rows:
            path = self.path / UNREADABLE_FILE
            with world(f"write {path}"), open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        named = "; ".join(f"{image.where} ({image.why})" for image in bad[:20])
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        return f"skipped {len(bad)} unreadable images (all are in {UNREADABLE_FILE}): {named}{more}"


def _with_train(config: C, **keys: Any) -> C:
    """`config` with other values below `train`."""
    whole: Any = config  # a dataclass, which RunConfig itself is not
    return dataclasses.replace(whole, train=dataclasses.replace(config.train, **keys))


def _starts(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["starts"])


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of one a line; what is none (a line cut short by a kill) is left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # too deep
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows
