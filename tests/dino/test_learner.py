"""One optimisation step: accumulation, the frozen last layer, other backbones, a loss gone wrong."""

import copy

import pytest
import torch
from torch import nn

from xdino.backbones import BackboneSpec
from xdino.errors import NonFinite
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.schedules import StepSettings
from xdino.stepping import Stepping
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
        p in learner.stepping.optimiser.state for p in learner.student.head.last_layer.parameters()
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


class Normed(Plain):
    """With BatchNorm in the backbone, whose statistics move in every forward pass."""

    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm2d(16))


def frozen_copy(learner):
    return copy.deepcopy(learner.state_dict())


def assert_nothing_moved(before, learner):
    after = learner.state_dict()
    for role in ("student", "teacher"):  # parameters, running_mean, running_var, counts
        for name, value in before[role].items():
            assert torch.equal(value, after[role][name]), f"{role} {name}"
    assert before.keys() == after.keys()
    assert before.get("steps") == after.get("steps")
    if "centre" in before:
        assert torch.equal(before["centre"], after["centre"])
    for i, moments in after["optimiser"]["state"].items():
        for kind, value in moments.items():
            known = before["optimiser"]["state"].get(i, {}).get(kind, torch.zeros_like(value))
            assert torch.equal(known, value), f"{kind} of parameter {i}"
    assert before["scaler"] == after["scaler"]


def nan_pixel(learner):
    """One pixel: loss, statistics and everything after them."""
    broken = crops()
    broken[1][0, 0, 0, 0, 0] = float("nan")
    return broken


def nan_gradient(learner):
    """A gradient that is not finite, with a finite loss, as of a square root at zero."""
    weight = dict(learner.student.named_parameters())["backbone.net.0.weight"]
    hook = weight.register_hook(lambda g: (hook.remove(), g * float("nan"))[1])
    return crops()


def infinite_statistics(learner):
    """A running variance that overflows, while the batch's own mean and loss are finite."""
    norm = learner.teacher.backbone.net[1]
    norm.register_forward_hook(lambda m, i, o: (m.running_var.fill_(float("inf")), o)[1])
    return crops()


BREAKING = [
    (nan_pixel, "the loss became nan"),
    (nan_gradient, r"the gradient of backbone.net.0.weight became nan, at a loss of \d"),
    (infinite_statistics, "backbone.net.1.running_var of the teacher became inf, at a loss of"),
]


@pytest.mark.parametrize(("breaking", "sentence"), BREAKING)
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_moves_nothing(breaking, sentence, steps_before, optimiser):
    learner = learner_with(Normed(), optimiser=optimiser)
    for _ in range(steps_before):
        learner.step([crops()], SETTINGS)
    before = frozen_copy(learner)
    batch = breaking(learner)
    with pytest.raises(NonFinite, match=sentence) as raised:
        learner.step([batch], SETTINGS)
    assert not raised.value.spoilt
    assert_nothing_moved(before, learner)


def test_a_run_goes_on_after_a_broken_step_as_if_it_had_not_been():
    one = learner_with(Normed(), precision="fp32")
    two = copy.deepcopy(one)
    batches = [crops() for _ in range(3)]
    for i, batch in enumerate(batches):
        one.step([batch], SETTINGS)
        if i == 1:
            broken = nan_gradient(two)
            with pytest.raises(NonFinite):
                two.step([broken], SETTINGS)
        two.step([batch], SETTINGS)
    assert_nothing_moved(frozen_copy(one), two)


def test_the_scaler_still_skips_infinite_gradients_by_itself():
    learner = learner_with(Normed(), precision="fp16")
    learner.step([crops()], SETTINGS)
    before = frozen_copy(learner)
    learner.step([nan_gradient(learner)], SETTINGS)  # no error
    after = learner.state_dict()
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
    for name, p in learner.student.named_parameters():
        assert torch.equal(before["student"][name], p), name
    before = frozen_copy(learner)
    with pytest.raises(NonFinite, match="the loss became nan"):
        learner.step([nan_pixel(learner)], SETTINGS)
    assert_nothing_moved(before, learner)
    learner.step([crops()], SETTINGS)  # the scaler was not left half way


def test_gradients_that_no_loss_scale_makes_finite_are_told():
    learner = learner_with(Plain(), precision="fp16")
    weight = dict(learner.student.named_parameters())["backbone.net.0.weight"]
    weight.register_hook(lambda g: g * float("nan"))
    for _ in range(33):  # the first scale is 2 ** 16
        learner.step([crops()], SETTINGS)
    with pytest.raises(NonFinite, match="not finite, even at a loss scale"):
        learner.check()


def test_what_is_saved_is_looked_at_first():
    for spoil, name in (
        (lambda x: x.student.head.mlp[0].weight, "head.mlp.0.weight of the student"),
        (lambda x: x.teacher.head.last_layer.weight_v, "last_layer.weight_v of the teacher"),
        (lambda x: x.student.backbone.net[1].running_mean, "net.1.running_mean of the student"),
        (lambda x: x.loss.centre, "the centre"),
        (
            lambda x: x.stepping.optimiser.state[x.student.head.mlp[0].weight]["exp_avg_sq"],
            "the optimiser's exp_avg_sq of head.mlp.0.weight",
        ),
    ):
        learner = learner_with(Normed())
        learner.step([crops()], SETTINGS)
        learner.check()
        with torch.no_grad():
            spoil(learner).view(-1)[1] = float("inf")
        with pytest.raises(NonFinite, match=f"{name} became inf") as raised:
            learner.check()
        assert raised.value.spoilt


def test_weights_that_are_spoilt_already_are_named_with_the_loss():
    learner = learner_with(Normed())
    with torch.no_grad():
        learner.student.head.mlp[0].bias[0] = float("nan")
    with pytest.raises(
        NonFinite, match=r"the loss became nan \(head.mlp.0.bias of the s"
    ) as raised:
        learner.step([crops()], SETTINGS)
    assert raised.value.spoilt


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("given", [list, iter, lambda parts: (part for part in parts)])
def test_a_step_takes_the_mean_of_its_micro_batches_without_being_told_how_many(count, given):
    one = learner_with(Plain(), clip=0, optimiser="sgd")
    two = copy.deepcopy(one)
    parts = [crops() for _ in range(count)]
    a = one.step(iter(parts), SETTINGS, count=count)
    wrong = 1 if given is list else None  # what has a length is counted, whatever is said
    b = two.step(given(parts), SETTINGS, count=wrong)
    assert a.loss == b.loss
    assert_nothing_moved(frozen_copy(one), two)


def test_a_wrong_number_of_micro_batches_is_refused_and_moves_nothing():
    learner = learner_with(Normed())
    before = frozen_copy(learner)
    for parts, count in ((iter([crops()]), 2), (iter([crops()] * 2), 1), ([], None)):
        with pytest.raises(ValueError, match="micro-batches was given"):
            learner.step(parts, SETTINGS, count=count)
        assert_nothing_moved(before, learner)


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


@pytest.mark.parametrize(("breaking", "sentence"), BREAKING)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_device_that_is_not_asked_moves_nothing_after_a_broken_step(
    breaking, sentence, steps_before
):
    """What a GPU does between two logging intervals, on the CPU: no error, no update, then a word."""
    asked = learner_with(Normed())
    unasked = copy.deepcopy(asked)
    unasked.stepping.device = torch.device("cuda")  # steps as there; every tensor stays where it is
    batches = [crops() for _ in range(3)]
    for batch in batches[:steps_before]:
        asked.step([batch], SETTINGS)
        unasked.step([batch], SETTINGS)
    assert_nothing_moved(frozen_copy(asked), unasked)  # while all is well the two ways are one
    before = frozen_copy(unasked)
    unasked.step([breaking(unasked)], SETTINGS)
    unasked.step([batches[2]], SETTINGS)  # a good batch later the trouble is still known
    assert_nothing_moved(before, unasked)
    with pytest.raises(NonFinite, match=sentence) as raised:
        unasked.check()
    assert raised.value.standing == 2
    with pytest.raises(NonFinite, match=sentence):
        unasked.step([batches[2]], SETTINGS, diagnose=True)
    assert_nothing_moved(before, unasked)
    # From a state that is loaded, it goes on.
    unasked.teacher.backbone.net[1]._forward_hooks.clear()
    unasked.load_state_dict(before)
    for learner in (asked, unasked):
        learner.step([batches[2]], SETTINGS, diagnose=True)
    assert_nothing_moved(frozen_copy(asked), unasked)


@pytest.mark.parametrize("clip", [0, 3])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_device_with_a_scaler_stands_still_too(monkeypatch, clip, freeze):
    learner = learner_with(Normed(), precision="fp16", clip=clip)
    settings = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=freeze)
    learner.step([crops()], settings)
    before = frozen_copy(learner)
    monkeypatch.setattr(Stepping, "_asks", False)
    learner.step([nan_pixel(learner)], settings)
    learner.step([crops()], settings)
    before["scaler"] = learner.stepping.scaler.state_dict()  # it counts; nothing is saved of it
    assert_nothing_moved(before, learner)
    with pytest.raises(NonFinite, match="the loss became nan"):
        learner.check()
