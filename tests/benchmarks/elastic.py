"""How far apart losses lie where a run's step is shared out otherwise: the table of README.md here.

    python tests/benchmarks/elastic.py [ITERATIONS [fp32|bf16]]

The run of tests/torture/tiny_run.py (20 images, an XCiT of one block, drop path 0.3) with 8 images
a step: on 1, 2 and 4 processes, killed on 2 and continued on 1 and 4, and in smaller micro-batches. Each
against one process that takes all 8 at once; differences are shares of its loss.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "train"), str(TESTS / "torture")]

import elastic_worker  # noqa: E402
import tiny_run  # noqa: E402

from xdino import config  # noqa: E402

#: batch_size, accumulate, and the processes of each going; all but the last are killed on the way.
WAYS = {
    "1 process x 8": (8, 1, [1]),
    "2 processes x 4": (4, 1, [2]),
    "4 processes x 2": (2, 1, [4]),
    "2, killed, then 1, killed, then 4 processes": (4, 1, [2, 1, 4]),
    "1 process x 4 x 2 micro-batches": (4, 2, [1]),
    "1 process x 2 x 4 micro-batches": (2, 4, [1]),
}


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def main() -> None:
    torch.set_num_threads(1)
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    precision = sys.argv[2] if len(sys.argv) > 2 else "fp32"
    first: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        images = tiny_run.write_images(Path(place) / "images")
        for number, (name, (size, accumulate, processes)) in enumerate(WAYS.items()):
            settings = tiny_run.configuration(
                images, train__batch_size=size, train__accumulate=accumulate,
                train__epochs=iterations // 2, model__drop_path=0.3, train__precision=precision,
                runtime__checkpoint_every=10,
            )  # fmt: skip
            run = Path(place) / str(number)
            told = {"kind": "pretrain", "config": config.to_tree(settings), "run": str(run)}
            for i, count in enumerate(processes, start=1):
                last = i == len(processes)
                kill = None if last else iterations * i // len(processes)
                elastic_worker.stage(told, count, kill)
            found = losses(run)
            first = first or found
            apart = [abs(b / a - 1) for a, b in zip(first, found, strict=True)]
            mean = sum(apart) / len(apart)
            print(f"| {name} | {max(apart):.1e} | {mean:.1e} | {found[-1]:.5f} |", flush=True)


if __name__ == "__main__":
    main()
