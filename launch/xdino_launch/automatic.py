"""`xdino pretrain auto`: look, time a few steps, choose, say why, and pretrain by what was chosen.

What was chosen stays in RUN/auto.json, and in RUN/config.yaml as an ordinary recipe. A run that is
continued goes on with it: nothing is looked at or timed again, for the machine may be in another mood.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from xdino import config as configuration
from xdino import data
from xdino.config import Config
from xdino.data.sources import Source
from xdino.errors import UsageError, asked
from xdino.forecast import fitting, ladder
from xdino.forecast.choices import Choice, choose, configured, settings_of, sizes_of
from xdino.forecast.facts import Images, Machine, look_at, machine_of
from xdino.forecast.fitting import Judging, Length
from xdino.forecast.ladder import Rung
from xdino.forecast.rates import Rates, time_steps
from xdino.plan.networks import spec_of
from xdino.run_directory import CONFIG_FILE, RunDirectory
from xdino.runtime import distributed
from xdino.runtime.atomic import write_text
from xdino.runtime.device import resolve_device
from xdino.runtime.lock import Lock
from xdino.runtime.stopping import StopSignal
from xdino.values import shown
from xdino_launch.console import stderr_console
from xdino_launch.local import evaluator_of, run_pretraining

RECORD_FILE = "auto.json"
PILOT_SHARE, PILOT_SECONDS = 0.06, (4.0, 60.0)  # of the time, for steps that are timed; bounds
PILOT_STEPS = 60
WITHOUT_LIMIT = 15.0  # seconds of a pilot where epochs were asked for
JUDGED = (32, 96, 352)  # images of a split: to warm up, and twice to time
END_SECONDS = 1.0  # after the last step


@dataclass(frozen=True)
class Asked:
    """What a person wants: minutes or epochs, and keys that are set already."""

    minutes: float | None
    epochs: int | None
    given: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises UsageError where it contradicts itself, or a key or value is none."""
        if self.minutes is not None and self.epochs is not None:
            raise UsageError("--minutes and --epochs exclude each other: give one")
        if self.minutes is not None and "train.epochs" in self.given:
            raise UsageError("--minutes and --train.epochs exclude each other: give one")
        if str(self.epochs) != self.given.get("train.epochs", str(self.epochs)):
            raise UsageError(
                f"--epochs is {self.epochs}, but --train.epochs is {self.given['train.epochs']}: "
                "give one"
            )
        settings_of(self.own)

    @property
    def own(self) -> dict[str, str]:
        """The keys, the epochs among them."""
        epochs = {} if self.epochs is None else {"train.epochs": f"{self.epochs}"}
        return {**self.given, **epochs}


@dataclass(frozen=True)
class Recipe:
    """What was chosen. seconds: that the run is going to take, as far as it was timed."""

    choices: list[Choice]
    seconds: float
    facts: dict[str, Any]

    @property
    def config(self) -> Config:
        return configured(self.choices)


def pretrain_auto(
    wanted: Asked,
    run_dir: str | Path,
    command: list[str],
    stop: StopSignal,
    began: float | None = None,
) -> Path:
    """Choose and pretrain, or continue the run that was chosen before.

    Args:
        began: `time.monotonic()` when the minutes began; by default now.

    Returns:
        The path of the pretrained backbone.

    Raises:
        UsageError, RunFailed, Stopped: as `pretrain`; no choice of a person's can be done, or not
            one epoch fits into the minutes.
    """
    began = time.monotonic() if began is None else began
    run = Path(run_dir)
    with contextlib.ExitStack() as stack:
        recipe, fresh = _agreed(wanted, run, stop, began, stack)
        config = recipe.config
        if fresh:
            distributed.from_first(lambda: _write(run, wanted, recipe))
        path = run_pretraining(config, run, command=command, stop=stop)
        if fresh and distributed.rank() == 0:
            _tell_end(run, wanted, (time.monotonic() - began) / 60)
    return path


def recipe_text(wanted: Asked, run_dir: str | Path, stop: StopSignal) -> str:
    """The recipe with its reasons, as YAML. Nothing is written."""
    with contextlib.ExitStack() as stack:
        recipe, _ = _agreed(wanted, Path(run_dir), stop, time.monotonic(), stack)
    return with_reasons(recipe)


def _agreed(
    wanted: Asked, run: Path, stop: StopSignal, began: float, stack: contextlib.ExitStack
) -> tuple[Recipe, bool]:
    """The recipe that all processes go by, and whether it is new."""
    device = resolve_device(wanted.given.get("runtime.device", "auto"))
    with stop.abandoning("while its processes met"):
        if distributed.start(device):
            stack.callback(distributed.stop)
    note = stderr_console().print if distributed.rank() == 0 else lambda *parts, **how: None
    with stop.abandoning("while its recipe was chosen"), distributed.heard():
        before = distributed.from_first(lambda: _recorded(run, wanted))
        if before is not None:
            note(f"{run}: by what was chosen at its start ({RECORD_FILE})", soft_wrap=True)
            return before, False
        if wanted.minutes is None and "train.epochs" not in wanted.own:
            raise UsageError("say how long: --minutes 30, or --epochs N")
        recipe = Choosing(wanted, run, device, began, note).recipe()
    if distributed.rank() == 0:
        stderr_console().print(table(recipe.choices))
    return recipe, True


# Choosing


class Choosing:
    """One choice under way. All processes do the same, and hear of the first what it saw."""

    def __init__(
        self,
        wanted: Asked,
        run: Path,
        device: torch.device,
        began: float,
        note: Callable[..., None],
    ) -> None:
        self.wanted, self.run, self.began, self.note = wanted, run, began, note
        self.given = wanted.own
        self.minutes = wanted.minutes
        path = self.given.get("data.path")
        if not path:
            raise UsageError("data.path is not set: name the images with --data.path FOLDER")
        self.images: Images = distributed.from_first(lambda: self._look(path))
        self.machine: Machine = distributed.from_first(
            lambda: machine_of(device, distributed.world_size())
        )
        self.rungs = ladder.ladder(self.images, self.machine)
        self.judging: Judging | None = None

    @property
    def seconds(self) -> float | None:
        """What is left of the minutes; None where there is no limit."""
        if self.minutes is None:
            return None
        left = 60 * self.minutes - (time.monotonic() - self.began) - END_SECONDS
        return distributed.from_first(lambda: left)

    def recipe(self) -> Recipe:
        """
        Raises:
            UsageError: not one epoch fits, or what a person has set cannot be done.
        """
        place = ladder.first_rung(self.rungs, self.machine, self.images, self.seconds)
        while True:
            rung = self.rungs[place]
            choices, rates = self._timed(rung, None)
            self._judge(choices)
            found = self._length(rates)
            smaller = place + 1 < len(self.rungs) and self._too_slow(rung, rates, found)
            if not smaller:
                break
            place += 1
        choices, rates, found = self._filled(rung, choices, rates, found)
        if found is None:
            raise UsageError(self._too_few(rates))
        return self._settled(rung, choices, rates, found)

    def _look(self, path: str) -> Images:
        settings = settings_of(self.given)
        channels, largest = settings.model.in_chans, settings.data.max_pixels
        with asked(f"cannot open data.path {shown(path)}"):
            source = data.open_source(path, "train", channels, max_pixels=largest)
        found = look_at(source, self._splits(settings) is not None)
        sides = "{}" if found.smallest == found.largest else "{} to {}"
        sides = sides.format(found.smallest, found.largest)
        self.note(
            f"{found.count:,} images of {source.name}, {sides} pixels (the shorter side of "
            f"{found.sampled}), {'grey' if found.grey else 'colour'}, "
            f"{'labelled' if found.labelled else 'without labels to judge by'}",
            soft_wrap=True,
        )
        return found

    @staticmethod
    def _splits(settings: Config) -> tuple[Source, Source] | None:
        path = settings.evaluate.data or settings.data.path
        try:
            return data.open_splits(path, settings.model.in_chans, settings.data.max_pixels)
        except UsageError:
            if settings.evaluate.data:
                raise
            return None

    def _choices(self, rung: Rung, updates: int, epochs: int, local: int | None) -> list[Choice]:
        found = choose(self.images, self.machine, rung, updates, epochs, self.given)
        return found if local is None else fitting.with_local_crops(found, local)

    def _timed(self, rung: Rung, local: int | None) -> tuple[list[Choice], Rates]:
        """Steps of a rung; with half of the batch where the memory does not suffice."""
        while True:
            choices = self._choices(rung, rung.updates, fitting.MOST_POINTS, local)
            config = configured(choices)
            limit = WITHOUT_LIMIT
            if self.minutes is not None:
                least, most = PILOT_SECONDS
                limit = min(max(PILOT_SHARE * 60 * self.minutes, least), most)
            rates, failed = None, False
            try:
                rates = time_steps(config, PILOT_STEPS, seconds=limit, folder=self._folder())
            except torch.OutOfMemoryError:
                failed = True
            if not distributed.any_true(failed):
                assert rates is not None
                break
            if rung.batch == 1 or "train.batch_size" in self.given:
                raise UsageError(
                    f"the memory does not suffice for a batch of {config.train.batch_size}"
                )
            rung = dataclasses.replace(rung, batch=config.train.batch_size // 2)
        self.note(
            f"{config.model.arch}, {rates.images_per_step} images a step: "
            f"{rates.seconds_per_step:.3g} s ({rates.steps} steps in {rates.precision} on "
            f"{rates.device}; {100 * rates.wait_share:.0f} % of it waiting for images)",
            soft_wrap=True,
        )
        return choices, rates

    def _folder(self) -> Path | None:
        """Where the run's disk can be tried."""
        place = self.run.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        return place if place.is_dir() and os.access(place, os.W_OK) else None

    def _judge(self, choices: list[Choice]) -> None:
        """Time an evaluation of a network like that; it is not repeated for the next."""
        if not self.images.labelled or self.judging is not None:
            return
        config = configured(choices)
        self.judging = distributed.from_first(lambda: self._judged(config))

    def _judged(self, config: Config) -> Judging | None:
        splits = self._splits(config)
        assert splits is not None
        every = dataclasses.replace(config.evaluate, every=1)
        channels = splits[0].channels
        with torch.random.fork_rng():
            backbone = spec_of(config, channels).build()
            backbone.to(resolve_device(config.runtime.device))
        taken = []
        for limit in JUDGED:
            limited = dataclasses.replace(every, limit=limit)
            evaluator = evaluator_of(dataclasses.replace(config, evaluate=limited), splits)
            assert evaluator is not None
            began = time.monotonic()
            try:
                with warnings.catch_warnings(action="ignore"):  # of so few images
                    evaluator(backbone)
            except (OSError, RuntimeError, ValueError) as error:
                self.note(f"scores along the way are left out: {error}", soft_wrap=True)
                return None
            taken.append(time.monotonic() - began)
        few, many = (sum(min(limit, len(split)) for split in splits) for limit in JUDGED[1:])
        an_image = max(0.0, taken[2] - taken[1]) / (many - few) if many > few else 0.0
        fixed = max(0.0, taken[1] - few * an_image)
        return Judging(fixed, an_image, len(splits[0]), len(splits[1]))

    def _length(self, rates: Rates) -> Length | None:
        if self.minutes is not None:
            seconds = self.seconds
            assert seconds is not None
            return fitting.length(seconds, rates, self.judging)
        epochs = settings_of(self.given).train.epochs
        budget = fitting.EVALUATIONS_SHARE * epochs * fitting.epoch_seconds(rates)
        judged = fitting.evaluations(epochs, budget, self.judging)
        return fitting.of_epochs(epochs, rates, judged)

    def _too_slow(self, rung: Rung, rates: Rates, found: Length | None) -> bool:
        """Whether a smaller network would make more of the time. None where a person chose it."""
        if "model.arch" in self.given or self.minutes is None:
            return False
        return found is None or 2 * found.epochs * rates.steps_per_epoch < rung.updates

    def _filled(
        self, rung: Rung, choices: list[Choice], rates: Rates, found: Length | None
    ) -> tuple[list[Choice], Rates, Length | None]:
        """With other local crops where whole epochs would leave much of the time."""
        seconds = self.seconds
        if seconds is None or "crops.local_count" in self.given:
            return choices, rates, found
        sizes = sizes_of(self.images, rung, self.given)
        others = fitting.local_counts(seconds, rates, self.judging, sizes, rung.local_count)
        if not others:
            return choices, rates, found
        more, timed = self._timed(rung, others[0])
        seconds = self.seconds
        assert seconds is not None
        with_more = fitting.length(seconds, timed, self.judging)
        if with_more is None or (found is not None and with_more.seconds <= found.seconds):
            return choices, rates, self._length(rates)
        return more, timed, with_more

    def _too_few(self, rates: Rates) -> str:
        spent = (time.monotonic() - self.began) / 60
        one = (fitting.start_seconds(rates) + fitting.epoch_seconds(rates)) / 60
        return (
            f"one epoch of {rates.images:,} images takes about {one:.2g} minutes here with the "
            f"smallest network, and the look at them took {spent:.1g} of the {self.minutes:g} that "
            f"were asked for: give --minutes {1.1 * (spent + one) + 0.1:.2g} or more, or fewer images "
            "(a text file of paths)"
        )

    def _settled(self, rung: Rung, timed: list[Choice], rates: Rates, found: Length) -> Recipe:
        """All choices, now that the length is known."""
        updates = found.epochs * rates.steps_per_epoch
        local = int(next(c.value for c in timed if c.key == "crops.local_count"))
        changed = local != rung.local_count and "crops.local_count" not in self.given
        batch = next(c for c in timed if c.key == "train.batch_size")
        rung = dataclasses.replace(rung, batch=min(rung.batch, int(batch.value)))
        choices = self._choices(rung, updates, found.epochs, local if changed else None)
        choices += [
            choice
            for choice in fitting.lengths(found, rates, self.judging)
            if choice.key not in self.given
        ]
        order = configuration.dotted_keys()
        choices.sort(key=lambda choice: order.index(choice.key))
        facts = {
            "images": dataclasses.asdict(self.images),
            "machine": dataclasses.asdict(self.machine),
            "rates": dataclasses.asdict(rates),
        }
        return Recipe(choices, found.seconds, facts)


# What is kept of it


def _recorded(run: Path, wanted: Asked) -> Recipe | None:
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
    kept |= {key: Choice(key, value, "given") for key, value in wanted.given.items()}
    recipe = Recipe(list(kept.values()), seconds, {})
    if not begun:  # it was stopped before its first step
        write_text(run / CONFIG_FILE, configuration.to_yaml(configured(choices)))
    return recipe


def _write(run: Path, wanted: Asked, recipe: Recipe) -> None:
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


def _tell_end(run: Path, wanted: Asked, minutes: float) -> None:
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
