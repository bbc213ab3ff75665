"""Evaluators on several processes against one: `python turns_worker.py FOLDER`; started by test_turns.

One process imports; its forks are the processes. Each writes what it found to FOLDER/PROCESSES-RANK.json.
"""

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch

from xdino import train
from xdino.backbones import BackboneSpec
from xdino.config import Crops
from xdino.data.idx import ArraySource
from xdino.errors import RunFailed, Stopped
from xdino.runtime import distributed, stopping, turns
from xdino_eval.during_training import callback
from xdino_eval.evaluators import KNN, Linear, Quality
from xdino_eval.extraction import Options
from xdino_eval.linear.grid import Grid
from xdino_eval.linear.sgd import Sgd
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.scoring import score

SPEC = BackboneSpec(
    "xcit_nano_12_p8",
    3,
    {"embed_dim": 32, "depth": 1, "num_heads": 2},
    16,
    16,
    (0.5,) * 3,
    (0.5,) * 3,
)


class Torn(ArraySource):
    """Images of which some cannot be read."""

    def read(self, index):
        if index in (3, 40):
            raise OSError("torn")
        return super().read(index)


def source(count, seed):
    """Squares whose corner tells the class, in noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = generator.integers(0, 200, (count, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[4 * label : 4 * label + 4] = 255
    kind = Torn if count == 70 else ArraySource
    return kind(f"{count} squares", pixels, labels, ("a", "b", "c"), 3)


def found(folder, processes):
    """What every evaluator finds here; seconds left out."""
    torch.manual_seed(0)
    backbone = SPEC.build()
    backbone.spec = SPEC
    train_images, val = source(70, 0), source(33, 1)
    options = Options(batch_size=8, workers=1, shared=processes > 1)
    how = Sgd(epochs=2, batch_size=8, lr=0.1)
    grid = Grid(lrs=(0.01, 0.1), features=("class", "patches"))
    rows = []
    for evaluator in (
        KNN((1, 5)),
        Linear("logistic"),
        Linear("sgd-features", how),
        Linear("grid-features", how, grid),
        Linear("sgd", how, keep_in=folder, save_head=str(folder / f"head-{processes}")),
        Linear("grid", how, grid),
        Quality(Crops(global_size=16), 10, 4),
    ):
        rows += evaluator(backbone, train_images, val, options)
    torch.manual_seed(1)
    rows += score(Classifier(backbone, SPEC, ("a", "b", "c")), train_images, options)
    told = [dataclasses.asdict(dataclasses.replace(row, seconds=0.0)) for row in rows]
    during = callback({"knn": KNN((5,)), "quality": Quality(Crops(global_size=16), 10, 4)},
                      train_images, val, options)  # fmt: skip
    return {"rows": told, "numbers": during(backbone)}


def failures():
    """Every process leaves in the same sentence, and they can still talk."""
    rank, told = distributed.rank(), []

    def fails_inside():
        if rank == 1:
            raise MemoryError
        return turns.on_first(lambda: 1, True)

    def items(fails=False):
        for i in range(2):
            if fails and i:
                raise RunFailed("a disk")
            yield i

    def work():
        return [*turns.of_all(items(fails=rank == 1), 4)]

    for action in (work, lambda: turns.all_hear(work, True)):
        try:
            action()
        except RunFailed as error:
            told.append(str(error))
    signal = stopping.StopSignal()
    signal._name = "SIGTERM" if rank == 1 else None
    with stopping.heeding(signal):
        try:
            turns.all_hear(lambda: [*turns.of_all(items(), 4)], True)
        except Stopped as error:
            told.append(str(error))
    try:
        [*turns.of_all(items(), 3 + rank)]
    except ValueError as error:
        told.append(str(error)[:60])
    return [*told, distributed.gather(rank)]


def child(folder, rank, processes, port):
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        distributed.start(torch.device("cpu"))
    told = found(folder, processes)
    if processes > 1:
        told["failures"] = failures()
    (folder / f"{processes}-{rank}.json").write_text(json.dumps(told, default=float))
    distributed.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert train
    for processes in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(processes):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    child(Path(sys.argv[1]), rank, processes, port)
                    code = 0
                except BaseException:  # noqa: BLE001 - a fork ends here
                    import traceback

                    traceback.print_exc()
                os._exit(code)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * processes
