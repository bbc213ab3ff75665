"""How gradients are averaged over processes: DDP as it was built, and with its two options.

    python tests/benchmarks/averaging.py [--arch xcit_tiny_12_p16] [--prototypes 16384] [--rounds 9]

Two gloo processes pretrain on random crops. Every round runs the arms in one order: copies of
gradients twice (their ratio is noise), gradient_as_bucket_view, which is what learners have, and that
with static_graph. Printed are the CPU seconds of a step of both processes, medians of the ratios to
the first arm with their range, and the memory of one process after its steps, each arm in processes
of its own. Losses must be equal to the bit.
"""

import argparse
import json
import os
import resource
import socket
import time
from statistics import median
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from xdino import config, stepping
from xdino.backbones import BackboneSpec
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.plan import build_head
from xdino.runtime import distributed
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher

ARMS: dict[str, dict[str, Any]] = {
    "copies": {"gradient_as_bucket_view": False},
    "copies, again": {"gradient_as_bucket_view": False},
    "bucket views": {"gradient_as_bucket_view": True},
    "bucket views, static graph": {"gradient_as_bucket_view": True, "static_graph": True},
}
SETTINGS = StepSettings(
    lr=1e-4, weight_decay=0.04, momentum=0.996, teacher_temp=0.04, freeze_last_layer=False
)


def learner_of(given: argparse.Namespace, options: dict[str, Any]) -> Learner:
    torch.manual_seed(0)
    head = config.parse({"head": {"prototypes": given.prototypes}}).head
    backbone = BackboneSpec(given.arch).build()
    student = MultiCropNetwork(backbone, build_head(head, backbone.embed_dim))
    teacher = make_teacher(student, BackboneSpec(given.arch).build())
    learner = Learner(student, teacher, DINOLoss(given.prototypes))
    built = learner.stepping.network
    assert isinstance(built, torch.nn.parallel.DistributedDataParallel)
    # As `stepping._over_processes` builds it, with other options.
    plain = stepping.DistributedDataParallel
    stepping.DistributedDataParallel = lambda net, **own: plain(net, **{**own, **options})
    stepping.inspect.signature, kept = (lambda _: kept(plain)), stepping.inspect.signature
    learner.stepping.network = stepping._over_processes(student)
    stepping.DistributedDataParallel, stepping.inspect.signature = plain, kept
    return learner


def steps(learner: Learner, seed: int, count: int, micro: int) -> tuple[float, float]:
    """CPU seconds of a step, of this process and its threads; the last loss."""
    generator = torch.Generator().manual_seed(1000 * seed + distributed.rank())
    crops = [
        [torch.randn(2, 2, 3, 64, 64, generator=generator),
         torch.randn(4, 2, 3, 32, 32, generator=generator)]
        for _ in range(micro)
    ]  # fmt: skip
    began = time.process_time()
    for _ in range(count):
        loss = learner.step(crops, SETTINGS).loss
    return (time.process_time() - began) / count, loss


def work(rank: int, port: int, given: argparse.Namespace, arms: list[str], told: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    learners = {name: learner_of(given, ARMS[name]) for name in arms}
    rounds = []
    for number in range(given.rounds + 1):  # the first warms up
        found = {name: steps(each, number, 2, given.micro) for name, each in learners.items()}
        rounds.append({name: sum(distributed.gather(s)) for name, (s, _) in found.items()})
        assert len({loss for _, loss in found.values()}) == 1, found
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told.put((rounds[1:], peak))
    distributed.stop()


def measured(given: argparse.Namespace, arms: list[str]) -> tuple[list[dict[str, float]], float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    both = [spawn.Process(target=work, args=(r, port, given, arms, told)) for r in (0, 1)]
    for process in both:
        process.start()
    found = told.get()
    for process in both:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="xcit_tiny_12_p16")
    parser.add_argument("--prototypes", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--micro", type=int, default=1, help="micro-batches a step")
    given = parser.parse_args()
    rounds, _ = measured(given, [*ARMS])
    alone = argparse.Namespace(**vars(given) | {"rounds": 2})
    for name in ARMS:
        ratios = sorted(each[name] / each["copies"] for each in rounds)
        row = {
            "arm": name,
            "cpu_s": round(median(each[name] for each in rounds), 3),
            "ratio": [round(x, 3) for x in (median(ratios), ratios[0], ratios[-1])],
            "megabytes": round(measured(alone, [name])[1]),
            "load": os.getloadavg()[0],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
