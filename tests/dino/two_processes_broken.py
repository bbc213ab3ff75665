"""Started by test_distributed: numbers that are not finite on the second process only."""

import copy
import json
import sys

import torch
from torch import nn

from xdino.errors import NonFinite
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.runtime import distributed
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher
from xdino.xcit import XCiT

torch.manual_seed(0)
distributed.start(torch.device("cpu"))
rank = distributed.rank()
student = MultiCropNetwork(XCiT(8, 32, 1, 2), DINOHead(32, 64, 32, 16))
teacher = make_teacher(student, XCiT(8, 32, 1, 2))
learner = Learner(student, teacher, DINOLoss(64))
settings = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=False)


def crops():
    return [torch.randn(v, 2, 3, s, s) for v, s in ((2, 32), (2, 16))]


def nan_pixel():
    batch = crops()
    batch[1][0, 0, 0, 0, 0] = float("nan")
    return batch


def nan_gradient():
    weight = student.head.mlp[0].weight
    hook = weight.register_hook(lambda g: (hook.remove(), g * float("nan"))[1])
    return crops()


def local_statistics():
    """Of a norm that no process shares with another."""
    norm = nn.InstanceNorm2d(3, track_running_stats=True)
    student.backbone.patch_embed.alone = norm
    learner.stepping.statistics.named["alone.running_mean of the student"] = norm.running_mean
    norm.running_mean.fill_(float("inf"))
    return crops()


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)


told = []
learner.step([crops()], settings)
for breaking in (nan_pixel, nan_gradient, local_statistics):
    before = list(leaves(copy.deepcopy(learner.state_dict())))
    batch = breaking() if rank == 1 else crops()
    try:
        learner.step([batch], settings)
        told.append("finite")
    except NonFinite as error:
        told.append(str(error))
    after = list(leaves(learner.state_dict()))[: len(before)]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    told.append("nothing moved" if same or breaking is local_statistics else "moved")
with open(f"{sys.argv[1]}.{rank}", "w") as file:
    json.dump(told, file)
distributed.stop()
