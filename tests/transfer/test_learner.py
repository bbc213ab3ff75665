"""Two steps of engine.py, moving averages, resuming, distillation, frozen layers."""

import copy

import pytest
import torch
from timm.utils import ModelEma as TimmEma
from torch import nn

from xdino.backbones import BackboneSpec
from xdino.errors import NonFinite, UsageError
from xdino.optim import set_step
from xdino_transfer.classification import optim
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.ema import ModelEma
from xdino_transfer.classification.learner import ClassificationLearner, StepSettings
from xdino_transfer.classification.losses import Distillation
from xdino_transfer.classification.mixup import Mix, Mixup, cutmix, smoothed

TINY = BackboneSpec(
    "xcit_nano_12_p16",
    shape={"embed_dim": 16, "depth": 2, "num_heads": 2, "eta": 1.0, "tokens_norm": True},
    input_size=32,
    resize=32,
)


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(TINY.build(), TINY, 7).train()


def optimiser_of(classifier: Classifier, **options) -> torch.optim.Optimizer:
    return optim.build("adamw", optim.parameter_groups(classifier, 0.05, **options))


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(7, (4,), generator=generator)
    return torch.randn(4, 3, 32, 32, generator=generator), smoothed(labels, 7, 0.1)


def ours(tensors: dict, prefix: str) -> dict:
    """Published names -> those of a Classifier."""
    found = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    return {n if n.startswith("head.") else f"backbone.{n}": v for n, v in found.items()}


def signals(tensors: dict, name: str) -> torch.Tensor:
    """False where a gradient is rounding and nothing else."""
    noise = ours(tensors, "noise/").get(name)
    return torch.tensor(True) if noise is None else ~noise.bool()


def test_two_steps_are_the_published_ones(downstream, classifier, agree):
    tensors, told = downstream("finetune_steps")
    classifier.load_state_dict(ours(tensors, "init/"))
    learner = ClassificationLearner(classifier, optimiser_of(classifier), ema_decay=0.99996)
    faster = ModelEma(classifier, 0.9)
    for i, case in enumerate(told["mixup"]):
        images = tensors[f"{i}/images"]
        mix = Mix(case["lam"])
        if case["cutmix"]:
            mix = cutmix(case["lam"], tuple(case["centre"]), *images.shape[2:])
        mixed, targets = Mixup()(images, tensors[f"{i}/labels"], 7, mix)
        agree(f"mixed {i}", mixed, tensors[f"{i}/mixed"], 1e-6)
        agree(f"targets {i}", targets, tensors[f"{i}/target"], 1e-6)
        loss = learner.step(mixed, targets, StepSettings(told["lr"]))
        faster.update(classifier)
        assert loss.item() == pytest.approx(told["losses"][i], rel=1e-6)
        if i == 0:
            for name, theirs in ours(tensors, "grad/0/").items():
                signal = signals(tensors, name)
                own = classifier.get_parameter(name).grad
                agree(f"gradient of {name}", own * signal, theirs * signal, 1e-4)
    compared = (
        ("final", classifier),
        ("ema_0.99996", learner.ema.network),
        ("ema_0.9", faster.network),
    )
    for prefix, network in compared:
        state, theirs = network.state_dict(), ours(tensors, f"{prefix}/")
        assert state.keys() == theirs.keys()
        for name, value in theirs.items():
            signal = signals(tensors, name)
            agree(f"{prefix} {name}", state[name] * signal, value * signal, 1e-5)


def test_groups_are_the_published_ones(downstream, classifier):
    _, told = downstream("finetune_steps")
    names = {p: n.removeprefix("backbone.") for n, p in classifier.named_parameters()}
    groups = optim.parameter_groups(classifier, 0.05)
    found = {g["weight_decay"]: {names[p] for p in g["params"]} for g in groups}
    assert found == {g["weight_decay"]: set(g["names"]) for g in told["groups"]}
    assert {g["lr_scale"] for g in groups} == {1.0}


def test_layers_decay_from_the_head_down(classifier):
    layers = optim.layers(classifier)
    assert layers["backbone.patch_embed.proj.0.0.weight"] == layers["backbone.cls_token"] == 0
    assert layers["backbone.pos_embeder.token_projection.bias"] == 0
    assert layers["backbone.blocks.0.gamma1"] == 1
    assert layers["backbone.blocks.1.gamma1"] == 2
    assert layers["backbone.cls_attn_blocks.1.gamma1"] == layers["backbone.norm.weight"] == 4
    assert layers["head.weight"] == 5
    optimiser = optimiser_of(classifier, layer_decay=0.5, backbone_factor=0.1)
    set_step(optimiser, 2.0, None)
    rates = {p: g["lr"] for g in optimiser.param_groups for p in g["params"]}
    assert rates[classifier.head.bias] == 2.0
    assert rates[classifier.backbone.norm.weight] == pytest.approx(2.0 * 0.1 * 0.5)
    assert rates[classifier.backbone.cls_token] == pytest.approx(2.0 * 0.1 * 0.5**5)
    with pytest.raises(UsageError, match='no optimiser is called "adam": did you mean "adamw"'):
        optim.build("adam", [])


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet", "test_convnext"])
def test_timm_networks_have_layers_too(arch):
    spec = BackboneSpec(arch, input_size=160, resize=160)
    classifier = Classifier(spec.build(), spec, 3)
    layers = optim.layers(classifier)
    assert min(layers.values()) == 0
    assert layers["head.weight"] == max(layers.values())
    assert sorted(set(layers.values())) == list(range(max(layers.values()) + 1))


def test_frozen_blocks_rest(classifier):
    optim.freeze(classifier, 1)
    learner = ClassificationLearner(classifier, optimiser_of(classifier), ema_decay=0.5)
    before = copy.deepcopy(classifier.state_dict())
    learner.step(*batch(), StepSettings(1e-2))
    moved = {n for n, v in classifier.state_dict().items() if not torch.equal(v, before[n])}
    frozen = ("backbone.patch_embed", "backbone.pos_emb", "backbone.cls_token", "backbone.blocks.0")
    assert not [name for name in moved if name.startswith(frozen)]
    assert "backbone.blocks.1.local_mp.bn.running_mean" in moved
    assert "head.weight" in moved
    optim.freeze(classifier, 4)
    assert [n for n, p in classifier.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    assert not any(m.training for m in classifier.backbone.modules())
    with pytest.raises(UsageError, match="has 4 blocks to freeze, class attention included, got 5"):
        optim.freeze(classifier, 5)


def test_averages_are_timms(classifier):
    mine, theirs = ModelEma(classifier, 0.7), TimmEma(classifier, 0.7)
    for i in range(5):
        with torch.no_grad():
            for value in classifier.state_dict().values():
                value.add_(i + 1) if not value.is_floating_point() else value.mul_(1.1)
        mine.update(classifier)
        theirs.update(classifier)
    for name, value in theirs.ema.state_dict().items():
        assert torch.allclose(mine.network.state_dict()[name], value, rtol=1e-6), name


def test_a_step_goes_on_where_it_stopped(classifier):
    other = Classifier(TINY.build(), TINY, 7).train()
    one = ClassificationLearner(classifier, optimiser_of(classifier), ema_decay=0.9)
    two = ClassificationLearner(other, optimiser_of(other), ema_decay=0.9)
    one.step(*batch(0), StepSettings(1e-3))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    losses = [x.step(*batch(1), StepSettings(1e-3)) for x in (one, two)]
    assert torch.equal(*losses)
    for name, value in one.ema.network.state_dict().items():
        assert torch.equal(two.ema.network.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_is_listened_to_and_left_alone(kind, classifier):
    teacher = nn.Sequential(
        nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7)
    )
    before = copy.deepcopy(teacher.state_dict())
    start = copy.deepcopy(classifier)
    taught = ClassificationLearner(
        classifier, optimiser_of(classifier), 0.0, Distillation(kind), teacher
    )
    alone = ClassificationLearner(start, optimiser_of(start))
    losses = [x.step(*batch(), StepSettings(1e-3)).item() for x in (taught, alone)]
    assert losses[0] != losses[1]
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
    with pytest.raises(UsageError, match=f"{kind} distillation needs a teacher"):
        ClassificationLearner(classifier, optimiser_of(classifier), 0.0, Distillation(kind))


def test_a_teacher_of_other_classes_is_refused_before_it_teaches(classifier):
    teacher = Classifier(TINY.build(), TINY, 5)
    with pytest.raises(UsageError, match="the teacher has 5 classes and the network 7"):
        ClassificationLearner(
            classifier, optimiser_of(classifier), 0.0, Distillation("hard"), teacher
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near(precision, classifier):
    other = copy.deepcopy(classifier)
    half = ClassificationLearner(other, optimiser_of(other), clip=1.0, precision=precision)
    full = ClassificationLearner(classifier, optimiser_of(classifier), clip=1.0)
    for i in range(3):
        losses = [x.step(*batch(i), StepSettings(1e-3)).item() for x in (half, full)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
    with pytest.raises(UsageError, match='no precision is called "fp8"'):
        ClassificationLearner(other, optimiser_of(other), precision="fp8")


def test_a_loss_that_is_none_moves_no_weight(classifier):
    learner = ClassificationLearner(classifier, optimiser_of(classifier))
    before = copy.deepcopy(dict(classifier.named_parameters()))
    images, targets = batch()
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFinite, match="the loss became nan"):
        learner.step(images, targets, StepSettings(1e-3))
    assert all(torch.equal(p, before[n]) for n, p in classifier.named_parameters())


def test_it_learns(classifier):
    learner = ClassificationLearner(classifier, optimiser_of(classifier))
    losses = [learner.step(*batch(), StepSettings(2e-3)).item() for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
