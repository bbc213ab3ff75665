"""Choosing a recipe: look, time, choose; time a smaller network where that makes more of the minutes."""

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xdino import config as configuration
from xdino import data
from xdino.config import Config
from xdino.config.bands import Bands
from xdino.data.sources import Source
from xdino.errors import UsageError, asked
from xdino.forecast import fitting, ladder
from xdino.forecast.choices import Choice, batch_of, choose, configured, settings_of
from xdino.forecast.facts import Images, Machine, look_at, machine_of
from xdino.forecast.fitting import Judging, Length
from xdino.forecast.ladder import Rung
from xdino.forecast.rates import Rates, time_steps
from xdino.job import Evaluator
from xdino.plan.networks import spec_of
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device
from xdino.values import shown

PILOT_SHARE, PILOT_SECONDS = 0.06, (4.0, 60.0)  # of the time, for steps that are timed; bounds
PILOT_STEPS = 60
WITHOUT_LIMIT = 5.0  # seconds of a pilot where epochs were asked for: it only forecasts
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


#: What judges a run by its configuration while it trains, given its labelled splits.
Judges = Callable[[Config, tuple[Source, Source]], Evaluator | None]


class Choosing:
    """One choice under way. All processes do the same, and hear of the first what it saw.

    Args:
        run: its folder, whose disk is tried; None for nowhere.
        began: `time.monotonic()` when the minutes began.
        note: is told what was found, a sentence at a time.
        judges: None where nobody is going to judge along the way.
    """

    def __init__(
        self,
        wanted: Asked,
        run: Path | None,
        device: torch.device,
        began: float,
        note: Callable[[str], None],
        judges: Judges | None = None,
    ) -> None:
        self.wanted, self.run, self.began, self.note = wanted, run, began, note
        self.judges = judges
        self.given = wanted.own
        self.minutes = wanted.minutes
        path = self.given.get("data.path")
        if not path:
            raise UsageError("data.path is not set: name the images with --data.path FOLDER")
        self.images: Images = distributed.from_first(lambda: self._look(path))
        self.machine: Machine = distributed.from_first(
            lambda: machine_of(device, distributed.world_size())
        )
        self.rungs = ladder.ladder(self.images, self.machine, self.given.get("loss.objective"))
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
            choices, timed = self._timed(rung)
            self._judge(choices)
            rates = self._with_epochs(timed)
            found = self._length(rates)
            smaller = place + 1 < len(self.rungs) and self._too_slow(rung, rates, found)
            if not smaller:
                break
            place += 1
        if found is None:
            raise UsageError(self._too_few(rates))
        cut = [] if rates is timed else [fitting.images_per_epoch(rates)]
        return self._settled(rung, choices, rates, found, cut)

    def _look(self, path: str) -> Images:
        settings = settings_of(self.given)
        channels, largest = settings.channels, settings.data.max_pixels
        with asked(f"cannot open data.path {shown(path)}"):
            source = data.open_source(path, "train", channels, max_pixels=largest)
        judged = self.judges is not None and self._labelled(settings) is not None
        found = look_at(source, judged)
        sides = "{}" if found.smallest == found.largest else "{} to {}"
        sides = sides.format(found.smallest, found.largest)
        colours = "grey" if found.grey else "colour"
        if isinstance(source.channels, Bands):
            colours = f"{source.channels} bands"
        self.note(
            f"{found.count:,} images of {source.name}, {sides} pixels (the shorter side of "
            f"{found.sampled}), {colours}, "
            f"{'labelled' if found.labelled else 'without labels to judge by'}"
        )
        return found

    @staticmethod
    def _labelled(settings: Config) -> tuple[Source, Source] | None:
        path = settings.evaluate.data or settings.data.path
        try:
            return data.open_splits(path, settings.channels, settings.data.max_pixels)
        except UsageError:
            if settings.evaluate.data:
                raise
            return None

    def _choices(self, rung: Rung, updates: int, epochs: int) -> list[Choice]:
        return choose(self.images, self.machine, rung, updates, epochs, self.given)

    def _timed(self, rung: Rung) -> tuple[list[Choice], Rates]:
        """Steps of a rung; with half of the batch where the memory does not suffice."""
        while True:
            choices = self._choices(rung, rung.updates, fitting.MOST_POINTS)
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
            f"{rates.device}; {100 * rates.wait_share:.0f} % of it waiting for images)"
        )
        return choices, rates

    def _folder(self) -> Path | None:
        """Where the run's disk can be tried."""
        if self.run is None:
            return None
        place = self.run.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        return place if place.is_dir() and os.access(place, os.W_OK) else None

    def _judge(self, choices: list[Choice]) -> None:
        """Time an evaluation of a network like that; it is not repeated for the next."""
        if self.judges is None or self.judging is not None:
            return
        unlabelled = [] if self._has_what_judges else [fitting.UNLABELLED]
        config = configured([*choices, *unlabelled])
        found = distributed.together(lambda: self._judged(config))  # each does its part of it
        self.judging = distributed.from_first(lambda: found)

    @property
    def _has_what_judges(self) -> bool:
        """Whether what judges is given, or labelled images leave it at k-NN."""
        return self.images.labelled or "evaluate.protocols" in self.given

    def _judged(self, config: Config) -> Judging | None:
        assert self.judges is not None
        splits, path = self._labelled(config), config.data.path
        if splits is None:
            source = data.open_source(
                path or "", "train", config.channels, max_pixels=config.data.max_pixels
            )
            splits = source, source
        every = dataclasses.replace(config.evaluate, every=1)
        channels = splits[0].channels
        with torch.random.fork_rng():
            backbone = spec_of(config, channels).build()
            backbone.to(resolve_device(config.runtime.device))
        taken = []
        for limit in JUDGED:
            limited = dataclasses.replace(every, limit=limit)
            evaluator = self.judges(dataclasses.replace(config, evaluate=limited), splits)
            assert evaluator is not None
            began = time.monotonic()
            try:
                with warnings.catch_warnings(action="ignore"):  # of so few images
                    evaluator(backbone)
            except (OSError, RuntimeError, ValueError) as error:
                self.note(f"scores along the way are left out: {error}")
                return None
            taken.append(time.monotonic() - began)
        judged = splits if self.images.labelled else splits[:1]
        few, many = (sum(min(limit, len(split)) for split in judged) for limit in JUDGED[1:])
        an_image = max(0.0, taken[2] - taken[1]) / (many - few) if many > few else 0.0
        fixed = max(0.0, taken[1] - few * an_image)
        val = len(splits[1]) if self.images.labelled else 0
        return Judging(fixed, an_image, len(splits[0]), val, self._has_what_judges)

    def _length(self, rates: Rates) -> Length | None:
        if self.minutes is not None:
            seconds = self.seconds
            assert seconds is not None
            return fitting.length(seconds, rates, self.judging)
        epochs = settings_of(self.given).train.epochs
        budget = fitting.EVALUATIONS_SHARE * epochs * fitting.epoch_seconds(rates)
        judged = fitting.evaluations(epochs, budget, self.judging)
        if not judged.every:
            judged = fitting.last_only(epochs, None, self.judging)
        return fitting.of_epochs(epochs, rates, judged)

    def _too_slow(self, rung: Rung, rates: Rates, found: Length | None) -> bool:
        """Whether a smaller network would make more of the time. None where a person chose it."""
        if "model.arch" in self.given or self.minutes is None:
            return False
        return found is None or 2 * found.epochs * rates.steps_per_epoch < rung.updates

    def _with_epochs(self, rates: Rates) -> Rates:
        """With epochs that are no passes over the images where those would miss the minutes."""
        seconds = self.seconds
        if seconds is None or "train.images_per_epoch" in self.given:
            return rates
        return fitting.of_other_epochs(seconds, rates, self.judging)

    def _too_few(self, rates: Rates) -> str:
        spent = (time.monotonic() - self.began) / 60
        steps, images = fitting.least_steps(rates), f"{rates.images:,} images"
        least = dataclasses.replace(rates, steps_per_epoch=steps)
        one = (fitting.start_seconds(rates) + fitting.epoch_seconds(least)) / 60
        whole = steps == rates.steps_per_epoch
        what = f"one epoch of {images} takes" if whole else f"{steps} steps on {images} take"
        mend = ", or fewer images (a text file of paths)" if whole else ""
        return (
            f"{what} about {one:.2g} minutes here with the smallest network, and the look at them took "
            f"{spent:.1g} of the {self.minutes:g} that were asked for: give --minutes "
            f"{1.1 * (spent + one) + 0.1:.2g} or more{mend}"
        )

    def _settled(
        self, rung: Rung, timed: list[Choice], rates: Rates, found: Length, cut: list[Choice]
    ) -> Recipe:
        """All choices, now that the length is known; `cut`: with epochs that are no passes."""
        updates = found.epochs * rates.steps_per_epoch
        batch = int(next(c.value for c in timed if c.key == "train.batch_size"))
        if batch < batch_of(self.images, self.machine, rung, self.given):  # memory halved it
            rung = dataclasses.replace(rung, batch=batch)
        passes = math.ceil(updates * rates.images_per_step / rates.images)
        choices = self._choices(rung, updates, min(found.epochs, passes)) + cut
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
