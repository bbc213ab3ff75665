"""Whether `debug` learns the same bits here as at another revision: after a change that moves code.

    python tests/benchmarks/bit_equality.py REVISION [--iterations 40]

Both sides run from their own checkout, one thread, one after the other. Compared are the rows of
metrics.jsonl without times and memory, and every tensor of checkpoints/last.pt and of
backbone.safetensors. Exit code 1 where anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
MACHINE = {"images_per_second", "tokens_per_second", "wait_share", "resident_mb", "peak_memory_mb"}


def train(checkout: Path, run: Path, iterations: int) -> None:
    """One epoch of `debug` in `iterations` steps."""
    options = {"train.batch_size": 10_000 // iterations, "train.epochs": 1, "runtime.log_every": 1}
    options |= {"evaluate.every": 0, "crops.local_count": 2, "runtime.device": "cpu"}
    options["train.precision"] = "fp32"  # "auto" has not always meant the same
    command = [sys.executable, "-m", "xdino_launch", "pretrain", "debug", "--run", str(run)]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    roots = [str(checkout / folder) for folder in ("ssl", "eval", "launch")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: exit {done.returncode}\n{done.stderr}")


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, tree


def contents(run: Path) -> dict[str, Any]:
    """By name: every tensor, and every row."""
    state = torch.load(run / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
    found = {f"last.pt{name}": x for name, x in leaves(state) if isinstance(x, torch.Tensor)}
    found |= {f"backbone/{n}": x for n, x in load_file(run / "backbone.safetensors").items()}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if key not in MACHINE}
        found[f"row {row['iteration']}"] = row
    return found


def same(before: Any, after: Any) -> bool:
    """Equal tensors; rows whose old columns are equal. New columns are told of, see `main`."""
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    return bool(before == {key: value for key, value in after.items() if key in before})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--iterations", type=int, default=40)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        there, runs = Path(folder) / "there", [Path(folder) / "a", Path(folder) / "b"]
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(there), told.revision], check=True)
        try:
            for checkout, run in zip((there, ROOT), runs, strict=True):
                train(checkout, run, told.iterations)
            before, after = map(contents, runs)
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)
    differ = [
        name
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or not same(before[name], after[name])
    ]
    rows = sum(name.startswith("row") for name in after)
    print(
        f"{told.revision} and here, {told.iterations} iterations: {len(after) - rows} tensors and "
        f"{rows} rows here, {len(differ)} differ"
    )
    pairs = [(before[name], after[name]) for name in before.keys() & after.keys()]
    new = sorted({k for a, b in pairs if isinstance(a, dict) for k in b.keys() - a.keys()})
    if new:
        print(f"  columns that are new here, not compared: {', '.join(new)}")
    for name in differ[:20]:
        print(f"  {name}")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
