"""Damages the files of a run at random, and uses the run: done or one sentence, never a traceback.

    python tests/torture/run_files.py [SEED [COUNT]]

One tiny run is made, finished and unfinished. A case damages one or two files of a copy (cut short,
emptied, spliced, other JSON, keys missing or of other types, no UTF-8, a folder in its place, gone)
and then continues, reports, scores or opens it, in this process. A seed gives the same cases.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run
import torch

from xdino import checkpoint, config, metrics, pretraining
from xdino.errors import RunFailed, UsageError
from xdino.job import Listener
from xdino.run_directory import RunDirectory
from xdino_eval import quality, results
from xdino_launch.console import results_table
from xdino_launch.report.page import write_report

FILES = (
    "config.yaml", "environment.json", "results.json", "unreadable.jsonl",
    "metrics.jsonl", "backbone.safetensors", "checkpoints/last.pt", "checkpoints/initial.safetensors",
    "views.png",
)  # fmt: skip
ODD = (None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", "\ud800", [], {}, [[]], {"a": [1]})
ROW = results.Row("k-NN", {"k": 20}, 50.0, 90.0, "photos", "t", 10, 5, "a" * 64, "teacher")
MEASURES = dict.fromkeys(quality.MEASURES, 2.0)
QUALITY = results.Row(
    quality.PROTOCOL, {}, None, None, "photos", "t", 10, 0, "a" * 64, "teacher", metrics=MEASURES
)


class Half(Listener):
    """Stops a run after its first epoch."""

    def step(self, row: dict[str, Any]) -> None:
        if row["iteration"] == 4:
            raise UsageError("enough")


def make_runs(root: Path) -> tuple[config.Config, dict[str, Path]]:
    """The same run twice: finished, and left after its first epoch."""
    images = tiny_run.write_images(root / "images")
    tiny = tiny_run.configuration(images)
    runs = {name: root / name for name in ("finished", "unfinished")}
    pretraining.pretrain(tiny, runs["finished"])
    with contextlib.suppress(UsageError):
        pretraining.pretrain(tiny, runs["unfinished"], listener=Half())
    for path in runs.values():
        results.append(path / "results.json", [ROW, QUALITY])
        bad = {"index": 3, "image": "a.png", "reason": "empty", "iteration": 1}
        (path / "unreadable.jsonl").write_text(json.dumps(bad) + "\n")
    return tiny, runs


# --- damage -----------------------------------------------------------------------------------


def damage(path: Path, r: random.Random) -> str:
    """Damage one file; what was done, in a word."""
    data = path.read_bytes()
    kinds: list[tuple[str, Callable[[], bytes]]] = [
        ("emptied", lambda: b""),
        ("cut", lambda: data[: r.randrange(len(data))]),
        ("spliced", lambda: data[: r.randrange(len(data))] + data[r.randrange(len(data)) :]),
        ("flipped", lambda: _flipped(data, r)),
        ("no UTF-8", lambda: b"\xff\xfe" + data[: r.randrange(len(data))] + b"\xe9\x00"),
        ("zeroed", lambda: bytes(len(data))),
        ("nested", lambda: b"[" * 100_000),
    ]
    if path.suffix in (".json", ".jsonl"):
        kinds += [("odd", lambda: _odd_json(data, path.suffix == ".jsonl", r))] * 8
    if path.suffix == ".yaml":
        kinds += [("odd", lambda: _odd_lines(data, r))] * 5
    if path.name == "last.pt":
        kinds += [("odd", lambda: _odd_state(path, r))] * 5
    if r.random() < 0.1:
        path.unlink()
        if r.random() < 0.5:
            path.mkdir()
            return "a folder"
        return "gone"
    name, make = r.choice(kinds)
    path.write_bytes(make())
    return name


def _flipped(data: bytes, r: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(r.randint(1, 5)):
        changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def _odd_json(data: bytes, lines: bool, r: random.Random) -> bytes:
    texts = data.decode().splitlines() if lines else [data.decode()]
    place = r.randrange(len(texts))
    texts[place] = json.dumps(changed(json.loads(texts[place]), r))
    return "\n".join(texts).encode("utf-8", "surrogatepass") + b"\n"


def _odd_lines(data: bytes, r: random.Random) -> bytes:
    lines = data.decode().splitlines()
    place = r.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    odd = r.choice(["", "[", "{a: b}", "&a [*a]", "1e999", ".nan", "null", "- x", "!!python/x"])
    lines[place] = r.choice([f"{key}{colon} {odd}", "", odd, f"{key}{colon}{colon}"])
    return "\n".join(lines).encode()


def _odd_state(path: Path, r: random.Random) -> bytes:
    state = torch.load(path, weights_only=True)
    out = io.BytesIO()
    torch.save(changed(state, r), out)
    return out.getvalue()


def changed(value: Any, r: random.Random) -> Any:
    """The value with one thing in it missing, or another."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        copy, key = dict(value), r.choice(list(value))
        if r.random() < 0.2:
            del copy[key]
        else:
            copy[key] = changed(value[key], r)
        return copy
    if isinstance(value, list) and value and r.random() < 0.8:
        place = r.randrange(len(value))
        return [*value[:place], changed(value[place], r), *value[place + 1 :]]
    return r.choice(ODD)


# --- use --------------------------------------------------------------------------------------


def continue_run(path: Path, tiny: config.Config) -> None:
    pretraining.pretrain(tiny, path)


def open_run(path: Path, tiny: config.Config) -> None:
    """What a start does before the first step."""
    run = RunDirectory(path)
    run.create(run.resolve(tiny))
    state, _ = run.load()
    iteration = state["iteration"] if state is not None else 0
    run.record_start({"commit": "none"})
    run.add_unreadable(run.unreadable(), 1)
    log = metrics.MetricsLog(path, iteration)
    log.write({"iteration": iteration + 1, "loss": 1.0})
    log.close()


def report(path: Path, tiny: config.Config) -> None:
    write_report([path])


def score(path: Path, tiny: config.Config) -> None:
    """Load what was trained, and add a row and a measure."""
    checkpoint.load_backbone(path)
    results.append(path / "results.json", [ROW])
    results_table(results.load(path / "results.json"))
    quality.rows_of(path)


USES = (continue_run, open_run, report, report, score)


def run(seed: int, count: int) -> dict[str, int]:
    """So many cases: how many were done, were told in a sentence, and ended in a traceback."""
    r = random.Random(seed)
    counts = {"done": 0, "told": 0, "tracebacks": 0}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="xdino") as folder:
        root = Path(folder)
        tiny, runs = make_runs(root)
        for case in range(count):
            here = root / "case"
            shutil.copytree(runs[r.choice(list(runs))], here)
            there = [name for name in FILES if (here / name).is_file()]
            done = [f"{n}: {damage(here / n, r)}" for n in r.sample(there, r.choice([1, 1, 1, 2]))]
            use = r.choice(USES)
            try:
                use(here, tiny)
                counts["done"] += 1
            except (UsageError, RunFailed):
                counts["told"] += 1
            except Exception:  # noqa: BLE001 -- every other one is what is looked for
                counts["tracebacks"] += 1
                print(f"seed {seed}, case {case}: {use.__name__} after {done}", file=sys.stderr)
                traceback.print_exc()
            shutil.rmtree(here)
    torch.set_num_threads(threads)
    return counts


if __name__ == "__main__":
    given = dict(zip(("seed", "count"), map(int, sys.argv[1:]), strict=False))
    found = run(**{"seed": 0, "count": 400} | given)
    print(found)
    sys.exit(1 if found["tracebacks"] else 0)
