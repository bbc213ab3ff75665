"""What `xdino plan` says beside what runs then take: a table, each number with how far the plan is off.

    python tests/benchmarks/plan_beside_runs.py [NAME ...]

Both count CPU seconds of their process (its loader's threads with it) instead of those on the wall, so
that what else runs on the core is not in them. `plan` trains and times some steps; what the table holds
it to is how these become the steps of a whole run, its memory, its files and its length.
"""

import json
import subprocess
import sys
import tempfile
import time

time.perf_counter = (
    time.process_time
)  # before any of ours is imported, also in plan's own processes

from contextlib import redirect_stdout  # noqa: E402
from io import StringIO  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from types import SimpleNamespace  # noqa: E402

from xdino_launch import cli  # noqa: E402
from xdino_launch.forecasting import trials  # noqa: E402

# So does what comes before a trial's first line, in plan's own process.
own = time.process_time if __name__ == "__mp_main__" else lambda: 0.0
trials.time = SimpleNamespace(time=own)

TESTS = Path(__file__).parents[1]
#: By name: the recipe, and other values of its keys.
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "debug": ("debug", {}),
    "batch of 500": ("debug", {"train.batch_size": 500, "train.epochs": 2}),
    "batch of 20 x 5": ("debug", {"train.batch_size": 20, "train.accumulate": 5}),
    "64 wide, 6 blocks": ("debug", {"model.embed_dim": 64, "model.depth": 6, "train.batch_size": 200}),
    "8,192 prototypes": ("debug", {"head.prototypes": 8192}),
    "recomputed": ("debug", {"runtime.activation_checkpointing": "true", "model.depth": 6}),
    "13 bands": ("small_data", {
        "data.path": "fields", "data.range": "0,4095", "model.arch": "xcit_nano_12_p8",
        "model.embed_dim": 64, "model.depth": 4, "crops.global_size": 64, "crops.local_size": 32,
        "train.batch_size": 16, "train.epochs": 4, "head.prototypes": 1024,
    }),
    "demo": ("demo", {"train.epochs": 1}),
}  # fmt: skip


def words(name: str) -> list[str]:
    recipe, keys = RUNS[name]
    given = {**keys, "runtime.workers": 1}
    return [recipe, *(str(word) for key, value in given.items() for word in (f"--{key}", value))]


def called(arguments: list[str]) -> str:
    """What a command prints; it ends in SystemExit or not."""
    told = StringIO()
    with redirect_stdout(told):
        try:
            cli.main(arguments)
        except SystemExit as stop:
            if stop.code:
                raise
    return told.getvalue()


def ran(name: str, run: Path) -> float:
    """CPU seconds of the whole run, in a process of its own."""
    command = [sys.executable, __file__, "--run", str(run), *words(name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.splitlines()[-1])


def compared(name: str, run: Path) -> list[str]:
    plan = json.loads(called(["plan", *words(name), "--json"]))
    seconds = ran(name, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "images_per_second" in row]
    files = {path.name: path.stat().st_size for path in run.rglob("*.*") if path.is_file()}
    pairs = {
        "steps": (plan["iterations"], rows[-1]["iteration"]),
        "s a step": (
            plan["step_seconds"],
            plan["total_batch"] / median(row["images_per_second"] for row in steps),
        ),
        "s in all": (plan["seconds"], seconds),
        "MB of memory": (plan["memory"] / 1e6, max(row.get("resident_mb", 0) for row in rows)),
        "kB of states": (
            sum(size for kind, size in plan["disk"].items() if "newest" in kind) / 1e3,
            sum(files.get(file, 0) for file in ("last.pt", "previous.pt")) / 1e3,
        ),
        "kB of weights": (
            plan["disk"]["weights, first and last"] / 1e3,
            sum(files[f"{which}.safetensors"] for which in ("initial", "backbone")) / 1e3,
        ),
    }
    return [
        f"{told:.4g} / {found:.4g} ({100 * (told / found - 1):+.0f} %)"
        for told, found in pairs.values()
    ]


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        called(["pretrain", *sys.argv[3:], "--run", sys.argv[2]])
        print(time.process_time())
        return
    print("| run | steps | s a step | s in all | MB of memory | kB of states | kB of weights |")
    with tempfile.TemporaryDirectory() as place:
        sys.path.append(str(TESTS / "data"))
        import bands_of_photographs

        fields = bands_of_photographs.write_classes(Path(place) / "fields", 96, 160, 8)
        RUNS["13 bands"][1]["data.path"] = fields
        for number, name in enumerate(sys.argv[1:] or RUNS):
            row = compared(name, Path(place) / str(number))
            print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
