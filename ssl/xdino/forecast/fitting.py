"""Whole epochs into the time there is, with their states and evaluations.

A run's length is laid down at its start, for its schedules end with it; so what was timed has to tell
how many epochs fit. Where they are few, one more or less would miss the time by
far: then the number of local crops makes an epoch longer or shorter until whole ones fill it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from xdino.forecast.choices import Choice
from xdino.forecast.ladder import CHECKPOINT_SECONDS, KEPT_STATES
from xdino.forecast.rates import Rates

AIM = 0.99  # of the time: what is left over costs less than what is missing
EVALUATIONS_SHARE = 0.1  # of the time, at most
LAST_SHARE = 0.2  # the same, where the one at the end is the only one
TRIED = 500  # lengths that are compared, at most
MOST_POINTS, LEAST_POINTS = 10, 3  # evaluations along the way
LIMITS = (10_000, 5_000, 2_000, 1_000, 500)  # images of a split
LOST_AT_MOST = 0.03  # of the epochs, so that the last one is evaluated, too
LOCAL_CROPS = (2, 12)  # with which whole epochs are made to fill the time
FILLED = 0.94  # of the time, at least


UNLABELLED = Choice(
    "evaluate.protocols", "quality", "nothing is labelled: RankMe, and whether views are told apart"
)


@dataclass(frozen=True)
class Judging:
    """What one evaluation takes: `fixed` seconds, and `an_image` for each of both splits.

    train, val: their images. labelled: else the features' quality is all that can be judged.
    """

    fixed: float
    an_image: float
    train: int
    val: int
    labelled: bool = True

    def seconds(self, limit: int) -> float:
        return self.fixed + self.an_image * (min(limit, self.train) + min(limit, self.val))


@dataclass(frozen=True)
class Evaluations:
    """every: epochs between them, 0 for none. points: how many. seconds: of one."""

    every: int = 0
    points: int = 0
    limit: int = LIMITS[0]
    seconds: float = 0.0


@dataclass(frozen=True)
class Length:
    """epochs: of the run. seconds: that it is going to take from here on."""

    epochs: int
    evaluations: Evaluations
    checkpoint_every: int
    seconds: float


def epoch_seconds(rates: Rates) -> float:
    """Steps, and the states written at the end of the epoch and, of a long one, along the way."""
    steps = rates.steps_per_epoch
    states = 1 + (steps - 1) // checkpoint_every(rates)
    return steps * rates.seconds_per_step + states * rates.state_seconds


def checkpoint_every(rates: Rates) -> int:
    """Iterations between states: some minutes' worth."""
    return max(10, round(CHECKPOINT_SECONDS / rates.seconds_per_step))


def start_seconds(rates: Rates) -> float:
    """Before the first step: planned again, the untrained weights written, the first images read."""
    return rates.plan_seconds + rates.state_seconds + 2 * rates.seconds_per_step * rates.wait_share


def evaluations(epochs: int, budget: float, judging: Judging | None) -> Evaluations:
    """As many as the budget pays for, on as many images, so that the last epoch is among them.

    One more is paid for than there are points: a run may be judged before its first step.
    """
    if judging is None:
        return Evaluations()
    for least in range(min(LEAST_POINTS, epochs), 0, -1):
        for limit in LIMITS:
            cost = judging.seconds(limit)
            for points in range(min(MOST_POINTS, epochs), least - 1, -1):
                every = epochs // points
                made = epochs // every
                lost = epochs - every * made
                if (made + 1) * cost <= budget and lost <= LOST_AT_MOST * epochs:
                    return Evaluations(every, made, limit, cost)
    return Evaluations()


def last_only(epochs: int, budget: float | None, judging: Judging | None) -> Evaluations:
    """One at the end, on few images, where the budget has room for it; None: in any case."""
    if judging is None:
        return Evaluations()
    cost = judging.seconds(LIMITS[-1])
    if budget is not None and cost > budget:
        return Evaluations()
    return Evaluations(epochs, 1, LIMITS[-1], cost)


def length(seconds: float, rates: Rates, judging: Judging | None) -> Length | None:
    """The run that makes the most of so many seconds; None where not one epoch fits.

    Scores come first, up to a tenth of the time, then epochs. One at the end may take a fifth.
    """
    left = AIM * seconds - start_seconds(rates)
    one = epoch_seconds(rates)
    most = int(left / one) if left > 0 else 0
    best: tuple[tuple[int, int, int], Length] | None = None
    least = max(1, min(most, int((1 - LAST_SHARE) * left / one)))
    for epochs in range(most, least - 1, -max(1, (most - least) // TRIED)):
        spare = left - epochs * one
        found = evaluations(epochs, min(EVALUATIONS_SHARE * left, spare), judging)
        if not found.every:
            found = last_only(epochs, min(LAST_SHARE * left, spare), judging)
        whole = found.every * found.points or epochs
        rank = min(found.points, LEAST_POINTS), found.limit * bool(found.points), whole
        if best is None or rank > best[0]:
            best = rank, of_epochs(whole, rates, found)
    return best[1] if best else None


def of_epochs(epochs: int, rates: Rates, judged: Evaluations) -> Length:
    taken = start_seconds(rates) + epochs * epoch_seconds(rates) + judged.points * judged.seconds
    return Length(epochs, judged, checkpoint_every(rates), taken)


def lengths(choice: Length, rates: Rates, judging: Judging | None) -> Iterator[Choice]:
    """The keys that the length of a run decides."""
    rate = f"{rates.seconds_per_step:.3g} s a step, {rates.steps_per_epoch:,} steps an epoch"
    yield Choice("train.epochs", f"{choice.epochs}", rate)
    found = choice.evaluations
    if found.every:
        if judging is not None and not judging.labelled:
            yield UNLABELLED
        yield Choice(
            "evaluate.every",
            f"{found.every}",
            f"{found.points} {'times' if found.points > 1 else 'time'}, {found.seconds:.2g} s each",
        )
        yield Choice("evaluate.limit", f"{found.limit}", "images of each split to judge by")
    elif judging is None:
        yield Choice("evaluate.every", "0", "nothing judges along the way")
    else:
        yield Choice("evaluate.every", "0", "scoring would take too much of the time")
    yield Choice(
        "runtime.checkpoint_every", f"{choice.checkpoint_every}", "a state every few minutes"
    )
    kept = -(-choice.epochs // KEPT_STATES)
    yield Choice("runtime.keep_every", f"{kept}", f"at most {KEPT_STATES} states are kept")


def local_counts(
    seconds: float,
    rates: Rates,
    judging: Judging | None,
    sizes: tuple[int, int],
    local_count: int,
) -> list[int]:
    """Other numbers of local crops by which whole epochs would fill the time, the nearest first.

    None where they do already. By the number of pixels, which is about what a step takes; it is to be
    timed before it is trusted.

    Args:
        sizes: of global and local crops, in pixels.
    """
    if fills(seconds, length(seconds, rates, judging)):
        return []
    size, local = sizes

    def scaled(count: int) -> Rates:
        share = (2 * size**2 + count * local**2) / (2 * size**2 + local_count * local**2)
        return dataclasses.replace(rates, seconds_per_step=share * rates.seconds_per_step)

    found = [
        count
        for count in range(LOCAL_CROPS[0], LOCAL_CROPS[1] + 1)
        if fills(seconds, length(seconds, scaled(count), judging))
    ]
    return sorted(found, key=lambda count: abs(count - local_count))


def fills(seconds: float, found: Length | None) -> bool:
    return found is not None and found.seconds >= FILLED * seconds


def with_local_crops(choices: list[Choice], count: int) -> list[Choice]:
    """The same choices with another number of local crops."""
    reason = "so that whole epochs fill the time"
    return [
        dataclasses.replace(choice, value=f"{count}", reason=reason)
        if choice.key == "crops.local_count"
        else choice
        for choice in choices
    ]
