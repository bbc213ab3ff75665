"""What this machine can train on these images in the time there is, and a recipe of it.

The networks, and the rule that prefers one, are `pretrain auto`'s (`xdino.forecast.choices`). Each is
tried, in a process of its own.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xdino.config import QUALITY_VIEWS, dotted_keys
from xdino.data import open_source, open_splits
from xdino.errors import RunFailed, UsageError
from xdino.forecast import fitting, ladder
from xdino.forecast.choices import Choice, choose, configured
from xdino.forecast.costs import Workload, count_step, forward_flops
from xdino.forecast.facts import Images, look_at, machine_of
from xdino.forecast.fitting import Judging
from xdino.forecast.ladder import Rung
from xdino.forecast.machines import Machine
from xdino.forecast.outlook import Outlook, Trial, outlook
from xdino.forecast.survey import Survey
from xdino.runtime.device import resolve_device
from xdino_launch.forecasting.trials import try_out

TRIED = 3  # networks


@dataclass(frozen=True)
class Candidate:
    """A network with its crops and batch, and what it took here.

    Args:
        choices: keys, values and reasons.
        outlook: of a run of the epochs that fit; of one epoch where none does.
        epochs: that fit. enough: whether they are the updates that the network is worth.
    """

    choices: Sequence[Choice]
    outlook: Outlook
    epochs: int
    enough: bool

    def value(self, key: str) -> str:
        return next((choice.value for choice in self.choices if choice.key == key), "")

    @property
    def network(self) -> str:
        """As a table names it."""
        depth = self.value("model.depth")
        return self.value("model.arch") + (f", {depth} blocks" if depth else "")


def candidates(
    found: Survey,
    data: str,
    minutes: float,
    machine: Machine,
    tell: Callable[[str], None] = lambda sentence: None,
) -> list[Candidate]:
    """Up to `TRIED` networks, the largest first, each tried here.

    Raises:
        UsageError: nothing can be trained on these images.
        RunFailed: no trial came to its end.
    """
    images = look_at(open_source(data, "train"), labelled=False)
    here = machine_of(resolve_device("auto"), 1)
    rungs = ladder.ladder(images, here)
    first = max(0, ladder.first_rung(rungs, here, images, 60 * minutes) - 1)
    made: list[Candidate] = []
    failed = ""
    for rung in rungs[first : first + TRIED]:
        given = {"data.path": data}
        choices = choose(images, here, rung, rung.updates, fitting.MOST_POINTS, given)
        config = configured(choices)
        channels = config.model.in_chans or images.channels
        precision = machine.precision(config.train.precision)
        work = Workload.of(config, found.images, channels, 1, precision)
        tell(f"a few steps of {config.model.arch} at {config.crops.global_size} pixels ...")
        try:
            trial = try_out(work, machine)
        except RunFailed as error:
            failed = str(error)
            continue
        made.append(_candidate(images, rung, work, machine, trial, minutes, given))
    if not made:
        raise RunFailed(failed or "nothing could be tried here")
    return made


def _candidate(
    images: Images,
    rung: Rung,
    work: Workload,
    machine: Machine,
    trial: Trial,
    minutes: float,
    given: dict[str, str],
) -> Candidate:
    """The epochs that fit, and the recipe laid out for them."""
    step = outlook(work, machine, trial=trial)
    rates = dataclasses.replace(
        trial.rates, seconds_per_step=step.step_seconds, steps_per_epoch=work.steps_per_epoch
    )
    begin = trial.import_seconds + trial.start_seconds
    judging = _judging(work, step.step_seconds, given["data.path"])
    passes, seconds = rates, 60 * minutes - begin
    rates = fitting.of_other_epochs(seconds, passes, judging)
    fits = fitting.length(seconds, rates, judging)
    length = fits or fitting.of_epochs(1, rates, fitting.Evaluations())
    updates = length.epochs * rates.steps_per_epoch
    here = machine_of(resolve_device("auto"), 1)
    settled = dataclasses.replace(rung, batch=work.config.train.batch_size)
    epochs = min(length.epochs, math.ceil(updates / passes.steps_per_epoch))
    choices = choose(images, here, settled, updates, epochs, given)
    choices += [] if rates is passes else [fitting.images_per_epoch(rates)]
    choices += fitting.lengths(length, rates, judging)
    order = dotted_keys()
    choices.sort(key=lambda choice: order.index(choice.key))
    full = Workload.of(
        configured(choices), work.images, work.spec.in_chans, 1, trial.rates.precision
    )
    seen = outlook(full, machine, trial=trial)
    return Candidate(choices, seen, fits.epochs if fits else 0, 2 * updates >= rung.updates)


def _judging(work: Workload, step_seconds: float, path: str) -> Judging:
    """What an evaluation takes, by the operations of its forward passes: it is not tried."""
    flops = count_step(work).flops
    an_image = forward_flops(work, work.spec.input_size) / flops * step_seconds
    try:
        train, val = open_splits(path)
    except UsageError:
        return Judging(0.0, (1 + QUALITY_VIEWS) * an_image, work.images, 0, labelled=False)
    return Judging(0.0, an_image, len(train), len(val))


def preferred(made: Sequence[Candidate]) -> Candidate:
    """The largest that gets half of the updates that it is worth; the smallest where none does."""
    return next((each for each in made if each.epochs and each.enough), made[-1])


# The recipe


def recipe_text(found: Survey, chosen: Candidate, file: str) -> str:
    """A recipe with the reason of each key, and what is known of the images at its top."""
    seen = chosen.outlook
    size = found.shorter
    sides = f", shorter side {size.low:.0f} to {size.high:.0f} pixels" if size else ""
    lines = [
        f"# Chosen by `xdino look`: {found.images:,} images{sides}.",
        "#",
        f"# command:  xdino pretrain {file} --run DIR",
        f"# hardware: {seen.device}, {seen.precision}, as it was tried",
        f"# hours:    {seen.seconds / 3600:.2g} (forecast from steps that were timed)",
        "# expected: not measured",
    ]
    section = ""
    for choice in chosen.choices:
        part, _, leaf = choice.key.partition(".")
        if part != section:
            lines += ["", f"{part}:"] if not section else [f"{part}:"]
            section = part
        reason = "" if choice.reason == "given" else f"  # {choice.reason}"
        lines.append(f"  {leaf}: {_scalar(choice.value)}{reason}")
    return "\n".join(lines) + "\n"


def _scalar(value: str) -> str:
    """A value as YAML's text; names of files may hold anything."""
    plain = value.replace(".", "").replace("_", "").replace(",", "").replace("%", "")
    if plain.isascii() and plain.replace("-", "").isalnum():
        return value
    try:
        return json.dumps(value)
    except UnicodeEncodeError:  # pragma: no cover - json escapes them
        raise UsageError("the name of the data cannot be written into a recipe") from None
