"""Started by test_distributed: three steps of a small XCiT, each process on its share of the images.

    python two_processes.py OUT NAME ...

Each objective of that name (`MADE`) takes its steps from the same start; the first process writes them.
"""

import sys
from typing import Any

import torch

from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss, SIGRegLoss, SimDINOLoss, SinkhornLoss, WithKoLeo
from xdino.runtime import distributed
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher
from xdino.xcit import XCiT

K, D, BATCH = 64, 16, 4
# Biases that a following BatchNorm takes out again: their gradient is zero but for noise, of which Adam
# makes a step, and the BatchNorm's running mean shows it. Here they stay where they are.
BEFORE_A_NORM = ("backbone.norm.bias", "head.mlp.0.bias", "head.mlp.3.bias")
MADE = {
    "dino": lambda: DINOLoss(K),
    "sinkhorn": lambda: SinkhornLoss(),
    "koleo": lambda: WithKoLeo(DINOLoss(K), 0.1),
    "simdino": lambda: SimDINOLoss(D),
    "sigreg": lambda: SIGRegLoss(D, slices=32),
}


def steps(name: str) -> dict[str, Any]:
    rank, world = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    loss = MADE[name]()
    # float64, so that a difference is one of mathematics and not of summation order under Adam.
    head = DINOHead(32, K if loss.of_prototypes else None, 32, D, use_bn=True, unit=loss.unit)
    student = MultiCropNetwork(XCiT(8, 32, 2, 2), head).double()
    for name, parameter in student.named_parameters():
        if name in BEFORE_A_NORM:
            parameter.requires_grad_(False)
    teacher = make_teacher(student, XCiT(8, 32, 2, 2).double())
    learner = Learner(student, teacher, loss.double())
    settings = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=False)
    losses, diagnostics = [], []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        halves = []  # two micro-batches of 4 images over all processes
        for _ in range(2):
            groups = [
                torch.randn(v, BATCH, 3, s, s, generator=generator, dtype=torch.float64)
                for v, s in ((2, 32), (2, 16))
            ]
            share = BATCH // world
            halves.append([g[:, rank * share : (rank + 1) * share].clone() for g in groups])
        found = learner.step(halves, settings, count=2, diagnose=True)
        losses.append(found.loss)
        diagnostics.append(found.diagnostics)
    roles = {role: getattr(learner, role).state_dict() for role in ("student", "teacher")}
    return {"losses": losses, "diagnostics": diagnostics, **loss.state(), **roles}


if __name__ == "__main__":
    distributed.start(torch.device("cpu"))
    found = {name: steps(name) for name in sys.argv[2:]}
    if distributed.rank() == 0:
        torch.save(found, sys.argv[1])
    distributed.stop()
