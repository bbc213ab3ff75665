"""Whole epochs into the time there is, with their states and evaluations.

A run's length is laid down at its start, for its schedules end with it; so what was timed has to tell
how many epochs fit. Where few passes over the images do, or not even one, one more or less would miss the
time by far: then an epoch is another number of images (`train.images_per_epoch`).
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
FILLED = 0.94  # of the time, at least, by passes over the images; else epochs are cut otherwise
CUT = 10  # epochs then, about
LEAST_STEPS = 100  # of a run that is less than a pass: fewer teach nothing


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


def of_other_epochs(seconds: float, rates: Rates, judging: Judging | None) -> Rates:
    """The same rates with epochs of so many steps that whole ones fill the time.

    As they are where passes over the images fill it, or where there is no time for `LEAST_STEPS`.
    """
    if _fills(seconds, length(seconds, rates, judging)):
        return rates
    each = (AIM * seconds - start_seconds(rates)) / CUT - rates.state_seconds
    most = int(each / rates.seconds_per_step) if each > 0 else 0
    best: tuple[tuple[int, int, float], Rates] | None = None
    # Fewer steps leave time for scores.
    for steps in range(most, int((1 - LAST_SHARE) * most), -max(1, most // TRIED)):
        cut = dataclasses.replace(rates, steps_per_epoch=steps)
        found = length(seconds, cut, judging)
        if found is None or found.epochs * steps < least_steps(rates):
            continue
        judged = found.evaluations
        rank = min(judged.points, LEAST_POINTS), judged.limit * bool(judged.points), found.seconds
        if best is None or rank > best[0]:
            best = rank, cut
    return best[1] if best else rates


def least_steps(rates: Rates) -> int:
    """Of any run: a pass over the images, `LEAST_STEPS` of very many."""
    return min(LEAST_STEPS, rates.steps_per_epoch)


def images_per_epoch(cut: Rates) -> Choice:
    """The key of epochs that are no passes."""
    images = cut.steps_per_epoch * cut.images_per_step
    share = images / cut.images
    return Choice(
        "train.images_per_epoch", f"{images}", f"{share:.2g} of all: whole epochs fill the time"
    )


def _fills(seconds: float, found: Length | None) -> bool:
    return found is not None and found.seconds >= FILLED * seconds
