"""Passes as CUDA graphs: the numbers of passes one by one, and what happens where none can be recorded.

Without a GPU, `Again` stands for a graph: it runs the recorded work anew at each replay, from the same
inputs.
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from xdino import xcit
from xdino.acceleration import graphs
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss, SIGRegLoss, SimDINOLoss, SinkhornLoss, WithKoLeo
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher

SETTINGS = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=False)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Again:
    made = 0

    def __init__(self, work, inputs):
        Again.made += 1
        self.work, self.inputs = work, [x.clone() for x in inputs]

    def replay(self):
        self.outputs = self.work(self.inputs)


class Unused(nn.Module):
    """A backbone with a parameter that no image reaches: no gradient, no weight decay."""

    embed_dim = 16

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.asleep = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.net(images)


def learner(backbone=None, loss=None, device="cpu", recorded=True, precision="fp32", seed=0):
    torch.manual_seed(seed)
    backbone = backbone() if backbone else xcit.XCiT(8, 32, 2, 2, drop_path_rate=0.2)
    loss = loss or DINOLoss(64)
    prototypes = 64 if loss.of_prototypes else None
    student = MultiCropNetwork(
        backbone, DINOHead(backbone.embed_dim, prototypes, 32, 16, unit=loss.unit)
    )
    teacher = make_teacher(student, copy.deepcopy(backbone))
    cuda = device == "cuda"
    found = Learner(
        student, teacher, loss, device=device, precision=precision, graphs=recorded and cuda
    )
    if recorded and not cuda:
        found.passes = graphs.Passes([p for _, p in found.stepping.trained], Again)
    return found


def micro_batches(count, sizes=((2, 32), (2, 16)), device="cpu"):
    return [[torch.randn(v, 3, 3, s, s).to(device) for v, s in sizes] for _ in range(count)]


def trained(one, steps, count=1, settings=lambda i: SETTINGS, device="cpu", sizes=None):
    """The losses of some steps, and all of the state after them."""
    losses = []
    for i in range(steps):
        torch.manual_seed(100 + i)
        batches = micro_batches(count, *([sizes(i)] if sizes else []), device=device)
        result = one.step(batches, settings(i), diagnose=True)
        losses.append((result.loss, result.diagnostics))
    state = {f"student.{n}": x for n, x in one.student.state_dict().items()}
    state |= {f"teacher.{n}": x for n, x in one.teacher.state_dict().items()}
    return losses, state


def assert_equal(a, b):
    assert a[0] == b[0]
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name]), name


@pytest.mark.parametrize("count", [1, 2, 4])
def test_recorded_passes_learn_what_others_learn(count):
    Again.made = 0
    one, other = learner(recorded=False), learner()
    assert_equal(trained(one, 6, count), trained(other, 6, count))
    assert Again.made == 1


def test_a_temperature_or_a_size_is_recorded_anew():
    def settings(i):
        return dataclasses.replace(SETTINGS, teacher_temp=0.04 if i < 4 else 0.05)

    def sizes(i):
        return ((2, 32), (2, 16)) if i < 6 else ((2, 16), (2, 8))

    Again.made = 0
    one, other = learner(recorded=False), learner()
    assert_equal(
        trained(one, 10, settings=settings, sizes=sizes),
        trained(other, 10, settings=settings, sizes=sizes),
    )
    assert Again.made == 3
    assert len(other.passes._recordings) == 1  # each holds the memory of its activations


def test_the_frozen_last_layer_stays_and_moves_afterwards():
    def settings(i):
        return dataclasses.replace(SETTINGS, freeze_last_layer=i < 4)

    one, other = learner(recorded=False), learner()
    assert_equal(trained(one, 7, settings=settings), trained(other, 7, settings=settings))


def test_what_gets_no_gradient_does_not_decay():
    one, other = learner(Unused, recorded=False), learner(Unused)
    found = trained(other, 5)
    assert_equal(trained(one, 5), found)
    assert torch.equal(found[1]["student.backbone.asleep"], torch.ones(3))


def test_where_nothing_can_be_recorded_passes_run_one_by_one_and_it_is_said_once():
    def refused(work, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    one, other = learner(recorded=False), learner()
    other.passes._recorder = refused
    assert_equal(trained(one, 5, 2), trained(other, 5, 2))
    assert other.passes.why_not() == (
        "no CUDA graph of the passes could be recorded, and they run without one (operation not "
        "permitted when stream is capturing)"
    )
    assert other.passes.why_not() is None


def test_directions_that_are_drawn_anew_are_not_recorded():
    assert not SIGRegLoss(16).recordable
    assert not WithKoLeo(SIGRegLoss(16), 0.1).recordable
    assert WithKoLeo(SimDINOLoss(16), 0.1).recordable


# On a device

OBJECTIVES = {
    "dino": lambda: DINOLoss(64),
    "sinkhorn": lambda: SinkhornLoss(),
    "koleo": lambda: WithKoLeo(DINOLoss(64), 0.1),
    "simdino": lambda: SimDINOLoss(16),
}


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_device_graphs_learn_what_passes_do(objective, precision, count):
    found = []
    for recorded in (False, True):
        one = learner(None, OBJECTIVES[objective](), "cuda", recorded, precision)
        found.append(trained(one, 6, count, device="cuda"))
        if recorded:
            assert one.passes.why_not() is None
            assert len(one.passes._recordings) == 1
    for (plain, told), (fast, same) in zip(found[0][0], found[1][0], strict=True):
        assert fast == pytest.approx(plain, rel=1e-4)
        assert same == pytest.approx(told, rel=1e-2, abs=1e-4)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@ON_GPU
def test_a_recording_that_breaks_leaves_the_device_as_it_was():
    """Asking for a number breaks it; dropped paths and another recording go on."""

    def asks(inputs):
        return [torch.empty_like(inputs[0]).bernoulli_(0.5), inputs[0].sum().item()]

    def draws(inputs):
        return [torch.empty_like(inputs[0]).bernoulli_(0.5)]

    x, stream = torch.ones(8, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        graphs.record(asks, [x])
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(0)
    drawn = draws([x])[0]
    recording = graphs.record(draws, [x])
    torch.manual_seed(0)
    recording.replay()
    assert torch.equal(recording.outputs[0], drawn)
