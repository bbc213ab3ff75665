"""What may stand beside DINO's loss: equal to the authors' own code, right by itself, one interface."""

import copy
import json
import math

import pytest
import torch
from torch.nn import functional as F

from xdino.errors import NonFinite
from xdino.head import DINOHead, WeightNormLinear
from xdino.learner import Learner
from xdino.loss import (
    DINOLoss,
    SIGRegLoss,
    SimDINOLoss,
    SinkhornLoss,
    Views,
    WithKoLeo,
    dino_loss,
)
from xdino.loss.coding_rate import coding_rate
from xdino.loss.koleo import koleo
from xdino.loss.sigreg import epps_pulley
from xdino.loss.sinkhorn import sinkhorn_centre
from xdino.schedules import StepSettings
from xdino.stepping import Stepping
from xdino.student_teacher import MultiCropNetwork, make_teacher

from .record_objectives import RECORDED, inputs
from .test_learner import Normed, Plain, assert_nothing_moved, crops, frozen_copy, nan_pixel

K, D = 32, 8
OBJECTIVES = {
    "dino": lambda: DINOLoss(K),
    "sinkhorn": lambda: SinkhornLoss(),
    "koleo": lambda: WithKoLeo(DINOLoss(K), 0.1),
    "simdino": lambda: SimDINOLoss(D),
    "sigreg": lambda: WithKoLeo(SIGRegLoss(D, slices=16), 0.1),
}
SETTINGS = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=False)


def head_for(objective, width=16):
    K_or_none = K if objective.of_prototypes else None
    return DINOHead(width, K_or_none, 32, D, use_bn=True, unit=objective.unit)


def learner_of(name, backbone=Normed, **options):
    objective = OBJECTIVES[name]()
    student = MultiCropNetwork(backbone(), head_for(objective))
    teacher = make_teacher(student, copy.deepcopy(student.backbone))
    return Learner(student, teacher, objective, **options)


def views(V=4, G=2, B=6, unit=True):
    def of(views, width):
        z = torch.randn(views, B, width, dtype=torch.float64)
        return F.normalize(z, dim=-1) if unit else z

    return Views(of(V, D), of(G, D), of(V, 12), 0.07)


def with_layers(seen):
    made = [WeightNormLinear(D, K, train_gain=True).double() for _ in range(2)]
    return Views(seen.student, seen.teacher, seen.tokens, seen.teacher_temp, *made)


# --- the authors' numbers ---


@pytest.fixture(scope="module")
def recorded():
    return {
        name: {key: torch.tensor(x, dtype=torch.float64) for key, x in values.items()}
        for name, values in json.loads(RECORDED.read_text()).items()
    }


def close(ours, theirs, rtol=1e-8, atol=1e-9):
    torch.testing.assert_close(ours.detach(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("source", "temp"), [("dinov2", 0.07), ("swav", 0.05)])
def test_sinkhorn_knopp_is_dinov2_s_and_swav_s(recorded, source, temp):
    logits = inputs()["logits"]
    close(SinkhornLoss(iterations=3).targets(logits, temp), recorded[f"{source}_sinkhorn"]["q"])


def test_koleo_is_dinov2_s(recorded):
    tokens = inputs()["tokens"].requires_grad_()
    loss = koleo(tokens)
    loss.backward()
    close(loss, recorded["dinov2_koleo"]["loss"])
    close(tokens.grad, recorded["dinov2_koleo"]["gradient"])


def test_simdino_is_its_authors(recorded):
    given = inputs()
    raw = given["student"].requires_grad_()
    student, teacher = (F.normalize(x, dim=-1) for x in (raw, given["teacher"]))
    found = SimDINOLoss(8, eps=0.05).double().measure(Views(student, teacher, student, 0.04))
    found.loss.backward()
    theirs = recorded["simdino"]
    close(found.loss, theirs["loss"])
    close(found.told["cosine"], theirs["cosine"])
    close(found.told["coding_rate"] * (8 + 6) / (8 * 6), theirs["expansion"])
    close(raw.grad, theirs["gradient"])


def test_sigreg_is_its_authors_with_the_directions_of_each_step(recorded):
    z = inputs()["embeddings"].float().requires_grad_()
    objective = SIGRegLoss(8, weight=1, slices=16)
    seen, theirs = Views(z, z[:2].detach(), z, 0.04), recorded["lejepa_sigreg"]
    found = objective.measure(seen)
    found.loss.backward()
    close(found.loss.double(), theirs["first"], rtol=1e-5)
    close(z.grad.double(), theirs["gradient"], rtol=1e-4, atol=1e-7)
    objective.update(found.statistics)
    close(objective.measure(seen).loss.double(), theirs["second"], rtol=1e-5)


def test_lejepa_of_global_views_is_the_authors_smallest_example(recorded, monkeypatch):
    given = inputs()
    a = given["directions"] / given["directions"].norm(dim=0)
    monkeypatch.setattr("xdino.loss.sigreg.directions", lambda *_: a)
    z = given["embeddings"]
    found = SIGRegLoss(8, weight=0.05).double().measure(Views(z, z, z, 0.04))
    theirs = recorded["lejepa_minimal"]
    close(found.loss, theirs["loss"])
    close(found.told["invariance"], theirs["invariance"])
    close(found.told["sigreg"], theirs["sigreg"])


# --- what each promises by itself ---


def test_sinkhorn_targets_use_every_prototype_alike_however_cold_the_teacher():
    logits = F.normalize(torch.randn(2, 40, 8), dim=-1) @ F.normalize(torch.randn(8, 16), dim=0)
    q = SinkhornLoss(iterations=200).targets(logits.double(), 0.04)
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 40).double())
    torch.testing.assert_close(
        q.sum((0, 1)), torch.full((16,), 80 / 16).double(), rtol=1e-3, atol=0
    )
    cold = SinkhornLoss().targets(logits * 100, 0.01)  # exp(logits / temp) is infinite in float32
    assert cold.isfinite().all()
    torch.testing.assert_close(cold.sum(-1), torch.ones(2, 40))


def test_sinkhorn_in_chunks_is_the_loss_of_its_targets():
    seen = with_layers(views())
    loss = SinkhornLoss()
    seen.student.requires_grad_()
    found = loss.measure(seen)
    with torch.no_grad():
        targets = loss.targets(seen.teacher_layer(seen.teacher), seen.teacher_temp)
    whole = dino_loss(seen.student_layer(seen.student), targets, loss.student_temp)
    torch.testing.assert_close(found.loss, whole)
    (mine,) = torch.autograd.grad(found.loss, seen.student)
    (reference,) = torch.autograd.grad(whole, seen.student)
    torch.testing.assert_close(mine, reference)
    entropy = -torch.special.xlogy(targets, targets).sum(-1).mean()
    torch.testing.assert_close(found.told["teacher_entropy"], entropy)
    assert len(found.statistics) == 0
    assert loss.state() == {}


def test_the_sinkhorn_centre_is_a_centre():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    centre = sinkhorn_centre(logits, 0.5, iterations=1)
    # One round: every prototype's mass over the images is one before the images are normalised.
    mass = ((logits - centre) / 0.5).exp().sum((0, 1))
    torch.testing.assert_close(mass, torch.ones(7).double())


def test_koleo_of_equal_images_is_finite_and_of_one_is_refused():
    same = torch.ones(4, 16, requires_grad=True)
    loss = koleo(same)
    loss.backward()
    assert loss.isfinite()
    assert same.grad.isfinite().all()
    with pytest.raises(ValueError, match="at least two images"):
        koleo(torch.ones(1, 16))


def test_the_coding_rate_is_least_for_one_point_and_largest_for_all_directions():
    d, eps = 8, 0.05
    one = F.normalize(torch.ones(16, d).double(), dim=-1)
    all_ = torch.eye(d).double().repeat(2, 1)
    assert coding_rate(one, eps).item() == pytest.approx(math.log(1 + d / eps) / 2)
    assert coding_rate(all_, eps).item() == pytest.approx(d * math.log(1 + 1 / eps) / 2)


def test_the_normal_distribution_passes_the_test_and_a_point_does_not():
    n = 20_000
    normal = torch.distributions.Normal(0, 1).icdf((torch.arange(n).double() + 0.5) / n)
    assert epps_pulley(normal.view(1, n, 1)).item() / n < 1e-6
    assert epps_pulley(torch.zeros(1, n, 1)).item() / n > 0.1


@pytest.mark.parametrize("name", ["simdino", "sigreg"])
def test_spread_and_agreement_say_what_they_are_called(name):
    objective = {"simdino": SimDINOLoss, "sigreg": SIGRegLoss}[name](D).double()
    normal = torch.randn(2, 4000, D, dtype=torch.float64)
    scale = normal if name == "sigreg" else F.normalize(normal, dim=-1)

    def told(z):
        objective.update(objective.moments(z))
        return objective.diagnose(0.0, {})

    strangers = told(scale)
    assert strangers["spread"] == pytest.approx(1, abs=0.05)
    assert strangers["agreement"] == pytest.approx(0, abs=0.05)
    twins = told(scale[:1].expand(2, -1, -1))
    assert twins["agreement"] == pytest.approx(1)
    point = told(scale[:1, :1].expand(2, 4000, -1))
    assert point["spread"] == pytest.approx(0, abs=1e-6)


# --- one interface ---


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_pairs_of_a_step_are_its_loss(name):
    objective = OBJECTIVES[name]().double()
    seen = views(unit=objective.unit)
    seen = with_layers(seen) if objective.of_prototypes else seen
    told = objective.measure(seen).told
    losses = objective.pairs(seen)
    assert losses.shape == (2, 4)
    mean = (losses.sum() - losses.diagonal().sum()) / 6
    if name == "simdino":
        torch.testing.assert_close(mean, -told["cosine"])
    elif name == "sigreg":
        assert losses.diagonal().tolist() == [0, 0]
    else:
        inner = objective.objective if name == "koleo" else objective
        torch.testing.assert_close(mean, inner.measure(seen).loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_learns_and_a_state_continues_alike(name):
    one = learner_of(name)
    batches = [crops(6) for _ in range(4)]
    before = frozen_copy(one)
    for batch in batches[:2]:
        found = one.step([batch], SETTINGS, diagnose=True)
    assert all(math.isfinite(value) for value in found.diagnostics.values())
    assert ("koleo" in found.diagnostics) == (name in ("koleo", "sigreg"))
    assert ("kl" in found.diagnostics) == one.loss.of_prototypes
    names = [n for n, _ in one.student.named_parameters()]
    assert any("last_layer" in n for n in names) == one.loss.of_prototypes
    for (n, p), old in zip(
        one.student.named_parameters(), before["student"].values(), strict=False
    ):
        if n.startswith("backbone.net.0"):
            assert not torch.equal(p, old), n
    two = learner_of(name)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for batch in batches[2:]:
        a, b = (x.step([batch], SETTINGS, diagnose=True) for x in (one, two))
        assert a.loss == b.loss
        assert a.diagnostics == b.diagnostics


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("asked", [True, False])
def test_a_broken_step_moves_nothing(name, asked, monkeypatch):
    learner = learner_of(name)
    learner.step([crops()], SETTINGS)
    before = frozen_copy(learner)
    broken = nan_pixel(learner)
    if asked:
        with pytest.raises(NonFinite, match="the loss became nan"):
            learner.step([broken], SETTINGS)
    else:
        monkeypatch.setattr(Stepping, "_asks", False)
        learner.step([broken], SETTINGS)
        with pytest.raises(NonFinite, match="the loss became nan"):
            learner.check()
        learner.load_state_dict(before)  # what a run does then
    assert_nothing_moved(before, learner)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_measures_nearly_the_same(name, precision):
    full = learner_of(name, Plain)
    half = learner_of(name, Plain, precision=precision)
    half.load_state_dict(full.state_dict() | {"scaler": half.stepping.scaler.state_dict()})
    batch = crops(8)
    a, b = (x.step([batch], SETTINGS, diagnose=True) for x in (full, half))
    assert a.loss == pytest.approx(b.loss, rel=0.05, abs=0.05)
    assert b.tensor.dtype == torch.float32


def test_an_objective_of_prototypes_refuses_heads_without():
    with pytest.raises(ValueError, match="needs heads with prototypes"):
        DINOLoss(K).double().measure(views())
