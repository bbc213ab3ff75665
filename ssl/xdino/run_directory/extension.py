"""Which epochs a start adds to a run that has its own: `pretrain --extend`, `train.extended`.

`train.epochs` and the schedules of those epochs stay what they were; added epochs lie behind them
(`schedules.Schedules.prolonged`), and config.yaml lists them one extension after the other. So the
recipe that began a run still continues it, and an extension that was cut off goes on like any run.
"""

from pathlib import Path

from xdino.config import RunConfig
from xdino.errors import UsageError


def extended(
    path: Path, before: RunConfig, given: RunConfig, further: int | None
) -> tuple[int, ...]:
    """`train.extended` of a run begun as `before`, started with `given` and --extend `further`.

    Raises:
        UsageError: what is given contradicts what the run has.
    """
    had, here = before.train.extended, given.train.extended
    if here and here[: len(had)] != had:
        raise UsageError(
            f"{path} was extended by {listed(had)} epochs (train.extended), and here it is "
            f"{listed(here)}: leave train.extended out, or begin it with {listed(had)}"
        )
    if further is None:
        return here or had
    if len(here) > len(had):
        raise UsageError(
            f"--extend {further} and --train.extended {listed(here)} both add epochs: give one"
        )
    return (*had, further)


def raised(path: Path, before: RunConfig, given: RunConfig) -> str:
    """A sentence on a run that is started with another `train.epochs` and nothing else new."""
    planned, here = before.train.epochs, given.train.epochs
    extends = "extended" in vars(before.train)  # pretraining does
    advice = f"choose another folder for a run of {'fewer' if extends else here}"
    if extends and here > planned + sum(before.train.extended):
        further = here - planned - sum(before.train.extended)
        advice = f"once the run is finished, --extend {further} adds as many as there are missing"
    return (
        f"{path} has train.epochs {planned}, and here it is {here}: its schedules were made for "
        f"{planned}. Leave train.epochs at {planned}; {advice}"
    )


def unfinished(path: Path, at: int | None, least: int) -> str:
    """A sentence on a run that is to be extended before its end."""
    where = "without a whole state" if at is None else f"at iteration {at:,} of {least:,}"
    return (
        f"{path} is not finished ({where}), and only a finished run is extended: continue it by "
        "the same command without --extend or --train.extended, and extend it then"
    )


def listed(epochs: tuple[int, ...]) -> str:
    """
    >>> listed((20, 10))
    '20,10'
    """
    return ",".join(map(str, epochs))
