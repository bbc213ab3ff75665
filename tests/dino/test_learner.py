"""One optimisation step: accumulation, the frozen last layer, other backbones, a loss gone wrong."""

import copy

import pytest
import torch
from torch import nn

from xdino.backbones import BackboneSpec
from xdino.errors import RunFailed
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher, update_teacher

SETTINGS = StepSettings(
    lr=1e-3, weight_decay=0.04, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False
)


class Plain(nn.Module):
    """A backbone without BatchNorm, so that the images of a batch do not meet."""

    embed_dim = 16

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, images):
        return self.net(images)


def learner_with(backbone, teacher_backbone=None, **options) -> Learner:
    student = MultiCropNetwork(backbone, DINOHead(backbone.embed_dim, 32, 32, 8))
    teacher = make_teacher(student, teacher_backbone or copy.deepcopy(backbone))
    return Learner(student, teacher, DINOLoss(32), **options)


def crops(batch=4, sizes=((2, 16), (3, 8))):
    return [torch.randn(views, batch, 3, size, size) for views, size in sizes]


def test_accumulating_micro_batches_equals_one_batch():
    torch.manual_seed(1)
    one = learner_with(Plain(), clip=0)
    two = copy.deepcopy(one)
    for _ in range(3):
        batch = crops()
        halves = [[g[:, :2] for g in batch], [g[:, 2:] for g in batch]]
        a = one.step([batch], SETTINGS, diagnose=True)
        b = two.step(iter(halves), SETTINGS, count=2, diagnose=True)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.diagnostics == pytest.approx(b.diagnostics, rel=1e-4)
    torch.testing.assert_close(one.loss.centre, two.loss.centre, rtol=1e-4, atol=1e-7)
    for role in ("student", "teacher"):
        for x, y in zip(
            getattr(one, role).parameters(), getattr(two, role).parameters(), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_the_frozen_last_layer_stays_and_the_rest_moves():
    learner = learner_with(Plain())
    before = copy.deepcopy(learner.student.state_dict())
    frozen = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=True)
    for _ in range(2):
        learner.step([crops()], frozen)
    after = learner.student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("last_layer" in name for name in moved)
    assert "head.mlp.0.weight" in moved
    assert not any(
        p in learner.optimiser.state for p in learner.student.head.last_layer.parameters()
    )


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_any_timm_backbone_trains(arch):
    spec = BackboneSpec(arch, input_size=32)
    learner = learner_with(spec.build(0.1), spec.build())
    batch = crops(3, ((2, 32), (4, 16)))
    before = copy.deepcopy(learner.student.state_dict())
    losses = [learner.step([batch], SETTINGS).loss for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    after = learner.student.state_dict()
    still = [n for n, p in learner.student.named_parameters() if torch.equal(before[n], after[n])]
    assert still == ["head.last_layer.weight_g"], "every trained parameter must move"


def test_only_the_global_views_reach_the_teacher_where_sizes_are_equal():
    learner = learner_with(Plain())
    seen = []
    learner.teacher.backbone.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    learner.step([crops(4, ((5, 16),))[0:1]], SETTINGS)
    assert seen == [2 * 4]


def test_the_teacher_is_the_moving_average_of_parameters_only():
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(student.weight, 3.0)
    student.running_mean += 7
    update_teacher(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight.data, torch.full((3,), 1.5))
    assert torch.equal(teacher.running_mean, torch.zeros(3))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precisions(precision):
    learner = learner_with(Plain(), precision=precision)
    losses = [learner.step([crops()], SETTINGS).loss for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(p.dtype == torch.float32 for p in learner.student.parameters())


def test_a_loss_that_is_not_finite_spoils_nothing():
    learner = learner_with(Plain())
    learner.step([crops()], SETTINGS)
    before = copy.deepcopy(learner.state_dict())
    broken = crops()
    broken[1][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(RunFailed, match="the loss became nan"):
        learner.step([broken], SETTINGS)
    after = learner.state_dict()
    for role in ("student", "teacher"):
        for name, value in before[role].items():
            assert torch.equal(value, after[role][name]), name
    assert torch.equal(before["centre"], after["centre"])


def test_state_round_trip_continues_alike():
    one = learner_with(Plain())
    batches = [crops() for _ in range(4)]
    for batch in batches[:2]:
        one.step([batch], SETTINGS)
    two = learner_with(Plain())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for batch in batches[2:]:
        assert one.step([batch], SETTINGS).loss == two.step([batch], SETTINGS).loss
    for x, y in zip(one.teacher.parameters(), two.teacher.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_device_that_is_not_asked_moves_nothing_after_a_broken_loss():
    """What a GPU does between two logging intervals, on the CPU: no error, no update, then a word."""
    asked, unasked = learner_with(Plain()), None
    unasked = copy.deepcopy(asked)
    unasked.device = torch.device("cuda")  # steps as there; every tensor stays where it is
    batches = [crops() for _ in range(3)]
    for batch in batches[:2]:
        asked.step([batch], SETTINGS)
        unasked.step([batch], SETTINGS)
    for a, b in zip(asked.student.parameters(), unasked.student.parameters(), strict=True):
        assert torch.equal(a, b), "while all is well the two ways are one"
    before = copy.deepcopy(unasked.state_dict())
    broken = crops()
    broken[1][0, 0, 0, 0, 0] = float("inf")
    unasked.step([broken], SETTINGS)
    unasked.step([batches[2]], SETTINGS)  # a good batch later the trouble is still known
    after = unasked.state_dict()
    for name, value in before["student"].items():
        assert torch.equal(value, after["student"][name]), name
    assert torch.equal(before["centre"], after["centre"])
    with pytest.raises(RunFailed, match="the loss became"):
        unasked.check()
    with pytest.raises(RunFailed, match="the loss became"):
        unasked.step([batches[2]], SETTINGS, diagnose=True)
