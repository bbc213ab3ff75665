"""Trials in this process, one after the other: what each ended in, how long it took, how much memory."""

import faulthandler
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable

SECONDS = 10  # that a trial may take


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judge(
    name: str, outcomes: Iterable[str], numbers: range, memory: int, trial: Callable[[int], str]
) -> dict[str, int]:
    """How often `trial` of each of `numbers` gave each of `outcomes`.

    Beside these it counts "tracebacks", trials of more than `SECONDS` ("slow"), and those that raised
    the peak of memory by more than `memory` bytes. The first ten are named on standard error; a hang
    of a minute ends the process and shows where.
    """
    counts = Counter(dict.fromkeys((*outcomes, "tracebacks", "slow", "memory"), 0))
    offenders: list[str] = []
    before = peak()
    for number in numbers:
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
        began = time.monotonic()
        try:
            counts[trial(number)] += 1
        except Exception:  # noqa: BLE001 - whatever it is, it is counted
            counts["tracebacks"] += 1
            offenders.append(f"{name} {number}: {traceback.format_exc(limit=-4)}")
        if time.monotonic() - began > SECONDS:
            counts["slow"] += 1
            offenders.append(f"{name} {number}: slow")
        if peak() > before + memory:
            counts["memory"] += 1
            offenders.append(f"{name} {number}: {(peak() - before) >> 20} MiB more")
            before = peak()
    faulthandler.cancel_dump_traceback_later()
    for offender in offenders[:10]:
        print(offender, file=sys.stderr)
    return dict(counts)
