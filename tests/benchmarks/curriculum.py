"""k-NN against minutes of training: a recipe beside itself with small crops first (FastDINOv2).

    python tests/benchmarks/curriculum.py --out FILE.json [--seeds 0,1,2] [--short-epochs 8]

Arms: `plain` is the recipe; `curriculum` the recipe with small crops for the first share of its
iterations; `plain, N epochs` (--short-epochs) the recipe with a shorter schedule. The last is the
fair rival of the second: half-way through its schedule a run stands worse than a finished shorter
one, so `plain`'s own curve understates what its minutes could buy.

Arms run in processes of their own that take turns, an evaluation period each, so that the machine's
moods fall on all alike; the order turns with the seed. Minutes are wall-clock minutes from the
first step on, with checkpoints and waiting for data, without evaluations and the other arms' turns
(in which an arm's loader may finish the one micro-batch it works on ahead).
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from xdino import config, data
from xdino.backbone import Backbone
from xdino.job import Listener
from xdino.pretraining import pretrain
from xdino.run_directory import commit
from xdino.runtime.atomic import written_beside
from xdino_eval.during_training import callback
from xdino_eval.evaluators import KNN
from xdino_eval.extraction import Options
from xdino_launch.bench.timing import machine
from xdino_launch.console import stderr_console, stdout_console

NEIGHBOURS, TEMPERATURE = 20, 0.07


class Arm(Listener):
    """A run in this process that stops at each evaluation until it is told to go on."""

    def __init__(
        self, pipe: Connection, overrides: dict[str, str], recipe: str, limit: int
    ) -> None:
        self.pipe = pipe
        self.config = config.load(recipe, overrides)
        sources = data.open_splits(self.config.data.path, channels=self.config.model.in_chans)
        options = Options(limit=limit, workers=1)
        self.knn = callback({"knn": KNN((NEIGHBOURS,), TEMPERATURE)}, *sources, options)
        self.seconds, self.began, self.last = 0.0, 0.0, 0

    def started(self, facts: dict[str, Any]) -> None:
        self.epoch_iterations = facts["steps_per_epoch"]
        self.pipe.send({"iterations": facts["iterations"], "images": facts["images"]})
        self.wait()

    def evaluate(self, backbone: Backbone) -> dict[str, float]:
        self.seconds += time.perf_counter() - self.began
        scores = self.knn(backbone)
        told = {"epoch": self.last, "iteration": self.last * self.epoch_iterations}
        self.pipe.send(told | {"minutes": self.seconds / 60, **scores})
        self.last += self.config.evaluate.every
        self.wait()
        return scores

    def wait(self) -> None:
        self.pipe.recv()
        self.began = time.perf_counter()


def run_arm(
    pipe: Connection, overrides: dict[str, str], recipe: str, limit: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    arm = Arm(pipe, overrides, recipe, limit)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(arm.config, Path(folder) / "run", arm.evaluate, arm)
    pipe.send(None)


def take_turns(
    arms: dict[str, dict[str, str]], seed: int, recipe: str, limit: int, threads: int
) -> list[dict[str, Any]]:
    """Run the arms side by side, one period at a time; a row for each evaluation."""
    context = multiprocessing.get_context("spawn")
    names = list(arms)
    names = names[seed % len(names) :] + names[: seed % len(names)]
    pipes, processes, rows = {}, [], []
    try:
        for name in names:
            pipes[name], theirs = context.Pipe()
            arguments = (theirs, arms[name] | {"train.seed": str(seed)}, recipe, limit, threads)
            processes.append(context.Process(target=run_arm, args=arguments))
            processes[-1].start()
            theirs.close()
            pipes[name].recv()  # it has opened its data and waits before the first step
        while pipes:
            for name in list(pipes):
                pipes[name].send("go on")
                found = pipes[
                    name
                ].recv()  # EOFError where the arm has failed: its traceback is out
                if found is None:
                    pipes.pop(name).close()
                    continue
                rows.append({"arm": name, "seed": seed, **found})
                stderr_console().print(
                    f"seed {seed} · {name} · epoch {found['epoch']} · {found['minutes']:.2f} min · "
                    f"k-NN {found['knn_top1']:.2f}"
                )
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Arms by epochs: median minutes and k-NN of each seed."""
    out = Table(title="k-NN top-1 in per cent against minutes of training", title_justify="left")
    seeds = sorted({row["seed"] for row in rows})
    for name in ("arm", "epoch", "minutes", *(f"k-NN, seed {seed}" for seed in seeds), "mean"):
        out.add_column(name, justify="left" if name == "arm" else "right")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for epoch in sorted({row["epoch"] for row in rows if row["arm"] == arm}):
            here = [row for row in rows if (row["arm"], row["epoch"]) == (arm, epoch)]
            scores = {row["seed"]: row["knn_top1"] for row in here}
            minutes = statistics.median(row["minutes"] for row in here)
            shown = [f"{scores[seed]:.2f}" if seed in scores else "-" for seed in seeds]
            mean = statistics.mean(scores.values())
            out.add_row(arm, str(epoch), f"{minutes:.2f}", *shown, f"{mean:.2f}")
    return out


def ends(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each arm at the end: k-NN by seed, and its minutes as a share of plain's of that seed."""
    last = {(row["arm"], row["seed"]): row for row in rows}  # rows come in order
    return {
        arm: {
            "knn_top1": [row["knn_top1"] for (name, _), row in last.items() if name == arm],
            "minutes": [row["minutes"] for (name, _), row in last.items() if name == arm],
            "minutes_of_plain": [
                row["minutes"] / last["plain", seed]["minutes"]
                for (name, seed), row in last.items()
                if name == arm
            ],
        }
        for arm in dict.fromkeys(name for name, _ in last)
    }


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="FILE.json")
@click.option("--recipe", default="demo", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option(
    "--epochs", type=click.IntRange(1), help="Of plain and curriculum; else the recipe's."
)
@click.option("--short-epochs", type=click.IntRange(1), help="A third arm: plain with this many.")
@click.option("--every", default=1, show_default=True, type=click.IntRange(1), help="Epochs.")
@click.option("--share", default=0.5, show_default=True)
@click.option("--global-size", default=20, show_default=True)
@click.option("--local-size", default=12, show_default=True)
@click.option("--limit", default=10_000, show_default=True, help="Images of a split for k-NN.")
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="For every arm.")
def main(
    out: Path,
    recipe: str,
    seeds: str,
    epochs: int | None,
    short_epochs: int | None,
    every: int,
    share: float,
    global_size: int,
    local_size: int,
    limit: int,
    threads: int,
    settings: tuple[str, ...],
) -> None:
    """Measure, print the table, write the JSON file after every seed."""
    common = {"evaluate.every": str(every), "runtime.prefetch": "1", "runtime.keep_every": "0"}
    common |= {"train.epochs": str(epochs or config.load(recipe).train.epochs)}
    common |= dict(pair.partition("=")[::2] for pair in settings)
    small = {
        "curriculum.share": str(share),
        "curriculum.global_size": str(global_size),
        "curriculum.local_size": str(local_size),
    }
    arms = {"plain": common, "curriculum": common | small}
    if short_epochs:
        arms[f"plain, {short_epochs} epochs"] = common | {"train.epochs": str(short_epochs)}
    for overrides in arms.values():
        if int(overrides["train.epochs"]) % every:
            raise click.UsageError("--every must divide the epochs, or the end is not evaluated")
    rows: list[dict[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        rows += take_turns(arms, seed, recipe, limit, threads)
        told = {
            "benchmark": "curriculum",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": " ".join(sys.argv),
            "commit": commit(),
            "machine": machine(),
            "settings": {"recipe": recipe, "arms": arms, "threads": threads},
            "protocol": f"k-NN of the teacher, k = {NEIGHBOURS}, T = {TEMPERATURE}, at most "
            f"{limit} images of train vote and of val are judged, full-size images",
            "ends": ends(rows),
            "rows": rows,
        }
        with written_beside(out) as beside:
            beside.write_text(json.dumps(told, indent=2) + "\n")
    stdout_console().print(table(rows))


if __name__ == "__main__":
    main()
