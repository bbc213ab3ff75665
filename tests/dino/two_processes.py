"""Started by test_distributed: three steps of a small XCiT, each process on its share of the images."""

import sys

import torch

from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.runtime import distributed
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher
from xdino.xcit import XCiT

torch.manual_seed(0)
distributed.start(torch.device("cpu"))
rank, world = distributed.rank(), distributed.world_size()
# float64, so that a difference is one of mathematics and not of summation order under Adam.
student = MultiCropNetwork(XCiT(8, 32, 2, 2), DINOHead(32, 64, 32, 16, use_bn=True)).double()
teacher = make_teacher(student, XCiT(8, 32, 2, 2).double())
learner = Learner(student, teacher, DINOLoss(64).double())
settings = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=False)
losses = []
for step in range(3):
    generator = torch.Generator().manual_seed(step)
    halves = []  # two micro-batches of 4 images over all processes
    for _ in range(2):
        groups = [
            torch.randn(v, 4, 3, s, s, generator=generator, dtype=torch.float64)
            for v, s in ((2, 32), (2, 16))
        ]
        share = 4 // world
        halves.append([g[:, rank * share : (rank + 1) * share].clone() for g in groups])
    losses.append(learner.step(halves, settings, count=2).loss)
if rank == 0:
    roles = {r: getattr(learner, r).state_dict() for r in ("student", "teacher")}
    torch.save({"losses": losses, "centre": learner.loss.centre, **roles}, sys.argv[1])
distributed.stop()
