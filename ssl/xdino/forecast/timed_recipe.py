"""A recipe for so many minutes, where nobody judges along the way: what `xdino.pretrain` asks for."""

import time
from collections.abc import Callable, Mapping

from xdino import data
from xdino.config import Config
from xdino.errors import UsageError
from xdino.forecast import fitting, ladder
from xdino.forecast.choices import choose, configured, settings_of
from xdino.forecast.facts import look_at, machine_of
from xdino.forecast.rates import time_steps
from xdino.runtime import distributed
from xdino.runtime.device import resolve_device

PILOT_STEPS, PILOT_SHARE, PILOT_SECONDS = 60, 0.06, (4.0, 60.0)
END_SECONDS = 1.0  # after the last step


def timed_recipe(
    minutes: float, given: Mapping[str, str], note: Callable[[str], None] = lambda sentence: None
) -> Config:
    """Network, crops, batch and epochs for the images, this machine and the time there is.

    All processes of a run call it and get the same.

    Args:
        minutes: that the whole run may take, this look included.
        given: dotted keys that are set already, `data.path` among them, as on the command line.
        note: is told what was found, a sentence at a time.

    Raises:
        UsageError: not one epoch fits, or what is given cannot be done.
    """
    began = time.monotonic()

    def left() -> float:
        spent = time.monotonic() - began
        return distributed.from_first(lambda: 60 * minutes - spent - END_SECONDS)

    settings = settings_of(given)
    channels, largest = settings.model.in_chans, settings.data.max_pixels
    source = data.open_source(settings.data.path, "train", channels, max_pixels=largest)
    images = distributed.from_first(lambda: look_at(source, labelled=False))
    device = resolve_device(settings.runtime.device)
    machine = distributed.from_first(lambda: machine_of(device, distributed.world_size()))
    rungs = ladder.ladder(images, machine)
    least, most = PILOT_SECONDS
    limit = min(max(PILOT_SHARE * 60 * minutes, least), most)
    rates = None
    for rung in rungs[ladder.first_rung(rungs, machine, images, left()) :]:
        chosen = choose(images, machine, rung, rung.updates, fitting.MOST_POINTS, given)
        rates = time_steps(configured(chosen), PILOT_STEPS, seconds=limit)
        note(
            f"{rung.arch}: {rates.seconds_per_step:.3g} s a step of {rates.images_per_step} images"
        )
        length = fitting.length(left(), rates, None)
        fast = length is not None and 2 * length.epochs * rates.steps_per_epoch >= rung.updates
        if fast or (length is not None and ("model.arch" in given or rung is rungs[-1])):
            break
    assert rates is not None
    if length is None:
        one = (fitting.start_seconds(rates) + fitting.epoch_seconds(rates)) / 60
        raise UsageError(
            f"one epoch of {rates.images:,} images takes about {one:.2g} minutes here: give more than "
            f"{minutes:g} minutes, or fewer images"
        )
    updates = length.epochs * rates.steps_per_epoch
    keys = {c.key: c for c in choose(images, machine, rung, updates, length.epochs, given)}
    keys |= {c.key: c for c in fitting.lengths(length, rates, None) if c.key not in given}
    return configured(list(keys.values()))
