"""The learning board: what so many CPU minutes buy, arm by arm, data set by data set, seed by seed.

    python tests/benchmarks/learning.py --out FILE.json --data tiles=FOLDER --data objects=FOLDER \\
        --minutes 30 --seeds 0,1,2 --dino DINO_DIR --xcit XCIT_DIR [--arms NAME,NAME] [--set KEY=VALUE]

`learning_data.py` makes the folders; `fashion_mnist` and `fashion_mnist_sample` are named sources. An
arm is a line of `ARMS` ("by hand" stands for the twelve of `BY_HAND`); `learning_judging.py` says what
a minute is, and judges all alike. The trained arms of one data set and seed take turns, a period of
training each, so that the machine's moods fall on all of them; only one of them works at a time.

FILE is written whenever an arm has finished. The same command goes on where it stopped, with what is
missing; further data, seeds and arms join the same file if minutes and settings are the same.

An interval is that of Student's t over seeds, 95 %: what another seed may bring, of the network and
of the order of images. That of the images themselves (a standard error of 0.9 points for 3,000
images at 40 per cent) is common to all arms, and is not in it.
"""

import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from learning_arms import TRAINERS, run
from learning_judging import Arm, Job
from rich.table import Table
from scipy.stats import t as student_t

from xdino.run_directory import commit
from xdino.runtime.atomic import written_beside
from xdino_launch.bench.timing import machine
from xdino_launch.console import stderr_console, stdout_console

COLOUR = {"crops.jitter": "0.4", "crops.grayscale": "0.1", "crops.global_solarize": "0,0"}
# What the demo's recipe has: all learns from the first step, at a rate that few steps ask for.
FEW_STEPS = {
    "head.use_bn": "true",
    "head.hidden_dim": "256",
    "head.bottleneck_dim": "64",
    "head.prototypes": "1024",
    "optim.lr": "8e-3",
    "optim.freeze_last_layer": "0",
    "optim.weight_decay_end": "0.04",
    "model.drop_path": "0",
    "crops.local_count": "2",
    "crops.local_scale": "0.15,0.5",
}
# What configs/small_data.yaml sets, but for the sizes of network, crops and batch.
SMALL_DATA = {
    "model.drop_path": "0.05",
    "head.prototypes": "4096",
    "head.norm_last_layer": "false",
    "crops.global_scale": "0.3,1.0",
    "crops.local_scale": "0.05,0.3",
    "optim.min_lr": "1e-5",
    "optim.warmup_epochs": "5%",
}
SIMDINO = {"loss.objective": "simdino"}

ARMS = {
    "raw pixels": Arm("pixels"),
    "untrained network": Arm("untrained"),
    "published components": Arm("published"),
    "ours": Arm("ours"),
    "supervised": Arm("supervised"),
    # Options alone: add a line, then its name to --arms.
    "sinkhorn": Arm("ours", {"loss.targets": "sinkhorn"}),
    "koleo": Arm("ours", {"loss.koleo": "0.1"}),
    "simdino": Arm("ours", SIMDINO),
    "simdino + rate x4": Arm("ours", SIMDINO | {"optim.lr": "2e-3"}),
    "simdino + rate x16": Arm("ours", SIMDINO | {"optim.lr": "8e-3"}),
    "simdino + BatchNorm": Arm("ours", SIMDINO | {"head.use_bn": "true"}),
    "simdino + colour": Arm("ours", SIMDINO | COLOUR),
    "simdino + few steps": Arm("ours", FEW_STEPS | SIMDINO),
    "sigreg": Arm("ours", {"loss.objective": "sigreg", "head.use_bn": "true"}),
    "sqrt rate": Arm("ours", {"optim.lr_scaling": "sqrt"}),
    "rate x8": Arm("ours", {"optim.lr": "4e-3"}),
    "published rate x8": Arm("published", {"optim.lr": "4e-3"}),
    "fp32": Arm("ours", {"train.precision": "fp32"}),
    "no drop path": Arm("ours", {"model.drop_path": "0"}),
    "constant momentum": Arm("ours", {"teacher.momentum_end": "0.99"}),
    "weaker colour": Arm("ours", COLOUR),
    "no colour": Arm("ours", COLOUR | {"crops.jitter": "0", "crops.grayscale": "0"}),
    "larger local crops": Arm("ours", {"crops.local_scale": "0.15,0.4"}),
    "small_data": Arm("ours", SMALL_DATA),
    "small_data + simdino x4": Arm("ours", SMALL_DATA | SIMDINO | {"optim.lr": "2e-3"}),
    "head with BatchNorm": Arm("ours", {"head.use_bn": "true"}),
    # What BatchNorm takes its statistics of; the first three: a total batch of 256 in micro-batches.
    "256 x 1": Arm("ours", {"train.batch_size": "256"}),
    "64 x 4": Arm("ours", {"train.batch_size": "64", "train.accumulate": "4"}),
    "16 x 16": Arm("ours", {"train.batch_size": "16", "train.accumulate": "16"}),
    "teacher in evaluation": Arm("ours", change="teacher in evaluation"),
    "statistics at rest": Arm("ours", change="statistics at rest"),
    "few steps": Arm("ours", FEW_STEPS),
    "few steps + colour": Arm("ours", FEW_STEPS | COLOUR),
    "few steps + colour + sinkhorn": Arm("ours", FEW_STEPS | COLOUR | {"loss.targets": "sinkhorn"}),
}
# Twelve that a person may set by hand, beside what `auto` chooses: networks x objectives x rates.
NETWORKS = {
    "tiny": {},
    "shallow": {"model.depth": "2"},
    "narrow": {"model.arch": "xcit_nano_12_p8", "model.depth": "6"},
}
BY_HAND = {
    f"{network} {objective} x{rate}": Arm(
        "ours", shape | {"loss.objective": objective, "optim.lr": f"{5e-4 * rate:g}"}
    )
    for network, shape in NETWORKS.items()
    for objective in ("dino", "simdino")
    for rate in (1, 4)
}
ARMS |= {"auto": Arm("auto")} | BY_HAND

DEFAULT = ("raw pixels", "untrained network", "published components", "ours", "supervised")

# What every arm is told, the published one too. The rate is the published one, for 256 images.
COMMON = {
    "model.arch": "xcit_tiny_12_p8",
    "model.depth": "4",
    "model.in_chans": "3",
    "head.prototypes": "2048",
    "crops.global_size": "64",
    "crops.local_size": "32",
    "crops.local_count": "4",
    "optim.lr": "5e-4",
    "optim.warmup_epochs": "10%",
    "teacher.momentum": "0.99",
    "train.batch_size": "32",
    "train.precision": "bf16",
}
# Small images want small patches and as many tokens: the shape of the demo.
SMALL = {
    "model.arch": "xcit_nano_12_p4",
    "model.embed_dim": "64",
    "model.depth": "3",
    "model.tokens_norm": "true",
    "head.prototypes": "1024",
    "crops.global_size": "28",
    "crops.local_size": "16",
    "crops.local_count": "2",
    "crops.local_scale": "0.15,0.5",
    "train.batch_size": "64",
}
BY_DATA = {"fashion_mnist": SMALL, "fashion_mnist_sample": SMALL}

Rows = list[dict[str, Any]]


# Running


def _work(pipe: Connection, job: Job) -> None:
    """One arm in this process: waits for its turn before it starts and after every row."""
    pipe.recv()

    def say(row: dict[str, Any]) -> None:
        pipe.send(row)
        if not row.get("last"):
            pipe.recv()

    run(job, say)


def take_turns(jobs: dict[str, Job], done: Any) -> list[str]:
    """Run jobs one period at a time in turn; `done(name, rows)` when one has finished.

    Returns the names of those that have failed.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes, rows = [], {name: [] for name in jobs}
    failed = list[str]()
    try:
        for name, job in jobs.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(theirs, job)))
            processes[-1].start()
            theirs.close()
        while pipes:
            for name in list(pipes):
                try:
                    pipes[name].send("go on")
                    row = pipes[name].recv()
                except (EOFError, BrokenPipeError):  # its traceback is out
                    pipes.pop(name).close()
                    failed.append(name)
                    continue
                rows[name].append(row)
                score = " · ".join(
                    f"{key} {row[key]:.2f}" for key in ("knn", "linear") if key in row
                )
                stderr_console().print(
                    f"{name} · step {row['step']} · {row['minutes']:.2f} min · {score}"
                )
                if row.get("last"):
                    pipes.pop(name).close()
                    done(name, rows[name])
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    return failed


# Telling


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    return float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def _shown(values: Sequence[float]) -> str:
    half = interval(values)
    return f"{statistics.mean(values):.2f}" + ("" if half is None else f" +- {half:.2f}")


def table(results: Rows, name: str) -> Table:
    """Arms of one data set: minutes, steps, k-NN a quarter along and so on, at the end, linear."""
    out = Table(title=f"{name}: top-1 in per cent, mean over seeds", title_justify="left")
    heads = ("arm", "seeds", "minutes", "steps", "k-NN on the way", "k-NN", "linear")
    for head in heads:
        out.add_column(head, justify="left" if head == "arm" else "right")
    here = [result for result in results if result["data"] == name]
    for arm in dict.fromkeys([*ARMS, *(result["arm"] for result in here)]):
        mine = [result["rows"] for result in here if result["arm"] == arm]
        if not mine:
            continue
        ends = [rows[-1] for rows in mine]
        on_the_way = [
            f"{statistics.mean(row['knn'] for row in at_once):.1f}"
            for at_once in zip(*(rows[:-1] for rows in mine), strict=False)
        ]
        out.add_row(
            arm,
            str(len(mine)),
            f"{statistics.mean(end['minutes'] for end in ends):.1f}",
            f"{statistics.mean(end['step'] for end in ends):.0f}",
            " ".join(on_the_way),
            _shown([end["knn"] for end in ends]),
            _shown([end["linear"] for end in ends]),
        )
    return out


def _opened(out: Path, asked: dict[str, Any]) -> Rows:
    """What FILE holds already. Raises UsageError where it was asked for something else."""
    if not out.exists():
        return []
    told = json.loads(out.read_text())
    for key, value in asked.items():
        if told.get(key) != value:
            raise click.UsageError(f"{out} was made with {key} {told.get(key)}, not {value}")
    return list(told["results"])


def _saved(out: Path, asked: dict[str, Any], results: Rows) -> None:
    told = {
        "benchmark": "learning",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(sys.argv),
        **asked,
        "arms": {name: {"kind": arm.kind, **arm.settings} for name, arm in ARMS.items()},
        "results": results,
    }
    with written_beside(out) as beside:
        beside.write_text(json.dumps(told, indent=1) + "\n")


def _made(path: str) -> dict[str, Any] | None:
    """What `learning_data.py` wrote about a folder."""
    told = Path(path) / "data.json"
    return json.loads(told.read_text()) if told.exists() else None


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    if bad := [pair for pair in given if "=" not in pair]:
        raise click.UsageError(f"{option} wants NAME=VALUE, got {bad[0]}")
    return dict(pair.split("=", 1) for pair in given)


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="FILE.json")
@click.option("--data", "sets", multiple=True, required=True, metavar="NAME=FOLDER")
@click.option("--minutes", default=5.0, show_default=True, help="CPU minutes of training an arm.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--arms", default=",".join(DEFAULT), show_default=True, metavar="NAME,NAME")
@click.option("--points", default=5, show_default=True, help="Evaluations along the way, about.")
@click.option("--dino", type=click.Path(exists=True), help="A checkout of facebookresearch/dino.")
@click.option("--xcit", type=click.Path(exists=True), help="A checkout of facebookresearch/xcit.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="For every arm.")
def main(
    out: Path,
    sets: tuple[str, ...],
    minutes: float,
    seeds: str,
    arms: str,
    points: int,
    dino: str | None,
    xcit: str | None,
    settings: tuple[str, ...],
) -> None:
    """Measure what is missing, write the JSON file after every arm, print the tables."""
    chosen = [name.strip() for name in arms.replace("by hand", ",".join(BY_HAND)).split(",")]
    if unknown := [name for name in chosen if name not in ARMS]:
        raise click.UsageError(f"no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}")
    told = _pairs(settings, "--set")
    asked = {"minutes": minutes, "points": points, "settings": told, "common": COMMON}
    results, failed = _opened(out, asked), list[str]()
    for name, path in _pairs(sets, "--data").items():
        for seed in map(int, seeds.split(",")):
            have = {(r["data"], r["arm"], r["seed"]) for r in results}
            common = COMMON | BY_DATA.get(name, {}) | told
            jobs = {
                arm: Job(ARMS[arm], path, seed, minutes, points, common, dino, xcit)
                for arm in chosen
                if (name, arm, seed) not in have
            }
            for arm, job in jobs.items():
                if job.arm.kind == "published" and not (dino and xcit):
                    raise click.UsageError(f"{arm} needs --dino and --xcit")

            def finished(
                arm: str, rows: Rows, name: str = name, path: str = path, seed: int = seed
            ) -> None:
                facts = {"made": _made(path), "machine": machine(), "commit": commit()}
                results.append({"data": name, "arm": arm, "seed": seed, "rows": rows, **facts})
                _saved(out, asked, results)

            stderr_console().print(f"{name}, seed {seed}: {len(jobs)} arms")
            # Arms that do not train first, one by one; then the others in turn.
            for arm, job in jobs.items():
                if job.arm.kind not in TRAINERS:
                    failed += take_turns({arm: job}, finished)
            trained = {arm: job for arm, job in jobs.items() if job.arm.kind in TRAINERS}
            failed += take_turns(trained, finished)
        stdout_console().print(table(results, name))
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
