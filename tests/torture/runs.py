"""Runs that are killed, stopped, flipped, squeezed and doubled: each must end as if left alone.

    python tests/torture/runs.py SEED [kills|signals|moves|flips|disks|pairs COUNT]

Whole processes are killed through the command line and the real torchrun; what needs no process of
its own (flipped bits, full disks) happens in this one.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiny_run

from xdino import checkpoint, config
from xdino.errors import RunFailed, Stopped, UsageError
from xdino.job import Listener
from xdino.pretraining import pretrain

SMALL = {
    "train.epochs": 6, "train.batch_size": 500, "crops.local_count": 0, "crops.global_size": 12,
    "model.drop_path": 0.2, "evaluate.every": 0, "runtime.log_every": 1,
    "runtime.checkpoint_every": 7,
}  # fmt: skip
ITERATIONS = 6 * 20


# --- whole processes ---


def command(run: Path, processes: int, more: Mapping[str, object] | None = None) -> list[str]:
    """`more`: keys besides, or with other values."""
    small = {**SMALL, "train.precision": "fp32", **(more or {})}
    small["train.batch_size"] = SMALL["train.batch_size"] // processes
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    module = ["-m", "xdino_launch", "pretrain", "debug", "--run-dir", str(run), *options]
    if processes == 1:
        return [sys.executable, *module]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *torchrun, *module]


def begin(run: Path, processes: int, more: Mapping[str, object] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        command(run, processes, more),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def starts(run: Path) -> list[dict]:
    path = run / "environment.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


def saved(run: Path) -> int:
    state = run / "checkpoints" / "last.pt"
    return checkpoint.load_state(state)["iteration"] if state.exists() else 0


def workers_of(launcher: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == launcher:
                found.append(int(stat.parent.name))
    return found


def interrupted(
    seed: int, count: int, ways: Sequence[int], kill: bool, precision: str = "fp32"
) -> Counter[str]:
    """`count` runs' worth of interruptions at random moments, against one run left alone.

    `ways`: numbers of processes, one of which each start has; the run left alone has the first.
    """
    generator, found = random.Random(seed), Counter[str]()
    more = {"train.precision": precision}
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        began = time.monotonic()
        assert begin(whole, ways[0], more).wait() == 0
        seconds = time.monotonic() - began
        number, run, done = 0, Path(place) / "0", 0
        while done < count or run.exists():
            before, told = saved(run), len(starts(run))
            processes = generator.choice(ways)
            process = begin(run, processes, more)
            if done < count:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=generator.uniform(0.5, 1.0) * seconds)
            if done < count and process.poll() is None:
                done += 1
                if kill:
                    _kill(process, generator, processes)
                else:
                    _ask(process, generator, found)
            error = process.communicate(timeout=600)[1]
            found["tracebacks"] += "Traceback" in error and processes == 1
            if len(begun := starts(run)) > told:  # else it was killed before it came so far
                lost = before - begun[-1]["iteration"]
                found["steps lost beyond the last checkpoint"] += max(0, lost)
            if process.returncode == 0:
                if len(ways) == 1:
                    _compare(whole, run, found, to_the_bit=True)
                else:
                    again = _moved(run, more)
                    _compare(again, run, found, to_the_bit=True)
                    shutil.rmtree(again)
                    if precision == "fp32":
                        _compare(whole, run, found, to_the_bit=False)
                shutil.rmtree(run)
                number += 1
                run = Path(place) / str(number)
        found["kills" if kill else "signals"] = done
    return found


def _moved(run: Path, more: Mapping[str, object]) -> Path:
    """A run of the same moves as `run` made, none of which was forced: its bits are those of `run`."""
    again = run.with_name(f"{run.name}-again")
    shutil.rmtree(again, ignore_errors=True)
    # Of starts from one state the last alone counts: nothing is left of those before.
    moves = {start["iteration"]: start["processes"] for start in starts(run)}
    ends = [*moves][1:]
    for at, processes in moves.items():
        kept = {"runtime.keep_last": ITERATIONS, "runtime.checkpoint_every": 1}
        back = {"from-iteration": at} if at else {}
        process = begin(again, processes, {**more, **kept, **back})
        end = next((end for end in ends if end > at), ITERATIONS)
        while process.poll() is None and end < ITERATIONS and saved(again) < end:
            time.sleep(0.1)
        if end < ITERATIONS and process.poll() is None:
            process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=600)[1]
        assert saved(again) >= end, error
        last = starts(again)[-1]
        assert (last["iteration"], last["processes"]) == (at, processes), error
    return again


def _kill(process: subprocess.Popen, generator: random.Random, processes: int) -> None:
    """SIGKILL to the process, or to one of torchrun's workers, or to torchrun."""
    workers = workers_of(process.pid) if processes > 1 else []
    victim = generator.choice([process.pid, *workers])
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 90  # orphans end by themselves
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their launcher"
        time.sleep(0.05)


def _ask(process: subprocess.Popen, generator: random.Random, found: Counter[str]) -> None:
    number = generator.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
    if not workers_of(process.pid):
        process.send_signal(number)
    else:
        process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    found[f"exit {code}"] += 1


def _compare(whole: Path, run: Path, found: Counter[str], to_the_bit: bool) -> None:
    found["runs"] += 1
    if to_the_bit:
        files = [place / "backbone.safetensors" for place in (whole, run)]
        found["runs of other bytes"] += checkpoint.sha256(files[0]) != checkpoint.sha256(files[1])
    else:  # other processes round otherwise
        one, two = ([row["loss"] for row in rows(place)] for place in (whole, run))
        same = len(one) == len(two) and np.allclose(one, two, rtol=1e-5, atol=0)
        found["runs of other losses"] += not same
    told = [row["iteration"] for row in rows(run)]
    found["rows doubled"] += len(told) - len(set(told))
    found["rows lost"] += ITERATIONS - len(set(told))


def kills(seed: int, count: int) -> Counter[str]:
    half = count // 2
    return interrupted(seed, count - half, [1], True) + interrupted(seed + 1, half, [2], True)


def signals(seed: int, count: int) -> Counter[str]:
    half = count // 2
    return interrupted(seed, count - half, [1], False) + interrupted(seed + 1, half, [2], False)


def moves(seed: int, count: int) -> Counter[str]:
    """Each start on another number of processes, killed or asked to stop; half of them in bf16.

    A run that was forced to its moves ends in the bits of one that made them at the same iterations
    unforced (`_moved`), in both precisions. In fp32 its losses are also those of one process to 1e-5. In
    bf16 they cannot be: the gradient of a weight is a sum over images that is rounded to 8 bits of
    mantissa, so that two halves, rounded each by itself, differ from the whole by up to 2^-8 of its
    value. Without any kill, losses of two and four processes are up to 8e-3 from those of one within
    200 iterations (tests/benchmarks/elastic.py 200 bf16; fp32: 1e-6).
    """
    half, ways = count // 2, [1, 2, 4]
    kinds = [(seed, half, True, "fp32"), (seed + 1, count - half, False, "bf16")]
    kinds += [(seed + 2, half, False, "fp32"), (seed + 3, count - half, True, "bf16")]
    return sum(
        (interrupted(s, (n + 1) // 2, ways, kill, kind) for s, n, kill, kind in kinds), Counter()
    )


def pairs(seed: int, count: int) -> Counter[str]:
    """Two processes begin the same run at about the same time: one does it, one is refused."""
    generator, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            run = Path(place) / str(number)
            both = [begin(run, 1)]
            time.sleep(generator.uniform(0, 1.5))
            both.append(begin(run, 1))
            errors = [process.communicate(timeout=600)[1] for process in both]
            found["pairs"] += 1
            found[f"exits {sorted(process.returncode for process in both)}"] += 1
            found["tracebacks"] += sum("Traceback" in error for error in errors)
            told = [row["iteration"] for row in rows(run)]
            found["rows doubled"] += len(told) - len(set(told))
            found["rows lost"] += ITERATIONS - len(set(told))
    return found


# --- in this process ---


class Ear(Listener):
    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, sentence: str) -> None:
        self.notices.append(sentence)


@contextlib.contextmanager
def tiny(**overrides: object) -> Iterator[tuple[config.Config, Path]]:
    """A configuration of six iterations, and an empty folder."""
    with tempfile.TemporaryDirectory() as place:
        images = tiny_run.write_images(Path(place) / "images")
        yield tiny_run.configuration(images, runtime__keep_every=1, **overrides), Path(place)


def flips(seed: int, count: int) -> Counter[str]:
    """One bit of last.pt is flipped: it is noticed, the state before is taken, the end is the same."""
    generator, found = random.Random(seed), Counter[str]()
    with tiny() as (configuration, place):
        pretrain(configuration, place / "whole")
        whole = checkpoint.sha256(place / "whole" / "backbone.safetensors")
        for number in range(count):
            run, ear = place / f"run{number}", Ear()
            shutil.copytree(place / "whole", run)
            for kept in (run / "checkpoints").glob("epoch_*.pt"):
                kept.unlink()
            last = run / "checkpoints" / "last.pt"
            spoilt = bytearray(last.read_bytes())
            spoilt[generator.randrange(len(spoilt))] ^= 1 << generator.randrange(8)
            last.write_bytes(spoilt)
            pretrain(configuration, run, listener=ear)
            found["flips"] += 1
            found["noticed, the state before taken"] += any(
                "damaged" in notice and "previous.pt, iteration 3" in notice
                for notice in ear.notices
            )
            found["runs of other bytes"] += whole != checkpoint.sha256(run / "backbone.safetensors")
            shutil.rmtree(run)
    return found


def disks(seed: int, count: int) -> Counter[str]:
    """A disk (tmpfs) of another size each time, full at some moment: a sentence, a good state."""
    found = Counter[str]()
    with tiny() as (configuration, place):
        pretrain(configuration, place / "whole")
        whole = checkpoint.sha256(place / "whole" / "backbone.safetensors")
        needed = sum(path.stat().st_size for path in (place / "whole").rglob("*") if path.is_file())
        disk = place / "disk"
        disk.mkdir()
        for number in range(count):
            kilobytes = 8 + round(1.3 * needed / 1024 * number / count)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
            if subprocess.run(mount, capture_output=True).returncode:
                return Counter({"skipped: a tmpfs cannot be mounted here": 1})
            found["disks"] += 1
            try:
                pretrain(configuration, disk / "run")
                found["done"] += 1
            except (RunFailed, UsageError, Stopped) as error:
                found["sentences"] += 1
                if "checkpoint" in str(error):
                    found["sentences that name the last good checkpoint"] += 1
            except Exception:  # noqa: BLE001 - that is what is counted
                found["tracebacks"] += 1
                traceback.print_exc()
            try:
                _still_good(disk, configuration, whole, found)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
    return found


def _still_good(disk: Path, configuration: config.Config, whole: str, found: Counter[str]) -> None:
    """Whatever state the full disk holds opens, and the run goes on once there is room."""
    states = list(disk.glob("run/checkpoints/*.pt"))
    for state in states:
        checkpoint.load_state(state)
        found["states that open"] += 1
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    pretrain(configuration, disk / "run")
    found["went on to the same bytes"] += whole == checkpoint.sha256(
        disk / "run" / "backbone.safetensors"
    )


KINDS = {
    "kills": kills,
    "signals": signals,
    "moves": moves,
    "flips": flips,
    "disks": disks,
    "pairs": pairs,
}


if __name__ == "__main__":
    for kind in sys.argv[2:3] or KINDS:
        count = int(sys.argv[3]) if len(sys.argv) > 3 else 10
        print(kind, dict(KINDS[kind](int(sys.argv[1]), count)), flush=True)
