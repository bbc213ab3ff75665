"""Runs that move between numbers of processes: `python elastic_worker.py SETTINGS.json`.

Settings, a list with one a run: kind ("pretrain", ...), config (a tree), run (a folder),
stages: for each how many processes, and after how many rows all of them are killed (null: they end by
themselves). One process imports, and its forks train: an import costs more than a stage. Which images
a step took is added to RUN.images, a line a step and process.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from xdino import config, pretraining, train
from xdino.job import Listener
from xdino.runtime import distributed
from xdino_transfer.dense_training.segmenting.job import SegmentationJob
from xdino_transfer.dense_training.segmenting.recipe import Segmentation
from xdino_transfer.finetuning.job import ClassificationJob
from xdino_transfer.finetuning.recipe import FineTuning

KINDS = {
    "pretrain": (pretraining.Pretraining, config.Config),
    "finetune": (ClassificationJob, FineTuning),
    "segment": (SegmentationJob, Segmentation),
}


def recorded(kind, file):
    """The job's class, which writes down what its steps take."""

    class Recorded(kind):
        def next_batches(self):
            for batch in super().next_batches():
                told = {"iteration": batch.iteration + 1, "indices": batch.indices.tolist()}
                with open(file, "a") as opened:
                    opened.write(json.dumps(told) + "\n")
                yield batch

    return Recorded


class Notices(Listener):
    def __init__(self, file):
        self.file = file

    def notice(self, sentence):
        with open(self.file, "a") as opened:
            opened.write(sentence + "\n")


def child(settings, rank, world, port):
    run, kind = Path(settings["run"]), settings["kind"]
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        distributed.start(torch.device("cpu"))
    job, schema = KINDS[kind]
    file = run.with_suffix(".images")
    settled = config.parse(settings["config"], "the test", schema)
    train.run(recorded(job, file)(settled), run, listener=Notices(run.with_suffix(".told")))
    distributed.stop()


def stage(settings, world, kill_after):
    run = Path(settings["run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                child(settings, rank, world, port)
                code = 0
            except BaseException as error:  # noqa: BLE001 - a fork ends here
                print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(code)
        pids.append(pid)
    if kill_after is not None:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_after):
            time.sleep(0.002)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    ended = [os.waitpid(pid, 0)[1] for pid in pids]
    expected = 0 if kill_after is None else signal.SIGKILL
    assert all(status == expected for status in ended), (world, ended)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for told in json.loads(Path(sys.argv[1]).read_text()):
        for processes, until in told["stages"]:
            stage(told, processes, until)
